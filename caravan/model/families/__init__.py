"""One file per family: `spec(config.json) -> Spec`, `config(Spec) -> config.json`, and the reversible weight
RULES.

The folder is the registry: the file's name is the `model_type` of config.json. Each file has ARCHITECTURE and
CLASSIFIER (class names that transformers opens our folders with), RULES (see model/rules.py), `spec` and
`config`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from caravan.types import UserError


def names() -> list[str]:
    """Every family there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(model_type: str) -> ModuleType:
    """The family of a model_type. Raises UserError listing the known ones."""
    if model_type not in names():
        raise UserError(f"unknown model family '{model_type}'", f"known families: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{model_type}")
