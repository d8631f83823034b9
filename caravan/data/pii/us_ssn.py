"""United States social security numbers, in their groups, but those that were never given out."""

from __future__ import annotations

import re
from collections.abc import Iterator

LABEL, PRIORITY, VERSION = "US_SSN", 25, 2
HINT = "[0-9]{3}-[0-9]{2}-[0-9]{4}"
_SHAPE = re.compile(
    r"(?<![A-Za-z0-9.-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![A-Za-z0-9]|-[0-9])"
)


def find(text: str) -> Iterator[tuple[int, int]]:
    return (found.span() for found in _SHAPE.finditer(text))
