"""Grouped matrix products: many experts, each on its own rows, in one call and without a Python loop.

N tokens, K experts chosen per token, M = N * K rows, X experts, D input width, F output width, L tiles of
T rows.

Rows are sorted by expert once (`Grouping`); a product then takes rows [M, D], weights [X, F, D] and the row
at which each expert ends. torch's own grouped product is used where a self-test on the device and in the
type says that it is there and right. Elsewhere (fp64, widths that are no multiple of 16 bytes) each expert's
rows are cut into tiles, padded with zeros, and go through one batched product: at most M + X T rows, however
uneven the choice.

Everything here is deterministic: tokens are gathered, never added up in an order left to the machine.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NATIVE_TYPES = (torch.float32, torch.bfloat16)
ALIGNMENT = 16
"""Bytes: torch's grouped product wants every row to start at a multiple of this."""
MAX_WASTE = 2
"""One tile per expert is used while it holds at most this many times the real rows."""


class Grouping(NamedTuple):
    """Which row goes where when rows are sorted by expert."""

    token_M: Tensor
    """Token of each sorted row."""
    row_NK: Tensor
    """Sorted row of each choice of each token."""
    end_X: Tensor
    """int32: the sorted row at which each expert's rows end."""


def group(chosen_NK: Tensor, n_expert: int) -> Grouping:
    """Sort the choices [N, K] (expert numbers) by expert; among equals the order of tokens stays."""
    flat_M = chosen_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    row_M = torch.empty_like(order_M).scatter_(
        0, order_M, torch.arange(order_M.shape[0], device=order_M.device)
    )
    end_X = torch.searchsorted(
        flat_M[order_M], torch.arange(n_expert, device=flat_M.device), right=True, out_int32=True
    )
    return Grouping(order_M // chosen_NK.shape[1], row_M.view_as(chosen_NK), end_X)


def reference_grouped(x_MD: Tensor, w_XFD: Tensor, end_X: Tensor) -> Tensor:
    """The definition: rows end[x-1]:end[x] times the transposed weight of expert x."""
    parts, start = [], 0
    for w_FD, end in zip(w_XFD, end_X.tolist(), strict=True):
        parts.append(x_MD[start:end] @ w_FD.T)
        start = end
    return torch.cat(parts)


def reference_outer(dy_MF: Tensor, x_MD: Tensor, end_X: Tensor) -> Tensor:
    """The definition of the weights' gradient [X, F, D]: dy^T x over each expert's rows."""
    parts, start = [], 0
    for end in end_X.tolist():
        parts.append(dy_MF[start:end].T @ x_MD[start:end])
        start = end
    return torch.stack(parts)


@functools.cache
def _native(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product exists on this device in this type and agrees with the definition,
    for an empty expert too."""
    if dtype not in NATIVE_TYPES or not hasattr(F, "grouped_mm"):
        return False
    x = torch.linspace(-1, 1, 9 * 16, device=device).view(9, 16).to(dtype)
    w = torch.linspace(1, -1, 4 * 8 * 16, device=device).view(4, 8, 16).to(dtype)
    end = torch.tensor([4, 4, 8, 9], dtype=torch.int32, device=device)
    try:
        y = F.grouped_mm(x, w.transpose(1, 2), offs=end)
        back = F.grouped_mm(y, w, offs=end)
        outer = F.grouped_mm(y.T, x, offs=end)
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        return False
    checks = (
        (y, reference_grouped(x, w, end)),
        (back, reference_grouped(y, w.transpose(1, 2), end)),
        (outer, reference_outer(y, x, end)),
    )
    return all(torch.allclose(got.float(), want.float(), rtol=0.02, atol=0.05) for got, want in checks)


def _fits(*tensors: Tensor) -> bool:
    """Whether torch's grouped product takes these operands: type, device, alignment, some rows at all."""
    first = tensors[0]
    return (
        all(
            t.shape[-1] * t.element_size() % ALIGNMENT == 0
            and t.data_ptr() % ALIGNMENT == 0
            and t.dtype == first.dtype
            and t.is_contiguous()
            and t.numel() > 0
            for t in tensors
        )
        and _native(first.device.type, first.dtype)
    )  # fmt: skip


class Tiles(NamedTuple):
    """Rows of each expert, cut into tiles of T and padded with zeros."""

    cell_M: Tensor
    """Cell of each sorted row, counted over all tiles."""
    expert_L: Tensor | None
    """Expert of each tile; None: tile x is expert x."""
    number: int
    rows: int

    def spread(self, x_MD: Tensor) -> Tensor:
        """[M, D] -> [L, T, D], zeros where there is no row."""
        cells = x_MD.new_zeros(self.number * self.rows, x_MD.shape[1])
        return cells.index_copy_(0, self.cell_M, x_MD).view(self.number, self.rows, -1)


def tile(end_X: Tensor, rows: int) -> Tiles:
    """One tile per expert, as long as the busiest needs; several shorter ones if that wastes too much."""
    n_expert = end_X.shape[0]
    begin_X = F.pad(end_X, (1, 0))[:-1].long()
    size_X = end_X.long() - begin_X
    longest = int(size_X.max())
    row_M = torch.arange(rows, device=end_X.device, dtype=end_X.dtype)
    expert_M = torch.searchsorted(end_X, row_M, right=True)
    within_M = row_M - begin_X[expert_M]
    if longest * n_expert <= MAX_WASTE * rows:
        return Tiles(expert_M * longest + within_M, None, n_expert, longest)
    height = -(-rows // n_expert)
    tiles_X = (size_X + height - 1) // height
    first_X = tiles_X.cumsum(0) - tiles_X
    expert_L = torch.repeat_interleave(torch.arange(n_expert, device=end_X.device), tiles_X)
    return Tiles(first_X[expert_M] * height + within_M, expert_L, len(expert_L), height)


def _tiled(x_MD: Tensor, w_XDF: Tensor, end_X: Tensor) -> Tensor:
    if not x_MD.shape[0]:
        return x_MD.new_zeros(0, w_XDF.shape[2])
    tiles = tile(end_X, x_MD.shape[0])
    w_LDF = w_XDF if tiles.expert_L is None else w_XDF[tiles.expert_L]
    y_LTF = torch.bmm(tiles.spread(x_MD), w_LDF)
    return y_LTF.flatten(0, 1).index_select(0, tiles.cell_M)


def _tiled_outer(dy_MF: Tensor, x_MD: Tensor, end_X: Tensor) -> Tensor:
    if not x_MD.shape[0]:
        return x_MD.new_zeros(end_X.shape[0], dy_MF.shape[1], x_MD.shape[1])
    tiles = tile(end_X, x_MD.shape[0])
    dw_LFD = torch.bmm(tiles.spread(dy_MF).transpose(1, 2), tiles.spread(x_MD))
    if tiles.expert_L is None:
        return dw_LFD
    return dw_LFD.new_zeros(end_X.shape[0], *dw_LFD.shape[1:]).index_add_(0, tiles.expert_L, dw_LFD)


# The two operators are opaque to torch.compile: what they choose depends on the machine and on the data.


@torch.library.custom_op("caravan::grouped", mutates_args=())
def _grouped(x_MD: Tensor, w: Tensor, end_X: Tensor, transposed: bool) -> Tensor:
    """x [M, D] times w[expert]: w is [X, F, D] if `transposed` (as nn.Linear stores it), else [X, D, F]."""
    x_MD, w = x_MD.contiguous(), w.contiguous()
    w_XDF = w.transpose(1, 2) if transposed else w
    if _fits(x_MD, w):  # its rows may come padded to the alignment
        return F.grouped_mm(x_MD, w_XDF, offs=end_X).contiguous()
    return _tiled(x_MD, w_XDF, end_X)


@_grouped.register_fake
def _(x_MD: Tensor, w: Tensor, end_X: Tensor, transposed: bool) -> Tensor:
    return x_MD.new_empty(x_MD.shape[0], w.shape[1 if transposed else 2])


@torch.library.custom_op("caravan::grouped_outer", mutates_args=())
def _outer(dy_MF: Tensor, x_MD: Tensor, end_X: Tensor) -> Tensor:
    """dy^T x over each expert's rows: [X, F, D]."""
    dy_MF, x_MD = dy_MF.contiguous(), x_MD.contiguous()
    if _fits(dy_MF, x_MD):
        return F.grouped_mm(dy_MF.T, x_MD, offs=end_X).contiguous()
    return _tiled_outer(dy_MF, x_MD, end_X)


@_outer.register_fake
def _(dy_MF: Tensor, x_MD: Tensor, end_X: Tensor) -> Tensor:
    return x_MD.new_empty(end_X.shape[0], dy_MF.shape[1], x_MD.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MD, w, end_X, transposed = inputs
    ctx.save_for_backward(x_MD, w, end_X)
    ctx.transposed = transposed


def _gradients(ctx: Any, dy_MF: Tensor) -> tuple[Tensor | None, ...]:
    x_MD, w, end_X = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _grouped(dy_MF, w, end_X, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        dw = _outer(dy_MF, x_MD, end_X) if ctx.transposed else _outer(x_MD, dy_MF, end_X)
    return dx, dw, None, None


_grouped.register_autograd(_gradients, setup_context=_keep)


def grouped_linear(x_MD: Tensor, w_XFD: Tensor, end_X: Tensor) -> Tensor:
    """Same as `reference_grouped`, for rows [M, D] sorted by expert: [M, F]. Differentiable once."""
    return _grouped(x_MD, w_XFD, end_X, True)


class Dispatch(torch.autograd.Function):
    """Tokens [N, D] to sorted rows [M, D]. Each token's K gradients are gathered and summed in order."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(row_NK)
        return x_ND.index_select(0, token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MD: Tensor) -> tuple[Tensor | None, ...]:
        (row_NK,) = ctx.saved_tensors
        dx_NKD = dx_MD.index_select(0, row_NK.flatten()).view(*row_NK.shape, dx_MD.shape[1])
        return dx_NKD.sum(1), None, None


class Combine(torch.autograd.Function):
    """Sorted rows [M, D] and weights [N, K] to weighted sums per token [N, D], in the weights' type.

    dy[row] = weight * dout,  dweight = <y[row], dout>.
    """

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weight_NK: Tensor, token_M: Tensor, row_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weight_NK, token_M, row_NK)
        y_NKD = y_MD.index_select(0, row_NK.flatten()).view(*row_NK.shape, y_MD.shape[1])
        return torch.einsum("nkd,nk->nd", y_NKD.to(weight_NK.dtype), weight_NK).to(y_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        y_MD, weight_NK, token_M, row_NK = ctx.saved_tensors
        wide_MD = dout_ND.index_select(0, token_M).to(weight_NK.dtype)
        dweight_M = (wide_MD * y_MD).sum(-1)
        weight_M = torch.empty_like(dweight_M).scatter_(0, row_NK.flatten(), weight_NK.flatten())
        dy_MD = wide_MD.mul_(weight_M[:, None]).to(y_MD.dtype)
        return dy_MD, dweight_M[row_NK.flatten()].view_as(weight_NK), None, None


def dispatch(x_ND: Tensor, groups: Grouping) -> Tensor:
    """[N, D] tokens -> [M, D] rows sorted by expert, a token once for each of its choices."""
    return Dispatch.apply(x_ND, groups.token_M, groups.row_NK)


def combine(y_MD: Tensor, weight_NK: Tensor, groups: Grouping) -> Tensor:
    """[M, D] rows sorted by expert and [N, K] weights -> [N, D] weighted sums."""
    return Combine.apply(y_MD, weight_NK, groups.token_M, groups.row_NK)
