"""model.decoder: what forward promises, apart from agreeing with transformers (tests/parity)."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.kernels.attention import Segments, reference_attention
from caravan.model import checkpoint, sizes
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel, ScoreHead
from caravan.model.positions import inverse_frequencies
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, RopeScaling, Spec
from caravan.types import Batch

NORM = Norm(eps=1e-5)
LAYER = Layer(
    attn=Attn(n_head=4, n_kv=2, head_dim=8, rope=Rope(dim=8), qk_norm=NORM),
    ffn=FFN(kind="glu", d_ff=24, act="silu"),
    norm=NORM,
)
SPEC = Spec(vocab=50, d=16, layers=(LAYER,) * 3, final_norm=NORM, max_pos=64)
LENGTHS = (9, 4, 1)
POS = torch.cat([torch.arange(n) for n in LENGTHS])
IDS = torch.randint(0, 50, (14,), generator=torch.Generator().manual_seed(0))


class Reference:
    """The slow attention as an `attend`; counts its calls."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.lengths, self.prefix = LENGTHS, None

    def __call__(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn: Attn
    ) -> torch.Tensor:
        self.layers.append(index)
        return reference_attention(LENGTHS, q, k, v, attn)


@pytest.fixture
def model() -> Decoder:
    return sizes.fresh(SPEC, seed=1)


def test_attend_is_all_the_decoder_knows_of_masks(model: Decoder) -> None:
    attend = Reference()
    slow = model(IDS, POS, attend)
    assert attend.layers == [0, 1, 2]
    assert torch.allclose(model(IDS, POS, Segments(LENGTHS)), slow, atol=1e-6)


def test_embeddings_may_be_given_instead_of_ids(model: Decoder) -> None:
    attend = Segments(LENGTHS)
    assert torch.equal(model(None, POS, attend, inputs_embeds=model.embed(IDS)), model(IDS, POS, attend))


@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_activations_changes_no_gradient(model: Decoder, every: int) -> None:
    grads = []
    for k in (0, every):
        model.zero_grad()
        model.checkpoint_every = k
        model(IDS, POS, Segments(LENGTHS)).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_angles_stay_exact_in_a_bfloat16_model(model: Decoder) -> None:
    far = torch.tensor([30_000])
    before = model.angles(far)
    half = model.bfloat16()
    for (c0, s0), (c1, s1) in zip(before, half.angles(far), strict=True):
        assert c1.dtype == torch.float32 and torch.equal(c0, c1) and torch.equal(s0, s1)


def test_bfloat16_is_close_and_stays_bfloat16(model: Decoder) -> None:
    exact = model(IDS, POS, Segments(LENGTHS))
    half = copy.deepcopy(model).bfloat16()(IDS, POS, Segments(LENGTHS))
    assert half.dtype == torch.bfloat16
    assert ((half.float() - exact).norm() / exact.norm()).item() < 0.03


def test_other_tokens_of_the_batch_change_nothing(model: Decoder) -> None:
    together = model(IDS, POS, Segments(LENGTHS))
    alone = model(IDS[9:13], POS[9:13], Segments((4,)))
    assert torch.allclose(together[9:13], alone, atol=1e-6)


def test_tied_head_is_the_embedding(model: Decoder) -> None:
    assert model.head_weight() is model.embed.weight and model.head_bias is None
    untied = sizes.fresh(replace(SPEC, tie=False, head_bias=True, logit_scale=2.0), seed=1)
    hidden = torch.randn(2, 3, 16)
    want = 2.0 * (hidden @ untied.head.weight.T + untied.head_bias)
    assert torch.allclose(untied.logits(hidden), want, atol=1e-6)


def test_headless_model_has_no_logits() -> None:
    model = sizes.fresh(replace(SPEC, head=False, tie=False), seed=1)
    assert model.head is None
    with pytest.raises(AssertionError):
        model.logits(torch.zeros(1, 16))


def test_scaled_frequencies_by_hand() -> None:
    plain = 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)
    linear, one = inverse_frequencies(Rope(dim=8, scaling=RopeScaling(kind="linear", factor=4.0)))
    assert one == 1.0 and torch.allclose(linear, plain / 4)
    scaling = RopeScaling(
        kind="llama3", factor=8.0, original_context=100, low_freq_factor=1.0, high_freq_factor=4.0
    )
    llama3, _ = inverse_frequencies(Rope(dim=8, scaling=scaling))
    # turns in 100 positions: 15.9 kept; 1.59 in between; 0.159 and 0.0159 stretched
    keep = (100 * 0.1 / (2 * math.pi) - 1) / 3
    want = torch.tensor([1.0, 0.1 * (keep + (1 - keep) / 8), 0.01 / 8, 0.001 / 8])
    assert torch.allclose(llama3, want, rtol=1e-5)
    _, factor = inverse_frequencies(
        Rope(dim=8, scaling=RopeScaling(kind="yarn", factor=4.0, original_context=100))
    )
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def batch() -> Batch:
    return Batch(IDS, POS, LENGTHS, IDS, torch.ones(14))


def test_scores_are_the_values_at_the_last_tokens(model: Decoder) -> None:
    reward = RewardModel(model, ScoreHead(16, bias=0.5))
    values, scores = reward.values(batch()), reward.scores(batch())
    assert values.shape == (14,) and torch.allclose(scores, values[[8, 12, 13]])
    reward.score.bias.fill_(0.0)
    assert torch.allclose(reward.scores(batch()), scores + 0.5)


def test_score_head_is_fp32_on_a_bfloat16_decoder(model: Decoder) -> None:
    reward = RewardModel(model.bfloat16())
    assert reward.score.weight.dtype == torch.float32 and reward.scores(batch()).dtype == torch.float32
    wide = ScoreHead(4095, generator=torch.Generator().manual_seed(0))
    assert float(wide.weight.std()) == pytest.approx(1 / 64, rel=0.05)
    assert "bias" not in dict(wide.named_parameters())


def test_a_trained_model_says_what_it_should(kit: Path) -> None:
    model = checkpoint.load_model(kit / "model" / "stories260k_hf")
    want = json.loads((kit / "model" / "greedy_first_32.json").read_text())["ids"]
    ids = want[:1]
    with torch.no_grad():
        while len(ids) < len(want):
            hidden = model(torch.tensor(ids), torch.arange(len(ids)), Segments((len(ids),)))
            ids.append(int(model.logits(hidden[-1]).argmax()))
    assert ids == want
