"""Postal addresses by pattern: house number and street (English), or street and house number (Chinese)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from caravan.data.pii import SPACE, found_at

LABEL, PRIORITY, VERSION = "ADDRESS", 50, 2
_STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Drive|Dr|Lane|Ln|Court|Ct|Place|Pl|Square|Sq|Terrace|Ter|"
    r"Highway|Hwy|Parkway|Pkwy|Way|Circle|Cir|Trail|Trl|Crescent|Close|Alley|Plaza|Row|Walk|Mews)"
)
_WORD = r"[A-Z][A-Za-z'’-]{0,24}"
_UNIT = (
    r"(?:,?\s{1,2}(?:Apt|Apartment|Suite|Ste|Unit|Floor|Fl|Room|Rm)\.? ?#?[A-Z0-9-]{1,8}"
    r"|,?\s{1,2}#[0-9]{1,6})"
)
_PLACE = (
    rf"(?:,?\s{{1,2}}{_WORD}(?: {_WORD}){{0,2}},?\s{{1,2}}"
    r"(?:[A-Z]{2}\s{1,2}[0-9]{5}(?:-[0-9]{4})?|[0-9]{4,6}))"
)
_ENGLISH = re.compile(
    rf"(?=[0-9PUAS])(?:(?<![A-Za-z0-9#.,-])[0-9]{{1,6}}[A-Za-z]?\s(?!The {_STREET}\b)"
    rf"(?:[NSEW]\.?\s)?(?:(?:{_WORD}|[0-9]{{1,3}}(?:st|nd|rd|th))\s){{1,4}}"
    rf"{_STREET}\b\.?{_UNIT}?{_PLACE}?"
    rf"|(?<![A-Za-z])P\.? ?O\.? Box [0-9]{{1,6}}\b{_PLACE}?"
    rf"|(?<![A-Za-z])PSC [0-9]{{1,5}}, Box [0-9]{{1,5}}(?:\s{{1,2}}APO A[AEP] [0-9]{{5}})?"
    rf"|(?<![A-Za-z0-9])(?:Unit|USNS|USS|USNV|USCGC) [A-Z0-9]{{2,12}}(?: Box [0-9]{{1,5}})?"
    rf"\s{{1,2}}(?:APO|FPO|DPO) A[AEP] [0-9]{{5}}"
    rf"|(?<![A-Za-z0-9])[0-9]{{1,6}} {_WORD}(?: {_WORD}){{0,3}} (?:Apt|Suite)\.? [0-9]{{1,5}}"
    rf"|(?<![A-Za-z])(?:Apt\.?|Suite) ?[0-9]{{1,5}}\b)"
)
_NUMBER = "[0-9０-９一二三四五六七八九十百]"
HINT = (
    rf"[0-9][A-Za-z]?{SPACE}(?:[NSEW]\.?{SPACE})?(?:(?:{_WORD}|[0-9]{{1,3}}(?:st|nd|rd|th)){SPACE}){{1,4}}{_STREET}"
    r"|P\.? ?O\.? Box [0-9]|PSC [0-9]|(?:Unit|USNS|USS|USNV|USCGC) [A-Z0-9]{2}|(?:Apt|Suite)\.? ?[0-9]"
    rf"|{_NUMBER}[号弄栋幢]"
)
_START = re.compile("[0-9PUAS](?<![A-Za-z].)")
_HAN = r"[\u4e00-\u9fff]"
_NUMBERED = re.compile(f"{_NUMBER}[号弄栋幢]")
_CHINESE = re.compile(
    rf"(?:{_HAN}{{2,8}}?(?:省|自治区))?(?:{_HAN}{{2,8}}?(?:市|州|盟))?"
    rf"(?:{_HAN}{{1,8}}?(?:区|县|旗))?(?:{_HAN}{{1,8}}?(?:镇|乡|街道))?"
    rf"{_HAN}{{1,10}}?(?:路|街|大道|巷|胡同|道|村|苑|小区)(?:{_HAN}{{0,4}}(?:段|里))?"
    rf"{_NUMBER}{{1,5}}(?:号楼|号院|号|弄|栋|幢)"
    rf"(?:[0-9A-Za-z０-９一二三四五六七八九十]{{1,5}}(?:号楼|号|栋|幢|座|单元|楼|层|室)){{0,4}}(?:[0-9]{{3,4}}室?)?"
)


def find(text: str) -> Iterator[tuple[int, int]]:
    for found in found_at(_START, _ENGLISH, text):
        yield found.span()
    done = 0
    for sign in _NUMBERED.finditer(text):
        if sign.start() < done:
            continue
        for found in _CHINESE.finditer(text, max(done, sign.start() - 60), sign.end() + 40):
            done = found.end()
            yield found.span()
