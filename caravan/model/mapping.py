"""The operations of the weight rules (model/rules.py), each with its inverse.

H query heads, K key/value heads, E head width, X experts. Reorderings are worked out on row numbers, so that
an inverse is an argsort and nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caravan.model.spec import Attn, Layer

OPS = {"T", "cat", "grp", "rope", "rope_mla_q", "rope_mla_kv", "mp4qvk", "ex", "exT", "sq"}


def copies(mark: str, target: str, layer: Layer | None) -> int:
    """How many tensors {e} (experts) or {h} (heads) of a target stand for."""
    assert layer is not None, target
    if mark == "{e}":
        assert layer.ffn is not None and layer.ffn.moe is not None, target
        return layer.ffn.moe.n_expert
    assert layer.attn is not None, target
    return layer.attn.n_kv if _part(target) == "kn" else layer.attn.n_head


def forwards(op: str, sources: list[Tensor], target: str, layer: Layer | None) -> list[Tensor]:
    """One op in the direction of loading."""
    if op == "T":
        return [s.transpose(-1, -2) if s.dim() > 1 else s for s in sources]
    if op == "cat":
        return [torch.cat(sources, _axis(sources[0]))]
    if op == "sq":
        return [s.flatten() for s in sources]
    if op in ("ex", "exT"):
        slabs = [s.unflatten(0, (copies("{e}", target, layer), -1)) for s in sources]
        whole = torch.cat(slabs, 1)
        return [whole.transpose(1, 2) if op == "exT" else whole]
    return [_reorder(op, s, target, layer) for s in sources]


def backwards(op: str, parts: list[Tensor], count: int, target: str, layer: Layer | None) -> list[Tensor]:
    """One op in the direction of saving; `count` is the number of tensors a joined one comes from."""
    if op == "T":
        return [p.transpose(-1, -2) if p.dim() > 1 else p for p in parts]
    if op == "cat":
        axis = _axis(parts[0])
        return list(parts[0].split(_sizes(parts[0].shape[axis], count, target, layer), axis))
    if op == "sq":
        return [p.view(1, 1, -1) for p in parts]
    if op in ("ex", "exT"):
        whole = parts[0].transpose(1, 2) if op == "exT" else parts[0]
        return [slab.flatten(0, 1) for slab in whole.chunk(count, 1)]
    return [_reorder(op, p, target, layer, inverse=True) for p in parts]


def _part(target: str) -> str:
    """The submodule a canonical name belongs to: qkv of blocks.0.mix.qkv.weight, qn of blocks.0.mix.qn."""
    return target.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _axis(tensor: Tensor) -> int:
    return 1 if tensor.dim() == 3 else 0


def _sizes(rows: int, count: int, target: str, layer: Layer | None) -> list[int]:
    if _part(target) == "qkv" and count == 3:
        attn = layer.attn if layer else None
        assert attn is not None, target
        return [n * attn.head_dim for n in (attn.n_head, attn.n_kv, attn.n_kv)]
    return [rows // count] * count


def _reorder(op: str, tensor: Tensor, target: str, layer: Layer | None, inverse: bool = False) -> Tensor:
    attn = layer.attn if layer else None
    assert attn is not None, target
    if op.startswith("rope") and not _stored_otherwise(attn):
        return tensor
    gain = _part(target) in ("qn", "kn")  # [E], [H, E] or [H * E]: always read as heads
    rows = torch.arange(tensor.numel() if gain else tensor.shape[0])
    order = _order(op, rows, _part(target), attn)
    order = order.argsort() if inverse else order
    return tensor.flatten()[order].view(tensor.shape) if gain else tensor[order]


def _stored_otherwise(attn: Attn) -> bool:
    return attn.rope is not None and (attn.rope.interleaved or bool(attn.rope.sections))


def _order(op: str, rows: Tensor, part: str, attn: Attn) -> Tensor:
    """Which old row comes to each new place."""
    if op == "grp":
        return _grouped(rows, attn)
    if op == "mp4qvk":
        q, v, k = rows.view(4, 3, -1).unbind(1)
        return torch.cat([q.flatten(), k.flatten(), v.flatten()])
    assert attn.rope is not None
    turned = _rotary(attn)
    if op == "rope_mla_kv":
        return torch.cat([rows[: -attn.rope.dim], rows[-attn.rope.dim :][turned]])
    width = attn.head_dim
    heads = rows.view(-1, width).clone()
    if op == "rope_mla_q":
        heads[:, -attn.rope.dim :] = heads[:, -attn.rope.dim :][:, turned]
    else:
        count = attn.n_head + attn.n_kv if part == "qkv" else len(heads)
        heads[:count, : attn.rope.dim] = heads[:count, : attn.rope.dim][:, turned]
    return heads.flatten()


def _rotary(attn: Attn) -> Tensor:
    """The rotary dimensions of a stored head in the rotate-half order [all first; all second of a pair]."""
    assert attn.rope is not None
    place = torch.arange(attn.rope.dim)
    if attn.rope.interleaved:
        return torch.cat([place[0::2], place[1::2]])
    # each section is a rotate-half head of its own
    sections = [section.view(2, -1) for section in place.split([2 * n for n in attn.rope.sections])]
    return torch.cat(sections, 1).flatten()


def _grouped(rows: Tensor, attn: Attn) -> Tensor:
    each = attn.n_head // attn.n_kv
    rows = rows.view(attn.n_kv, each + 2, attn.head_dim)
    return torch.cat([rows[:, :each].reshape(-1), rows[:, each].reshape(-1), rows[:, each + 1].reshape(-1)])
