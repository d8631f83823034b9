"""Which files of an outside path enter the store, by the kind they are added as. Nothing enters unseen.

A model folder gives what is needed to run it (weights as safetensors, configs, tokenizer), what says who may
use it (licence, notice, readme) and nothing that could execute; raw data gives every file that is not hidden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.types import UserError

MODEL_KINDS = ("model", "reward", "tokenizer")
_TOKENIZERS = (".json", ".model", ".tiktoken", ".txt")
"""One file of these can be a whole tokenizer."""
_NEEDED = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja")
_SAYS = ("license", "licence", "copying", "notice", "readme", "use_policy")
"""How the names of files begin that say whose work it is and what may be done with it."""
_PROGRAMS = (".py", ".pyc", ".so", ".sh", ".exe", ".dll", ".js", ".ipynb")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "convert it once where you trust it: "
    "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)`, "
    "or as docs/models.md shows where transformers does not know the model"
)


def files(
    source: Path, kind: str, trust_manifest: bool = True
) -> tuple[dict[str, Path], dict[str, Any] | None]:
    """Name in the store -> file, and the manifest if the folder is an artefact written by `--output`.

    Raises UserError if the path is absent, empty or not what `kind` needs.
    """
    if kind == "raw" and is_pattern(source):
        return matching(source), None
    if not source.exists():
        raise UserError(
            f"there is no file or folder {source}", "check the path; it is taken from the current folder"
        )
    exported = manifest(source) if trust_manifest else None
    if exported is not None and exported["kind"] == kind:
        whole = {name: source / name for name in exported["files"]}
        if all(p.is_file() for p in whole.values()):
            return whole, exported
    if kind in MODEL_KINDS:
        return _model(source, kind), None
    if source.is_file():
        return {source.name: source}, None
    if not source.is_dir():
        raise UserError(f"{source} is neither a file nor a folder", "a pipe or a device has no end to hash")
    found = {p.relative_to(source).as_posix(): p for p in _visible(source)}
    for name in ("manifest.json", "timing.jsonl"):
        if name in found and (name == "timing.jsonl" or manifest(source) is None):
            raise UserError(
                f"{source} has a file `{name}`, a name the store needs", "move it into a folder below"
            )
        found.pop(name, None)
    if not found:
        raise UserError(f"{source} holds no files", "give a file, or a folder with files in it")
    return found, None


def is_pattern(path: Path) -> bool:
    """Whether a path that is not there is a pattern of paths (`data/*/train-*.parquet`, `data/**/*.txt`)."""
    return any(mark in str(path) for mark in "*?[") and not path.exists()


def matching(pattern: Path) -> dict[str, Path]:
    """Name below the pattern's fixed part -> file, of all that match and of folders that do. UserError if
    there are none."""
    parts = pattern.parts
    fixed = next(k for k, part in enumerate(parts) if any(mark in part for mark in "*?["))
    base = Path(*parts[:fixed])
    found: dict[str, Path] = {}
    for path in sorted(base.glob(str(Path(*parts[fixed:])))) if base.is_dir() else []:
        if any(part.startswith(".") for part in path.relative_to(base).parts):
            continue
        below = [path] if path.is_file() else _visible(path) if not path.is_symlink() else []
        found |= {p.relative_to(base).as_posix(): p for p in below}
    if not found:
        raise UserError(
            f"no file matches {pattern}", "check the pattern; it is taken from the current folder"
        )
    for name in ("manifest.json", "timing.jsonl"):
        if name in found:
            raise UserError(
                f"{pattern} takes in a file `{name}`, a name the store needs", "narrow the pattern"
            )
    return found


def passed_over(source: Path) -> list[str]:
    """What below a folder of raw data does not enter the store and is not hidden: links to folders (they may
    lead in a circle) or to nothing, pipes, sockets and devices. `loop (a link to a folder)`, ..."""
    left = []
    for here, folders, names in os.walk(source):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(n for n in [*folders, *names] if not n.startswith(".")):
            path = Path(here, name)
            if name in folders:
                what = "a link to a folder" if path.is_symlink() else ""
            elif path.is_file():
                what = ""
            else:
                what = "a link that leads to no file" if path.is_symlink() else "a pipe, socket or device"
            if what:
                left.append(f"{path.relative_to(source).as_posix()} ({what})")
    return left


def _visible(folder: Path) -> Iterator[Path]:
    """Files below a folder in a fixed order, without hidden ones and without following linked folders."""

    def refuse(err: OSError) -> None:
        raise err

    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(here, n) for n in sorted(names) if not n.startswith(".") and Path(here, n).is_file())


def _model(source: Path, kind: str) -> dict[str, Path]:
    if kind == "tokenizer" and source.is_file() and source.suffix in _TOKENIZERS:
        return {"tokenizer.json" if source.suffix == ".json" else source.name: source}
    if not source.is_dir():
        raise UserError(f"{source} is a file; a {kind} is a folder", "give the folder that holds config.json")
    there = {p.name: p for p in sorted(source.iterdir()) if p.is_file()}
    skipped = ("manifest.json", "pytorch_model.bin.index.json")
    found = {
        n: p for n, p in there.items() if (p.suffix in _NEEDED and n not in skipped) or says_whose(p.name)
    }
    if kind == "tokenizer":
        found = {n: p for n, p in found.items() if p.suffix != ".safetensors"}
        formats = ("tokenizer.json", "merges.txt", "rwkv_vocab", "vocab.txt", ".model", ".tiktoken")
        if not any(n.startswith(formats) or n.endswith(formats) for n in found) and not _of_bytes(source):
            raise UserError(
                f"{source} holds no tokenizer.json", "a tokenizer folder needs one (tokenizers format)"
            )
        return found
    if not any(p.suffix == ".safetensors" for p in found.values()):
        if any(p.suffix in _PICKLES for p in there.values()):
            raise UserError(
                f"{source} holds its weights as pickles only, which can run code when opened", _CONVERT
            )
        raise UserError(
            f"{source} holds no *.safetensors weights", "give the folder of a Hugging Face checkpoint"
        )
    if "config.json" not in found:
        raise without_config(source)
    return found


def _of_bytes(folder: Path) -> bool:
    """Whether config.json alone says what the tokenizer is: bGPT reads bytes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "bgpt"


def without_config(folder: Path) -> UserError:
    """What to say of a folder that has no config.json."""
    if (folder / "adapter_config.json").exists():
        return UserError(
            f"{folder} has no config.json: it holds an adapter (LoRA), not a model",
            "merge it into its base first: PeftModel's `merge_and_unload().save_pretrained(new_folder)`",
        )
    return UserError(f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint")


def says_whose(name: str) -> bool:
    """Whether a file's name is of LICENSE's kind (LICENSE.apache, NOTICE.txt, README_zh.md, ...)
    and not a program's."""
    return name.lower().startswith(_SAYS) and Path(name).suffix.lower() not in _PROGRAMS + _PICKLES


def manifest(source: Path) -> dict[str, Any] | None:
    """The manifest of an exported artefact; None for anything else called manifest.json."""
    try:
        found = json.loads((source / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(found, dict) and {"schema", "kind", "id", "key", "asked", "files"} <= found.keys()
    if not ours or any(Path(n).is_absolute() or ".." in Path(n).parts for n in found["files"]):
        return None
    return found
