"""Weight rules: a small language that says how a family's file maps to our canonical names, read in both
directions.

    table @=model.layers.{i} ~=model           what '@' and '~' stand for in sources
    prefix? model.                             files saved from the bare model may lack this
    drop rotary_emb  ^lm_head                  regular expressions of keys to ignore
    ~.{embed_tokens,norm} -> {embed,norm}      braces on both sides: one rule per pair
    @.self_attn.{q,k,v}_proj -> mix.qkv : cat  braces on the left only: several sources of one target

Rules are separated by ';' or newline. A name without suffix means .weight and .bias, whichever the model
has. A target whose source starts with '@' lives in blocks.{i}. Reading forwards loads, reading backwards
exports, and export(load(x)) is x bit for bit.

ops, in load order:
    T      transpose the last two axes (no-op on a bias)
    cat    join sources on axis 0; the inverse splits qkv by heads and anything else into equal parts
    grp    rows [kv group][its queries, key, value] -> [all q; all k; all v]
    rope   interleaved rotary pairs -> rotate-half, within every query and key head
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from caravan.model.spec import Attn, Spec
from caravan.types import UserError


@dataclass(frozen=True, slots=True)
class Rule:
    """sources -> target through ops; names may hold {i}."""

    sources: tuple[str, ...]
    target: str
    ops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """All rules of one family."""

    rules: tuple[Rule, ...]
    drops: tuple[str, ...] = ()
    prefix: str = ""

    def dropped(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self.drops)


@dataclass(frozen=True, slots=True)
class Step:
    """One canonical tensor and the file tensors it is made of."""

    target: str
    sources: tuple[str, ...]
    ops: tuple[str, ...]
    attn: Attn | None
    """The attention of the layer, for ops that must know the heads."""


def _alternatives(name: str) -> list[str]:
    """a{x,y}b -> [axb, ayb]; {i} is left alone."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", name)
    if not found:
        return [name]
    return [name[: found.start()] + part + name[found.end() :] for part in found.group(1).split(",")]


def parse(text: str) -> Table:
    """Text of a table -> Table. Malformed text is a programmer's mistake and raises ValueError."""
    at = root = prefix = ""
    drops: list[str] = []
    rules: list[Rule] = []
    for line in (part.strip() for chunk in text.splitlines() for part in chunk.split(";")):
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "table":
            for definition in rest.split():
                sign, _, value = definition.partition("=")
                at, root = (value, root) if sign == "@" else (at, value)
        elif word == "prefix?":
            prefix = rest.strip()
        elif word == "drop":
            drops += rest.split()
        else:
            rules += _rules(line, at, root)
    return Table(tuple(rules), tuple(drops), prefix)


def _rules(line: str, at: str, root: str) -> list[Rule]:
    body, _, ops = line.partition(" : ")
    left, arrow, right = (part.strip() for part in body.partition("->"))
    if not arrow or not left or not right:
        raise ValueError(f"not a rule: {line!r}")
    home = "blocks.{i}." if left.startswith("@") else ""
    left = left.replace("@", at).replace("~", root)
    sources, targets = _alternatives(left), [home + name for name in _alternatives(right)]
    if len(targets) == 1:
        return [Rule(tuple(sources), targets[0], tuple(ops.split()))]
    return [Rule((s,), t, tuple(ops.split())) for s, t in zip(sources, targets, strict=True)]


def plan(table: Table, spec: Spec, canonical: Collection[str]) -> list[Step]:
    """One Step for every canonical tensor name of the model. A name without a rule is a programmer's
    mistake."""
    steps = []
    for name in canonical:
        found = re.match(r"blocks\.(\d+)\.", name)
        index = found.group(1) if found else ""
        stem, _, suffix = name.rpartition(".")
        for rule in table.rules:
            if rule.target.replace("{i}", index) == stem:
                sources = tuple(f"{s.replace('{i}', index)}.{suffix}" for s in rule.sources)
                steps.append(Step(name, sources, rule.ops, spec.layers[int(index)].attn if found else None))
                break
        else:
            raise ValueError(f"no rule makes {name}")
    return steps


def load(
    table: Table, steps: list[Step], keys: Collection[str], read: Callable[[str], Tensor], where: str
) -> tuple[dict[str, Tensor], bool]:
    """File tensors -> canonical tensors; also whether the file lacked the optional prefix.

    Raises UserError naming the key when the file lacks a tensor or has one that nothing asks for.
    """
    present = set(keys)
    bare = bool(table.prefix) and not any(key.startswith(table.prefix) for key in present)
    result, used = {}, set()
    for step in steps:
        sources = [s.removeprefix(table.prefix) if bare else s for s in step.sources]
        for source in sources:
            if source not in present:
                raise UserError(
                    f"{where}: tensor '{source}' is missing (needed for {step.target})",
                    "config.json does not describe these weights, or the download is incomplete",
                )
        used.update(sources)
        result[step.target] = forwards([read(s) for s in sources], step)
    extra = sorted(key for key in present - used if not table.dropped(key))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{where}: tensor '{extra[0]}'{more} has no place in this model",
            "config.json does not describe these weights: check model_type, layer count and bias flags",
        )
    return result, bare


def export(
    table: Table, steps: list[Step], tensors: Mapping[str, Tensor], bare: bool = False
) -> dict[str, Tensor]:
    """Canonical tensors -> file tensors: `load` read backwards."""
    result: dict[str, Tensor] = {}
    for step in steps:
        for name, tensor in zip(step.sources, backwards(tensors[step.target], step), strict=True):
            result[name.removeprefix(table.prefix) if bare else name] = tensor
    return result


def forwards(sources: list[Tensor], step: Step) -> Tensor:
    """Apply a step's ops in order."""
    for op in step.ops:
        if op == "T":
            sources = [s.transpose(-1, -2) if s.dim() > 1 else s for s in sources]
        elif op == "cat":
            sources = [torch.cat(sources)]
        else:
            sources = [_rows(op, sources[0], step)]
    (result,) = sources
    return result


def backwards(tensor: Tensor, step: Step) -> list[Tensor]:
    """Undo a step's ops in reverse order."""
    parts = [tensor]
    for op in reversed(step.ops):
        if op == "T":
            parts = [p.transpose(-1, -2) if p.dim() > 1 else p for p in parts]
        elif op == "cat":
            parts = list(parts[0].split(_sizes(parts[0], step)))
        else:
            parts = [_rows(op, parts[0], step, inverse=True)]
    return parts


def _sizes(tensor: Tensor, step: Step) -> list[int]:
    if ".qkv." in step.target:
        assert step.attn is not None
        return [n * step.attn.head_dim for n in (step.attn.n_head, step.attn.n_kv, step.attn.n_kv)]
    count = len(step.sources)
    return [tensor.shape[0] // count] * count


def _rows(op: str, tensor: Tensor, step: Step, inverse: bool = False) -> Tensor:
    """Reorder rows by a permutation worked out on row numbers, so that the inverse is its argsort."""
    assert step.attn is not None, step
    order = {"grp": _grouped, "rope": _interleaved}[op](torch.arange(tensor.shape[0]), step.attn)
    return tensor[order.argsort() if inverse else order]


def _grouped(rows: Tensor, attn: Attn) -> Tensor:
    each = attn.n_head // attn.n_kv
    rows = rows.view(attn.n_kv, each + 2, attn.head_dim)
    return torch.cat([rows[:, :each].reshape(-1), rows[:, each].reshape(-1), rows[:, each + 1].reshape(-1)])


def _interleaved(rows: Tensor, attn: Attn) -> Tensor:
    assert attn.rope is not None
    heads = rows.view(-1, attn.head_dim).clone()
    turned = heads[: attn.n_head + attn.n_kv, : attn.rope.dim]
    turned.copy_(torch.cat([turned[:, 0::2], turned[:, 1::2]], 1))
    return heads.reshape(-1)
