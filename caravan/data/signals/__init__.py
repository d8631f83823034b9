"""Signals: numbers that say what a document is like, from which rules decide later.

One file per family; the folder is the registry. A family has a one-line docstring that names it, and

    COLUMNS  name of a signal -> what it measures, in one line
    VERSION  raised when the same text should get another number
    signals  signals(view) -> {name: array [D]} for every name in COLUMNS

A signal is a pure function of one document: neither its neighbours in a batch nor the number of processes can
change it. Ratios are float32, counts int64, names text.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from caravan.data.signals._view import View
from caravan.types import UserError

__all__ = ["View", "columns", "compute", "families_of", "load", "names"]


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Families there are."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")))


def load(name: str) -> ModuleType:
    """One family."""
    return importlib.import_module(f"caravan.data.signals.{name}")


def columns(families: Sequence[str] | None = None) -> dict[str, str]:
    """Signal -> what it measures, of these families or of all."""
    return {k: v for name in families or names() for k, v in load(name).COLUMNS.items()}


def families_of(wanted: Sequence[str]) -> tuple[str, ...]:
    """The families that make these signals; names that no family makes are left out."""
    return tuple(n for n in names() if not load(n).COLUMNS.keys().isdisjoint(wanted))


def compute(view: View, families: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Every signal of the families: name -> array [D]. Raises UserError for a family that does not exist."""
    out: dict[str, np.ndarray] = {}
    for name in families or names():
        if name not in names():
            raise UserError(f"there are no signals called `{name}`", f"there are: {', '.join(names())}")
        made = load(name).signals(view)
        assert made.keys() == load(name).COLUMNS.keys(), f"{name} makes other signals than it says"
        out.update(made)
    return out
