"""What goes wrong with data: the error type, and the budget of malformed rows."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

logger = logging.getLogger("lt2titan")


class DataError(ValueError):
    """Data that cannot be used. The message names the file or dataset and the way out."""


class Malformed(NamedTuple):
    """A row without a usable text: where it is, and what is wrong."""

    where: str
    reason: str


class BadRows:
    """Counts malformed rows, reports each one, and raises DataError when there are more than ``limit``.

    Args:
        count: those counted before.
    """

    def __init__(self, limit: int, count: int = 0) -> None:
        self.limit, self.count = limit, count

    def add(self, row: Malformed) -> None:
        self.count += 1
        logger.warning("skipped a malformed row: %s: %s (%d so far)", row.where, row.reason, self.count)
        if self.count > self.limit:
            raise DataError(
                f"{row.where}: {row.reason}. That is malformed row number {self.count}, and data.max_bad_rows = "
                f"{self.limit}: repair the file or raise data.max_bad_rows"
            )


def text_or_malformed(value: Any, where: str) -> str | Malformed:
    """``value`` if it can be a document's text, else what is wrong with it."""
    if value is None:
        return Malformed(where, "the text is missing")
    if not isinstance(value, str):
        return Malformed(where, f"the text is of type {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return Malformed(where, f"the text is not valid Unicode ({error.reason})")
    return value
