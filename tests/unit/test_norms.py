"""model.norms: every variant against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from caravan.model.norms import RMSNorm, WideNorm, make_norm
from caravan.model.spec import Norm


def definition(x: torch.Tensor, norm: Norm, module: torch.nn.Module) -> torch.Tensor:
    """In double precision."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    y = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    weights = dict(module.named_parameters())
    if norm.affine:
        y = y * (weights["weight"].double() + (1.0 if norm.unit_offset else 0.0))
        if norm.bias:
            y = y + weights["bias"].double()
    return y


@pytest.mark.parametrize(
    ("kind", "bias", "affine", "unit", "wide"),
    [v for v in itertools.product(("rms", "layer"), *[(False, True)] * 4) if v[0] == "layer" or not v[1]],
)
def test_every_variant_is_its_definition(kind: str, bias: bool, affine: bool, unit: bool, wide: bool) -> None:
    norm = Norm(kind=kind, eps=1e-3, bias=bias, affine=affine, unit_offset=unit, gain_fp32=wide)
    for shape in (8, (3, 8)):
        module = make_norm(shape, norm)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert len(list(module.parameters())) == (affine + (affine and bias))
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(module(x).double(), definition(x, norm, module), atol=1e-5)
        half = module.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.double(), definition(x, norm, module), atol=0.1)


def test_the_common_ones_take_the_fast_way() -> None:
    assert isinstance(make_norm(8, Norm()), RMSNorm)
    assert isinstance(make_norm(8, Norm(kind="layer", bias=True)), torch.nn.LayerNorm)
    assert isinstance(make_norm(8, Norm(unit_offset=True)), WideNorm)
    assert isinstance(make_norm(8, None), torch.nn.Identity)


def test_the_gain_may_be_multiplied_before_the_cast() -> None:
    """In bfloat16 the order is seen: 1 + w in fp32 keeps what the cast of the gain would lose."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    errors = {}
    for wide in (False, True):
        module = make_norm(32, Norm(unit_offset=True, gain_fp32=wide)).bfloat16()
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-0.02, 0.02, 32))
        exact = definition(x, Norm(unit_offset=True), module)
        errors[wide] = float((module(x).double() - exact).norm())
    assert errors[True] < 0.8 * errors[False]


def test_fresh_gains_do_nothing() -> None:
    for norm in (Norm(), Norm(unit_offset=True), Norm(kind="layer", unit_offset=True, bias=True)):
        module, x = make_norm(8, norm), torch.randn(2, 8)
        gainless = Norm(kind=norm.kind, eps=norm.eps, affine=False)
        assert torch.allclose(module(x), make_norm(8, gainless)(x), atol=1e-6)
