"""What goes wrong with data: the error type, and the budget of malformed rows."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("lt2titan")


class DataError(ValueError):
    """Data that cannot be used. The message names the file or dataset and the way out."""


class BadRows:
    """Counts malformed rows, reports each one, and raises DataError when there are more than ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        logger.warning("skipped a malformed row: %s: %s (%d so far)", where, reason, self.count)
        if self.count > self.limit:
            raise DataError(
                f"{where}: {reason}. That is malformed row number {self.count}, and data.max_bad_rows = {self.limit}: "
                "repair the file or raise data.max_bad_rows"
            )


def problem_with_text(value: Any) -> str:
    """Why ``value`` cannot be a document's text; "" if it can."""
    if value is None:
        return "the text is missing"
    if not isinstance(value, str):
        return f"the text is of type {type(value).__name__}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"the text is not valid Unicode ({error.reason})"
    return ""
