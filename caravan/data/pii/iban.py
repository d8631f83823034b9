"""International bank account numbers: the country's length and ISO 7064 mod 97-10."""

from __future__ import annotations

import re
from collections.abc import Iterator

LABEL, PRIORITY, VERSION = "IBAN", 2, 2
HINT = "(?i:[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11})"
_SHAPE = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])", re.IGNORECASE)
_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22,
    "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip


def valid(code: str) -> bool:
    """Whether a number without spaces has its country's length and the right check digits."""
    code = code.upper()
    if _LENGTHS.get(code[:2]) != len(code):
        return False
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in _SHAPE.finditer(text):
        # Words may follow after a space: try the country's own length first.
        size, seen, stop = _LENGTHS.get(found[0][:2].upper(), 0), 0, found.start()
        for stop in range(found.start(), found.end()):
            seen += text[stop] != " "
            if seen == size:
                break
        ends = stop + 1 == len(text) or not text[stop + 1].isascii() or not text[stop + 1].isalnum()
        if ends and valid(text[found.start() : stop + 1].replace(" ", "")):
            yield found.start(), stop + 1
