"""How the logger "lt2titan" prints: time and level; torchrun puts the rank before every line."""

from __future__ import annotations

import logging


class _RunHandler(logging.StreamHandler):
    """The handler that init_logging installs, recognisable by its type when it is called again."""


def init_logging() -> logging.Logger:
    """Send the logger "lt2titan" to standard error, once however often this is called, and return it.

    Call it from entry points only: records no longer reach the root logger, whose handlers (other libraries
    install some) would print them a second time.
    """
    logger = logging.getLogger("lt2titan")
    for handler in [h for h in logger.handlers if isinstance(h, _RunHandler)]:
        logger.removeHandler(handler)
    handler = _RunHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
