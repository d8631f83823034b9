"""What must not depend on how a step is cut up: accumulation, packing, batch composition, dtypes."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import training_toys

from caravan.algos.optim import OptimConfig
from caravan.data.loader import example_batches
from caravan.data.pack import lm_batch
from caravan.data.render import Rendered
from caravan.kernels.attention import Segments
from caravan.model.decoder import Decoder
from caravan.model.sizes import derive, fresh
from caravan.model.spec import FFN, MoE
from caravan.systems.train import Trainee, lm_loss, train_step

VOCAB = 97


def model(seed=0):
    spec, _ = derive("nano", None, VOCAB, 64)
    return fresh(spec, seed)


def examples(count=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(0, VOCAB, (int(torch.randint(4, 30, (1,), generator=g)),), generator=g).tolist()
        rows.append(Rendered(ids, [j >= 2 + i % 3 for j in range(len(ids))]))
    return rows


def gradient(batches, dtype=torch.float32, optimiser="adamw", recompute=0):
    decoder = model()
    decoder.checkpoint_every = recompute
    trainee = Trainee(decoder, OptimConfig(name=optimiser), dtype)
    total = sum(float(b.weight_N.sum()) for b in batches)
    result = train_step(trainee, batches, lambda b: lm_loss(trainee.model, b, total), 0.0, lambda *_: False)
    return result, trainee


def difference(a, b):
    return float((a.grad - b.grad).norm() / b.grad.norm())


def test_accumulation_1x8_is_4x2_is_8x1():
    rows = examples()
    whole, reference = gradient([lm_batch(rows)])
    for each in (1, 2, 3):
        cut, trainee = gradient([lm_batch(rows[i : i + each]) for i in range(0, 8, each)])
        assert difference(trainee, reference) < 2e-6
        assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
        assert cut.stats["tokens"] == whole.stats["tokens"]


def test_accumulation_in_bf16_stays_near_fp32():
    rows = examples()
    _, exact = gradient([lm_batch(rows)])
    for batches in ([lm_batch(rows)], [lm_batch([row]) for row in rows]):
        assert difference(gradient(batches, torch.bfloat16)[1], exact) < 0.03


def test_packing_does_not_change_the_gradient():
    rows = examples()
    _, reference = gradient([lm_batch(rows)])
    for budget in (1, 40, 70):
        assert difference(gradient(list(example_batches(rows, budget)))[1], reference) < 2e-6


def test_recomputing_activations_gives_the_same_bits():
    batch = [lm_batch(examples())]
    assert torch.equal(gradient(batch, recompute=2)[1].grad, gradient(batch)[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_composition_changes_no_logit(dtype):
    decoder = model().to(dtype)
    rows = [row.ids for row in examples()]

    def logits(*which):
        batch = lm_batch([Rendered(rows[i], [True] * len(rows[i])) for i in which])
        with torch.no_grad():
            hidden = decoder(batch.ids_N, batch.pos_N, Segments(batch.lengths))
            return decoder.logits(hidden).float().split(list(batch.lengths))

    alone = [logits(i)[0] for i in range(8)]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for together in (range(8), reversed(range(8)), (3, 0, 5)):
        which = list(together)
        for i, got in zip(which, logits(*which), strict=True):
            assert (got - alone[i]).abs().max() <= tolerance * alone[i].std()


def test_a_weight_of_zero_is_no_token():
    rows = examples()
    batch = lm_batch(rows)
    noise = torch.where(batch.weight_N > 0, batch.targets_N, (batch.targets_N + 5) % VOCAB)
    changed = type(batch)(batch.ids_N, batch.pos_N, batch.lengths, noise, batch.weight_N)
    assert torch.equal(gradient([changed])[1].grad, gradient([batch])[1].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_masters_and_weights_agree_after_steps_and_loss_falls(dtype, optimiser):
    decoder = model()
    trainee = Trainee(decoder, OptimConfig(name=optimiser), dtype)
    batch = lm_batch(examples())
    total = float(batch.weight_N.sum())
    losses = [
        train_step(trainee, [batch], lambda b: lm_loss(decoder, b, total), 5e-3).loss for _ in range(12)
    ]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.2) and losses[-1] < 0.6 * losses[0]
    params = dict(decoder.named_parameters())
    for slot in trainee.slots:
        assert params[slot.name].dtype == dtype
        assert torch.equal(params[slot.name], slot.of(trainee.optimiser.master).to(dtype))
    kinds = {slot.name: slot.kind for slot in trainee.slots}
    assert kinds["embed.weight"] == "decay" and kinds["norm.weight"] == "plain"
    assert kinds["blocks.0.mix.qkv.weight"] == ("muon" if optimiser == "muon" else "decay")
    if optimiser == "muon":
        rows = {slot.name: slot.rows for slot in trainee.slots}
        assert rows["blocks.0.mix.qkv.weight"] == (128, 128, 128) and rows["blocks.0.ffn.inp.weight"] == (
            384,
            384,
        )


def test_frozen_parameters_stay_and_kept_ones_are_fp32():
    decoder = model()
    decoder.embed.weight.requires_grad_(False)
    before = decoder.embed.weight.detach().clone()
    trainee = Trainee(decoder, OptimConfig(), torch.bfloat16, keep_fp32=("norm.",))
    batch = lm_batch(examples())
    train_step(trainee, [batch], lambda b: lm_loss(decoder, b, 10.0), 1e-2)
    assert torch.equal(decoder.embed.weight, before.bfloat16())
    assert decoder.norm.weight.dtype == torch.float32 and decoder.blocks[0].n1.weight.dtype == torch.bfloat16
    assert not torch.equal(decoder.norm.weight, torch.ones(128))


def test_a_stage_run_twice_gives_the_same_artefact_and_finite_curves(tmp_path):
    (tmp_path / "in").mkdir()
    training_toys.write_inputs(tmp_path / "in")
    arts = [training_toys.execute(tmp_path / f"store{i}", tmp_path / "in", "pretrain") for i in range(2)]
    assert arts[0].id == arts[1].id
    lines = [json.loads(line) for line in (arts[0].path / "metrics.jsonl").read_text().splitlines()]
    assert (
        lines[0]["loss"] == pytest.approx(math.log(291), abs=0.3) and lines[-1]["loss"] < lines[0]["loss"] - 2
    )
    assert len([line for line in lines if "eval" in line]) == 4


def test_loss_of_scaled_and_capped_logits_is_that_of_the_logits():
    torch.manual_seed(0)
    batch = lm_batch(examples())
    spec = replace(model().spec, logit_scale=3.0, logit_softcap=2.0)
    capped = Decoder(spec)
    capped.load_state_dict(model().state_dict())
    loss = lm_loss(capped, batch, float(batch.weight_N.sum()))
    logits = capped.logits(capped(batch.ids_N, batch.pos_N, Segments(batch.lengths)))
    want = F.cross_entropy(logits, batch.targets_N, reduction="none") @ batch.weight_N / batch.weight_N.sum()
    torch.testing.assert_close(loss.value, want, rtol=1e-5, atol=0)


def test_experts_add_their_balance_once_however_the_step_is_cut():
    """Equal batches: the weighted mean of their balance losses is that of one of them."""
    base = model().spec
    moe = MoE(n_expert=4, top_k=2, d_ff=24, aux_coef=0.5)
    layers = tuple(replace(x, ffn=FFN(kind="moe", d_ff=24, act="silu", moe=moe)) for x in base.layers)
    mixed = fresh(replace(base, layers=layers), 0)
    batch = lm_batch(examples())
    whole = lm_loss(mixed, batch, float(batch.weight_N.sum()))
    parts = [lm_loss(mixed, batch, 2 * float(batch.weight_N.sum())) for _ in range(2)]
    balance = whole.stats["balance"]
    assert balance > 0.5  # K = 2 choices at least, times the coefficient
    nll = whole.stats["nll"] / whole.stats["tokens"]
    torch.testing.assert_close(whole.value, nll + balance)
    torch.testing.assert_close(sum(one.value for one in parts), whole.value)
    trainee = Trainee(mixed, OptimConfig(name="muon"))
    assert {s.name.rsplit(".", 1)[-1] for s in trainee.slots if s.kind == "muon"} >= {"xin", "xout"}
    result = train_step(trainee, [batch], lambda b: lm_loss(mixed, b, float(b.weight_N.sum())), 1e-3)
    assert result.applied and not trainee.unreached
