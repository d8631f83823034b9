"""One file per family: `spec(config.json) -> Spec`, `config(Spec) -> config.json`, and the reversible weight
RULES.

The folder is the registry: the file's name is the `model_type` of config.json, with '_' for '-'. Each file
has ARCHITECTURE and CLASSIFIER (class names that transformers opens our folders with, None without one),
RULES (see model/rules.py), `spec` and `config`; it may have ALIASES (other model_types that mean the same
layout), MODEL_TYPE (what is written, where it is not the file's name), `guards(spec)` (names of its own
predicates for the rules), KEPT (a pattern of tensors written back as they came), `opened(tensors)` (another
spelling of a file, read under the names of RULES), MODULE (a module of its own instead of the one decoder),
POOL (an encoder, and how it becomes a vector), `beside(folder)` (keys of config.json that stand in other
files) and `carried(old, new)` (the keys of config.json to be written, with what nested objects had
besides).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from types import ModuleType

from caravan.types import UserError


@functools.cache
def names() -> list[str]:
    """Every family there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def aliases() -> dict[str, str]:
    """Other model_types -> the family that answers to them. Imports every file."""
    return {alias: name for name in names() for alias in getattr(_module(name), "ALIASES", ())}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def find(model_type: str) -> ModuleType:
    """The family of a model_type. Raises UserError listing the known ones."""
    name = str(model_type).replace("-", "_")
    if name in names():
        return _module(name)
    if model_type in aliases():
        return _module(aliases()[model_type])
    raise UserError(f"unknown model family '{model_type}'", f"known families: {', '.join(names())}")


def model_type(family: ModuleType) -> str:
    """The model_type a family's files are written with."""
    return getattr(family, "MODEL_TYPE", family.__name__.rpartition(".")[2])


def classifier(family: ModuleType) -> str:
    """The class name that reward models are written with; our own where transformers has none."""
    stem = re.sub("(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", family.ARCHITECTURE)
    return family.CLASSIFIER or f"{stem}ForSequenceClassification"
