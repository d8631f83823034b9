"""Give a model a chat template: a built-in one, or a jinja file of your own. Nothing else changes.

For checkpoints that come without one, or with one that does not do what is wanted. The template then goes
with the model into every later stage, `serve` and `chat`, and into transformers and vLLM.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data import template
from caravan.data.calls import spelling
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Message, UserError

INPUTS = {"model": "model", "file": "raw?"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1
OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Files that are written anew or may be: copied, never linked."""


@dataclass(frozen=True, kw_only=True)
class Config:
    template: str = ""
    """Built-in chat template, by name (docs/tokenizers.md); empty: the one in `--file`."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    source = inputs["model"].path
    own = _own(inputs.get("file"))
    if bool(cfg.template) == (own is not None):
        raise UserError(
            "give either --template NAME or --file TEMPLATE.jinja",
            "built in are: " + ", ".join(template.names()),
        )
    tok = Tokenizer.load(source, cfg.template or None)
    tok = tok.told(own) if own is not None else tok
    talk = [Message("user", "1+1?"), Message("assistant", "2")]
    shown = render(talk, tok)
    if "2" not in tok.decode([i for i, answer in zip(shown.ids, shown.mask, strict=True) if answer]):
        raise UserError("the chat template does not show answers", "it must print message['content']")
    _copy(source, out)
    tok.complete(out)
    return {"template": cfg.template or "file", **_stop(tok, out), **_abilities(talk, tok)}


def _own(file: Artefact | None) -> str | None:
    """The text of the jinja file given, if one is."""
    if file is None:
        return None
    found = [file / name for name in file.manifest["files"]]
    if len(found) != 1:
        raise UserError(f"--file holds {len(found)} files", "give the one file of the template")
    try:
        return found[0].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{found[0].name} is no UTF-8 text: {error}", "a template is jinja text") from error


def _copy(source: Path, out: Path) -> None:
    """The model's files; large ones linked, for artefacts never change."""
    for path in sorted(p for p in source.iterdir() if p.is_file() and p.name != "manifest.json"):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
            continue
        try:
            os.link(path, out / path.name)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(path, out / path.name)


def _stop(tok: Tokenizer, out: Path) -> dict[str, Any]:
    """What ends an answer, also written where transformers and vLLM look for it."""
    if tok.end_of_turn is None:
        return {"stop": ""}
    path = out / "generation_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**said, "eos_token_id": sorted(tok.stop_ids)}, indent=2) + "\n")
    return {"stop": tok.decode([tok.end_of_turn], skip_special=False)}


def _abilities(talk: list[Message], tok: Tokenizer) -> dict[str, Any]:
    """What the template can do beyond one question and one answer."""
    try:
        render([Message("system", "Be brief."), *talk], tok)
        system = True
    except UserError:
        system = False
    try:
        render([*talk, *talk], tok)
        turns = True
    except UserError:
        turns = False
    reads, _ = template.knows(tok.chat_template)
    return {
        "system": system,
        "several_turns": turns,
        "tools": "read" if reads else "as text",
        "calls_can_be_read": spelling(tok) is not None,
    }
