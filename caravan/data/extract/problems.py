"""What an extractor says of a file it cannot read."""

from __future__ import annotations


class Unreadable(ValueError):
    """A file that is not what it seems; the text says what was expected."""
