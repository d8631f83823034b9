"""C4's rule on bad words: a page that says a listed word goes (Raffel et al. 2020, section 2.2).

No list comes with caravan. You give one: a file with a word or phrase per line, or a folder with a file per
language, named by its code (en, zh.txt, ...), as the list of the paper is published
(github.com/LDNOOBW/List-of-Dirty-Naughty-Obscene-and-Otherwise-Bad-Words). A file named by a code judges
texts in that language, a single file of another name all texts; in a folder other names are left alone.

A listed word counts where it stands by itself: lower-cased, with no letter, digit or _ at either side, which
is how the published code of multilingual C4 asks; between the words of a phrase any white space will do. A
character of a script without spaces is a word of its own, so that a Chinese entry counts anywhere in a text,
and an English one between Chinese characters too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from caravan.data import langid
from caravan.data.dedup.units import UNSPACED
from caravan.types import UserError

_JOINING = rf"[^\W{UNSPACED}]"
_RUN = re.compile(rf"{_JOINING}+")
_ALONE = re.compile(f"[{UNSPACED}]")


class Words:
    """One list, ready to be looked for: a text is cut into runs of letters once, and only an entry whose
    first run is among them is looked for in the text itself."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._by_run: dict[str, list[str]] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._without: list[str] = []
        for entry in dict.fromkeys(" ".join(e.lower().split()) for e in entries):
            if not entry:
                continue
            found = _RUN.search(entry)
            (self._by_run.setdefault(found[0], []) if found else self._without).append(entry)
            self._patterns[entry] = _pattern(entry)

    def __len__(self) -> int:
        return len(self._patterns)

    def find(self, text: str) -> str:
        """The listed entry that the text says first; "" if it says none."""
        low = text.lower()
        maybe = [entry for entry in self._without if entry in low]
        for run in self._by_run.keys() & set(_RUN.findall(low)):
            maybe += self._by_run[run]
        hits = [(m.start(), entry) for entry in maybe if (m := self._patterns[entry].search(low))]
        return min(hits, default=(0, ""))[1]


def _pattern(entry: str) -> re.Pattern[str]:
    before = "" if _ALONE.match(entry[0]) else f"(?<!{_JOINING})"
    after = "" if _ALONE.match(entry[-1]) else f"(?!{_JOINING})"
    return re.compile(before + r"\s+".join(map(re.escape, entry.split())) + after)


class BadWords:
    """Lists by language; "" holds for all."""

    def __init__(self, lists: Mapping[str, Words]) -> None:
        self.lists = lists

    def find(self, text: str, lang: str) -> str:
        """The first listed entry in the text, "" if there is none. `lang` is the language of the text."""
        for name in ("", lang):
            if name in self.lists and (entry := self.lists[name].find(text)):
                return entry
        return ""


def read(folder: Path) -> BadWords:
    """Lists of a folder. Raises UserError if none of its files is one, or one is empty or not UTF-8."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    known = langid.texts().keys() | set(langid.ALONE.values())
    lists = {}
    for path in files:
        lang = path.name.removesuffix(".txt")
        if lang not in known and len(files) > 1:
            continue
        try:
            words = Words(path.read_text(encoding="utf-8-sig").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the list of words {path.name}: {error}", "save it as UTF-8"
            ) from error
        if not len(words):
            raise UserError(f"the list of words {path.name} is empty", "write one word or phrase per line")
        lists[lang if lang in known else ""] = words
    if not lists:
        names = ", ".join(p.name for p in files[:3])
        raise UserError(
            f"no file is named by a language: {names}", "give one file, or a folder with files like en and zh"
        )
    return BadWords(lists)
