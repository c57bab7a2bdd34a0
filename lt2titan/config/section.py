"""What every configuration section shares: how it says that a value is wrong.

A section is a keyword-only dataclass beside the component it configures; it imports without torch. Its help text
stands under each field (tyro turns it into ``--help``), and ``validate()`` refuses values that cannot work.
"""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A configuration value that cannot be used. ``key`` is relative to the section until the loader completes it."""

    def __init__(self, key: str, value: Any, reason: str) -> None:
        super().__init__(key, value, reason)
        self.key, self.value, self.reason = key, value, reason

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.reason}"


def require(condition: bool, section: Any, field: str, reason: str) -> None:
    """Raise ConfigError naming ``field`` of ``section`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(field, getattr(section, field), reason)
