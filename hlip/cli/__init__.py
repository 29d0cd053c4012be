"""The command line: ``hlip demo | train | evaluate | embed | info``."""

from .main import main

__all__ = ["main"]
