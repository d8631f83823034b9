"""Packing, reading and multiplying integer weights."""

import pytest
import torch
import torch.nn.functional as F

from caravan.compress import rtn
from caravan.kernels import quantized
from caravan.kernels.quantized import QuantLinear, dequantise, expand, pack, read_integers, scheme, unpack
from caravan.types import UserError

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head"],
}


def test_known_word_of_the_layout() -> None:
    q = torch.tensor([[-8, -7, -6, -5, 0, 1, 2, 7]], dtype=torch.int8)
    assert pack(q, 4).item() & 0xFFFFFFFF == 0xFA983210
    eight = torch.tensor([[-128, 0, 127, 1]], dtype=torch.int8)
    assert pack(eight, 8).item() & 0xFFFFFFFF == 0x81FF8000


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [32, 40, 7])
def test_packing_round_trip(bits: int, inputs: int) -> None:
    low = -(1 << (bits - 1))
    q = torch.randint(low, -low, (5, inputs), dtype=torch.int8)
    packed = pack(q, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-inputs * bits // 32))
    assert torch.equal(unpack(packed, bits, inputs), q)


def stored(N: int = 6, K: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    q, scale = rtn.quantise(weight, 4, 32)
    tensors = {
        "a.weight_packed": pack(q, 4),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([N, K]),
        "a.bias": torch.zeros(N),
        "norm.weight": torch.ones(3),
    }
    return tensors, weight


def test_dequantised_folder_has_the_usual_names() -> None:
    tensors, weight = stored()
    plain = dequantise(tensors, CONFIG)
    assert set(plain) == {"a.weight", "a.bias", "norm.weight"} and len(plain) == 3
    assert (plain["a.weight"] - weight).abs().max() <= tensors["a.weight_scale"].max() / 2 + 1e-6
    assert "a.weight_packed" not in plain and plain["norm.weight"].equal(torch.ones(3))
    turned = dequantise(tensors, {**CONFIG, "transposed": True})
    assert torch.equal(turned["a.weight"], plain["a.weight"].T)


@pytest.mark.parametrize(
    "change",
    [{"quant_method": "gptq"}, {"format": "int-quantized"}, {"config_groups": {}}]
    + [
        {"config_groups": {"g": {"weights": {**WEIGHTS, **w}}}}
        for w in ({"num_bits": 3}, {"symmetric": False}, {"actorder": "group"}, {"strategy": "tensor"})
    ],
)
def test_other_layouts_are_refused(change: dict) -> None:
    with pytest.raises(UserError, match="not read"):
        scheme({**CONFIG, **change})


def test_damaged_parts_are_named() -> None:
    tensors, _ = stored()
    del tensors["a.weight_scale"]
    with pytest.raises(UserError, match=r"a\.weight_scale"):
        read_integers(tensors, "a", 4)
    tensors, _ = stored()
    tensors["a.weight_shape"] = torch.tensor([6, 128])
    with pytest.raises(UserError, match="6 x 128"):
        read_integers(tensors, "a", 4)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 128), (8, 32)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_quantised_linear_equals_the_definition(bits: int, group: int, rows: int) -> None:
    torch.manual_seed(rows)
    q, scale = rtn.quantise(torch.randn(48, 128), bits, group)
    bias = torch.randn(48)
    layer = QuantLinear(q, scale, bits, bias)
    x = torch.randn(2, rows, 128)
    want = F.linear(x, expand(q, scale), bias)
    got = layer(x)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got - want).norm() < 0.01 * want.norm()
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", [7, 33, 40, 172])
def test_inputs_that_fill_no_vector_are_padded(inputs: int) -> None:
    """The bare operator reads past them; repeated, because what lies there is luck."""
    torch.manual_seed(0)
    q, scale = rtn.quantise(torch.randn(48, inputs), 8, inputs)
    layer = QuantLinear(q, scale, 8)
    for _ in range(10):
        x = torch.randn(3, inputs)
        want = F.linear(x, expand(q, scale))
        assert (layer(x) - want).norm() < 0.01 * want.norm()


def test_fallback_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "packed_product_works", lambda bits: False)
    q, scale = rtn.quantise(torch.randn(48, 128), 4, 32)
    layer = QuantLinear(q, scale, 4)
    assert not layer.fast
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), F.linear(x, expand(q, scale)))


def test_a_broken_operator_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_int4", lambda x, *rest: torch.zeros(len(x), 48, dtype=x.dtype))
    assert not quantized.packed_product_works.__wrapped__(4)
