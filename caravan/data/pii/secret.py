"""Keys, tokens and passwords: what services issue, private key blocks, and random strings assigned to such
names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from caravan.data.pii import SPACE

LABEL, PRIORITY, VERSION = "SECRET", 0, 2
_BLOCK = re.compile(
    r"-----BEGIN (?P<what>[A-Z ]{0,30})PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=\s:,.()\\-]{1,20000}?"
    r"-----END (?P=what)PRIVATE KEY(?: BLOCK)?-----"
)
_ISSUED = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{60,90}|"
    r"glpat-[A-Za-z0-9_-]{20,50}|xox[abprs]-[A-Za-z0-9-]{10,120}|AIza[0-9A-Za-z_-]{35}|hf_[A-Za-z]{34}|"
    r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,200}|[rs]k_live_[0-9A-Za-z]{16,100}|npm_[A-Za-z0-9]{36}|"
    r"eyJ[A-Za-z0-9_-]{8,1000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{16,1000}"
    r")(?![A-Za-z0-9_])"
)
_ASSIGNED = re.compile(
    r"(?i:passw(?:or)?d|pwd|secret|token|api[_-]?key|access[_-]?key|auth[_-]?key|private[_-]?key|密码|口令|密钥)"
    r"[A-Za-z_]{0,20}[\"']?\s{0,3}(?:=>|[:=：])\s{0,3}[\"']?(?P<value>[A-Za-z0-9+/_=.!@#$%^&*~-]{12,200})"
)
HINT = (
    r"PRIVATE KEY|AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AIza|hf_|sk-|k_live_|npm_|eyJ"
    rf"|[=:：]>?{SPACE}{{0,3}}[\"']?[A-Za-z0-9+/_=.!@#$%^&*~-]{{12}}"
)
BITS = 3.3
"""Random strings of hexadecimal digits have up to 4 bits per character, English words in one case about 3."""


def entropy(value: str) -> float:
    """Bits per character, of the string's own frequencies."""
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())


def find(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_BLOCK, _ISSUED):
        for found in pattern.finditer(text):
            yield found.span()
    for found in _ASSIGNED.finditer(text):
        value = found["value"].rstrip(".")
        classes = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
        if classes and entropy(value) > BITS and not re.fullmatch(r"[a-z0-9_.]*\.[a-z_]+", value):
            yield found.start("value"), found.start("value") + len(value)
