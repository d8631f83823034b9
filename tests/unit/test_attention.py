"""kernels.attention: planning of buckets, and both paths against the loop that defines them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.kernels import attention, tiles
from caravan.kernels.attention import Pairs, Segments, alibi_slopes, buckets, reference_attention
from caravan.kernels.tiles import Tiled
from caravan.model.spec import Attn

RAGGED = (7, 1, 30, 29, 3, 140, 28, 2, 1)


def inputs(tokens: int, heads: int, kv: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, heads, width), (tokens, kv, width), (tokens, kv, width)]
    return [torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def knobs(scale: float, **more: Any) -> Attn:
    return Attn(n_head=2, n_kv=2, head_dim=4, scale=scale, **more)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30))
def test_every_token_has_exactly_one_cell(lengths: list[int]) -> None:
    plan = buckets(lengths)
    held = sorted(segment for bucket in plan for segment in bucket.segments)
    assert held == [s for s, length in enumerate(lengths) if length]
    for bucket in plan:
        real = sum(lengths[s] for s in bucket.segments)
        assert bucket.width == max(lengths[s] for s in bucket.segments)
        assert bucket.rows * bucket.width <= attention.PAD_LIMIT * real + 1e-9
    if plan:
        token_of_cell, cell_of_token = attention._cells(plan, lengths)
        assert torch.equal(token_of_cell[cell_of_token], torch.arange(sum(lengths)))
        assert len(token_of_cell) == sum(b.rows * b.width for b in plan)


def test_equal_lengths_are_not_gathered() -> None:
    (bucket,) = buckets((5, 5, 5))
    assert (bucket.rows, bucket.width) == (3, 5)
    assert Segments((5, 5, 5))._cells is None and Segments((5, 4))._cells is not None
    assert buckets(()) == [] and buckets((0, 0)) == []


@pytest.mark.parametrize("lengths", [(6,) * 4, RAGGED, (300,), (1,)])
@pytest.mark.parametrize("kv", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_the_reference(
    lengths: tuple[int, ...], kv: int, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = inputs(sum(lengths), 6, kv, 8, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    grad = torch.randn(sum(lengths), 6, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    want = reference_attention(lengths, *exact, knobs(0.3))
    want.backward(grad.double())
    got = Segments(lengths)(0, *qkv, knobs(0.3))
    got.backward(grad)
    assert got.dtype == dtype and relative(got, want) < tolerance
    for mine, theirs in zip(qkv, exact, strict=True):
        assert theirs.grad.norm() == 0 or relative(mine.grad, theirs.grad) < 2 * tolerance


@pytest.mark.parametrize(("keep", "native"), [(0, True), (1024, True), (1024, False)])
def test_tiles_are_exact_in_double_precision(
    keep: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(tiles, "_native_softmax_gradient", lambda: False)
    monkeypatch.setattr(tiles, "TILE", 4)
    monkeypatch.setattr(tiles, "TILE_CELLS", 50)
    monkeypatch.setattr(tiles, "KEEP_LENGTH", keep)
    qkv = [x.detach().requires_grad_() for x in inputs(2 * 7, 2, 1, 2, torch.float64)]
    want = reference_attention((7, 7), *qkv, knobs(0.7))
    assert torch.allclose(Tiled.apply(*qkv, 2, 0.7, None), want, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q, k, v: Tiled.apply(q, k, v, 2, 0.7, None), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_segment_sees_neither_its_neighbours_nor_its_future(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in inputs(sum(RAGGED), 4, 2, 8, dtype))
    attend = Segments(RAGGED)
    before = attend(0, q, k, v, knobs(0.3))
    at = 20  # inside the third segment, which covers 8..37
    k2, v2 = k.clone(), v.clone()
    k2[at], v2[at] = 50.0, 50.0
    after = attend(0, q, k2, v2, knobs(0.3))
    changed = (before != after).flatten(1).any(1).nonzero().flatten()
    assert changed.min() == at and changed.max() == 37
    k2[:], v2[:] = float("nan"), float("nan")
    k2[8:38], v2[8:38] = k[8:38], v[8:38]
    alone = attend(0, q, k2, v2, knobs(0.3))
    assert torch.equal(alone[8:38], before[8:38])


SHAPES: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "alibi-scaled-window": {"alibi": True, "alibi_scale": 0.25, "alibi_max": 4.0, "window": 9},
    "bidirectional": {"causal": False},
    "all": {"alibi": True, "window": 7, "softcap": 1.3},
}


@pytest.mark.parametrize("lengths", [(12,) * 3, RAGGED, (19, 18, 18, 2)], ids=["equal", "ragged", "close"])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", [4, 128])
def test_shaped_attention_is_the_reference(
    shape: str, prefixed: bool, lengths: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision, gradients too; values narrower than keys, three query heads per key head."""
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "TILE_CELLS", 50 * tile)
    monkeypatch.setattr(tiles, "KEEP_LENGTH", 64)
    attn = knobs(0.3, **SHAPES[shape])
    prefix = tuple(length // 2 for length in lengths) if prefixed else None
    q, k, v = (x.detach() for x in inputs(sum(lengths), 6, 2, 8, torch.float64))
    qkv = [q.requires_grad_(), k.requires_grad_(), v[..., :5].clone().requires_grad_()]
    exact = [x.detach().clone().requires_grad_() for x in qkv]
    want = reference_attention(lengths, *exact, attn, prefix)
    got = Segments(lengths, prefix=prefix)(0, *qkv, attn)
    assert relative(got, want) < 1e-12
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want.backward(grad)
    got.backward(grad)
    for mine, theirs in zip(qkv, exact, strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_shaped_attention_in_short_floats(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    qkv = [x.detach() for x in inputs(sum(RAGGED), 6, 2, 8, dtype)]
    want = reference_attention(RAGGED, *(x.double() for x in qkv), knobs(0.3, **SHAPES[shape]))
    assert relative(Segments(RAGGED)(0, *qkv, knobs(0.3, **SHAPES[shape])), want) < tolerance


def by_distance_and_kind(ordered: bool) -> Pairs:
    """A table of 11 rows: one per distance up to 3 within a kind, one per pair of kinds otherwise; kinds are
    counted along the text, so that a wrong cell shows."""
    draw = torch.Generator().manual_seed(5)
    table = torch.randn(11, 6, generator=draw, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 9, (sum(RAGGED),), generator=draw)

    def row(distance: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        rows = torch.where(i == j, distance.clamp(-3, 3) + 3, 7 + 2 * i + j)
        return rows.masked_fill((distance % 7 == 2) if ordered else (distance == 5), -1)

    return Pairs(table, ids, lambda ids: (ids < 3).cumsum(1) % 2, row, ordered)


@pytest.mark.parametrize("shape", ["window", "softcap", "alibi", "prefix", "row alone"])
@pytest.mark.parametrize("tile", [4, 128])
def test_a_learned_bias_for_pairs_is_the_reference(
    shape: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision, with the gradient of the table; some pairs are hidden by the row itself."""
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "TILE_CELLS", 50 * tile)
    monkeypatch.setattr(tiles, "KEEP_LENGTH", 64)
    attn = knobs(0.3, **SHAPES.get(shape, {}))
    prefix = tuple(length // 2 for length in RAGGED) if shape == "prefix" else None
    pairs = by_distance_and_kind(ordered=shape != "row alone")
    qkv = [x.detach().requires_grad_() for x in inputs(sum(RAGGED), 6, 2, 8, torch.float64)]
    got = Segments(RAGGED, prefix=prefix)(0, *qkv, attn, pairs)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got.backward(grad)
    mine = [x.grad for x in (*qkv, pairs.table_XH)]
    for x in (*qkv, pairs.table_XH):
        x.grad = None
    want = reference_attention(RAGGED, *qkv, attn, prefix, pairs)
    want.backward(grad)
    assert relative(got, want) < 1e-12
    for ours, x in zip(mine, (*qkv, pairs.table_XH), strict=True):
        assert relative(ours, x.grad) < 1e-12


def test_a_window_as_wide_as_the_row_is_none() -> None:
    q, k, v = (x.detach() for x in inputs(20, 2, 1, 4, torch.float32))
    plain = Segments((20,))(0, q, k, v, knobs(0.5))
    assert torch.equal(Segments((20,))(0, q, k, v, knobs(0.5, window=20)), plain)
    assert not torch.allclose(Segments((20,))(0, q, k, v, knobs(0.5, window=19)), plain)


def test_slopes_of_any_number_of_heads() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    six = [2.0**-i for i in (2, 4, 6, 8)] + [2.0**-i for i in (1, 3)]
    assert alibi_slopes(6).tolist() == six
    assert alibi_slopes(1).tolist() == [2.0**-8] and alibi_slopes(2, 4.0).tolist() == [0.25, 0.0625]


def test_padding_makes_no_gradient() -> None:
    lengths = (10, 9, 9)
    q, k, v = inputs(28, 2, 2, 4, torch.bfloat16)
    Segments(lengths)(0, q, k, v, knobs(0.5)).sum().backward()
    together = v.grad.clone()
    for x in (q, k, v):
        x.grad = None
    for part in ((0, 10), (10, 19), (19, 28)):
        Segments((part[1] - part[0],))(0, *(x[slice(*part)] for x in (q, k, v)), knobs(0.5)).sum().backward()
    assert torch.allclose(together.float(), v.grad.float(), atol=0.02)


def test_wrong_total_is_a_programmers_mistake() -> None:
    q, k, v = inputs(5, 2, 2, 4, torch.float32)
    with pytest.raises(AssertionError):
        Segments((3, 3))(0, q, k, v, knobs(0.5))


def test_the_private_operator_is_used_here_only_if_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles._native_softmax_gradient.cache_clear()
    monkeypatch.setattr(torch, "_softmax_backward_data", lambda dp, p, dim, dtype: dp)
    assert not tiles._native_softmax_gradient()
    monkeypatch.delattr(torch, "_softmax_backward_data")
    tiles._native_softmax_gradient.cache_clear()
    assert not tiles._native_softmax_gradient()
    monkeypatch.undo()
    tiles._native_softmax_gradient.cache_clear()
    assert tiles._native_softmax_gradient()
