"""A model of patches (bGPT) in everything the stages ask of a decoder: training, judging, writing,
integers, averages; held to two GPT-2 classes put together by hand (tests/families/bgpt.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from caravan import cli
from caravan.algos.optim import OptimConfig
from caravan.compress import folder as integers
from caravan.data.pack import lm_batch
from caravan.data.render import Rendered
from caravan.engine import needs, rollout
from caravan.engine.engine import Engine
from caravan.engine.score import logprobs, values
from caravan.kernels.attention import Segments
from caravan.kernels.quantized import QuantLinear
from caravan.model import checkpoint, flat, grow, merge, upcycle
from caravan.model.encoders.bgpt import Bgpt
from caravan.stages.reward import fresh
from caravan.systems import memory
from caravan.systems.train import Trainee, fused_rows, lm_loss, train_step
from caravan.types import Batch, Sampling, UserError
from tests.families import bgpt

pytest.importorskip("transformers")

LENGTHS = (1, 3, 4, 5, 13, 21, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "bgpt"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(bgpt.BGPT))
    save_file(bgpt.weights(), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return checkpoint.load_model(folder)


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(6)
    return [torch.randint(0, 257, (n,), generator=draw).tolist() for n in lengths]


def batch(rows: list[list[int]]) -> Batch:
    return lm_batch([Rendered(row, [True] * len(row)) for row in rows])


def states(model: Any, rows: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """[T, D] of each text, all of them in one flat batch."""
    one = batch(rows)
    return model(one.ids_N, one.pos_N, Segments(one.lengths)).split(one.lengths)


@torch.no_grad()
def test_what_fills_the_last_patch_is_not_seen(model: Any) -> None:
    """Filled or not, with whatever symbols: the real bytes' states are the same."""
    rows = texts()
    bare = states(model, rows)
    for fill in (256, 7):
        filled = states(model, [[*row, *[fill] * (-len(row) % bgpt.SIZE)] for row in rows])
        for got, want in zip(filled, bare, strict=True):
            torch.testing.assert_close(got[: len(want)], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_texts_without_a_whole_patch_are_read(model: Any) -> None:
    parts = bgpt.composed(bgpt.weights())
    rows = texts((1, 2, 3, 2))
    for got, row in zip(states(model, rows), rows, strict=True):
        want = bgpt.said(parts, torch.tensor(row))
        torch.testing.assert_close(model.logits(got), want, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_two_halves(model: Any) -> None:
    parts = bgpt.composed(bgpt.weights())
    patch, byte, matrix, offset = parts
    matrix.requires_grad_(), offset.requires_grad_()
    rows = texts()
    every = sum(len(row) - 1 for row in rows)
    want = sum(
        F.cross_entropy(bgpt.said(parts, torch.tensor(row))[:-1], torch.tensor(row[1:]), reduction="sum")
        for row in rows
        if len(row) > 1
    )
    (want / every).backward()
    loss = lm_loss(model, batch(rows), every)
    assert float(loss.value.detach()) == pytest.approx(float(want.detach() / every), rel=1e-5)
    loss.value.backward()
    model.patch.embed.requires_grad_(True)  # one row that nothing looks up
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    mine = checkpoint.export_tensors(model)
    grads = {f"patch_level_decoder.base.{name}": p.grad for name, p in patch.named_parameters()}
    grads |= {f"byte_level_decoder.base.{name}": p.grad for name, p in byte.named_parameters()}
    grads |= {
        f"patch_level_decoder.patch_embedding.{n}": t.grad for n, t in (("weight", matrix), ("bias", offset))
    }
    idle = [key for key, grad in grads.items() if grad is None]
    assert idle == ["patch_level_decoder.base.wte.weight"] and mine.keys() <= grads.keys()
    for key in mine.keys() - set(idle):
        grad = grads[key]
        assert grad is not None
        assert float((mine[key] - grad).abs().max()) < 1e-4 * float(grad.std()) + 1e-7, key


def gradient(path: Path, every: int) -> tuple[Trainee, int]:
    """The gradient of a step, and how often a block ran."""
    model = checkpoint.load_model(path)
    model.checkpoint_every = every
    runs: list[int] = []
    for half in (model.patch, model.byte):
        half.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    trainee = Trainee(model, OptimConfig())
    one = batch(texts())
    train_step(trainee, [one], lambda b: lm_loss(model, b, 50.0), 0.0, lambda *_: False)
    assert model.checkpoint_every == every and not trainee.unreached
    return trainee, len(runs)


def test_both_halves_recompute_and_give_the_same_bits(folder: Path) -> None:
    (kept, once), (again, twice) = gradient(folder, 0), gradient(folder, 2)
    assert torch.equal(kept.grad, again.grad) and (once, twice) == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_it_learns(model: Any, dtype: torch.dtype, optimiser: Any) -> None:
    unread = model.patch.embed.weight.detach().clone()
    trainee = Trainee(model, OptimConfig(name=optimiser), dtype)
    one = batch([[(3 * i + j) % 7 for i in range(20 + j)] for j in range(5)])
    total = float(one.weight_N.sum())
    losses = [train_step(trainee, [one], lambda b: lm_loss(model, b, total), 5e-3).loss for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.patch.embed.weight, unread.to(dtype))
    kinds = {slot.name: slot.kind for slot in trainee.slots}
    assert kinds["inp.weight"] == "decay" and "patch.embed.weight" not in kinds
    for half in ("patch", "byte"):
        name = f"{half}.blocks.0.mix.qkv.weight"
        assert kinds[name] == ("muon" if optimiser == "muon" else "decay")
        assert fused_rows(model)[name] == (bgpt.D,) * 3


@torch.no_grad()
def test_what_rounds_a_bf16_batch_needs_no_positions(model: Any) -> None:
    """38 tokens behind a batch, while the model's context is 28 bytes; none of them is seen."""
    short = replace(model.spec, patch=replace(model.spec.patch, max_pos=7))
    model = Bgpt(short).to(torch.bfloat16)
    one = batch(texts((25, 1)))
    hidden_ND, _ = flat.hidden_states(model, one)
    bare = model(one.ids_N, one.pos_N, Segments(one.lengths))
    assert hidden_ND.shape == bare.shape
    torch.testing.assert_close(hidden_ND, bare, rtol=0.05, atol=0.1)


# ----------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def test_a_reward_model_is_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    made = fresh(model, 3)
    made.score.bias.fill_(0.25)
    rows = texts()
    want = made.scores(batch(rows))
    checkpoint.save_reward(made, tmp_path / "reward", dtype=torch.float32)
    config = checkpoint.read_config(tmp_path / "reward")
    assert config["architectures"] == ["bGPTForSequenceClassification"] and config["num_labels"] == 1
    again = checkpoint.load_reward(tmp_path / "reward")
    assert again.spec == made.spec and isinstance(again.decoder, Bgpt)
    assert torch.equal(again.scores(batch(rows)), want)
    last = [states(model, [row])[0][-1] for row in rows]
    torch.testing.assert_close(made.score(torch.stack(last)), want, rtol=1e-4, atol=1e-4)
    assert values(again, batch(rows)).shape == (sum(n - 1 for n in LENGTHS),)
    with pytest.raises(UserError, match="reward model"):
        checkpoint.load_model(tmp_path / "reward")


# ----------------------------------------------------------------------------------------------- writing


OPTIONS: list[dict[str, int]] = [
    {"max_seqs": 2, "block_size": 4, "step_tokens": 6},
    {"max_seqs": 2, "block_size": 3, "step_tokens": 5, "cache_tokens": 30},
    {"max_seqs": 6, "block_size": 16},
]


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_what_it_writes_is_the_oracles(model: Any, options: dict[str, int]) -> None:
    """Prompts from one byte on, cut anywhere, preempted, beside a neighbour that gives up."""
    parts = bgpt.composed(bgpt.weights())
    engine = Engine(model, **options)
    got: dict[int, list[int]] = {}
    (first,) = texts((9,))
    quitter = engine.submit(first, Sampling(temperature=0, max_tokens=20))
    asked = texts((1, 2, 15, 14, 7))
    ids = [engine.submit(row, Sampling(temperature=0, max_tokens=13)) for row in asked]
    for step in range(1000):
        for event in engine.step():
            got.setdefault(event.id, []).extend(event.new_ids)
        if step == 9:
            engine.abort(quitter)
        if not engine.busy:
            break
    for id, prompt in zip([quitter, *ids], [first, *asked], strict=True):
        text = list(prompt)
        for token in got.get(id, []):
            logits = bgpt.said(parts, torch.tensor(text))[-1]
            assert token == int(logits.argmax())
            text.append(token)
        assert len(text) == len(prompt) + 13 or id == quitter
    assert (engine.stats()["preemptions"] > 0) == ("cache_tokens" in options)
    assert engine.stats()["blocks_owned"] == 0 and engine.lanes.order == []


def test_samples_of_a_prompt_differ_and_do_not_mind_company(model: Any) -> None:
    prompt = texts((11,))[0]
    sampling = Sampling(temperature=1.0, max_tokens=9, seed=5)
    (group,) = Engine(model, max_seqs=4).generate([prompt], sampling, n=4)
    (alone,) = Engine(model, max_seqs=1).generate([prompt], sampling, n=4)
    assert [c.ids for c in group] == [c.ids for c in alone] and len({c.ids for c in group}) == 4


@torch.no_grad()
def test_in_bf16_the_trainer_scores_what_it_wrote(model: Any) -> None:
    model = model.to(torch.bfloat16)
    drawn = rollout.sample(
        model, list(enumerate(texts((9, 2, 16)))), 2,
        temperature=1.0, max_new_tokens=12, seed=2, stop_ids=frozenset(), vocab_size=257,
    )  # fmt: skip
    parts = torch.tensor(drawn.sampled_logp_R).split(drawn.response_lengths)
    (one,) = drawn.batches(range(len(drawn)), 1 << 12)
    logp, _ = logprobs(model, one)
    off = (logp - torch.cat([parts[i] for i in one.index])).abs()
    assert off.max() < 0.15 and off.mean() < 0.03


def test_the_cache_is_counted_in_patches(model: Any) -> None:
    engine = Engine(model, max_seqs=1)
    engine.generate([texts((30,))[0]], Sampling(temperature=0, max_tokens=4))
    (lanes,) = engine.lanes.coarser.values()
    held = sum(t[:1].numel() * t.element_size() for pair in lanes.kv.values() for t in pair)
    assert lanes.capacity == 16 and held == memory.cache(model.spec, model.spec.context, width=4)
    per_byte = memory.cache(model.spec, 16, width=4) // 16
    assert needs.cache_positions(model.spec, 1 << 40) == needs.CACHE_BYTES // per_byte
    kept = {name: t[0] for name, t in engine.lanes.states[0].items()}
    assert memory.state(model.spec) == kept["bytes"].numel() * 8 + kept["vector"].numel() * 2


# ------------------------------------------------------------------------------------- folders and tools


@torch.no_grad()
def said_of(model: Any) -> torch.Tensor:
    return torch.cat([model.logits(hidden) for hidden in states(model, texts((40, 9)))])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_both_halves_become_integers(folder: Path, tmp_path: Path, method: str) -> None:
    source = integers.load_source(folder)
    want, grid = said_of(source), integers.Grid(8, 0, torch.float32)
    if method == "rtn":
        weights = integers.round_to_nearest(source, grid, lambda *_: None)
    else:
        weights = integers.by_gptq(source, grid, texts((60,) * 8), lambda *_: None)
    assert len(weights) == 4 * (3 + 2) and {name.split(".")[0] for name in weights} == {"patch", "byte"}
    left = integers.write(folder, tmp_path / "out", checkpoint.load_model(folder), grid, weights)
    assert left == []
    model = checkpoint.load_model(tmp_path / "out")
    got = said_of(model)
    assert 0 < (got - want).norm() < 0.02 * want.norm()
    assert integers.swap(model, tmp_path / "out") == 20
    assert isinstance(model.byte.blocks[1].ffn.out, QuantLinear)
    assert (said_of(model) - got).norm() < 0.03 * got.norm()
    done = Engine(model).generate([[1, 2, 3]], Sampling(max_tokens=9))
    assert len(done[0][0].ids) == 9


def test_texts_shorter_than_a_patch_calibrate_nothing(folder: Path) -> None:
    grid = integers.Grid(8, 0, torch.float32)
    with pytest.raises(UserError, match="as long as one patch"):
        integers.by_gptq(integers.load_source(folder), grid, texts((3, 2)), lambda *_: None)


def test_two_models_are_averaged(folder: Path, tmp_path: Path, model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    checkpoint.save_model(model, tmp_path / "three", dtype=torch.float32)
    recipe = merge.Recipe(method="linear", weights=(1.0, 1.0))
    merge.merge([folder, tmp_path / "three"], None, tmp_path / "two", recipe)
    one = bgpt.weights()
    for key, tensor in checkpoint.export_tensors(checkpoint.load_model(tmp_path / "two")).items():
        torch.testing.assert_close(tensor, 2 * one[key])


def test_it_is_inspected(folder: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    for said in ("over patches: attention 6 heads", "within a patch: attention 6 heads", "4 bytes",
                 "64 tokens", "rl (PPO)", f"{model.spec.parameters:,}", "recurrent state"):  # fmt: skip
        assert said in text, said
    assert cli.main(["inspect", "--json", str(folder)]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["cache"]["full context"] == 16 * 3 * 2 * bgpt.D * 2 and page["cache"]["context"] == 64
    assert "other" not in page["parameters"] and page["spec"]["layers"] == 5


def test_a_stored_head_is_the_embedding(folder: Path) -> None:
    tensors = bgpt.weights()
    head = "byte_level_decoder.base.lm_head.weight"
    tensors[head] = tensors["byte_level_decoder.base.transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert head not in checkpoint.export_tensors(checkpoint.load_model(folder))
    tensors[head][5, 7] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head"):
        checkpoint.load_model(folder)


def test_a_reward_model_is_inspected(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save_reward(fresh(model, 0), tmp_path / "reward")
    assert cli.main(["inspect", str(tmp_path / "reward")]) == 0
    assert "one score per text" in capsys.readouterr().out


def test_what_cannot_be_done_is_said(model: Any) -> None:
    with pytest.raises(UserError, match="vocabulary cannot change"):
        grow.resize(model, [(i,) for i in range(257)], 320)
    with pytest.raises(UserError, match="'bgpt' model cannot be given experts"):
        upcycle.copies(model, 4, 2)
    with pytest.raises(UserError, match="64 tokens and the context holds 64"):
        Engine(model).submit([1] * 64, Sampling(max_tokens=1))
