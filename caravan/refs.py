"""What a user may write where an artefact is wanted: a reference, a name, a path or hf:ORG/NAME."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from caravan import outside, stage
from caravan.store import Artefact, Store
from caravan.types import UserError

_LIKE_REF = re.compile(r"([a-z_]+/)?[0-9a-f]{4,64}")
Make = Callable[[str, Artefact], Artefact]
"""Run stage `name` at its default settings on raw data."""


def resolve(store: Store, text: str, spec: str, make: Make) -> Artefact:
    """The artefact behind `text` where one of the kinds in `spec` is wanted.

    A reference comes before a path of the same spelling; `./name` is always the path. A path becomes an
    artefact: a checkpoint folder as it is, anything else through the stage that makes the kind from raw data.
    """
    kinds = stage.kinds(spec)
    if text.startswith("hf:"):
        return _from_hub(store, text, kinds, make)
    path = Path(text).expanduser()
    try:
        return store.open(text)
    except UserError as err:
        if path.exists() or outside.is_pattern(path):
            return _from_path(store, path, kinds, make)
        if _LIKE_REF.fullmatch(text):
            raise
        hint = "check the path, it is taken from the current folder; `caravan ls` shows the artefacts"
        hint = err.hint if err.hint and err.hint.startswith("did you mean") else hint
        raise UserError(f"there is no file or folder {text}, and no artefact of that name", hint) from None


def _from_path(store: Store, path: Path, kinds: tuple[str, ...], make: Make) -> Artefact:
    exported = outside.manifest(path) if path.is_dir() else None
    if exported is not None and exported["kind"] in kinds:
        return store.add(path, kind=exported["kind"])
    if "raw" in kinds:
        return _raw(store, path)
    models = [k for k in kinds if k in outside.MODEL_KINDS]
    if models and (path.is_dir() or len(models) == len(kinds)):
        return store.add(path, kind=_model_kind(path, models))
    for kind in kinds:
        maker = stage.maker(kind)
        if maker:
            return make(maker, _raw(store, path))
    raise UserError(f"{path} cannot become a {' or '.join(kinds)} by itself", stage.how("|".join(kinds)))


def _raw(store: Store, path: Path) -> Artefact:
    """Raw data; what of a folder stays outside is said, since it may be most of it."""
    if left := outside.passed_over(path):
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        print(f"  left out of {path}: {', '.join(left[:5])}{more}", file=sys.stderr, flush=True)
    return store.add(path)


def _from_hub(store: Store, text: str, kinds: tuple[str, ...], make: Make) -> Artefact:
    models = [k for k in kinds if k in outside.MODEL_KINDS]
    makers = ["raw"] if "raw" in kinds else [m for kind in kinds if (m := stage.maker(kind))]
    if not models and makers:
        from caravan.data import hub as data_hub

        with data_hub.fetched(text) as folder:
            raw = store.add(folder)
        return raw if makers[0] == "raw" else make(makers[0], raw)
    if not models:
        raise UserError(f"a {' or '.join(kinds)} cannot come from the Hub", stage.how("|".join(kinds)))
    from caravan.model import hub

    folder = hub.fetch(text)
    return store.add(folder, kind=_model_kind(folder, models))


def _model_kind(folder: Path, kinds: list[str]) -> str:
    """Of several model kinds, `reward` for a sequence classifier, else the first."""
    if len(kinds) > 1 and "reward" in kinds and (folder / "config.json").is_file():
        try:
            names = json.loads((folder / "config.json").read_text()).get("architectures") or []
        except ValueError:
            names = []
        if any(str(n).endswith("ForSequenceClassification") for n in names):
            return "reward"
    return next((k for k in kinds if k != "reward"), kinds[0])
