"""Telephone numbers: North American, with a country code, Chinese, with a leading zero, or announced as
such."""

from __future__ import annotations

import re
from collections.abc import Iterator

from caravan.data.pii import SPACE, found_at

LABEL, PRIORITY, VERSION = "PHONE", 40, 2
HINT = rf"[0-9](?:(?:[-.()ext]|{SPACE})*[0-9]){{6}}"
"""Seven digits, and what patterns allow between two of them."""
_BEFORE, _AFTER = r"(?<![A-Za-z0-9_.+/-])", r"(?![A-Za-z0-9_]|[-./][0-9])"
_SHAPES = re.compile(
    _BEFORE
    + r"(?=[+(0-9])(?:"
    + "|".join(
        (
            r"(?:\+?86[- ]?)?1[3-9][0-9][- ]?[0-9]{4}[- ]?[0-9]{4}",  # Chinese mobile
            r"(?:\+?86[- ]?)?\(?0[1-9][0-9]{1,2}\)?[- ][0-9]{7,8}",  # Chinese landline
            r"(?:400|800)-[0-9]{3}-[0-9]{4}",
            r"(?:(?:\+|00)?1[-. ]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[0-9]{3}[-. ][0-9]{4}"
            r"(?:\s?(?:x|ext\.?)\s?[0-9]{1,5})?",  # North American
            r"(?:\+|00(?=[1-9][0-9]{0,2}[-. (]))"
            r"[1-9][0-9]{0,2}[-. ]?(?:\(0?[0-9]{1,4}\)[-. ]?)?[0-9]{1,5}(?:[-. ]?[0-9]{2,5}){1,5}"
            r"(?:\s?x[0-9]{1,5})?",
            r"0[1-9][0-9]{1,4}[ -][0-9]{2,4}(?:[ -][0-9]{2,4}){1,3}",  # national, in groups
            r"\([0-9]{2,4}\) ?[0-9]{3,4}[- ][0-9]{3,4}",
        )
    )
    + r")"
    + _AFTER
)
_NUMBER = re.compile(
    r"(?<![0-9+(.-])(?=[+(0-9])(?:[+(]?[0-9][0-9()]{0,6}(?:[-. ]{1,2}[0-9()]{1,6}){1,6}|[0-9]{7,12})" + _AFTER
)
_ANNOUNCED = re.compile(
    r"(?i:\b(?:tele)?phone|\btel\b|\bcell\b|\bmobile\b|\bfax\b|\bcall(?:ing)?\b|\bdial\b|\bwhatsapp\b|\bcontact\b|"
    r"\breach\b|\btext me\b|电话|手机|传真|致电|热线)"
    r"[^0-9+(\n]{0,40}$"
)
_START = re.compile(r"[+(0-9](?<![0-9+.-].)")


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in found_at(_START, _SHAPES, text):
        if _long_enough(found[0]):
            yield found.span()
    for found in found_at(_START, _NUMBER, text):
        before = text[max(0, found.start() - 56) : found.start()]
        if _long_enough(found[0]) and _ANNOUNCED.search(before):
            yield found.span()


def _long_enough(number: str) -> bool:
    return 7 <= sum(c.isdigit() for c in number) <= 15
