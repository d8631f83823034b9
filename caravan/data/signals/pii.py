"""Personal data and secrets: how many spans of each kind, and how much of the text they are.

The spans are those of `data/pii`, which the `pii` stage replaces: a document for which `pii_spans` is 0 goes
through that stage unchanged. A span counts once, for the surest kind it could be.
"""

from __future__ import annotations

import numpy as np

from caravan.data import pii
from caravan.data.signals._view import View, ratio

VERSION = 2
"""Raised with that of any kind of span."""
COLUMNS = {
    "pii_spans": "spans of personal data and secrets of all kinds",
    "pii_share": "characters inside them; over all characters",
    **{f"pii_{kind}": f"spans of the kind {kind}" for kind in pii.names()},
}


def signals(view: View) -> dict[str, np.ndarray]:
    out = {name: np.zeros(len(view), np.int64) for name in COLUMNS}
    inside = np.zeros(len(view), np.int64)
    for d, spans in enumerate(pii.find_all(view.texts)):
        for span in spans:
            out["pii_spans"][d] += 1
            out[f"pii_{span.kind}"][d] += 1
            inside[d] += span.stop - span.start
    return out | {"pii_share": ratio(inside, view.chars_D)}
