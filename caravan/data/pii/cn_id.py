"""Chinese resident identity numbers: 18 places, region, a date of birth that exists, and the check digit of
GB 11643 (ISO 7064, mod 11-2)."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

LABEL, PRIORITY, VERSION = "CN_ID", 1, 2
HINT = "[0-9]{17}"
_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])[0-9]{4}"
    r"(?P<date>(?:18|19|20)[0-9]{6})[0-9]{3}[0-9Xx](?![A-Za-z0-9])"
)
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def check(first: str) -> str:
    """The last place for the first 17."""
    return "10X98765432"[sum(int(c) * w for c, w in zip(first, _WEIGHTS, strict=True)) % 11]


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in _SHAPE.finditer(text):
        try:
            datetime.datetime.strptime(found["date"], "%Y%m%d")
        except ValueError:
            continue
        if check(found[0][:17]) == found[0][17].upper():
            yield found.span()
