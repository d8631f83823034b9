"""Every signal there is, with a value worked out on paper: texts short enough to count with a finger."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from caravan import stage
from caravan.data import quality, signals
from caravan.data.measure import CLASSIFIED, PERPLEXITY
from caravan.data.signals import View
from caravan.stages import corpus as corpus_stage
from caravan.stages import signals as signals_stage
from caravan.store import Artefact, Store

CAT = "The cat sat on the mat.\nThe cat sat on the mat.\n- 42 # two\nAnd so on..."
"""71 characters: 44 letters (3 of them upper case), 2 digits, 7 marks, 15 spaces, 3 newlines. 19 words, 17 of
them with letters or digits (46 in all)."""
PAGE = "Some lorem ipsum text is here.\nHere is { a brace."
MENU = "Sign in\nA line that nobody minds at all.\n12 345"
CHINESE = "天地玄黄，天地玄黄，天地玄黄，天地玄黄。\n点击查看\n时习之"
"""23 Han characters and 4 marks; 黄点击时习 are simplified only, 8 characters in all."""
OLD = "學而時習之，不亦說乎？有朋自遠方來"
"""15 Han characters; 學時習說遠來 are traditional only."""
CODE = "int main() {\n  return 0;\n}"
TAGS = "<b>x</b>"
GREEK = "Πού πήγαν"
MAIL = "Mail a@b.de, c@d.de or 8.8.8.8 or 415-555-2671."
"""47 characters, of which 6 + 6 + 7 + 12 are spans."""

HAND: dict[str, tuple[str, float | str]] = {
    "chars": (CAT, 71), "bytes": (GREEK, 17), "words": (CAT, 19), "lines": (CAT, 4),
    "alpha_share": (CAT, 44 / 53), "digit_share": (CAT, 2 / 53), "mark_share": (CAT, 7 / 53),
    "upper_share": (CAT, 3 / 44), "han_share": (OLD, 1),
    # Gopher, quality: appendix A.1.1
    "gopher_words": (CAT, 17), "gopher_mean_word_length": (CAT, 46 / 17), "gopher_hash_ratio": (CAT, 1 / 17),
    "gopher_ellipsis_ratio": (CAT, 1 / 17), "gopher_bullet_lines": (CAT, 1 / 4),
    "gopher_ellipsis_lines": (CAT, 1 / 4), "gopher_alpha_words": (CAT, 16 / 19),
    "gopher_stop_words": (CAT, 1),
    # Gopher, repetition: table A1. "the cat", "the cat sat", "the cat sat on" come twice.
    "copied_lines": (CAT, 1 / 4), "copied_line_chars": (CAT, 23 / 71),
    "copied_paragraphs": ("a b\n\nc\n\na b", 1 / 3), "copied_paragraph_chars": ("a b\n\nc\n\na b", 3 / 11),
    "top_2gram": (CAT, 12 / 46), "top_3gram": (CAT, 18 / 46), "top_4gram": (CAT, 22 / 46),
    "repeated_5grams": (CAT, 34 / 46), "repeated_6grams": (CAT, 34 / 46), "repeated_7grams": (CAT, 0),
    "repeated_8grams": ("a b c d e f g h i " * 2 + "jj", 18 / 20),
    "repeated_9grams": ("a b c d e f g h i " * 2 + "jj", 18 / 20),
    "repeated_10grams": ("a b c d e f g h i j " * 2 + "kkkkk", 20 / 25),
    # C4 as its paper, its code and FineWeb have it
    "c4_kept_lines": (CAT, 2 / 4), "c4_sentences": (CAT, 2), "c4_lorem": (PAGE, 1), "c4_braces": (PAGE, 1),
    "c4_code_kept_lines": ("One two three four.\n" + CAT, 2 / 5),
    "c4_code_sentences": ("One two three four.\n" + CAT, 2),
    "c4_code_lorem": (PAGE, 1), "c4_code_braces": (PAGE, 1),
    "c4_any_end_sentences": (CAT, 4), "c4_any_end_lorem": (PAGE, 1), "c4_any_end_braces": (PAGE, 1),
    "fineweb_ended_lines": (CAT, 3 / 4), "fineweb_short_lines": (CAT + "\n" + "x" * 31, 4 / 5),
    "fineweb_copied_line_chars": (CAT, 23 / 68), "fineweb_newlines": (CAT, 3 / 19),
    "refinedweb_flagged_words": (MENU, 4 / 11), "refinedweb_flagged_lines": (MENU, 2 / 3),
    "zh_chars": (CHINESE, 23), "zh_mark_share": (CHINESE, 4 / 27), "zh_longest_clause": (CHINESE, 4),
    "zh_top_4gram": (CHINESE, 16 / 23), "zh_repeated_10grams": (CHINESE, 16 / 23),
    "zh_short_lines": (CHINESE, 2 / 3), "zh_ended_lines": (CHINESE, 1 / 3),
    "zh_boilerplate_lines": (CHINESE, 1 / 3), "zh_simplified": (CHINESE, 8 / 23),
    "zh_traditional": (OLD, 6 / 15),
    "code_lines": (CODE, 1), "symbol_share": (CODE, 5 / 19), "markup_share": (TAGS, 7 / 8),
    "lang": (GREEK, "el"), "lang_score": (GREEK, 1), "script": (GREEK, "GREEK"),
    "pii_spans": (MAIL, 4), "pii_share": (MAIL, 31 / 47), "pii_email": (MAIL, 2), "pii_ip": (MAIL, 1),
    "pii_phone": (MAIL, 1), "pii_secret": ("key AKIAIOSFODNN7EXAMPLE", 1),
    "pii_cn_id": ("身份证11010519491231002X", 1), "pii_iban": ("DE89370400440532013000", 1),
    "pii_credit_card": ("4111 1111 1111 1111", 1), "pii_us_ssn": ("460-89-9847", 1),
    "pii_address": ("at 221B Baker Street", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_value_on_paper(name: str) -> None:
    text, value = HAND[name]
    family = signals.families_of([name])
    found = signals.compute(View(["first", text, "last"]), family)[name][1]
    assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6))


def test_no_signal_is_left_out() -> None:
    assert HAND.keys() == signals.columns().keys()


def one_corpus(folder: Path, texts: list[str]) -> tuple[Store, Artefact]:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    store = Store(folder / "store")
    cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0, min_chars=1)
    return store, stage.execute(store, "corpus", cfg, {"raw": store.add(folder / "a.jsonl")})


def test_perplexity_of_a_model_that_knows_nothing(tmp_path: Path) -> None:
    """All weights zero: every token of V costs log2(V) bits, whatever came before."""
    import torch

    from caravan.data import tokenizer as tokenizers
    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh

    texts = [CAT, "one two three"]
    store, made = one_corpus(tmp_path, texts)
    tok = tokenizers.train(texts * 20, 280)
    tok.save(tmp_path / "tok")
    spec, _ = derive(None, 1, tok.vocab_size, 128)
    model = fresh(spec, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    save_model(model, tmp_path / "model", tmp_path / "tok", dtype=torch.float32)
    inputs = {"corpus": made, "model": store.add(tmp_path / "model", "model")}
    art = stage.execute(store, "signals", signals_stage.Config(families=("length",)), inputs)
    found = pq.read_table(art / "train.parquet").to_pydict()
    assert tok.bos is not None or tok.eos is not None, "something stands before the first token"
    for size, bits in zip(found["bytes"], found[PERPLEXITY], strict=True):
        text = next(t for t in texts if len(t) == size)
        ids = tok.encode(text)
        assert bits == pytest.approx(len(ids) * math.log2(spec.vocab) / len(text), rel=1e-5)


def test_scores_of_a_classifier_that_knows_one_word(tmp_path: Path) -> None:
    """1 / (1 + exp(-(2 x - 1))), x the word's share of the document: 0, or, where it comes twice,
    (1 + ln 2) / sqrt((1 + ln 2)^2 + 1); toxicity is calibrated by another line."""
    store, made = one_corpus(tmp_path, ["bad only", "good good bad"])
    weight = np.zeros(1 << quality.BITS)
    weight[quality.counts(View(["good"])).column_Z] = 2.0
    inputs = {"corpus": made}
    for name, slope, offset in (("quality", 1.0, 0.0), ("toxicity", -2.0, 0.5)):
        (tmp_path / name).mkdir()
        quality.Classifier(weight, -1.0, slope, offset).save(tmp_path / name)
        inputs[name] = store.add(tmp_path / name, "classifier")
    art = stage.execute(store, "signals", signals_stage.Config(families=("length",)), inputs)
    found = pq.read_table(art / "train.parquet").to_pydict()
    by_size = dict(zip(found["chars"], zip(found["quality"], found["toxicity"], strict=True), strict=True))
    twice = 1 + math.log(2)
    for size, x in ((len("bad only"), 0.0), (len("good good bad"), twice / math.hypot(twice, 1))):
        for score, line in zip(by_size[size], ((1, 0), (-2, 0.5)), strict=True):
            margin = line[0] * (2 * x - 1) + line[1]
            assert score == pytest.approx(1 / (1 + math.exp(-margin)), rel=1e-6)
    assert {*CLASSIFIED} == {"quality", "toxicity"}
