"""lt2titan: pretraining of looped linear-time language models. Importing this package imports no torch."""

from lt2titan.version import __version__

__all__ = ["__version__"]
