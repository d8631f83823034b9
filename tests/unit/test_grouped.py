"""kernels.grouped: grouped products against the loop over experts, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caravan.kernels import grouped

# expert sizes: even, uneven with an empty expert, all on one, none at the ends
SIZES = {
    "even": (3, 3, 3, 3),
    "uneven": (1, 0, 5, 2),
    "one": (0, 0, 9, 0),
    "skewed": (1, 0, 0, 0, 30, 0, 0, 1),
}
WIDTHS = {"aligned": (16, 24), "odd": (7, 5), "half_odd": (8, 10)}


def operands(
    sizes: tuple[int, ...], width: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    end = torch.tensor(sizes).cumsum(0).int()
    return make(sum(sizes), width[0]), make(len(sizes), width[1], width[0]), end


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_product_and_gradients_are_those_of_the_loop(sizes: str, width: str, dtype: torch.dtype) -> None:
    x, w, end = operands(SIZES[sizes], WIDTHS[width], dtype)
    dy = torch.randn(x.shape[0], w.shape[1], dtype=torch.float64).to(dtype)
    got = grouped.grouped_linear(x, w, end)
    want = grouped.reference_grouped(x, w, end)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert torch.allclose(got, want, atol=tolerance, rtol=tolerance)
    ours, theirs = torch.autograd.grad(got, (x, w), dy), torch.autograd.grad(want, (x, w), dy)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sizes", SIZES)
def test_double_precision_gradient(sizes: str) -> None:
    x, w, end = operands(SIZES[sizes], WIDTHS["odd"], torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped.grouped_linear(x, w, end), (x, w), fast_mode=True)


def test_the_machines_own_product_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(grouped, "_tiled", lambda *a: used.append("tiled") or grouped.reference_grouped(
        a[0], a[1].transpose(1, 2), a[2]))  # fmt: skip
    for width in WIDTHS.values():
        grouped.grouped_linear(*operands(SIZES["even"], width, torch.float32))
    assert grouped._native("cpu", torch.float32) and used == ["tiled"]  # only where a row is 28 bytes


def test_a_machine_whose_product_is_wrong_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        return torch.zeros((a.shape[0], b.shape[-1]) if b.dim() == 3 else (len(offs), a.shape[0], b.shape[1]))

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", zeros)
    grouped._native.cache_clear()
    try:
        assert not grouped._native("cpu", torch.float32)
    finally:
        grouped._native.cache_clear()


@pytest.mark.parametrize("width", WIDTHS)
def test_operators_are_what_they_say_to_the_compiler(width: str) -> None:
    x, w, end = operands(SIZES["uneven"], WIDTHS[width], torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.caravan.grouped.default, (x, w, end, True), test_utils=checks)
    back = grouped.reference_grouped(x, w, end).detach()
    torch.library.opcheck(
        torch.ops.caravan.grouped.default, (back, w.detach(), end, False), test_utils=checks
    )
    torch.library.opcheck(torch.ops.caravan.grouped_outer.default, (back, x.detach(), end), test_utils=checks)


def test_no_rows_at_all() -> None:
    x, w, end = operands((0, 0), (16, 8), torch.float32)
    y = grouped.grouped_linear(x, w, end)
    y.sum().backward()
    assert y.shape == (0, 8) and w.grad is not None and not w.grad.any()


def test_tiles_never_hold_more_than_twice_the_rows_or_one_tile_more_per_expert() -> None:
    for sizes in SIZES.values():
        rows, experts = sum(sizes), len(sizes)
        tiles = grouped.tile(torch.tensor(sizes).cumsum(0).int(), rows)
        assert tiles.number * tiles.rows <= max(
            grouped.MAX_WASTE * rows, rows + experts * -(-rows // experts)
        )
        assert len(set(tiles.cell_M.tolist())) == rows


def test_grouping_sorts_by_expert_and_keeps_the_order_of_tokens() -> None:
    groups = grouped.group(torch.tensor([[2, 0], [0, 3], [2, 3]]), 4)
    assert groups.token_M.tolist() == [0, 1, 0, 2, 1, 2]
    assert groups.end_X.tolist() == [2, 2, 4, 6] and groups.end_X.dtype == torch.int32
    assert groups.row_NK.tolist() == [[2, 0], [1, 4], [3, 5]]


def test_dispatch_and_combine_against_plain_indexing() -> None:
    g = torch.Generator().manual_seed(1)
    chosen = torch.rand(6, 5, generator=g).topk(2, -1)[1]
    groups = grouped.group(chosen, 5)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, 2, generator=g, dtype=torch.float64, requires_grad=True)
    scale_X = torch.arange(1, 6, dtype=torch.float64)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        rows = grouped.dispatch(x, groups)
        expert_M = torch.searchsorted(groups.end_X, torch.arange(12, dtype=torch.int32), right=True)
        return grouped.combine(rows * scale_X[expert_M, None], weight, groups)

    want = x * (weight * scale_X[chosen]).sum(1, keepdim=True)
    assert torch.allclose(ours(x, weight), want)
    assert torch.autograd.gradcheck(ours, (x, weight))


def test_bfloat16_rows_are_weighed_in_the_weights_type() -> None:
    groups = grouped.group(torch.tensor([[0, 1]]), 2)
    rows = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)
    total = grouped.combine(rows, torch.tensor([[0.3341, 0.3327]]), groups)
    assert total.dtype == torch.bfloat16
    assert total.item() == pytest.approx(0.0014, rel=2**-8)  # 0.00195 were the weights rounded first


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    chosen = torch.rand(6, 4).topk(2, -1)[1]
    x, w, _ = operands((6,), (16, 8), torch.float32)
    w = w.expand(4, -1, -1).clone().detach().requires_grad_()

    def whole(x: Tensor, w: Tensor) -> Tensor:
        groups = grouped.group(chosen, 4)
        return grouped.combine(grouped.grouped_linear(grouped.dispatch(x, groups), w, groups.end_X),
                               torch.ones(6, 2), groups)  # fmt: skip

    got, want = torch.compile(whole, fullgraph=True)(x, w), whole(x, w)
    assert torch.allclose(got, want, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(want.sum(), (x, w)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-4)
