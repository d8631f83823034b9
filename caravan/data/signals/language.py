"""The language of a document and how sure that is (see data/langid.py)."""

from __future__ import annotations

import numpy as np

from caravan.data import langid
from caravan.data.signals._view import View

VERSION = 2
COLUMNS = {
    "lang": 'language code of ISO 639; "code" for what was read as source code; "" without letters',
    "lang_score": "how surely, 0 to 1",
    "script": "writing system of most letters (LATIN, HAN, ...)",
}


def signals(view: View) -> dict[str, np.ndarray]:
    found = langid.guesses(view.texts)
    code = [stated == "code" for stated in view.langs]
    langs = ["code" if c else g.lang for c, g in zip(code, found, strict=True)]
    return {
        "lang": np.array(langs, object),
        "lang_score": np.array([g.score for g in found], np.float32),
        "script": np.array([g.script for g in found], object),
    }
