"""From the tensors of files to the parameters of a model, one after another.

Parameters are allocated once, in the type and on the device where they stay, and each source is read straight
into its rows: the rules read backwards take an empty parameter apart into views of itself. Where a rule
reorders rows, one source after another is read and its rows put where they belong; only where it looks at
columns are all sources of a parameter read first. So memory holds the weights and one tensor more.

What is read straight is read in the order of the files, by a few threads that each take one stretch: fetching
pages from the disk and copying them into fresh memory cost about the same, and so they overlap.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from caravan.model import rules
from caravan.model.tensors import Tensors
from caravan.types import UserError

READERS = min(4, os.cpu_count() or 1)
"""Threads that read files."""


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
    straight = [
        _check(step, keys, tensors, shapes[step.target], where)
        for step, keys in zip(steps, sources, strict=True)
    ]
    # all before the first is filled: what comes and goes meanwhile leaves no holes between what stays
    result = {
        step.target: torch.empty(tuple(shapes[step.target]), dtype=dtypes[step.target], device=device)
        for step in steps
    }

    def make(i: int) -> None:
        step, keys = steps[i], sources[i]
        target = result[step.target]
        if straight[i]:
            for key, part in zip(keys, rules.backwards(target, step), strict=True):
                _read(tensors, key, part, step, where)
        elif (places := _order(step, target.shape)) is not None:
            for key, place in zip(keys, places, strict=True):
                one = tensors[key]
                if one.shape != (len(place), *target.shape[1:]):
                    raise _unfit(where, key, step, one.shape, (len(place), *target.shape[1:]))
                target.index_copy_(0, place.to(target.device), one.to(target.device, target.dtype))
                del one
        else:
            made = rules.forwards([tensors[key] for key in keys], step)
            if made.shape != target.shape:
                raise _unfit(where, keys[0], step, made.shape, target.shape)
            target.copy_(made)

    places = {i: _place(tensors, keys[0]) for i, keys in enumerate(sources) if straight[i]}
    found = sorted((place, i) for i, place in places.items() if place is not None)
    _side_by_side(make, [(i, math.prod(shapes[steps[i].target])) for _, i in found])
    for i in range(len(steps)):
        if places.get(i) is None:
            make(i)
    return result


def _order(step: rules.Step, shape: torch.Size) -> list[Tensor] | None:
    """The rows of the parameter that each source's rows become, for steps that do nothing but order rows."""
    if len(shape) < 2 or step.stack:
        return None
    numbers = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    try:
        parts = rules.backwards(numbers, step)
        wanted = rules.backwards(torch.empty(tuple(shape), device="meta"), step)
    except (RuntimeError, AssertionError, UserError):
        return None  # a step that looks at columns
    if any(part.shape != (len(part), *numbers.shape[1:]) for part in parts):
        return None
    if [tuple(w.shape) for w in wanted] != [(len(part), *shape[1:]) for part in parts]:
        return None
    rows = torch.cat([part.flatten() for part in parts])
    if rows.dtype != torch.int64 or not torch.equal(rows.sort().values, numbers.flatten()):
        return None
    return [part.flatten() for part in parts]


def _place(tensors: Mapping[str, Tensor], key: str) -> tuple[str, int] | None:
    return tensors.place(key) if isinstance(tensors, Tensors) else None


def _side_by_side(make: Callable[[int], None], jobs: Sequence[tuple[int, int]]) -> None:
    """make(i) for all (i, size), each reader on a run of neighbours, the runs about equal in size."""
    share = max(1, -(-sum(size for _, size in jobs) // READERS))
    runs: list[deque[int]] = [deque() for _ in range(READERS)]
    before = 0
    for i, size in jobs:
        runs[min(before // share, READERS - 1)].append(i)
        before += size

    def walk(run: deque[int]) -> None:
        while run:
            make(run.popleft())

    with ThreadPoolExecutor(READERS) as readers:
        try:
            list(readers.map(walk, runs))
        except BaseException:  # whoever interrupts does not wait until all is read
            for run in runs:
                run.clear()
            raise


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
