"""The runner on a tiny model: right sums of log-probs, nothing scored twice, the same bytes twice."""

import json
import math
from pathlib import Path

import pytest
import torch

from caravan import stage
from caravan.data import shards as shard_files
from caravan.data import tokenizer as tokenizers
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer
from caravan.evals import likelihood
from caravan.evals.compare import compare
from caravan.evals.contamination import contamination
from caravan.evals.items import item_of
from caravan.evals.likelihood import Scored
from caravan.evals.runner import Judge, Limits, Subject, World, evaluate, summarise
from caravan.kernels.attention import Segments
from caravan.model import checkpoint, sizes
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel
from caravan.model.spec import Spec
from caravan.stage import Runtime
from caravan.stages import evaluate as stage_evaluate
from caravan.store import Store
from caravan.types import Message, UserError

TEXTS = [
    "Return the length of a list. 12+29=41",
    "What does len do? len: Return the size.",
    "你是谁？我是商队。",
] * 3
CONTEXT = 64


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return tokenizers.train(TEXTS, 300, min_count=1)


@pytest.fixture(scope="module")
def spec(tok: Tokenizer) -> Spec:
    return sizes.derive(None, 1, tok.vocab_size, CONTEXT)[0]


@pytest.fixture(scope="module")
def model(spec: Spec) -> Decoder:
    return sizes.fresh(spec, 0).eval()


@pytest.fixture(scope="module")
def other(spec: Spec) -> Decoder:
    return sizes.fresh(spec, 1).eval()


QUESTIONS = [
    {"id": "a", "question": "What does len do?", "answer": "Return the size.", "kind": "fact",
     "match": "contains"},
    {"id": "b", "question": "12+29=?", "answer": "41", "kind": "arithmetic"},
    {"id": "c", "question": "Which?", "choices": ["len", "商队"], "answer": 0},
    {"id": "d", "context": "Return the", "choices": ["size.", "list", "length of a list."], "answer": 2},
]  # fmt: skip


def plain_logprobs(model: Decoder, ids: list[int]) -> torch.Tensor:
    """log P(ids[t] | ids[:t]) for t >= 1 by one plain forward of one sequence."""
    row = torch.tensor(ids)
    with torch.no_grad():
        logits = model.logits(model(row, torch.arange(len(ids)), Segments((len(ids),))))
    return torch.log_softmax(logits.float(), -1)[:-1].gather(1, row[1:, None])[:, 0]


def world(model: Decoder, tok: Tokenizer, **more: object) -> World:
    items = [item_of(row, f"q:{n}") for n, row in enumerate(QUESTIONS)]
    limits = Limits(max_tokens=6, sampled=2, sampled_tokens=6, parallel=4)
    return World(Subject(model, tok), items, limits=limits, **more)  # type: ignore[arg-type]


def tasks(*names: str) -> dict:
    return {name: stage.load("evals/tasks", name) for name in names}


def test_logprobs_equal_a_plain_forward_whatever_the_batch(model: Decoder, tok: Tokenizer) -> None:
    rows = [tok.encode(text) for text in TEXTS[:3]]
    sequences = [Scored(ids, start) for ids, start in zip(rows, (1, 4, len(rows[2]) - 1), strict=True)]
    wide = likelihood.logprobs(model, sequences)
    narrow = likelihood.logprobs(model, sequences, batch_tokens=1)
    for s, a, b in zip(sequences, wide, narrow, strict=True):
        wanted = plain_logprobs(model, list(s.ids))[s.start - 1 :]
        torch.testing.assert_close(a, wanted, atol=2e-5, rtol=0)
        torch.testing.assert_close(b, wanted, atol=2e-5, rtol=0)


def test_divergence_is_the_kl_of_the_distributions(model: Decoder, other: Decoder, tok: Tokenizer) -> None:
    ids = tok.encode(TEXTS[0])
    ((logp, logq, exact),) = likelihood.divergence(model, other, [Scored(ids, 3)], vocab=tok.vocab_size)
    torch.testing.assert_close(logp, plain_logprobs(model, ids)[2:], atol=2e-5, rtol=0)
    torch.testing.assert_close(logq, plain_logprobs(other, ids)[2:], atol=2e-5, rtol=0)
    assert len(exact) == len(ids) - 3 and bool((exact > 0).all())
    ((logp, logq, exact),) = likelihood.divergence(model, model, [Scored(ids, 3)])
    assert float(exact.abs().max()) == 0.0 and torch.equal(logp, logq)


def test_choices_are_scored_behind_the_served_prompt(model: Decoder, tok: Tokenizer) -> None:
    w = world(model, tok)
    w.items = w.items[2:3]
    found: dict[str, list[float]] = {}

    class Spy:
        KIND, CHECKED = "choices", True
        load, prompt = staticmethod(lambda items: items), tasks("multiple_choice")["multiple_choice"].prompt

        @staticmethod
        def score(item, ll):  # type: ignore[no-untyped-def]
            found[item.id] = ll
            return {"spy": 0.0}

    evaluate(w, {"spy": Spy})
    prompt = render([Message("user", "Which?")], tok, generation_prompt=True).ids
    for text, ll in zip(("len", "商队"), found["c"], strict=True):
        after = tok.encode(text)
        wanted = plain_logprobs(model, [*prompt, *after])[-len(after) :].sum()
        assert ll == pytest.approx(float(wanted), abs=1e-4)


def shards_of(folder: Path, tok: Tokenizer, texts: list[str]) -> shard_files.Shards:
    encoded = list(shard_files.encode_documents(texts, tok))
    shard_files.write(folder, {"train": encoded, "heldout": encoded}, tok.vocab_size)
    return shard_files.Shards.open(folder, "heldout")


def test_bits_per_byte_scores_every_token_but_the_first_once(
    model: Decoder, tok: Tokenizer, tmp_path: Path
) -> None:
    short, long = "len: Return the size.", "Return the length of a list. 12+29=41, 商队。" * 8
    w = world(model, tok, shards=shards_of(tmp_path, tok, [short, long]))
    evaluate(w, tasks("bits_per_byte"))
    first, second = w.results
    ids = tok.encode(short)
    assert first.score == pytest.approx(-float(plain_logprobs(model, ids).sum()) / math.log(2), rel=1e-4)
    assert first.weight == len(short.encode()) - len(tok.bytes_of(ids[0]))
    ids = tok.encode(long)
    assert len(ids) > 2 * CONTEXT
    windows = [ids[at : at + CONTEXT] for at in range(0, len(ids) - 1, CONTEXT - 1)]
    nats = -sum(float(plain_logprobs(model, part).sum()) for part in windows)
    assert sum(len(part) - 1 for part in windows) == len(ids) - 1
    assert second.score == pytest.approx(nats / math.log(2), rel=1e-4)
    assert second.weight == len(long.encode()) - len(tok.bytes_of(ids[0]))
    value = summarise(w.results, resamples=100, seed=0)["bits_per_byte"].value
    assert value == pytest.approx((first.score + second.score) / (first.weight + second.weight))
    # An untrained model spreads evenly: about log2(vocabulary) bits a token.
    tokens = len(tok.encode(short)) + len(ids) - 2
    assert value * (first.weight + second.weight) / tokens == pytest.approx(
        math.log2(tok.vocab_size), rel=0.1
    )


def test_reward_and_kl_read_the_same_sampled_answers(model: Decoder, other: Decoder, tok: Tokenizer) -> None:
    judge = Judge(RewardModel(other).eval(), tok)
    w = world(model, tok, judge=judge, reference=model)
    evaluate(w, tasks("kl", "reward_score"))
    by_task = {t: [r for r in w.results if r.task == t] for t in ("kl", "kl.sampled", "reward_score")}
    assert [[r.id for r in rows] for rows in by_task.values()] == [["a", "b"]] * 3
    assert all(r.score == 0.0 for r in by_task["kl"] + by_task["kl.sampled"])
    moved = world(model, tok, reference=other)
    evaluate(moved, tasks("kl"))
    assert all(r.score > 0 for r in moved.results if r.task == "kl")


def test_a_long_answer_keeps_the_token_the_judge_is_asked_at(other: Decoder) -> None:
    from caravan.evals.runner import _latest
    from caravan.model.heads import Pool, PooledHead

    decoder, encoder = RewardModel(other), RewardModel(other)
    encoder.score = PooledHead(other.spec.d, Pool(act=None, reads="first"))
    assert _latest([1, 2, 3, 4], 3, decoder) == [2, 3, 4]
    assert _latest([1, 2, 3, 4], 3, encoder) == [1, 3, 4]
    assert _latest([1, 2, 3], 3, encoder) == [1, 2, 3]


def test_draws_differ_between_chunks(model: Decoder, tok: Tokenizer) -> None:
    """generate() numbers its requests from 0 at each call; two chunks must not draw alike all the same."""
    from caravan.evals.runner import generate
    from caravan.types import Sampling

    w = world(model, tok)
    w.limits = Limits(parallel=1)  # four prompts per chunk
    prompt = tok.encode("len")
    found = generate(w, [prompt] * 8, Sampling(temperature=1.0, max_tokens=8), "x")
    assert [a.ids for a in found[:4]] != [a.ids for a in found[4:]]
    assert [a.ids for a in generate(w, [prompt] * 8, Sampling(temperature=1.0, max_tokens=8), "x")] == [
        a.ids for a in found
    ]


def test_a_prompt_longer_than_the_context_is_cut_and_counted(model: Decoder, tok: Tokenizer) -> None:
    w = world(model, tok)
    w.items = [item_of({"question": "Return the size " * 60, "answer": "x"}, "q:1")]
    evaluate(w, tasks("exact_match"))
    assert w.notes["prompts_cut"] == 1 and len(w.results) == 1


def test_kinds_are_reported_apart_unless_that_says_the_same_twice(model: Decoder, tok: Tokenizer) -> None:
    w = world(model, tok)
    w.items.append(item_of({"id": "e", "question": "q", "answer": "Paris", "kind": "word"}, "q:9"))
    evaluate(w, tasks("exact_match", "arithmetic"))
    assert set(summarise(w.results, resamples=50, seed=0)) == {
        "arithmetic", "exact_match", "exact_match.fact", "exact_match.word",
    }  # fmt: skip


class Folder:
    """What the stage needs of an artefact: its path."""

    def __init__(self, path: Path) -> None:
        self.path = path


@pytest.fixture()
def inputs(tmp_path: Path, model: Decoder, other: Decoder, tok: Tokenizer) -> dict:
    tok.save(tmp_path / "tok")
    checkpoint.save_model(model, tmp_path / "model", tmp_path / "tok", torch.float32)
    checkpoint.save_model(other, tmp_path / "other", tmp_path / "tok", torch.float32)
    checkpoint.save_reward(RewardModel(other), tmp_path / "reward", tmp_path / "tok", torch.float32)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "eval.jsonl").write_text("\n".join(json.dumps(q) for q in QUESTIONS) + "\nbroken\n")
    shards_of(tmp_path / "shards", tok, TEXTS[:3])
    names = {"model": "model", "questions": "q", "shards": "shards", "reward": "reward", "reference": "other"}
    return {role: Folder(tmp_path / name) for role, name in names.items()}


CONFIG = stage_evaluate.Config(max_tokens=5, sampled=2, sampled_tokens=5, resamples=200, parallel=4)


def test_stage_writes_the_same_evaluation_twice(inputs: dict, tmp_path: Path) -> None:
    facts = stage_evaluate.run(CONFIG, inputs, tmp_path / "one", Runtime(device="cpu", threads=1))
    stage_evaluate.run(CONFIG, inputs, tmp_path / "two", Runtime(device="cpu", threads=1))
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == ["items.jsonl", "quarantine.jsonl", "samples.jsonl", "scores.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    scores = json.loads((tmp_path / "one" / "scores.json").read_text())
    assert {"bits_per_byte", "exact_match", "arithmetic", "multiple_choice", "reward_score", "kl"} <= set(
        scores
    )
    for found in scores.values():
        assert found["low"] <= found["value"] <= found["high"] and found["n"] >= 1
    assert facts["questions"] == 4 and facts["questions_refused"] == 1
    assert facts["kl"] == scores["kl"]["value"] > 0


def test_two_models_are_compared_item_by_item(inputs: dict, tmp_path: Path) -> None:
    rt = Runtime(device="cpu", threads=1)
    stage_evaluate.run(CONFIG, inputs, tmp_path / "a", rt)
    stage_evaluate.run(CONFIG, inputs | {"model": inputs["reference"]}, tmp_path / "b", rt)
    found = compare(tmp_path / "a", tmp_path / "b", resamples=200)
    assert found["bits_per_byte"].value != 0.0 and found["bits_per_byte"].n == 3
    assert found["kl"].value < 0
    assert {"exact_match", "exact_match.fact", "arithmetic"} <= found.keys()
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert set(scores) == set(found)
    same = compare(tmp_path / "a", tmp_path / "a")
    assert all((d.value, d.low, d.high, d.p) == (0.0, 0.0, 0.0, 1.0) for d in same.values())
    (tmp_path / "b" / "items.jsonl").write_text(
        (tmp_path / "b" / "items.jsonl").read_text().replace("document/1", "document/7")
    )
    with pytest.raises(UserError, match="same items"):
        compare(tmp_path / "a", tmp_path / "b")


def test_questions_in_the_training_text_are_counted() -> None:
    items = [
        item_of({"id": "whole", "question": "What does len do?", "answer": "Return the size of it."}, "q:1"),
        item_of({"id": "sum", "question": "12 + 29 = ?", "answer": "41"}, "q:2"),
        item_of({"id": "far", "question": "What does map do?", "answer": "x"}, "q:3"),
        item_of({"id": "short", "question": "Why?", "answer": "x"}, "q:4"),
        item_of({"id": "zh", "question": "请问 len 是什么？", "answer": "x"}, "q:5"),
        item_of(
            {"id": "long", "question": " ".join(f"word{chr(97 + i)}" for i in range(20)), "answer": "x"},
            "q:6",
        ),
    ]
    long_part = " ".join(f"WORD{chr(97 + i)}" for i in range(3, 17))
    texts = [
        "so WHAT does\nLen do",
        "what does len do: return the size of it",
        "12+29=41",
        "",
        "你好，请问len是什么",
    ]
    found = contamination(items, [*texts, long_part])
    assert found.questions == ("whole", "sum", "zh", "long") and found.checked == 5
    assert found.answers == ("whole",) and found.both == ("whole",) and found.texts == 6
    assert contamination(items, texts[:1]).both == ()
    assert "sum" not in contamination(items, ["12-29=", "112+29=", "12+290="]).questions


def test_shards_of_another_vocabulary_are_refused(inputs: dict, tmp_path: Path) -> None:
    page = json.loads((inputs["shards"].path / "shards.json").read_text())
    page["vocab_size"] += 1
    (inputs["shards"].path / "shards.json").write_text(json.dumps(page))
    with pytest.raises(UserError, match="tokenizer"):
        stage_evaluate.run(CONFIG, inputs, tmp_path / "x", Runtime(device="cpu", threads=1))


def test_an_unknown_task_suggests_the_nearest(inputs: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exact_mach"):
        stage_evaluate.run(
            stage_evaluate.Config(tasks=("exact_mach",)),
            inputs,
            tmp_path / "x",
            Runtime(device="cpu", threads=1),
        )


def test_the_store_answers_the_second_time_and_records_task_versions(inputs: dict, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    kinds = {"model": "model", "questions": "raw", "reward": "reward", "reference": "model"}
    given = {role: store.add(inputs[role].path, kind=kind) for role, kind in kinds.items()}
    rt = Runtime(device="cpu", threads=1)
    first = stage.execute(store, "evaluate", CONFIG, given, rt)
    assert first.kind == "evaluation" and first.facts["arithmetic"] in (0.0, 1.0)
    assert set(first.manifest["uses"]["tasks"]) == set(stage.names("evals/tasks"))
    assert stage.execute(store, "evaluate", CONFIG, given, rt).id == first.id
