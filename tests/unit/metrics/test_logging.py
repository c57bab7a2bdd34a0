from __future__ import annotations

import subprocess
import sys

CODE = """
import logging
from lt2titan.metrics.logging import init_logging
logging.basicConfig(format="root %(message)s")  # another library's handler on the root logger
init_logging(rank={rank})
init_logging(rank={rank})
logging.getLogger("lt2titan").info("hello")
logging.getLogger("lt2titan").debug("quiet")
"""


def log(rank: int) -> list[str]:
    result = subprocess.run([sys.executable, "-c", CODE.format(rank=rank)], check=True, capture_output=True, text=True)
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_one_line_with_time_and_level() -> None:
    (line,) = log(rank=0)
    date, clock, *rest = line.split(" ")
    assert len(date.split("-")) == len(clock.split(":")) == 3
    assert rest == ["INFO", "hello"]


def test_other_ranks_are_named() -> None:
    (line,) = log(rank=3)
    assert line.endswith(" INFO [rank 3] hello")
