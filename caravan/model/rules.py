"""Weight rules: a small language that says how a family's file maps to our canonical names, read in both
directions.

    table @=model.layers.{i} ~=model           what '@' and '~' stand for in sources
    prefix? model.                             files saved from the bare model may lack this
    drop rotary_emb  ^lm_head                  regular expressions of keys to ignore
    ~.{embed_tokens,norm} -> {embed,norm}      braces on both sides: one rule per pair
    @.self_attn.{q,k,v}_proj -> mix.qkv : cat  braces on the left only: several sources of one target
    @.experts.{e}.w2.weight -> ffn.xout        {e}: one tensor per expert, stacked; {h}: one per head
    [gated] @.wi_0 -> ffn.gate                 only where the predicate holds; [not gated] where it does not
    or ~.embedding -> embed                    other names of some files: read where they are, and written so

Rules are separated by ';' or newline. A name without suffix means .weight and .bias, whichever the model
has; the exact name of a parameter means just that. A target whose source starts with '@' lives in blocks.{i},
or in what `=> TARGET` of the table's line says. Reading forwards loads, reading backwards exports, and
export(load(x)) is x bit for bit.

    table X like llama s/.mlp./.ff./           llama's text after literal substitutions, then what follows:
    - n2; @.norm -> n1                         '-' deletes an inherited target, a new rule replaces the old
                                               ones of its target; drop and prefix? replace the old ones
BASE is another table of the same text or a family. A text with several tables is their union.

ops, in load order:
    T            transpose the last two axes (no-op on a bias)
    cat          join sources on axis 0 (stacked ones on axis 1); the inverse splits qkv by heads and anything
                 else into equal parts
    grp          rows [kv group][its queries, key, value] -> [all q; all k; all v]
    rope         the rotary rows of every query and key head, as the checkpoint has them -> rotate-half
    rope_mla_q   the same for the rotary slice of MLA's query heads; rope_mla_kv: of its latent projection
    mp4qvk       rows [4][q, v, k] -> [q; k; v]
    ex, exT      slabs [X * f, d] -> [X, f, d], joined on axis 1; -> [X, d, f]
    sq           [1, 1, d] -> [d]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from caravan.model import mapping
from caravan.model.spec import Layer, Spec
from caravan.types import UserError

Guards = Callable[[Spec], set[str]]


@dataclass(frozen=True, slots=True)
class Rule:
    """sources -> target through ops; names may hold {i}, sources {e} or {h}."""

    sources: tuple[str, ...]
    target: str
    ops: tuple[str, ...] = ()
    guard: str = ""
    """Name of a predicate, "not NAME", or nothing."""

    def holds(self, facts: Collection[str]) -> bool:
        """Whether the guard is satisfied by the predicates that are true."""
        name = self.guard.removeprefix("not ")
        return not name or (name in facts) != self.guard.startswith("not ")


@dataclass(frozen=True, slots=True)
class Table:
    """All rules of one family."""

    rules: tuple[Rule, ...]
    drops: tuple[str, ...] = ()
    prefix: str = ""
    guards: Guards | None = None
    """The family's own predicates."""
    others: tuple[Rule, ...] = ()
    """Rules of targets that have another one, under other names."""
    spelling: tuple[str, ...] = ()
    """Sources of the others that are in use."""

    def spelled(self, keys: Collection[str]) -> Table:
        """With `or` rules in place of those whose names `keys` lacks. Keys of a file, or a table's
        `spelling`."""
        found = [o for o in self.others if self._among(keys, o)]
        gone = {o.target for o in found} - {r.target for r in self.rules if self._among(keys, r)}
        used = tuple(o for o in found if o.target in gone)
        kept = tuple(r for r in self.rules if r.target not in gone)
        return replace(self, rules=kept + used, spelling=tuple(s for o in used for s in o.sources))

    def _among(self, keys: Collection[str], rule: Rule) -> bool:
        for name in rule.sources:
            start = f"({re.escape(self.prefix)})?" if self.prefix and name.startswith(self.prefix) else ""
            rest = re.escape(name.removeprefix(self.prefix))
            pattern = start + re.sub(r"\\\{[ieh]\\\}", r"(\\d+|{[ieh]})", rest) + r"(\.weight|\.bias)?"
            if not any(re.fullmatch(pattern, key) for key in keys):
                return False
        return True

    def dropped(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self.drops)

    def sources(self, target: str) -> tuple[str, ...]:
        """Names a canonical module is stored under; () when no rule makes it."""
        return next((rule.sources for rule in self.rules if rule.target == target), ())


@dataclass(frozen=True, slots=True)
class Step:
    """One canonical tensor and the file tensors it is made of."""

    target: str
    sources: tuple[str, ...]
    ops: tuple[str, ...]
    layer: Layer | None
    """The layer it belongs to, for ops that must know the heads."""
    stack: int = 0
    """So many sources in a row are stacked on a new axis 0 before the ops; 0: none are."""


def of(family: ModuleType) -> Table:
    """The Table of a family's file, with its own predicates."""
    return parse(family.RULES, getattr(family, "guards", None))


# ---------------------------------------------------------------------------------------------------- parsing


@dataclass
class _Draft:
    """A table before names are filled in. Every level of lines overrides the ones before."""

    at: str = ""
    root: str = ""
    home: str = "blocks.{i}"
    levels: tuple[tuple[str, ...], ...] = ()


def parse(text: str, guards: Guards | None = None) -> Table:
    """Text of one or more tables -> Table. Malformed text is a programmer's mistake and raises ValueError."""
    rules: list[Rule] = []
    others: list[Rule] = []
    drops: list[str] = []
    prefix = ""
    for draft in _drafts(text).values():
        more = _resolved(draft)
        rules += more.rules
        others += more.others
        drops += [d for d in more.drops if d not in drops]
        prefix = more.prefix or prefix
    return Table(tuple(rules), tuple(drops), prefix, guards, tuple(others))


def _drafts(text: str) -> dict[str, _Draft]:
    """The tables of a text by name (a number when they have none), their bases filled in."""
    found: dict[str, _Draft] = {"0": _Draft()}
    lines: list[str] = []
    name = "0"

    def close() -> None:
        found[name].levels += (tuple(lines),)
        lines.clear()

    for line in (part.strip() for chunk in text.splitlines() for part in chunk.split(";")):
        if not line or line.startswith("#"):
            continue
        if line.startswith("table "):
            close()
            name = str(len(found))
            name, draft = _header(line.removeprefix("table "), name, found)
            found[name] = draft
        else:
            lines.append(line)
    close()
    return {key: draft for key, draft in found.items() if any(draft.levels)}


def _header(line: str, name: str, found: Mapping[str, _Draft]) -> tuple[str, _Draft]:
    swaps = re.findall(r"(?:^|\s)s/([^/]+)/([^/]*)/", line)
    words = re.sub(r"(?:^|\s)s/[^/]+/[^/]*/", " ", line).split()
    draft = _Draft()
    while words:
        word = words.pop(0)
        if word == "like":
            base = _base(words.pop(0), found)
            levels = tuple(tuple(_swap(old, swaps) for old in level) for level in base.levels)
            draft = _Draft(base.at, base.root, base.home, levels)
        elif word == "=>":
            draft.home = words.pop(0)
        elif word.startswith("@="):
            draft.at = word[2:]
        elif word.startswith("~="):
            draft.root = word[2:]
        else:
            name = word
    return name, draft


def _swap(line: str, swaps: list[tuple[str, str]]) -> str:
    for old, new in swaps:
        line = line.replace(old, new)
    return line


def _base(name: str, found: Mapping[str, _Draft]) -> _Draft:
    if name in found:
        return found[name]
    from caravan.model import families  # a family's rules may build on another's

    drafts = list(_drafts(families.find(name).RULES).values())
    if len(drafts) != 1:
        raise ValueError(f"{name} has {len(drafts)} tables: which one is meant?")
    return drafts[0]


def _resolved(draft: _Draft) -> Table:
    rules: list[Rule] = []
    others: list[Rule] = []
    drops: tuple[str, ...] = ()
    prefix = ""
    for level in draft.levels:
        new = [rule for line in level for rule in _rules(line, draft) if _is_rule(line)]
        gone = {rule.target for rule in new}
        for name in (line[1:].strip() for line in level if line.startswith("- ")):
            gone |= {name, f"{draft.home}.{name}"}
        rules = [rule for rule in rules if rule.target not in gone] + new
        others = [rule for rule in others if rule.target not in gone]
        others += [rule for line in level if line.startswith("or ") for rule in _rules(line[3:], draft)]
        restated = [word for line in level if line.startswith("drop ") for word in line.split()[1:]]
        drops = tuple(restated) or drops
        prefix = next((line[7:].strip() for line in level if line.startswith("prefix?")), prefix)
    return Table(tuple(rules), drops, prefix, others=tuple(others))


def _is_rule(line: str) -> bool:
    return not line.startswith(("- ", "or ", "drop ", "prefix?"))


def _alternatives(name: str) -> list[str]:
    """a{x,y}b -> [axb, ayb]; {i}, {e} and {h} are left alone."""
    found = re.search(r"\{([^{}]*,[^{}]*)\}", name)
    if not found:
        return [name]
    return [name[: found.start()] + part + name[found.end() :] for part in found.group(1).split(",")]


def _rules(line: str, draft: _Draft) -> list[Rule]:
    if not _is_rule(line):
        return []
    found = re.match(r"\[([^\]]+)\]\s*(.*)", line)
    guard, line = found.groups() if found else ("", line)
    body, _, ops = line.partition(" : ")
    left, arrow, right = (part.strip() for part in body.partition("->"))
    if not arrow or not left or not right:
        raise ValueError(f"not a rule: {line!r}")
    home = f"{draft.home}." if left.startswith("@") else ""
    left = left.replace("@", draft.at).replace("~", draft.root)
    sources, targets = _alternatives(left), [home + name for name in _alternatives(right)]
    steps = tuple(ops.split())
    unknown = set(steps) - mapping.OPS
    if unknown:
        raise ValueError(f"no such op: {sorted(unknown)[0]!r} in {line!r}")
    if len(targets) == 1:
        return [Rule(tuple(sources), targets[0], steps, guard)]
    return [Rule((s,), t, steps, guard) for s, t in zip(sources, targets, strict=True)]


# --------------------------------------------------------------------------------------------------- planning


def predicates(spec: Spec) -> set[str]:
    """Names of the guards that hold for every Spec: how its first layer is put together."""
    if not spec.layers:
        return set()
    layer = spec.layers[0]
    par2 = layer.parallel and not layer.shared_norm
    said = {
        "pre": layer.pre,
        "sum": layer.post == "sum",
        "out": layer.post == "out",
        "seq": not layer.parallel,
        "par2": par2,
        "gated": layer.ffn is not None and layer.ffn.kind == "glu",
    }
    return {name for name, true in said.items() if true}


def plan(table: Table, spec: Spec, canonical: Collection[str]) -> list[Step]:
    """One Step for every canonical tensor name of the model. A name without a rule is a programmer's
    mistake."""
    facts = predicates(spec) | (table.guards(spec) if table.guards else set())
    exact: dict[str, list[Rule]] = {}
    for rule in table.rules:
        if rule.holds(facts):
            exact.setdefault(rule.target, []).append(rule)
    steps = []
    for name in canonical:
        found = re.search(r"blocks\.(\d+)\.", name)
        index = found.group(1) if found else ""
        pattern = name[: found.start(1)] + "{i}" + name[found.end(1) :] if found else name
        stem, _, suffix = pattern.rpartition(".")
        for key, end in ((pattern, ""), (stem, f".{suffix}")):
            found_rules = [r for t in (key, key.replace("{i}", index)) for r in exact.get(t, ())]
            if found_rules:
                steps.append(_step(name, found_rules[0], index, end, spec))
                break
        else:
            raise ValueError(f"no rule makes {name}")
    return steps


def _step(name: str, rule: Rule, index: str, end: str, spec: Spec) -> Step:
    layer = spec.layers[int(index)] if index and int(index) < len(spec.layers) else None
    plain = [source.replace("{i}", index) for source in rule.sources]
    stack = 0
    mark = next((mark for mark in ("{e}", "{h}") if mark in plain[0]), None)
    if mark:
        stack = mapping.copies(mark, name, layer)
        plain = [source.replace(mark, str(n)) for source in plain for n in range(stack)]
    return Step(name, tuple(source + end for source in plain), rule.ops, layer, stack)


def load(
    table: Table, steps: list[Step], keys: Collection[str], read: Callable[[str], Tensor], where: str
) -> tuple[dict[str, Tensor], bool]:
    """File tensors -> canonical tensors; also whether the file lacked the optional prefix.

    Raises UserError naming the key when the file lacks a tensor or has one that nothing asks for.
    """
    assigned, bare = assign(table, steps, keys, where)
    pairs = zip(steps, assigned, strict=True)
    return {step.target: forwards([read(s) for s in sources], step) for step, sources in pairs}, bare


def assign(
    table: Table, steps: list[Step], keys: Collection[str], where: str
) -> tuple[list[tuple[str, ...]], bool]:
    """The keys of the file that each step reads; also whether the file lacked the optional prefix. Raises as
    `load` does."""
    present = set(keys)
    bare = bool(table.prefix) and not any(key.startswith(table.prefix) for key in present)
    result: list[tuple[str, ...]] = []
    used: set[str] = set()
    for step in steps:
        sources = tuple(s.removeprefix(table.prefix) if bare else s for s in step.sources)
        for source in sources:
            if source not in present:
                raise UserError(
                    f"{where}: tensor '{source}' is missing (needed for {step.target})",
                    "config.json does not describe these weights, or the download is incomplete",
                )
        used.update(sources)
        result.append(sources)
    extra = sorted(key for key in present - used if not table.dropped(key))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{where}: tensor '{extra[0]}'{more} has no place in this model",
            "config.json does not describe these weights: check model_type, layer count and bias flags",
        )
    return result, bare


def beside(pattern: str, steps: list[Step], table: Table, keys: Collection[str]) -> set[str]:
    """Keys matching `pattern` that no step reads: heads for other uses, kept and written back as they are."""
    read = {name for step in steps for name in step.sources}
    read |= {name.removeprefix(table.prefix) for name in read}
    return {key for key in keys if pattern and key not in read and re.search(pattern, key)}


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
    """Stack what is stored one by one, then apply a step's ops in order."""
    if step.stack:
        n = step.stack
        sources = [torch.stack(sources[at : at + n]) for at in range(0, len(sources), n)]
    for op in step.ops:
        sources = mapping.forwards(op, sources, step.target, step.layer)
    (result,) = sources
    return result


def backwards(tensor: Tensor, step: Step) -> list[Tensor]:
    """Undo a step's ops in reverse order, then take stacks apart."""
    parts = [tensor]
    count = len(step.sources) // step.stack if step.stack else len(step.sources)
    for op in reversed(step.ops):
        parts = mapping.backwards(op, parts, count, step.target, step.layer)
    return [one for part in parts for one in part.unbind()] if step.stack else parts
