"""From a reference or a folder to a model that answers: weights, tokenizer, engine, and what to draw with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caravan.store import Store, file_digest
from caravan.types import Message, Sampling, UserError

if TYPE_CHECKING:
    from caravan.data.calls import Spelling
    from caravan.data.tokenizer import Tokenizer
    from caravan.engine.engine import Engine
    from caravan.stage import Runtime

TEMPERATURE = 0.3
"""When neither the user nor generation_config.json names one: small models wander at more."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to answer."""

    name: str
    engine: Engine
    tok: Tokenizer
    context_length: int
    weights: str
    """Artefact id, or the hash of the weight files of a folder that is none."""
    defaults: Sampling

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids of the served prompt, by the one renderer."""
        from caravan.data.render import render

        return render(messages, self.tok, generation_prompt=True).ids

    @property
    def calls(self) -> Spelling | None:
        """How its chat template writes tool calls; None: in no way that can be read back."""
        from caravan.data.calls import spelling

        return spelling(self.tok)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text as the start of a document: after the start token where the family has one of
        its own (Llama, Gemma), as it stands where end and start are one token (GPT-2, ours) unless empty."""
        ids = self.tok.encode(text)
        bos, eos = self.tok.bos, self.tok.eos
        if bos is not None and (bos != eos or not ids):
            return [bos, *ids]
        return ids

    def answer(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        """The answer in pieces, on the caller's thread. Closing the iterator early frees the engine."""
        prompt = self.prompt(messages)
        if len(prompt) >= self.context_length:
            raise UserError(
                f"the conversation has {len(prompt)} tokens; the model's context of {self.context_length} "
                "must hold the answer too",
                "start a new one (/reset)",
            )
        id = self.engine.submit(prompt, sampling)
        try:
            while True:
                for event in self.engine.step():
                    if event.id == id:
                        if event.text:
                            yield event.text
                        if event.finished:
                            return
        finally:
            self.engine.abort(id)


def find(store: Store, model: str) -> tuple[Path, str, str]:
    """Folder, weights id and a short name of a model given as an artefact reference or a folder path.

    A reference comes before a path of the same spelling. The short name is the one it was published under, if
    any.
    """
    path = Path(model).expanduser()
    try:
        artefact = store.open(model)
    except UserError:
        if not path.is_dir():
            raise
    else:
        if artefact.kind != "model":
            raise UserError(
                f"{artefact.ref} is a {artefact.kind}, not a model", "`caravan ls model` shows the models"
            )
        called = [name for name, ref in store.names().items() if ref == f"{artefact.kind}/{artefact.id}"]
        name = model if model in called else called[0] if called else artefact.ref.replace("/", "-")
        return artefact.path, artefact.id, name
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no model folder: config.json is missing", "give a Hugging Face folder")
    manifest = path / "manifest.json"
    if manifest.is_file():
        id = str(json.loads(manifest.read_text()).get("id", ""))
        if id:
            return path, id, f"model-{id[:12]}" if path.name == id else path.name
    found = sorted(path.glob("*.safetensors"))
    whole = hashlib.sha256("".join(file_digest(file) for file in found).encode()).hexdigest()
    return path, whole, path.resolve().name


def load(
    store: Store,
    model: str,
    rt: Runtime,
    *,
    name: str = "",
    max_seqs: int = 16,
    max_tokens: int = 1024,
    temperature: float | None = None,
    precision: str = "fp32",
) -> Loaded:
    """Load for answering. UserError when the folder is not a model, or its tokenizer does not fit."""
    from caravan.compress.folder import swap
    from caravan.data.tokenizer import Tokenizer
    from caravan.engine.engine import Engine
    from caravan.model import checkpoint
    from caravan.systems import runtime

    folder, weights, short = find(store, model)
    machine = runtime.setup(rt, precision=precision)  # type: ignore[arg-type]
    tok = Tokenizer.load(folder)
    decoder = checkpoint.load_model(folder, dtype=machine.dtype, device=machine.device)
    checkpoint.check_vocab(decoder.spec, tok.vocab_size)
    if machine.device.type == "cpu":
        swap(decoder, folder)  # the integers themselves, where the folder holds any
    decoder.eval()
    engine = Engine(
        decoder,
        stop_ids=tok.stop_ids,
        vocab_size=tok.vocab_size,
        decode=tok.decode,
        max_seqs=max_seqs,
        version=weights[:12],
    )
    return Loaded(
        name=name or short,
        engine=engine,
        tok=tok,
        context_length=decoder.spec.context,
        weights=weights,
        defaults=_defaults(checkpoint.read_generation(folder), temperature, max_tokens),
    )


def _defaults(said: Mapping[str, Any], temperature: float | None, max_tokens: int) -> Sampling:
    """What generation_config.json says, unless the user says otherwise."""
    if temperature is None:
        greedy = said.get("do_sample") is False
        temperature = 0.0 if greedy else said.get("temperature")
    return Sampling(
        temperature=TEMPERATURE if temperature is None else float(temperature),
        top_k=int(said.get("top_k") or 0),
        top_p=float(said.get("top_p") or 1.0),
        max_tokens=max_tokens,
    )
