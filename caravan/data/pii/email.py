"""E-mail addresses: RFC 5321's shape with a domain of proper labels."""

from __future__ import annotations

import re
from collections.abc import Iterator

LABEL, PRIORITY, VERSION = "EMAIL", 20, 2
HINT = "@"
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9.!#$%&'*+/=?^_`{|}~-])[A-Za-z0-9_][A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in _ADDRESS.finditer(text):
        if ".." not in found[0] and ".@" not in found[0]:
            yield found.span()
