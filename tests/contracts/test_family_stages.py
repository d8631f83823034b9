"""Every family through every stage: handed back, trained, aligned, judged, made smaller, grown, served.

A folder as its makers give it (transformers' own or an oracle's tensors, and a small tokenizer beside them)
goes through the store and the stages with settings of a few steps. What comes out is held to the reference
that the family is proven against: transformers opens it, or the oracle reads it, and says what we say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from caravan import cli
from caravan.data.tokenizer import Tokenizer
from caravan.model import checkpoint, families, fp8, rules
from caravan.types import Message, UserError
from tests import families as tiny
from tests.contracts.test_family_parity import error, flat_logits, label, stored
from tests.e2e.test_families_without_class import metrics
from tests.families import Case, bert
from tests.road import TEMPLATE, Road, greedy, predicted, said, served

transformers = pytest.importorskip("transformers")

QUESTIONS = ("good dog", "the fox is slow", "cat sees brown fox", "bad cat or dog", "slow", "is it good")
SMOKE = ("llava",)
"""Run by default, too: a wrapper around the plainest."""


FIXED = {"cpmant": "cannot be resized", "bgpt": "cannot change"}
"""What is said of tables whose rows are no words, or no words alone."""


MORE = """
    baichuan-13b baichuan2-13b bloom-eight-heads-untied chatglm-6b cohere-qknorm cpmbee-own-head
    deepseek_v2-lite deepseek_v3-yarn deepseek_v3-fp8 falcon-40b falcon-rw gemma3-vision-renamed gpt2-untied
    jamba-dense llama-tied-mqa llama-bias llama-aquila llama-dynamic llama-yarn-mscale llava-mistral
    mamba-biased mamba-early mistral3-tied mpt-clipped openelm-own-head opt-350m opt-galactica phi3-short
    qwen-logn qwen-ntk qwen2_moe-every-other qwen2_vl-flat rwkv-4-wide rwkv-7-port stablelm-12b
    stripedhyena-apart yalm-way-out
"""
"""Beside each family's first case, those with a knob that a stage could stumble over."""


def writers() -> list[tuple[str, Case]]:
    """Cases of the families that write text."""
    seen: set[str] = set()
    found = []
    for family, case in tiny.cases():
        if not hasattr(families.find(family), "POOL") and (family not in seen or case.name in MORE.split()):
            found.append((family, case))
            seen.add(family)
    return found


@pytest.fixture(scope="module")
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    family, case = request.param
    yield Road(family, case, tmp_path_factory.mktemp(case.name))
    torch.use_deterministic_algorithms(deterministic)


every_family = pytest.mark.parametrize(
    "road",
    [
        pytest.param(pair, id=label(*pair), marks=[] if pair[1].name in SMOKE else [pytest.mark.slow])
        for pair in writers()
    ],
    indirect=True,
    scope="module",
)


# ----------------------------------------------------------------------------------------------- checks


def is_unchanged(road: Road, folder: Path) -> None:
    """The tensors and the meaning of what the makers gave, under their names or those of an export."""
    table = rules.of(families.find(road.family))
    mine, theirs = stored(folder), stored(road.folder)
    if theirs.keys() != mine.keys():
        theirs = road.case.written(theirs)
    theirs = {key: t for key, t in theirs.items() if key in mine or not table.dropped(key)}
    assert theirs.keys() == mine.keys()
    if fp8.stored_so(checkpoint.read_config(road.folder)):  # written out, in the type of the rest
        theirs = {key: t.to(mine[key].dtype) for key, t in theirs.items()}
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)
    assert checkpoint.load_spec(folder) == checkpoint.load_spec(road.folder)
    kept = Tokenizer.load(folder)
    assert kept.alike(road.tok) and kept.chat_template == TEMPLATE
    if road.case.disguise is None:  # otherwise the keys of config.json may be the makers', not the class's
        opens_elsewhere(road, folder)


def opens_elsewhere(road: Road, folder: Path) -> None:
    """The reference, reading the folder, says what we say."""
    theirs = road.reference(folder)
    if theirs is None:
        return
    with torch.no_grad():
        ours = flat_logits(checkpoint.load_model(folder).eval(), road.text, (len(road.text),))
        assert error(ours[None], theirs(road.text[None])) < 2 * road.case.tolerance


@every_family
def test_it_is_handed_back_unchanged(road: Road) -> None:
    """By the average of a model and itself, and by training with a rate of zero."""
    is_unchanged(road, road.c.merge(model=[road.base, road.base]).path)
    is_unchanged(road, road.tune(0.0, "fp32", steps=1, balance_rate=0.0).path)


@every_family
def test_it_learns(road: Road) -> None:
    losses = [row["loss"] for row in metrics(road.sft)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    opens_elsewhere(road, road.sft.path)
    theirs = road.opened(road.sft.path)
    if theirs is None or road.case.run_hf is not None or road.case.decode is not True:
        return
    for asked in QUESTIONS[:2]:  # they stop where we stop, by what generation_config.json says
        _, prompt, ids = greedy(road.sft.path, [Message("user", asked)], 8)
        once = torch.tensor([prompt])
        more = {"attention_mask": torch.ones_like(once), "do_sample": False, "use_cache": False}
        assert theirs.generate(once, max_new_tokens=8, **more)[0, len(prompt) :].tolist() == ids


@every_family
def test_it_learns_in_bf16(road: Road) -> None:
    made = road.tune(3e-3, "bf16")
    losses, exact = ([row["loss"] for row in metrics(art)] for art in (made, road.sft))
    assert losses[-1] < losses[0] and math.isclose(losses[0], exact[0], rel_tol=0.03)
    opens_elsewhere(road, made.path)


@every_family
def test_it_learns_the_same_in_other_ways(road: Road) -> None:
    """Computing layers again instead of keeping them changes nothing; Muon learns, too."""
    assert metrics(road.tune(3e-3, "fp32", recompute=2)) == metrics(road.sft)
    losses = [row["loss"] for row in metrics(road.tune(3e-3, "fp32", optimizer="muon"))]
    assert losses[-1] < losses[0]


@every_family
def test_it_reads_on(road: Road) -> None:
    """Pre-training goes on from it; with a rate of zero nothing happens but the choice of experts."""
    losses = [row["loss"] for row in metrics(road.read_on(3e-3))]
    assert losses[-1] < losses[0]
    opens_elsewhere(road, road.read_on(0.0).path)


@every_family
def test_its_vocabulary_grows(road: Road) -> None:
    """By rows that nothing uses yet: what the old ones say stays."""
    rows = checkpoint.load_spec(road.folder).vocab
    if road.family in FIXED:
        with pytest.raises(UserError, match=FIXED[road.family]):
            road.c.grow(model=road.base, rows=rows + 3)
        return
    made = road.c.grow(model=road.base, rows=rows + 3)
    with torch.no_grad():
        grown, old = (
            flat_logits(checkpoint.load_model(folder).eval(), road.text, (len(road.text),))
            for folder in (made.path, road.folder)
        )
    assert grown.shape[1] == rows + 3 and error(grown[:, :rows], old) < road.case.tolerance
    opens_elsewhere(road, made.path)


@every_family
def test_it_judges(road: Road, tmp_path: Path) -> None:
    assert road.judge.facts["steps"] >= 2
    model = checkpoint.load_reward(road.judge.path).eval()
    checkpoint.save_reward(model, tmp_path, road.judge.path, torch.float32)
    before, after = stored(road.judge.path), stored(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    there = getattr(transformers, families.find(road.family).CLASSIFIER or "-", None)
    if there is None or road.reference(road.judge.path) is None:
        return
    theirs = there.from_pretrained(
        road.judge.path, attn_implementation=road.hf.config._attn_implementation, dtype=torch.float32
    )
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        want = float(theirs.eval()(input_ids=road.text[None]).logits[0, 0]) - theirs.config.reward_bias
        got = float(model.scores(bert.batch([road.text.tolist()])))
    assert math.isclose(got, want, rel_tol=1e-4, abs_tol=1e-4)


@every_family
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_aligned(road: Road, precision: str) -> None:
    """Policy and reference begin as one; sampler and trainer agree; so the loss is ln 2 and ratios are 1."""
    dpo = road.preferred(precision)
    assert dpo.facts["steps"] >= 2 and abs(dpo.facts["first_loss"] - math.log(2)) < 1e-5
    ppo = road.reinforced(dpo, precision)
    done = metrics(ppo)
    assert len(done) == 2 and done[0]["kl"] == 0.0
    assert all(abs(row["first_ratio_error"]) < 1e-4 for row in done)
    opens_elsewhere(road, ppo.path)


@every_family
def test_it_is_measured(road: Road) -> None:
    made = road.c.evaluate(
        model=road.sft, questions=road.c.add(road.root / "questions"), reward=road.judge,
        reference=road.base, max_tokens=4, sampled=2, sampled_tokens=4, resamples=50,
    )  # fmt: skip
    scores = json.loads((made / "scores.json").read_text())
    assert scores and all(math.isfinite(score["value"]) and score["n"] > 0 for score in scores.values())


@every_family
def test_it_is_made_smaller(road: Road) -> None:
    assert road.small.facts["bytes_after"] < road.small.facts["bytes_before"]
    with torch.no_grad():
        rounded, exact = (
            flat_logits(checkpoint.load_model(art.path).eval(), road.text, (len(road.text),))
            for art in (road.small, road.sft)
        )
    assert road.small.facts["weight_error_max"] < 0.01
    apart = float((rounded - exact).abs().mean(-1).median() / exact.std())
    assert 0 < apart < 0.3  # of most tokens: a router may choose another expert for some
    again = road.tune(0.0, "fp32", base=road.small, steps=1, balance_rate=0.0)
    with torch.no_grad():
        opened = flat_logits(checkpoint.load_model(again.path).eval(), road.text, (len(road.text),))
    assert error(opened, rounded) < road.case.tolerance
    four = road.c.quantize(model=road.sft, bits=4, method="gptq", group=0, calibration=road.chats)
    assert four.facts["bytes_after"] < road.small.facts["bytes_after"]
    for art in (road.small, four):
        assert greedy(art.path, [Message("user", "good fox")], 4)[1]


@every_family
def test_it_is_served(road: Road, serve: Callable[[Any], Any]) -> None:
    """The served answer is the engine's, and every word of it what the reference would say next, for the
    released and the aligned model, up to the end of learned positions; asked again, with the prompt known."""
    spec = checkpoint.load_spec(road.folder)
    ropes = [a.rope for a in spec.attns if a.rope]
    # where frequencies depend on the length of the text, cached keys have those of their time
    known = 1 if road.case.decode is not True or any(r.switch is not None for r in ropes) else None
    ends = getattr(spec, "pos", "learned") == "learned"  # bGPT's halves have tables, too
    most, longest = 60 if ends else 12, 0
    for folder in (road.folder, road.ppo.path):
        theirs = road.reference(folder)
        ask = served(folder, road.c.store, serve)
        for asked in QUESTIONS:
            body = {"messages": said(asked), "max_tokens": most, "temperature": 0}
            answer = ask("chat/completions", body)
            text, prompt, ids = greedy(folder, [Message("user", asked)], most)
            assert answer["choices"][0]["message"]["content"] == text
            assert ask("chat/completions", body)["choices"] == answer["choices"]
            assert [answer["usage"][f"{part}_tokens"] for part in ("prompt", "completion")] == [
                len(prompt), len(ids)
            ]  # fmt: skip
            if theirs is not None:
                assert ids[:known] == predicted(theirs, prompt, ids[:known], road.tok.vocab_size)
            longest = max(longest, len(ids))
            if len(ids) >= 6:
                break
        several = ask("chat/completions", {"messages": said("cat"), "max_tokens": 5, "n": 3, "seed": 1})
        assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
        vector = torch.tensor(ask("embeddings", {"input": "the slow fox"})["data"][0]["embedding"])
        assert math.isclose(float(vector.norm()), 1.0, rel_tol=1e-4)
    assert longest >= 6, "no prompt is answered at length"


@every_family
def test_every_folder_is_explained(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (road.folder, *(a.path for a in (road.sft, road.judge, road.dpo, road.ppo, road.small))):
        assert cli.main(["inspect", str(folder)]) == 0
        assert road.family in capsys.readouterr().out
