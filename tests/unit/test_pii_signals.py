"""Personal data as signals: counts by kind and share of characters, of the spans the `pii` stage replaces."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from caravan import stage
from caravan.data import pii, records, signals
from caravan.data.signals import View
from caravan.stages import corpus as corpus_stage
from caravan.stages import filter as filter_stage
from caravan.stages import pii as pii_stage
from caravan.stages import signals as signals_stage
from caravan.store import Store

KEY = "ghp_" + "a1B2" * 9
ENGLISH = f"Write to ann@mail.example.com or bob@li.com, call (415) 555-2671 from 8.8.8.8; the key is {KEY}."
CHINESE = (
    "身份证号11010519491231002X，手机13812345678，住北京市海淀区中关村大街27号，卡号6222021234567890128。"
)
BOTH = "Card 4111 1111 1111 1111, SSN 460-89-9847, IBAN GB82 WEST 1234 5698 7654 32. " * 2
PLAIN = "In 1984 he walked along the road for 12 days. 他走了三天三夜。"
SPANS = {
    ENGLISH: {"email": 2, "phone": 1, "ip": 1, "secret": 1},
    CHINESE: {"cn_id": 1, "phone": 1, "address": 1, "credit_card": 1},
    BOTH: {"credit_card": 2, "us_ssn": 2, "iban": 2},
    PLAIN: {},
    "": {},
}
VALUES = {
    ENGLISH: ["ann@mail.example.com", "bob@li.com", "(415) 555-2671", "8.8.8.8", KEY],
    CHINESE: ["11010519491231002X", "13812345678", "住北京市海淀区中关村大街27号", "6222021234567890128"],
    BOTH: ["4111 1111 1111 1111", "460-89-9847", "GB82 WEST 1234 5698 7654 32"] * 2,
    PLAIN: [],
    "": [],
}


def test_spans_by_kind_and_their_share() -> None:
    found = signals.compute(View(list(SPANS)), ["pii"])
    assert found.keys() == {"pii_spans", "pii_share", *(f"pii_{kind}" for kind in pii.names())}
    for d, (text, spans) in enumerate(SPANS.items()):
        assert {k: n for k in pii.names() if (n := int(found[f"pii_{k}"][d]))} == spans, text
        assert found["pii_spans"][d] == sum(spans.values())
        inside = sum(map(len, VALUES[text]))
        assert found["pii_share"][d] == pytest.approx(inside / len(text) if text else 0, rel=1e-6)
    assert found["pii_share"].dtype == np.float32 and found["pii_email"].dtype == np.int64


def test_a_changed_kind_raises_the_version_of_the_family() -> None:
    """The store's key knows the family's version alone: raise it with that of a kind, or with a new one."""
    assert (signals.load("pii").VERSION, {kind: pii.load(kind).VERSION for kind in pii.names()}) == (
        2,
        dict.fromkeys(
            ("secret", "cn_id", "iban", "credit_card", "email", "us_ssn", "ip", "phone", "address"), 2
        ),
    )


def test_the_same_spans_as_the_stage_finds_and_rules_can_use_them(tmp_path: Path) -> None:
    texts = [*list(SPANS)[:4], *(f"{ENGLISH} {CHINESE} Number {k}. {PLAIN}" for k in range(3))]
    rows = [{"id": f"d{k}", "text": text} for k, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "private.toml").write_text(
        "[[rule]]\nname = 'no_ids'\nsignal = 'pii_cn_id'\nat_most = 0\nwhy = 'no identity numbers'\n"
        "[[rule]]\nname = 'few_spans'\nsignal = 'pii_share'\nless_than = 0.5\n"
    )
    store = Store(tmp_path / "store")
    cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0)
    made = stage.execute(store, "corpus", cfg, {"raw": store.add(tmp_path / "a.jsonl")})
    table = stage.execute(store, "signals", signals_stage.Config(), {"corpus": made})
    clean = stage.execute(store, "pii", pii_stage.Config(), {"corpus": made})
    columns = pq.read_table(table / "train.parquet").to_pydict()
    counted = Counter({k: sum(columns[f"pii_{k}"]) for k in pii.names()})
    assert +counted == clean.facts["spans"]
    changed = {d.id: d.text for d in records.read_documents(clean / "train.jsonl.zst")}
    was = {d.id: d.text for d in records.read_documents(made / "train.jsonl.zst")}
    spans = dict(zip(columns["id"], columns["pii_spans"], strict=True))
    assert {k for k in was if was[k] != changed[k]} == {k for k, n in spans.items() if n}
    inputs = {"corpus": made, "signals": table, "own": store.add(tmp_path / "private.toml")}
    left = stage.execute(store, "filter", filter_stage.Config(rules=("private",)), inputs)
    assert left.facts["removed"] == {"no_ids": 4, "few_spans": 2}
