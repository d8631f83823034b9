"""kernels norm, rope, glu: each fast form against its slow reference, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from caravan.kernels.glu import reference_swiglu, swiglu
from caravan.kernels.norm import reference_rms_norm, rms_norm
from caravan.kernels.rope import reference_rotate, rotate, split_rotate

COS = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
SIN = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


def split_reference(qkv: Tensor) -> Tensor:
    q, k, v = qkv.split([2, 1, 1], 1)
    return torch.cat([reference_rotate(q, COS, SIN), reference_rotate(k, COS, SIN), v], 1)


# name: (fast, slow, shapes of the inputs)
PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, g: rms_norm(x, g, 1e-2), lambda x, g: reference_rms_norm(x, g, 1e-2),
                 ((5, 8), (8,))),
    "rms_norm_heads": (lambda x, g: rms_norm(x, g, 1e-2), lambda x, g: reference_rms_norm(x, g, 1e-2),
                       ((5, 2, 8), (8,))),
    "swiglu": (swiglu, reference_swiglu, ((5, 12),)),
    "rotate": (lambda x: rotate(x, COS, SIN), lambda x: reference_rotate(x, COS, SIN), ((5, 2, 6),)),
    "rotate_part": (lambda x: rotate(x, COS, SIN), lambda x: reference_rotate(x, COS, SIN), ((5, 2, 9),)),
    "split_rotate": (lambda x: torch.cat(split_rotate(x, COS, SIN, 2, 1), 1), split_reference, ((5, 4, 7),)),
}  # fmt: skip


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in PAIRS[name][2]
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_double_precision_gradients(name: str) -> None:
    fast, slow, _ = PAIRS[name]
    arguments = inputs(name, torch.float64)
    assert torch.allclose(fast(*arguments), slow(*arguments), atol=1e-12)
    assert torch.autograd.gradcheck(fast, arguments)


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_is_as_near_to_the_truth_as_the_reference(name: str) -> None:
    fast, slow, _ = PAIRS[name]
    results = {}
    for label, function, dtype in (("exact", slow, torch.float64), ("slow", slow, torch.bfloat16),
                                   ("fast", fast, torch.bfloat16)):  # fmt: skip
        arguments = [x.detach().to(dtype).requires_grad_() for x in inputs(name, torch.bfloat16)]
        out = function(*arguments)
        assert out.dtype == dtype
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(torch.bfloat16).to(dtype))
        results[label] = torch.cat([out.detach().flatten(), *(x.grad.flatten() for x in arguments)]).double()
    slow_error = (results["slow"] - results["exact"]).norm()
    assert (results["fast"] - results["exact"]).norm() <= 1.2 * slow_error + 1e-9


def test_norm_of_bfloat16_casts_before_it_multiplies() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gain = torch.rand(32, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(rms_norm(x, gain, 1e-6), reference_rms_norm(x, gain, 1e-6))
