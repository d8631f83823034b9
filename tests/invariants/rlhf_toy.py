"""A toy world for the RLHF stages: a tokenizer, a two-layer model of width 32, and data in which one word is
good."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from caravan.data.tokenizer import Tokenizer, train
from caravan.model.checkpoint import save_model, save_reward
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel, ScoreHead
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.store import Artefact, Store

WORDS = ["good", "bad", "sun", "moon", "tree", "river", "stone", "bird"]


def tokenizer() -> Tokenizer:
    texts = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(60)]
    return train([*texts, *("user assistant\n" for _ in range(20))], 300)


def spec(vocab: int, *, head: bool = True, tie: bool = True, d: int = 32) -> Spec:
    attn = Attn(n_head=2, n_kv=1, head_dim=d // 2, rope=Rope(dim=d // 2))
    layer = Layer(attn=attn, ffn=FFN(kind="glu", d_ff=64, act="silu"), norm=Norm())
    return Spec(vocab=vocab, d=d, layers=(layer,) * 2, final_norm=Norm(), max_pos=128, tie=tie, head=head)


def decoder(vocab: int, seed: int = 0, **kw: object) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(spec(vocab, **kw))  # type: ignore[arg-type]
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.08)
    return model


def reward_model(vocab: int, seed: int = 1) -> RewardModel:
    trunk = decoder(vocab, seed, head=False)
    return RewardModel(
        trunk, ScoreHead(trunk.spec.d, bias=0.25, generator=torch.Generator().manual_seed(seed))
    )


def rankings(count: int, seed: int, k: int = 2) -> list[dict]:
    """Answers of two to five words; the one with more `good` is better, ties broken away by drawing again."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        answers = [" ".join(rng.choices(WORDS, k=rng.randint(2, 5))) for _ in range(k)]
        goodness = [-a.split().count("good") for a in answers]
        if len(set(goodness)) < 2 or len(set(answers)) < k:
            continue
        levels = sorted(set(goodness))
        prompt = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))}]
        ranks = [levels.index(g) for g in goodness]
        rows.append(
            {
                "prompt": prompt,
                "responses": answers,
                "ranks": ranks,
                "id": f"{seed}/{len(rows)}",
                "source": "toy",
            }
        )
    return rows


def conversations(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))},
                {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 5)))},
            ],
            "id": f"{seed}/{i}",
            "source": "toy",
        }
        for i in range(count)
    ]


def _write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def world(root: Path, *, k: int = 2, train_rows: int = 96) -> tuple[Store, dict[str, Artefact]]:
    """A store with model, reward, preferences and conversations."""
    tok = tokenizer()
    tok.save(root / "tok")
    save_model(decoder(tok.vocab_size), root / "model", root / "tok", torch.float32)
    save_reward(reward_model(tok.vocab_size), root / "reward", root / "tok", torch.float32)
    _write(root / "preferences", "train.jsonl", rankings(train_rows, 1, k))
    _write(root / "preferences", "heldout.jsonl", rankings(24, 2, k))
    _write(root / "conversations", "train.jsonl", conversations(40, 3))
    _write(root / "conversations", "heldout.jsonl", conversations(8, 4))
    store = Store(root / "store")
    kinds = ("model", "reward", "preferences", "conversations")
    return store, {kind: store.add(root / kind, kind=kind) for kind in kinds}
