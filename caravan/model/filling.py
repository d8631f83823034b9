"""From the tensors of files to the parameters of a model, one after another.

A parameter is allocated once, in the type and on the device where it stays, and each source is read straight
into its rows: the rules read backwards take an empty parameter apart into views of itself. Only where a rule
reorders rows is a source read first and copied then. So memory holds the weights and one tensor more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from caravan.model import rules
from caravan.model.tensors import Tensors
from caravan.types import UserError


def fill(
    steps: Sequence[rules.Step],
    sources: Sequence[tuple[str, ...]],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str,
    where: str,
) -> dict[str, Tensor]:
    """Canonical name -> its parameter, filled. `sources`: the keys of `tensors` that each step reads.

    Raises UserError naming the key when a shape is not what config.json says; shapes that headers tell are
    all compared before anything is allocated.
    """
    direct = [
        _check(step, keys, tensors, shapes[step.target], where)
        for step, keys in zip(steps, sources, strict=True)
    ]
    result = {}
    for step, keys, straight in zip(steps, sources, direct, strict=True):
        target = torch.empty(tuple(shapes[step.target]), dtype=dtypes[step.target], device=device)
        if straight:
            for key, part in zip(keys, rules.backwards(target, step), strict=True):
                _read(tensors, key, part, step, where)
        else:
            made = rules.forwards([tensors[key] for key in keys], step)
            if made.shape != target.shape:
                raise _unfit(where, keys[0], step, made.shape, target.shape)
            target.copy_(made)
        result[step.target] = target
    return result


def _check(
    step: rules.Step, keys: Sequence[str], tensors: Mapping[str, Tensor], shape: Sequence[int], where: str
) -> bool:
    """Compare the shapes of a step's sources with what they should be; whether they can be read in place."""
    whole = torch.empty(tuple(shape), device="meta")
    parts = rules.backwards(whole, step)
    for key, part in zip(keys, parts, strict=True):
        found = tensors.shape(key) if isinstance(tensors, Tensors) else None
        if found is not None and found != tuple(part.shape):
            raise _unfit(where, key, step, found, part.shape)
    return all(part is whole or part._base is whole for part in parts)


def _read(tensors: Mapping[str, Tensor], key: str, part: Tensor, step: rules.Step, where: str) -> None:
    if isinstance(tensors, Tensors) and tensors.shape(key) is not None:
        tensors.fill(key, part)
        return
    one = tensors[key]
    if one.shape != part.shape:
        raise _unfit(where, key, step, one.shape, part.shape)
    part.copy_(one)


def _unfit(where: str, key: str, step: rules.Step, found: Sequence[int], wanted: Sequence[int]) -> UserError:
    return UserError(
        f"{where}: '{key}' (for {step.target}) has shape {tuple(found)}, config.json says {tuple(wanted)}",
        "config.json does not belong to these weights",
    )
