"""Where sentences begin: what a copied span of sentences is counted in.

A sentence ends at the end of a line; at . ! ? before white space, closing quotes and brackets included, but
not at an initial ("J. R. Smith"), which is how the sentences of C4 are counted (`lines.sentences`); and at
。！？ in any place. The authors of C4 asked NLTK's punkt, which knows abbreviations too."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from caravan.data.dedup.units import EVERYTHING, Units, units

_CLOSING = r"[\"')\]”’]"
_INITIAL = r"(?<!\s[A-Z]\.)(?<!^[A-Z]\.)"
_END = re.compile(
    rf"[.!?](?:{_INITIAL}|(?={_CLOSING})){_CLOSING}{{0,3}}(?=\s)|[。！？]+[”’」』）》】\"')]{{0,3}}|\n",
    re.MULTILINE,
)


def begins(texts: Sequence[str], cut: Units) -> np.ndarray:
    """bool [U]: units of the texts with which a sentence begins. `cut` is `units(texts, ...)`."""
    text = "\n".join(texts) + "\n"
    ends = np.fromiter((m.end() for m in _END.finditer(text)), np.int64)
    sentence_U = np.searchsorted(ends, cut.start_U, side="right")
    out = np.ones(len(sentence_U), np.bool_)
    np.not_equal(sentence_U[1:], sentence_U[:-1], out=out[1:])
    return out


def spans(text: str) -> tuple[np.ndarray, np.ndarray]:
    """int64, int64: where the sentences of a text begin and end in it. What has no word or mark is none."""
    cut = units([text], EVERYTHING)
    starts, ends = cut.spans(0)
    first = np.flatnonzero(begins([text], cut))
    return starts[first], ends[np.append(first[1:], len(ends)) - 1] if len(ends) else ends
