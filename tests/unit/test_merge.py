"""model.merge and stages.merge: every method against its definition written out number by number."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from caravan.data.tokenizer import train
from caravan.model import checkpoint, merge, sizes
from caravan.model.decoder import Decoder
from caravan.stage import Runtime, execute, listed
from caravan.stages import merge as stage
from caravan.store import Artefact, Store
from caravan.types import UserError

DRAW = torch.Generator().manual_seed(3)
BASE, A, B, C = (torch.randn(5, 7, generator=DRAW) for _ in range(4))


def test_linear_is_the_weighted_mean() -> None:
    want = (A * 2 + B * 1 + C * 5) / 8
    torch.testing.assert_close(merge.linear([A, B, C], (2, 1, 5)), want)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_walks_the_arc(t: float) -> None:
    a, b = A / A.norm(), B / B.norm()
    one = merge.slerp(a, b, t)
    assert float(one.norm()) == pytest.approx(1, abs=1e-6)
    whole = math.acos(float((a * b).sum()))
    assert math.acos(min(1.0, float((a * one).sum()))) == pytest.approx(t * whole, abs=1e-3)
    torch.testing.assert_close(merge.slerp(A, A * 3, 0.5), A * 2)


def slow_ties(
    base: Tensor, parts: list[Tensor], weights: list[float], scale: float, density: float
) -> Tensor:
    deltas = []
    for part in parts:
        d = [float(x - b) for x, b in zip(part.flatten(), base.flatten(), strict=True)]
        kept = sorted(range(len(d)), key=lambda i: -abs(d[i]))[: round(density * len(d))]
        deltas.append([x if i in kept else 0.0 for i, x in enumerate(d)])
    out = []
    for i, b in enumerate(base.flatten().tolist()):
        total = sum(w * d[i] for w, d in zip(weights, deltas, strict=True))
        agree = [(w, d[i]) for w, d in zip(weights, deltas, strict=True) if d[i] * total > 0]
        mean = sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0
        out.append(b + scale * mean)
    return torch.tensor(out).view(base.shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers(density: float) -> None:
    got = merge.ties(BASE, [A, B, C], (1.0, 2.0, 0.5), 0.7, density)
    torch.testing.assert_close(got, slow_ties(BASE, [A, B, C], [1.0, 2.0, 0.5], 0.7, density))


def test_task_adds_differences() -> None:
    want = BASE + 0.5 * (0.2 * (A - BASE) - 1.0 * (B - BASE))
    torch.testing.assert_close(merge.task(BASE, [A, B], (0.2, -1.0), 0.5), want)


def test_dare_drops_and_rescales() -> None:
    base, part = torch.zeros(400, 50), torch.ones(400, 50)
    draw = torch.Generator().manual_seed(0)
    got = merge.dare(base, [part], (1.0,), 1.0, 0.25, [draw])
    assert set(got.unique().tolist()) == {0.0, 4.0}
    assert float(got.mean()) == pytest.approx(1.0, abs=0.05)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    masks = [torch.rand(BASE.shape, generator=torch.Generator().manual_seed(i)) < 0.5 for i in range(2)]
    want = BASE + sum(0.5 * m * (x - BASE) / 0.5 for m, x in zip(masks, [A, B], strict=True))
    torch.testing.assert_close(merge.dare(BASE, [A, B], (0.5, 0.5), 1.0, 0.5, draws), want)
    torch.testing.assert_close(merge.dare(BASE, [A], (1.0,), 1.0, 1.0, [torch.Generator()]), A)


def model(seed: int) -> Decoder:
    spec, _ = sizes.derive("nano", None, 300, 32)
    return sizes.fresh(replace(spec, layers=spec.layers[:1]), seed)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def models(store: Store, tmp_path: Path) -> list[Artefact]:
    train(["one two three one two three"], 300).save(tmp_path / "tok")
    found = []
    for seed in range(3):
        checkpoint.save_model(model(seed), tmp_path / str(seed), tmp_path / "tok", torch.float32)
        found.append(store.add(tmp_path / str(seed), "model"))
    return found


@pytest.mark.parametrize("method", ["linear", "slerp", "task", "ties", "dare"])
def test_the_stage_merges_every_tensor(method: str, store: Store, models: list[Artefact]) -> None:
    from caravan.model.tensors import TensorFolder

    inputs = listed("model", models[:2])
    if method in stage.RELATIVE:
        inputs["base"] = models[2]
    cfg = stage.Config(method=method)  # type: ignore[arg-type]
    done = execute(store, "merge", cfg, inputs, Runtime())
    out, a, b, base = (TensorFolder(x.path) for x in (done, models[0], models[1], models[2]))
    key = "model.layers.0.mlp.up_proj.weight"
    recipe = merge.Recipe(method=method, weights=(0.5, 0.5))  # type: ignore[arg-type]
    assert torch.equal(out[key], recipe.one(key, [a[key], b[key]], base[key]))
    assert not torch.equal(out[key], a[key])
    assert (done / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()
    checkpoint.load_model(done.path)
    again = execute(store, "merge", stage.Config(method=method, seed=1), inputs, Runtime())  # type: ignore[arg-type]
    assert (again.id != done.id) == (method == "dare")


def test_what_does_not_fit_is_named(store: Store, models: list[Artefact], tmp_path: Path) -> None:
    first = models[0]

    def refused(other: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            execute(store, "merge", stage.Config(), listed("model", [first, store.add(other, "model")]))

    spec = model(0).spec
    norm = replace(spec.layers[0].norm, eps=1e-3)
    other = sizes.fresh(replace(spec, layers=(replace(spec.layers[0], norm=norm),), final_norm=norm), 0)
    checkpoint.save_model(other, tmp_path / "eps", tmp_path / "tok", torch.float32)
    refused(tmp_path / "eps", r"layers\.0\.norm\.eps is .* 0\.001 in")
    checkpoint.save_model(model(0), tmp_path / "words", tmp_path / "tok", torch.float32)
    train(["four five six four five six"], 300).save(tmp_path / "words")
    refused(tmp_path / "words", r"the tokenizers differ: id \d+ is b'")
    two = sizes.fresh(replace(spec, layers=spec.layers * 2), 0)
    checkpoint.save_model(two, tmp_path / "two", tmp_path / "tok", torch.float32)
    refused(tmp_path / "two", "the number of layers is 1 .* 2 in")
    checkpoint.save_model(model(0), tmp_path / "type", tmp_path / "tok", torch.float32)
    config = json.loads((tmp_path / "type/config.json").read_text())
    (tmp_path / "type/config.json").write_text(json.dumps({**config, "model_type": "aquila"}))
    refused(tmp_path / "type", "model_type is 'llama'.*'aquila'")
    with pytest.raises(UserError, match="one model cannot"):
        execute(store, "merge", stage.Config(), {"model": first}, Runtime())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties"}, "from a base"),
        ({"weights": (1.0,)}, "1 weights for 2 models"),
        ({"weights": (1.0, -1.0)}, "sum 0"),
        ({"method": "slerp", "weights": (1.0, 1.0)}, "two models and t"),
        ({"t": 2.0}, "t is 2"),
        ({"density": 0.0}, "density is 0"),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, object], message: str, store: Store, models: list[Artefact]
) -> None:
    with pytest.raises(UserError, match=message):
        cfg = stage.Config(**settings)  # type: ignore[arg-type]
        execute(store, "merge", cfg, listed("model", models[:2]), Runtime())
