from __future__ import annotations

import subprocess
import sys

CODE = """
import logging
from lt2titan.metrics.logging import init_logging
logging.basicConfig(format="root %(message)s")  # another library's handler on the root logger
init_logging()
init_logging()
logging.getLogger("lt2titan").info("hello")
logging.getLogger("lt2titan").debug("quiet")
"""


def test_one_line_with_time_and_level() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    date, clock, *rest = line.split(" ")
    assert len(date.split("-")) == len(clock.split(":")) == 3
    assert rest == ["INFO", "hello"]
