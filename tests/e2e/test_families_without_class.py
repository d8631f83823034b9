"""From a release's own folder to a served, aligned model and back, for families that no other library opens:
the tokenizer, the chat template and every stage, on tiny random weights."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from caravan import cli
from caravan.data.pack import lm_batch
from caravan.data.render import Rendered, render
from caravan.data.tokenizer import Tokenizer
from caravan.data.vocabulary import cpm
from caravan.engine.engine import Engine
from caravan.model import checkpoint, families
from caravan.model.flat import hidden_states
from caravan.model.tensors import TensorFolder
from caravan.recipes.flow import Caravan
from caravan.serve.api import create_app
from caravan.serve.run import Config, load_models
from caravan.stage import Runtime
from caravan.store import Artefact, Store
from caravan.types import Message, Sampling
from tests.vocabularies import cpm_lines, write_cpm

BEE = {
    "model_type": "cpmbee",
    "vocab_size": len(cpm_lines()),
    "hidden_size": 32,
    "num_attention_heads": 4,
    "dim_head": 8,
    "dim_ff": 64,
    "num_hidden_layers": 2,
    "position_bias_num_buckets": 16,
    "position_bias_num_segment_buckets": 24,
    "position_bias_max_distance": 256,
    "eps": 1e-6,
}
ANT_LINES = [*(text for text in cpm_lines() if text not in ("<root>", "<ans>")), "<d>", "</d>"]
ANT = {
    **{key: value for key, value in BEE.items() if "segment" not in key},
    "model_type": "cpmant",
    "vocab_size": len(ANT_LINES) + 1,  # the empty line of our file has an id there
    "segment_types": 4,
    "prompt_length": 3,
    "prompt_types": 3,
}
BGPT = {
    "model_type": "bgpt",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "patch_size": 8,
    "patch_length": 32,
    "patch_num_layers": 2,
    "byte_num_layers": 1,
}
FAMILIES = {"cpmbee": BEE, "cpmant": ANT, "bgpt": BGPT}
KEY = {
    "cpmbee": "cpmbee.input_embedding.weight",
    "cpmant": "cpmant.input_embedding.weight",
    "bgpt": "patch_level_decoder.patch_embedding.weight",
}
"""A tensor of each, as its file names it."""
WORDS = ["good", "the", "world", "天气", "北京", "one", "two", "你好"]
FP32 = {"precision": "fp32"}


def release(at: Path, config: dict[str, Any]) -> Path:
    """A folder as the family's makers would give it: weights, config.json and their own tokenizer file."""
    family = families.find(config["model_type"])
    model = family.MODULE(family.spec(config), config["model_type"], config)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
        else:
            torch.nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
    checkpoint.save_model(model, at, None, torch.float32)
    if config["model_type"] != "bgpt":
        write_cpm(at, ANT_LINES if config["model_type"] == "cpmant" else None)
    return at


def rows(seed: int, count: int, make: Callable[[random.Random], dict[str, Any]]) -> str:
    rng = random.Random(seed)
    return "".join(json.dumps(make(rng), ensure_ascii=False) + "\n" for _ in range(count))


def chat(rng: random.Random) -> dict[str, Any]:
    asked = " ".join(rng.choices(WORDS, k=3))
    said = {"role": "system", "content": "世界"}, {"role": "user", "content": asked}
    return {"messages": [*said, {"role": "assistant", "content": asked.split()[0] + " good"}]}


def pair(rng: random.Random) -> dict[str, Any]:
    asked = " ".join(rng.choices(WORDS, k=3))
    return {
        "prompt": asked,
        "chosen": "good " + rng.choice(WORDS),
        "rejected": "two " + rng.choice(WORDS[1:]),
    }


def question(rng: random.Random) -> dict[str, Any]:
    asked = " ".join(rng.choices(WORDS, k=3))
    return {"question": asked, "answer": asked.split()[0] + " good"}


class Road:
    """One family's way through the stages; each is run when first asked for."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.folder = release(root / "release", FAMILIES[name])
        self.c = Caravan(Store(root / "store"), Runtime(threads=1, device="cpu"))
        for file, make in (("chats", chat), ("pairs", pair), ("questions", question)):
            (root / file).mkdir()
            (root / file / "a.jsonl").write_text(rows(len(file), 40, make), encoding="utf-8")

    @cached_property
    def base(self) -> Artefact:
        return self.c.add(self.folder, "model")

    @cached_property
    def chats(self) -> Artefact:
        return self.c.conversations(raw=self.c.add(self.root / "chats"), heldout_share=0.1)

    @cached_property
    def pairs(self) -> Artefact:
        return self.c.preferences(raw=self.c.add(self.root / "pairs"), heldout_share=0.1)

    @cached_property
    def sft(self) -> Artefact:
        steps = {"steps": 12, "batch_tokens": 512, "micro_tokens": 256, "lr": 1e-2}
        return self.c.sft(base=self.base, data=self.chats, **steps, **FP32)

    @cached_property
    def judge(self) -> Artefact:
        steps = {"epochs": 3, "batch_tokens": 1024, "micro_tokens": 512, "lr": 5e-3}
        return self.c.reward(base=self.sft, data=self.pairs, **steps, **FP32)

    @cached_property
    def dpo(self) -> Artefact:
        steps = {"epochs": 1, "batch_tokens": 1024, "micro_tokens": 512, "lr": 1e-3}
        return self.c.prefer(policy=self.sft, data=self.pairs, **steps, **FP32)

    @cached_property
    def ppo(self) -> Artefact:
        steps = {"steps": 2, "batch_prompts": 4, "max_new_tokens": 6, "micro_tokens": 256, "lr": 1e-3}
        roles = {"policy": self.dpo, "reward": self.judge, "prompts": self.chats}
        return self.c.rl(**roles, **steps, **FP32)

    def questions(self) -> Artefact:
        return self.c.add(self.root / "questions")


@pytest.fixture(scope="module", params=FAMILIES)
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:  # words enough for a test, whether jieba is there or not
        patch.setattr(cpm, "jieba", lambda: re.compile(r"\w+|\W").findall)
        yield Road(request.param, tmp_path_factory.mktemp(request.param))
    torch.use_deterministic_algorithms(deterministic)


def metrics(art: Artefact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (art / "metrics.jsonl").read_text().splitlines()]


def test_an_untouched_model_is_handed_back_bit_for_bit(road: Road, tmp_path: Path) -> None:
    model = checkpoint.load_model(road.folder)
    checkpoint.save_model(model, tmp_path, road.folder, torch.float32)
    Tokenizer.load(road.folder).complete(tmp_path)
    before, after = TensorFolder(road.folder), TensorFolder(tmp_path)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    said, again = (json.loads((at / "config.json").read_text()) for at in (road.folder, tmp_path))
    assert {key: again.get(key) for key in said} == said
    texts = ["今天 the world\n", "</s><|endoftext|>"]
    kept, ours = Tokenizer.load(tmp_path), Tokenizer.load(road.folder)
    assert kept.encode_many(texts) == ours.encode_many(texts) and kept.chat_template == ours.chat_template
    if road.name != "bgpt":
        own = (road.folder / "vocab.txt").read_text(encoding="utf-8")
        assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") in (own, own.replace("\n\n", "\n"))


def test_inspect_explains_it(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(road.folder)]) == 0
    said = capsys.readouterr().out
    tok = Tokenizer.load(road.folder)
    assert road.name in said and f"{tok.vocab_size:,}" in said
    assert ("<|endoftext|>" if road.name == "bgpt" else "</s>") in said


def test_pre_training_goes_on_from_it(road: Road) -> None:
    """On shards in its own vocabulary."""
    rng = random.Random(1)
    (road.root / "texts").mkdir()
    texts = [" ".join(rng.choices(WORDS, k=60)) + "\n" for _ in range(40)]
    for i, text in enumerate(texts):
        (road.root / f"texts/{i}.txt").write_text(text, encoding="utf-8")
    corpus = road.c.corpus(raw=road.c.add(road.root / "texts"), heldout_share=0.1)
    shards = road.c.shards(corpus=corpus, tokenizer=road.c.add(road.folder, "tokenizer"))
    steps = {"steps": 10, "batch_tokens": 512, "micro_tokens": 256, "context": 64, "lr": 1e-2}
    made = road.c.pretrain(base=road.base, shards=shards, **steps, **FP32)
    losses = [row["loss"] for row in metrics(made)]
    assert losses[-1] < 0.9 * losses[0]
    assert checkpoint.load_model(made.path).spec == checkpoint.load_model(road.folder).spec
    assert Tokenizer.load(made.path).alike(Tokenizer.load(road.folder))


def test_supervised_training_lowers_the_loss(road: Road) -> None:
    losses = [row["loss"] for row in metrics(road.sft)]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    tok, whole = Tokenizer.load(road.sft.path), Tokenizer.load(road.folder)
    assert tok.stop_ids == whole.stop_ids and tok.chat_template == whole.chat_template


def test_it_judges_and_is_aligned(road: Road) -> None:
    assert road.judge.facts["last_loss"] < road.judge.facts["first_loss"]
    assert abs(road.dpo.facts["first_loss"] - 0.6931) < 1e-3
    assert road.dpo.facts["last_loss"] < road.dpo.facts["first_loss"]


def test_reinforcement_learning_starts_where_it_must(road: Road) -> None:
    """Sampler and trainer agree: the first update's ratios are 1, and nothing has moved yet."""
    done = metrics(road.ppo)
    assert len(done) == 2
    assert all(row["first_ratio_error"] < 1e-5 and row["sampler_difference"] < 1e-5 for row in done)
    assert done[0]["kl"] == 0.0 and done[1]["kl"] != 0.0


def test_it_is_evaluated(road: Road) -> None:
    made = road.c.evaluate(
        model=road.sft, questions=road.questions(), reward=road.judge, reference=road.base,
        max_tokens=6, sampled=4, sampled_tokens=4, max_questions=6, resamples=100,
    )  # fmt: skip
    scores = json.loads((made / "scores.json").read_text())
    assert scores and all(score["n"] > 0 for score in scores.values())


@torch.no_grad()
def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """[T, V] of one text at once, as in training."""
    model = checkpoint.load_model(folder).eval()
    hidden, _ = hidden_states(model, lm_batch([Rendered(ids, [False] * len(ids))]))
    return model.logits(hidden)


def greedy(folder: Path, messages: list[Message], tokens: int) -> tuple[str, list[int]]:
    """The answer of a fresh engine, asked alone; its ids are the likeliest of the whole text read at once."""
    tok = Tokenizer.load(folder)
    engine = Engine(checkpoint.load_model(folder).eval(), stop_ids=tok.stop_ids, vocab_size=tok.vocab_size)
    prompt = render(messages, tok, generation_prompt=True).ids
    ids = list(engine.generate([prompt], Sampling(temperature=0, max_tokens=tokens))[0][0].ids)
    likeliest = logits(folder, [*prompt, *ids])[:, : tok.vocab_size].argmax(-1).tolist()
    assert likeliest[len(prompt) - 1 : -1] == ids
    return tok.decode(ids), prompt


def test_served_chats_are_the_engines(road: Road, serve: Callable[[Any], Any]) -> None:
    """Three at once, of one turn and of several, each as if it were asked alone."""
    models = load_models(
        Config(model=str(road.ppo.path), name="m"), Store(road.root / "s"), Runtime(threads=1)
    )
    server = serve(create_app(models, None))
    first = [{"role": "system", "content": "世界"}, {"role": "user", "content": "good 北京?</s>"}]
    more = [*first, {"role": "assistant", "content": "the good"}, {"role": "user", "content": "two"}]
    chats = [first, more, [{"role": "user", "content": "one two 你好 " * 3}]]
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http, ThreadPoolExecutor() as pool:
        body = {"max_tokens": 11, "temperature": 0}
        asked = [pool.submit(http.post, "/v1/chat/completions", json={**body, "messages": c}) for c in chats]
        answers = [future.result().json() for future in asked]
    for messages, answer in zip(chats, answers, strict=True):
        said, prompt = greedy(road.ppo.path, [Message(**m) for m in messages], 11)
        assert answer["choices"][0]["message"]["content"] == said
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert any(answer["choices"][0]["message"]["content"] for answer in answers)


def test_it_is_quantised(road: Road) -> None:
    small = road.c.quantize(model=road.sft, bits=8)
    assert small.facts["bytes_after"] < small.facts["bytes_before"]
    tok = Tokenizer.load(small.path)
    ids = render([Message("user", "good 北京")], tok, generation_prompt=True).ids
    before, after = logits(road.sft.path, ids), logits(small.path, ids)
    assert 0 < (before - after).norm() < 0.05 * before.norm()
    assert greedy(small.path, [Message("user", "good 北京")], 4)[1] == ids


def test_what_a_stage_gives_is_a_whole_model_folder(road: Road) -> None:
    merged = road.c.merge(model=[road.base, road.sft], weights=(1.0, 1.0))
    other = road.c.template(model=road.base, template="vicuna")
    small = road.c.quantize(model=road.base, bits=8)
    for made in (road.sft, road.dpo, road.ppo, merged, small, other):
        there = {path.name for path in made.path.iterdir()}
        assert ("vocab.txt" in there) == (road.name != "bgpt")
        assert ("tokenizer.json" in there) == (made not in (merged, small))
        assert json.loads((made / "config.json").read_text())["model_type"] == road.name
        assert checkpoint.load_model(made.path).spec == checkpoint.load_model(road.folder).spec
        tok = Tokenizer.load(made.path)
        assert tok.encode("the 天气") == Tokenizer.load(road.folder).encode("the 天气")
        assert (tok.chat_template == Tokenizer.load(road.folder).chat_template) == (made is not other)
    mean = (TensorFolder(road.folder)[KEY[road.name]] + TensorFolder(road.sft.path)[KEY[road.name]]) / 2
    assert torch.allclose(TensorFolder(merged.path)[KEY[road.name]], mean, atol=1e-6)
