"""GPTQ against its definition, and against rounding to nearest."""

import pytest
import torch

from caravan.compress import gptq, rtn
from caravan.kernels.quantized import expand


def correlated(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    strength = torch.linspace(-2, 1, width).exp()
    return (torch.randn(rows, width, generator=generator) * strength) @ mix


def moments(x: torch.Tensor) -> torch.Tensor:
    hessian = gptq.Hessian()
    for part in x.split(100):
        hessian.add(part[None])
    return hessian.matrix()


def test_moments_are_a_mean() -> None:
    x = torch.randn(250, 12)
    assert torch.allclose(moments(x), x.T @ x / 250, atol=1e-5)


def naive(weight: torch.Tensor, H: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The optimal-brain update, one column at a time, the inverse worked out anew each time."""
    scale = rtn.scales(weight, bits, group).repeat_interleave(group, 1).double()
    W, H = weight.double().clone(), H.double().clone()
    H.diagonal().add_(0.01 * float(H.diagonal().mean()))
    left = H.diagonal().argsort(descending=True, stable=True).tolist()
    q = torch.zeros_like(W)
    while left:
        i = left[0]
        inverse = torch.linalg.inv(H[left][:, left])
        q[:, i] = (W[:, i] / scale[:, i]).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        error = (W[:, i] - q[:, i] * scale[:, i]) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q.to(torch.int8)


@pytest.mark.parametrize("width", [24, 160])
def test_equals_the_column_by_column_definition(width: int) -> None:
    x = correlated(600, width, 1)
    weight = torch.randn(10, width)
    q, _ = gptq.quantise(weight, moments(x), 4, 8)
    want = naive(weight, moments(x), 4, 8)
    # a value within rounding of a half step may fall either way and carries its columns along
    assert (q != want).float().mean() < 0.02


@pytest.mark.parametrize("group", [32, 128])
def test_output_error_is_well_below_rounding(group: int) -> None:
    torch.manual_seed(0)
    x, fresh = correlated(4096, 256, 1), correlated(2000, 256, 2)
    weight = torch.randn(128, 256)

    def error(q: torch.Tensor, scale: torch.Tensor) -> float:
        wanted = fresh @ weight.T
        return float(((fresh @ expand(q, scale).T - wanted) ** 2).sum() / (wanted**2).sum())

    plain = error(*rtn.quantise(weight, 4, group))
    better = error(*gptq.quantise(weight, moments(x), 4, group))
    assert better < 0.6 * plain


def test_inputs_never_seen_become_zero_and_singular_moments_are_survived() -> None:
    x = torch.randn(3, 64)
    x[:, 5] = 0
    q, scale = gptq.quantise(torch.randn(8, 64), moments(x), 4, 32)
    assert bool((q[:, 5] == 0).all()) and bool(torch.isfinite(scale).all())


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        gptq.inverse_factor(torch.full((4, 4), float("nan")), 0.01)
