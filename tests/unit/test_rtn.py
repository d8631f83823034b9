"""Rounding to nearest against numbers worked by hand."""

import pytest
import torch

from caravan.compress import rtn
from caravan.kernels.quantized import expand


def test_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.4, 0.6, -7.0], [0.0, 0.0, 0.0, 0.0]])
    q, scale = rtn.quantise(weight, 4, 4)
    assert scale.tolist() == [[1.0], [1.0]]
    assert q.tolist() == [[7, -3, 1, -7], [0, 0, 0, 0]]
    q, scale = rtn.quantise(torch.tensor([[12.7, -0.1, 0.26, 3.0]]), 8, 2)
    assert torch.allclose(scale, torch.tensor([[0.1, 3 / 127]]))
    assert q.tolist() == [[127, -1, 11, 127]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 128)
    q, scale = rtn.quantise(weight, bits, 32, dtype)
    assert scale.dtype == dtype and q.dtype == torch.int8
    step = scale.float().repeat_interleave(32, 1)
    # a scale rounded down to 16 bits may clip the largest value by its own rounding
    slack = (1 << (bits - 1)) * 2**-8 if dtype == torch.bfloat16 else 1e-4
    assert bool(((weight - expand(q, scale)).abs() <= step * (0.5 + slack)).all())


def test_smaller_groups_and_more_bits_are_closer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 256)

    def error(bits: int, group: int) -> float:
        return float((weight - expand(*rtn.quantise(weight, bits, group))).norm() / weight.norm())

    assert error(8, 256) < 0.01 < error(4, 32) < error(4, 128) < error(4, 256) < 0.2
