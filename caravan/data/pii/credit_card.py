"""Payment card numbers: a network's prefix and length, and the check digit of Luhn (ISO 7812)."""

from __future__ import annotations

import re
from collections.abc import Iterator

LABEL, PRIORITY, VERSION = "CREDIT_CARD", 10, 2
HINT = "[0-9](?:[ -]?[0-9]){11}"
_SHAPE = re.compile(r"(?<![A-Za-z0-9_.+-])[1-6](?:[ -]?[0-9]){11,18}(?![A-Za-z0-9_]|[.-][0-9])")
_NETWORKS: tuple[tuple[str, frozenset[int]], ...] = (
    (r"4", frozenset((13, 16, 19))),  # Visa
    (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", frozenset((16,))),  # Mastercard
    (r"3[47]", frozenset((15,))),  # American Express
    (r"30[0-5]|3[689]", frozenset((14, 16, 19))),  # Diners
    (r"35|2131|1800", frozenset((15, 16, 19))),  # JCB
    (r"6011|64[4-9]|65|62", frozenset((16, 17, 18, 19))),  # Discover, UnionPay
    (r"50|5[6-8]|6", frozenset(range(12, 20))),  # Maestro
)
_PREFIXES = tuple((re.compile(prefix), sizes) for prefix, sizes in _NETWORKS)


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others."""
    values = [int(c) for c in reversed(digits)]
    doubled = [d * 2 - 9 * (d > 4) for d in values[1::2]]
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in _SHAPE.finditer(text):
        digits = "".join(filter(str.isdigit, found[0]))
        known = any(prefix.match(digits) and len(digits) in sizes for prefix, sizes in _PREFIXES)
        if known and luhn(digits) and len(set(digits)) > 1:
            yield found.span()
