"""Muon sees the maps of every family: each fused matrix is taken apart, everything else is one map, and what
is looked up is none."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from caravan.algos.optim import OptimConfig, layout, muon_
from caravan.model import checkpoint, families, rules
from caravan.systems.train import fused_rows, linear_maps
from tests import families as tiny

pytest.importorskip("transformers")

ONE = {"q", "k", "v", "r", "g", "o", "out", "qa", "qb", "pk", "pq", "dt", "router", "shared_gate", "pin",
       "pout", "dense", "pool", "xout"}  # fmt: skip
"""Linear maps that hold nothing but themselves. `inp` of a plain FFN is another."""
FUSED = {"qkv": {3}, "proj": {3}, "kv": {2}, "kva": {2}, "kvb": {2}, "xin": {2}, "x": {3}, "inp": {2, 3, 5}}
"""Fused ones, and into how many parts they fall; `inp`: gate and up, or x and z; x2, x1 and v; z, x, B, C and
the time step."""


def built(case: tiny.Case, folder: Path) -> Any:
    """The case's model without memory, from its config.json."""
    if case.hf is not None:
        case.hf().save_pretrained(folder)
        if case.disguise is not None:
            case.disguise(folder)
    else:
        (folder / "config.json").write_text(json.dumps(case.config))
    config = checkpoint.read_config(folder)
    module = families.find(config["model_type"])
    return checkpoint.empty(module, config, module.spec(config), folder)


@pytest.mark.parametrize("family", tiny.names())
def test_every_map_is_whole_or_in_parts(family: str, tmp_path: Path) -> None:
    case = importlib.import_module(f"tests.families.{family}").CASES[0]
    model = built(case, tmp_path)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows, maps = fused_rows(model), linear_maps(model)
    assert rows.keys() <= shapes.keys() and maps <= shapes.keys()
    for name in sorted(maps):
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        parts = rows.get(name, (shapes[name][-2],))
        assert shapes[name][-2] % sum(parts) == 0, name
        plain = leaf in ONE or (leaf == "inp" and name not in rows)
        assert len(parts) in ({1} if plain else FUSED[leaf]), name
    for step in rules.plan(rules.of(families.find(model.family)), model.spec, shapes):
        joined = len(step.sources) // max(step.stack, 1)
        if step.target in maps and "cat" in step.ops and joined > 1:
            assert len(rows[step.target]) == joined, step.target
    slots = layout(shapes.items(), "muon", maps, rows, checkpoint.wide_names(model))
    tables = {"embed.weight", "head.weight", "pos.weight", "seg.weight"} & shapes.keys()
    tables |= {"inp.weight"} & shapes.keys()  # of bGPT's patches
    assert not tables & {slot.name for slot in slots if slot.kind == "muon"}


def test_parts_that_alternate_are_gathered() -> None:
    """[head][key rows, value rows]: the update of the keys is that of a matrix of keys alone."""
    heads, rows, width = 3, (2, 4), 16
    (mixed,) = layout([("kvb", (heads * sum(rows), width))], "muon", {"kvb"}, {"kvb": rows})
    apart = layout([("k", (heads * 2, width)), ("v", (heads * 4, width))], "muon", {"k", "v"})
    draw = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(heads, sum(rows), width, generator=draw) for _ in range(2))

    def stepped(slots: Any, flat: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        muon_(flat, gradient, torch.zeros_like(flat), slots, 0.1, 0.9, 0.01)
        return flat

    got = stepped([mixed], weight.flatten().clone(), grad.flatten().clone()).view_as(weight)
    flat = [torch.cat([x[:, :2].flatten(), x[:, 2:].flatten()]) for x in (weight, grad)]
    want = stepped(apart, *flat)
    assert torch.equal(torch.cat([got[:, :2].flatten(), got[:, 2:].flatten()]), want)
    assert not math.isclose(float((got - weight).norm()), 0)


def test_what_is_stated_by_no_module_is_one_map() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    assert fused_rows(model) == {} and linear_maps(model) == {"0.weight"}
    assert layout([("0.weight", (6, 4))], OptimConfig(name="muon").name, {"0.weight"})[0].rows == ()
