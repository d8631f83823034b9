"""model.decoder: what forward promises, apart from agreeing with transformers (tests/parity)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caravan.kernels.attention import Segments, reference_attention
from caravan.model import checkpoint, sizes
from caravan.model.decoder import Block, Decoder
from caravan.model.heads import RewardModel, ScoreHead
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
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


# ------------------------------------------------------------------------------------ knobs, one by one


ATTEND = Segments(LENGTHS)
FORMS: dict[str, dict[str, object]] = {
    "pre": {},
    "post-sum": {"pre": False, "post": "sum"},
    "sandwich": {"post": "out"},
    "out-only": {"pre": False, "post": "out"},
    "no-norm-before-mixer": {"pre_mixer": False},
    "from-norm": {"res_from_norm": True, "alpha": 2.5},
    "weighted": {"alpha": 0.7, "beta": 0.3},
    "deepnorm": {"pre": False, "post": "sum", "alpha": 1.8},
    "parallel": {"parallel": True},
    "parallel-shared": {"parallel": True, "shared_norm": True, "beta": 0.5},
    "mixer-only": {"ffn": None},
    "mixer-only-out": {"ffn": None, "post": "out", "beta": 0.5},
}


def by_hand(block: Block, layer: Layer, x: torch.Tensor, angles: object) -> torch.Tensor:
    """A block from its Layer, in the words of the Layer's docstring."""
    mixer = lambda h: block.mix(h, 0, angles, ATTEND)  # noqa: E731
    if layer.parallel:
        second = block.n1 if layer.shared_norm else block.n2
        return layer.alpha * x + layer.beta * (mixer(block.n1(x)) + block.ffn(second(x), 0, ATTEND))
    parts = [(block.n1, block.p1, mixer, layer.pre and layer.pre_mixer)]
    if layer.ffn:
        parts.append((block.n2, block.p2, lambda h: block.ffn(h, 0, ATTEND), layer.pre))
    for before, after, f, normed in parts:
        h = before(x) if normed else x
        y = after(f(h)) if layer.post == "out" else f(h)
        x = layer.alpha * (h if layer.res_from_norm else x) + layer.beta * y
        x = after(x) if layer.post == "sum" else x
    return x


@pytest.mark.parametrize("form", FORMS)
def test_residual_forms(form: str) -> None:
    layer = replace(LAYER, **FORMS[form])
    model = sizes.fresh(replace(SPEC, layers=(layer,)), seed=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x = torch.randn(14, 16, generator=torch.Generator().manual_seed(5))
    angles = model.angles(POS)
    got = model.blocks[0](x, 0, angles, ATTEND)
    assert torch.allclose(got, by_hand(model.blocks[0], layer, x, angles), atol=1e-6)
    norms = [n for n, p in model.blocks[0].named_parameters() if n.split(".")[0] in ("n1", "n2", "p1", "p2")]
    want = {"pre": 2, "sandwich": 4, "mixer-only": 1, "mixer-only-out": 2, "no-norm-before-mixer": 1,
            "parallel-shared": 1}.get(form, 2)  # fmt: skip
    assert len(norms) == want, norms


def test_the_embedding_is_scaled_widened_placed_and_normed() -> None:
    norm = Norm(kind="layer", bias=True)
    spec = replace(SPEC, layers=(), final_norm=None, embed_dim=6, embed_scale=3.0, pos="learned",
                   pos_offset=2, type_vocab=2, embed_norm=norm)  # fmt: skip
    model = sizes.fresh(spec, seed=1)
    types = (POS > 2).long()
    wide = 3.0 * model.embed(IDS) @ model.pin.weight.T + model.pos.weight[POS + 2] + model.seg.weight[types]
    want = torch.nn.functional.layer_norm(wide, (16,), eps=norm.eps) @ model.pout.weight.T
    got = model(IDS, POS, ATTEND, types_N=types)
    assert got.shape == (14, 6) and torch.allclose(got, want, atol=1e-6)
    assert model.pos.weight.shape == (66, 16) and model.logits(got).shape == (14, 50)
    first = model(IDS, POS, ATTEND)
    assert torch.equal(first, model(IDS, POS, ATTEND, types_N=torch.zeros_like(IDS)))


def test_sinusoids_have_no_weights() -> None:
    model = sizes.fresh(replace(SPEC, layers=(), final_norm=None, pos="sinusoid", pos_offset=2), seed=1)
    assert [n for n, _ in model.named_parameters()] == ["embed.weight"]
    added = model(IDS, POS, ATTEND) - model.embed(IDS)
    assert torch.allclose(added[0, :8], torch.sin(2.0 * 1e-4 ** (torch.arange(8) / 7)), atol=1e-6)


def test_logits_are_scaled_then_capped_and_rows_may_have_length_one() -> None:
    hidden = torch.randn(3, 16)
    capped = sizes.fresh(replace(SPEC, logit_scale=4.0, logit_softcap=2.0), seed=1)
    want = 2.0 * torch.tanh(4.0 * (hidden @ capped.embed.weight.T) / 2.0)
    assert torch.allclose(capped.logits(hidden), want, atol=1e-6)
    normed = sizes.fresh(replace(SPEC, tie=False, head_norm=True), seed=1)
    assert torch.allclose(normed.head_weight().norm(dim=-1), torch.ones(50))
    normed.head_weight().sum().backward()
    assert normed.head.weight.grad is not None


def test_a_wide_residual_stays_fp32_between_bfloat16_layers() -> None:
    model = sizes.fresh(replace(SPEC, residual_fp32=True), seed=1).bfloat16()
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert model(IDS, POS, ATTEND).dtype == torch.bfloat16
    assert seen == [torch.float32] * 3


def test_equal_layers_take_their_number_as_an_argument() -> None:
    """So that a compiled block is compiled once: nothing in it says which layer it is."""
    model = sizes.fresh(SPEC, seed=1)
    first, last = (
        {k: v for k, v in vars(block).items() if isinstance(v, int | float)} for block in model.blocks[::2]
    )
    assert first == last
