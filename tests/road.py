"""A family's way through the stages: a folder as its makers give it, a small vocabulary, data of few rows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor

from caravan.data import shards
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer
from caravan.engine.engine import Engine
from caravan.model import checkpoint
from caravan.recipes.flow import Caravan
from caravan.serve.api import create_app
from caravan.serve.run import Config, load_models
from caravan.stage import Runtime
from caravan.store import Artefact, Store
from caravan.types import Message, Sampling
from tests import families as tiny
from tests.contracts.test_family_parity import stored
from tests.families import Case

FP32 = {"precision": "fp32"}
WORDS = ["the", "fox", "is", "quick", "and", "brown", "or", "slow", "dog", "cat", "sees", "good", "bad"]
SPECIAL = ("<pad>", "<gmask>", "<sop>", "<answer>", "<user>", "<end>")
"""Their places are their ids: what ChatGLM-6B and CPM ask for at 1 and 2 is what the template puts there."""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}"
    "{% else %}<gmask><sop><answer>{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<gmask><sop><answer>{% endif %}"
)


def vocabulary(folder: Path, size: int) -> None:
    """A word per id, with special ones first, as a tokenizer.json and its settings."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    names = [*SPECIAL, "<unk>", *WORDS]
    names += [f"w{i}" for i in range(len(names), size)]
    backend = tokenizers.Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The same rows to train on and held out."""
    folder.mkdir()
    for split in ("train", "heldout"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(asked: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}]


class Road:
    """One case's way through the stages; each is run when first asked for."""

    def __init__(self, family: str, case: Case, root: Path) -> None:
        self.family, self.case, self.root, self.folder = family, case, root, root / "release"
        self.hf: Any = None
        self.folder.mkdir()
        if case.hf is not None:
            self.hf = case.hf()
            self.hf.save_pretrained(self.folder)
            if case.disguise is not None:
                case.disguise(self.folder)
        else:
            assert case.config and case.tensors
            (self.folder / "config.json").write_text(json.dumps(case.config))
            save_file(case.tensors(), self.folder / "model.safetensors", metadata={"format": "pt"})
        vocabulary(self.folder, min(checkpoint.load_spec(self.folder).vocab, tiny.VOCAB))
        self.tok = Tokenizer.load(self.folder)
        self.c = Caravan(Store(root / "store"), Runtime(threads=1, device="cpu"))
        self.write_data()

    def write_data(self) -> None:
        """Four questions with answers, and what somebody likes more or less about them."""
        rng = random.Random(0)
        asked = [" ".join(rng.choices(WORDS, k=4)) for _ in range(4)]
        about = [{"id": str(i), "source": "toy"} for i in range(4)]
        write_rows(
            self.root / "chats",
            [
                {"messages": [*said(q), {"role": "assistant", "content": f"{q} good fox"}]} | a
                for q, a in zip(asked, about, strict=True)
            ],
        )
        answers = [f"good {q} good" for q in asked], [f"bad {q} {rng.choice(WORDS)}" for q in asked]
        write_rows(
            self.root / "pairs",
            [
                {"prompt": said(q), "responses": [good, bad], "ranks": [0, 1]} | a
                for q, good, bad, a in zip(asked, *answers, about, strict=True)
            ],
        )
        (self.root / "questions").mkdir()
        lines = [json.dumps({"question": q, "answer": q.split()[0]}) + "\n" for q in asked]
        (self.root / "questions" / "a.jsonl").write_text("".join(lines))

    @cached_property
    def base(self) -> Artefact:
        return self.c.add(self.folder, "model")

    @cached_property
    def chats(self) -> Artefact:
        return self.c.add(self.root / "chats", "conversations")

    @cached_property
    def pairs(self) -> Artefact:
        return self.c.add(self.root / "pairs", "preferences")

    @cached_property
    def shards(self) -> Artefact:
        """Twenty documents that repeat themselves, cut by the tokenizer."""
        at = self.root / "shards"
        self.tok.save(at / "tokenizer")
        rows = list(shards.encode_documents([" ".join(WORDS[i % 5 :]) for i in range(20)], self.tok))
        shards.write(at, {"train": rows, "heldout": rows[:5]}, self.tok.vocab_size)
        return self.c.add(at, "shards")

    def read_on(self, lr: float) -> Artefact:
        few = {"steps": 3, "context": 16, "batch_tokens": 64, "micro_tokens": 32, "weight_decay": 0.0}
        return self.c.pretrain(base=self.base, shards=self.shards, lr=lr, warmup_steps=0, **few, **FP32)

    def tune(self, lr: float, precision: str, **more: Any) -> Artefact:
        few = {"steps": 3, "batch_tokens": 512, "micro_tokens": 256, "lr": lr, "precision": precision}
        return self.c.sft(**{"base": self.base, "data": self.chats, **few, **more})

    @cached_property
    def sft(self) -> Artefact:
        return self.tune(3e-3, "fp32")

    @cached_property
    def judge(self) -> Artefact:
        steps = {"epochs": 1, "batch_tokens": 48, "micro_tokens": 128, "lr": 1e-3}
        return self.c.reward(base=self.sft, data=self.pairs, **steps, **FP32)

    def preferred(self, precision: str) -> Artefact:
        steps = {"epochs": 1, "batch_tokens": 48, "micro_tokens": 128, "lr": 1e-3}
        return self.c.prefer(policy=self.sft, data=self.pairs, **steps, precision=precision)

    def reinforced(self, policy: Artefact, precision: str) -> Artefact:
        steps = {"steps": 2, "batch_prompts": 3, "max_new_tokens": 5, "micro_tokens": 128, "lr": 1e-3}
        roles = {"policy": policy, "reward": self.judge, "prompts": self.chats, "ptx": self.shards}
        return self.c.rl(**roles, **steps, ptx_tokens=32, precision=precision)

    @cached_property
    def dpo(self) -> Artefact:
        return self.preferred("fp32")

    @cached_property
    def ppo(self) -> Artefact:
        return self.reinforced(self.dpo, "fp32")

    @cached_property
    def small(self) -> Artefact:
        return self.c.quantize(model=self.sft, bits=8)

    def opened(self, folder: Path) -> Any:
        """The class's model of a folder; None where there is no class, or none that knows the family's
        files."""
        if self.hf is None or folder == self.folder:
            return self.hf
        if self.case.reload is not True:
            return None
        return (
            type(self.hf)
            .from_pretrained(
                folder, attn_implementation=self.hf.config._attn_implementation, dtype=torch.float32
            )
            .eval()
        )

    def reference(self, folder: Path) -> Callable[[Tensor], Tensor] | None:
        """(ids [B, T]) -> logits of the class or the oracle on the weights of a folder; None as `opened`."""
        case, theirs = self.case, self.opened(folder)
        if case.oracle is not None:
            config = checkpoint.read_config(folder)
            tensors = {key: t.float() for key, t in stored(folder).items()}
            return lambda ids_BT: case.oracle(config, tensors, ids_BT)  # type: ignore[misc]
        run = case.run_hf or (lambda m, ids: m(input_ids=ids, use_cache=False).logits)
        return None if theirs is None else lambda ids_BT: run(theirs, ids_BT)

    @cached_property
    def text(self) -> Tensor:
        """A whole conversation as ids [T]."""
        answer = Message("assistant", "the brown cat")
        return torch.tensor(render([Message("user", "is good dog slow"), answer], self.tok).ids)


def greedy(folder: Path, messages: list[Message], most: int) -> tuple[str, list[int], list[int]]:
    """Text of the answer of a fresh engine, asked alone, the ids it was asked, and the ids it said."""
    tok = Tokenizer.load(folder)
    engine = Engine(checkpoint.load_model(folder).eval(), stop_ids=tok.stop_ids, vocab_size=tok.vocab_size)
    prompt = render(messages, tok, generation_prompt=True).ids
    ids = engine.generate([prompt], Sampling(temperature=0, max_tokens=most))[0][0].ids
    return tok.decode(ids), prompt, list(ids)


def predicted(
    theirs: Callable[[Tensor], Tensor], prompt: list[int], ids: list[int], vocabulary: int
) -> list[int]:
    """What the reference finds most likely at each place of an answer, in one pass over it."""
    with torch.no_grad():
        logits_TV = theirs(torch.tensor([prompt + ids[:-1]]))[0]
    found: list[int] = logits_TV[len(prompt) - 1 :, :vocabulary].argmax(-1).tolist()
    return found


def served(folder: Path, store: Store, serve: Callable[[Any], Any]) -> Callable[[str, Any], dict[str, Any]]:
    """(route, body) -> what a server of a folder answers."""
    config = Config(model=str(folder), name="m")
    server = serve(create_app(load_models(config, store, Runtime(threads=1)), None))

    def ask(route: str, body: dict[str, Any]) -> dict[str, Any]:
        with httpx.Client(base_url=server.url, trust_env=False, timeout=30) as http:
            answer = http.post(f"/v1/{route}", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return ask
