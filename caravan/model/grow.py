"""Other vocabularies for a model: its tables of embeddings get new rows, or lose some.

V old rows, W new rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from caravan.model.blank import blank
from caravan.model.decoder import Decoder
from caravan.model.encoders.cpm import CpmSpec
from caravan.types import UserError

TABLES = ("embed.weight", "head.weight", "head.bias", "tied_bias")
"""Parameters with one row per id."""


@torch.no_grad()
def resize(model: Decoder, sources: Sequence[Sequence[int]], rows: int) -> Decoder:
    """A new model whose row i, in the embedding and in an untied head alike, is the mean of the old rows in
    sources[i]; one source is a copy, bit for bit. Rows without sources, and those behind the last up to
    `rows`, are the mean of all old rows that the others name: an average word, which no context prefers.

    A piece's meaning starts as that of its parts (Yao et al. 2021, arXiv:2106.13474). Hidden states of old
    ids and their logits stay what they were. Raises UserError when a source does not exist or the id that
    ends a prefix would move.
    """
    if not isinstance(model, Decoder):
        raise UserError(
            f"the symbols of a '{model.family}' model are fixed: its vocabulary cannot change",
            "train it with the tokenizer it has",
        )
    spec = model.spec
    highest = max((i for row in sources for i in row), default=-1)
    if highest >= spec.vocab or rows < len(sources) or not any(sources):
        raise UserError(
            f"{len(sources)} ids of old rows up to {highest} do not fit {spec.vocab} old, {rows} new rows",
            "give the tokenizer that belongs to the model, or more rows",
        )
    if len(model.embed.weight) != spec.vocab:
        raise UserError(f"the table of '{model.family}' holds more than words and cannot be resized")
    for at in (spec.prefix_token, spec.bos if isinstance(spec, CpmSpec) else None):
        if at is not None and at >= 0 and (at >= len(sources) or list(sources[at]) != [at]):
            raise UserError(f"this model reads its texts by id {at}, which must keep its place")
    changed = replace(spec, vocab=rows)
    with blank():
        result = type(model)(changed, model.family, model.config)
    own = {name: p.detach() for name, p in model.named_parameters()}
    new = {name: grown(p, sources, rows) if name in TABLES else p.clone() for name, p in own.items()}
    result.load_state_dict(new, strict=True, assign=True)
    result.bare, result.spelling, result.checkpoint_every = model.bare, model.spelling, model.checkpoint_every
    result.spelling = model.spelling
    result.kept = {name: tensor.clone() for name, tensor in model.kept.items()}
    return result


def grown(old_VD: Tensor, sources: Sequence[Sequence[int]], rows: int) -> Tensor:
    """[V, ...] -> [rows, ...]: means of old rows, taken in fp32."""
    single = torch.tensor([row[0] if len(row) == 1 else 0 for row in sources])
    new_WD = old_VD.new_empty(rows, *old_VD.shape[1:])
    new_WD[: len(sources)] = old_VD[single.to(old_VD.device)]
    used = sorted({i for row in sources for i in row})
    average = old_VD[torch.tensor(used, device=old_VD.device)].float().mean(0).to(old_VD.dtype)
    new_WD[len(sources) :] = average
    for i, row in enumerate(sources):
        if len(row) != 1:
            mean = old_VD[list(row)].float().mean(0).to(old_VD.dtype) if row else average
            new_WD[i] = mean
    return new_WD


def moved_ids(config: Mapping[str, Any], sources: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A config.json (or generation_config.json) whose `..._token_id`s are the new ones; ids that are gone are
    left out."""
    new = {row[0]: i for i, row in reversed(list(enumerate(sources))) if len(row) == 1}
    result: dict[str, Any] = {}
    for key, value in config.items():
        if not key.endswith("_token_id") or value is None:
            result[key] = value
        elif isinstance(value, list):
            result[key] = [new[i] for i in value if i in new]
        elif value in new:
            result[key] = new[value]
    return result


def of_pieces(
    old: Sequence[bytes], new: Sequence[bytes], cut: Callable[[str], Sequence[int]]
) -> list[tuple[int, ...]]:
    """For each new piece (bytes) the old ids it starts as: itself if it was there, else its sub-tokens by
    cut(text), or for parts of characters the longest old pieces from the left."""
    place: dict[bytes, int] = {}
    for i, piece in enumerate(old):
        place.setdefault(piece, i)
    longest = max(map(len, place), default=0)
    result: list[tuple[int, ...]] = []
    for i, piece in enumerate(new):
        if not piece:
            result.append((i,) if i < len(old) and not old[i] else ())
        elif i < len(old) and old[i] == piece:
            result.append((i,))
        elif piece in place:
            result.append((place[piece],))
        else:
            result.append(_parts(piece, place, longest, cut))
    return result


def _parts(
    piece: bytes, place: Mapping[bytes, int], longest: int, cut: Callable[[str], Sequence[int]]
) -> tuple[int, ...]:
    try:
        return tuple(cut(piece.decode()))
    except UnicodeDecodeError:  # part of a character
        found = []
        while piece:
            sizes = range(min(longest, len(piece)), 0, -1)
            size = next((n for n in sizes if piece[:n] in place), None)
            if size is None:
                return ()
            found.append(place[piece[:size]])
            piece = piece[size:]
        return tuple(found)
