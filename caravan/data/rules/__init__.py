"""Rules: limits on signals, kept as data, one TOML file per published set.

    about = "one sentence"
    source = "where it was published"
    skip_languages = ["zh"]         # documents in these are not judged by this set
    lines = "c4_paper"              # a line filter of data/lines.py that edits what stays (optional)

    [[rule]]
    name = "gopher_words"           # unique; what the facts count under
    signal = "gopher_words"         # a column of the signals
    at_least = 50                   # a document stays if at_least <= value <= at_most,
    at_most = 100000                # more_than < value < less_than, value in one_of,
    languages = ["en"]              # judged in these languages only (optional)
    why = "one sentence"

    pareto = 9                      # or: stays with probability (2 - value)^-pareto (GPT-3's rule)

Limits are compared in the precision signals are stored in, so a document that is exactly at a limit is on
the side its definition says. A signal that is missing from the table is an error at the start, never a rule
that silently keeps everything; a signal that is not a number for one document (no perplexity of an empty
text) does not judge it.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from caravan.config import nearest
from caravan.data.clean import Rejection
from caravan.data.quality import pareto_keeps
from caravan.types import UserError

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One limit on one signal."""

    name: str
    signal: str
    why: str = ""
    at_least: float | None = None
    at_most: float | None = None
    more_than: float | None = None
    less_than: float | None = None
    one_of: tuple[str, ...] = ()
    pareto: float | None = None
    languages: tuple[str, ...] = ()
    skip_languages: tuple[str, ...] = ()

    def breaks(self, table: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
        """bool [D]: documents that break the rule. `table` holds the signal, `lang` and `id`."""
        value = table[self.signal]
        if self.one_of:
            broken = ~np.isin(value, self.one_of)
        elif self.pareto is not None:
            broken = ~pareto_keeps(table["id"].tolist(), value, self.pareto, seed)
        else:
            broken = np.zeros(len(value), np.bool_)
            for limit, outside in (
                (self.at_least, np.less), (self.at_most, np.greater),
                (self.more_than, np.less_equal), (self.less_than, np.greater_equal),
            ):  # fmt: skip
                if limit is not None:
                    broken |= outside(value, limit)  # in the precision of the signal
        if value.dtype.kind == "f":
            broken &= ~np.isnan(value)
        if self.languages:
            broken &= np.isin(table["lang"], self.languages)
        if self.skip_languages:
            broken &= ~np.isin(table["lang"], self.skip_languages)
        return broken

    def reason(self, value: Any) -> Rejection:
        """What to say of a document that breaks it."""
        shown = f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
        return Rejection(self.name, f"{self.signal} is {shown} ({self.limit})")

    @property
    def limit(self) -> str:
        words = {
            "at_least": "at least {}", "at_most": "at most {}", "more_than": "more than {}",
            "less_than": "less than {}", "pareto": "Pareto draw with shape {}",
        }  # fmt: skip
        said = [text.format(v) for k, text in words.items() if (v := getattr(self, k)) is not None]
        return ", ".join([*said, *(["one of " + ", ".join(self.one_of)] if self.one_of else [])])


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """Rules of one file."""

    name: str
    about: str
    source: str
    rules: tuple[Rule, ...]
    lines: str = ""
    """Line filter applied to what stays."""
    skip_languages: tuple[str, ...] = ()


@dataclass(slots=True)
class Verdicts:
    """What rules said about a batch of documents."""

    first: list[Rejection | None]
    """The first rule each document breaks, in the order of the rules; None if it stays."""
    broken: dict[str, int] = field(default_factory=dict)
    """Documents that break each rule, whether or not an earlier one removed them."""
    alone: dict[str, int] = field(default_factory=dict)
    """Documents that break this rule and no other."""


def names() -> list[str]:
    """Rule sets that come with caravan."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def load(wanted: Sequence[str], own: Path | None = None) -> list[RuleSet]:
    """Rule sets by name; those of the folder or file `own` come before ours. UserError if one is unknown."""
    there = {p.stem: p for p in sorted(FOLDER.glob("*.toml"))}
    if own is not None:
        there |= {p.stem: p for p in sorted([own] if own.is_file() else own.glob("*.toml"))}
    for name in wanted:
        if name not in there:
            raise UserError(f"there are no rules called `{name}`", nearest(name, list(there)))
    sets = [read(there[name]) for name in wanted]
    seen: dict[str, str] = {}
    for rules in sets:
        for rule in rules.rules:
            if rule.name in seen:
                raise UserError(f"both {seen[rule.name]} and {rules.name} have a rule `{rule.name}`")
            seen[rule.name] = rules.name
    return sets


def read(path: Path) -> RuleSet:
    """One rule file. UserError names what is wrong in it."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the rules in {path.name}: {error}") from error
    known = {"about", "source", "rule", "lines", "skip_languages"}
    for key in data.keys() - known:
        raise UserError(f"{path.name}: `{key}` means nothing", nearest(key, sorted(known)))
    skip = tuple(data.get("skip_languages", ()))
    rules = tuple(_rule(path.name, row, skip) for row in data.get("rule", ()))
    if not rules and not data.get("lines"):
        raise UserError(f"{path.name} holds no [[rule]]")
    return RuleSet(
        name=path.stem,
        about=data.get("about", ""),
        source=data.get("source", ""),
        rules=rules,
        lines=data.get("lines", ""),
        skip_languages=skip,
    )


def _rule(file: str, row: dict[str, Any], skip: tuple[str, ...]) -> Rule:
    known = [f.name for f in fields(Rule)]
    for key in row.keys() - set(known):
        raise UserError(f"{file}: `{key}` means nothing in a rule", nearest(key, known))
    for key in ("name", "signal"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{file}: every rule needs a {key}")
    for key in ("at_least", "at_most", "more_than", "less_than", "pareto"):
        value = row.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise UserError(f"{file}: {row['name']}.{key} must be a number, and is {value!r}")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    rule = Rule(**given)
    if not rule.limit:
        raise UserError(f"{file}: rule `{rule.name}` has no limit", "say at_least, at_most, one_of or pareto")
    if rule.pareto is not None and rule.pareto <= 0:
        raise UserError(f"{file}: {rule.name}.pareto must be above 0, and is {rule.pareto!r}")
    return replace(rule, skip_languages=(*rule.skip_languages, *skip))


def changed(sets: Sequence[RuleSet], limits: Sequence[str], off: Sequence[str]) -> list[RuleSet]:
    """The sets with limits replaced ("gopher_words.at_least=30") and rules left out. UserError for a name
    that no rule has."""
    there = {rule.name: rule for rules in sets for rule in rules.rules}
    for name in off:
        if name not in there:
            raise UserError(f"no rule is called `{name}`", nearest(name, list(there)))
    for text in limits:
        place, _, value = text.partition("=")
        name, _, key = place.partition(".")
        if name not in there:
            raise UserError(f"no rule is called `{name}`", nearest(name, list(there)))
        if key not in ("at_least", "at_most", "more_than", "less_than", "pareto"):
            raise UserError(
                f"`{text}` sets no limit", "write RULE.at_least=NUMBER, at_most, more_than, less_than"
            )
        try:
            new: dict[str, Any] = {key: float(value)}
            if math.isnan(new[key]) or (key == "pareto" and new[key] <= 0):  # everything keeps to these
                raise ValueError
            there[name] = replace(there[name], **new)
        except ValueError:
            wanted = "a number above 0" if key == "pareto" else "a number"
            raise UserError(f"`{value}` in `{text}` is not {wanted}") from None
    return [
        replace(rules, rules=tuple(there[r.name] for r in rules.rules if r.name not in off)) for rules in sets
    ]


def judge(rules: Sequence[Rule], table: Mapping[str, np.ndarray], seed: int = 0) -> Verdicts:
    """Apply rules in their order to a table of signals (columns [D], with `id` and `lang`)."""
    count = len(table["id"])
    out = Verdicts([None] * count)
    times = np.zeros(count, np.int64)
    broken = []
    for rule in rules:
        mask = rule.breaks(table, seed)
        broken.append(mask)
        times += mask
        out.broken[rule.name] = int(mask.sum())
        for d in np.flatnonzero(mask).tolist():
            if out.first[d] is None:
                out.first[d] = rule.reason(table[rule.signal][d])
    for rule, mask in zip(rules, broken, strict=True):
        out.alone[rule.name] = int((mask & (times == 1)).sum())
    return out


def needed(rules: Sequence[Rule]) -> list[str]:
    """Signals these rules look at; always `lang`."""
    return sorted({rule.signal for rule in rules} | {"lang"})
