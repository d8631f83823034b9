"""Give a model another vocabulary: an extended or pruned tokenizer, or only another number of rows.

Rows of ids that stay are copied; a new piece starts as the mean of the pieces that the old tokenizer cut it
into, in the embedding and in an untied head. Model and tokenizer come out together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data.tokenizer import Tokenizer, copy_files
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"model": "model", "tokenizer": "tokenizer|model?"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many rows."""

    pad_multiple: int = 64
    """Rows are rounded up to a multiple of this, which matrix products like; 1 leaves no padding."""
    rows: int | None = None
    """Rows exactly, instead; at least the ids of the tokenizer."""

    def __post_init__(self) -> None:
        if self.pad_multiple < 1 or (self.rows is not None and self.rows < 1):
            raise UserError("pad_multiple and rows are counts", "give 1 or more")


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Write the model with its new tables, and the tokenizer, into `out`; returns counts of rows."""
    from caravan.model import checkpoint, grow, stored

    source = inputs["model"].path
    given = inputs.get("tokenizer")
    words = given.path if given is not None else source
    dtype = stored.dtype(source)
    old, new = Tokenizer.load(source), Tokenizer.load(words)
    model = checkpoint.load_model(source, dtype)
    checkpoint.check_vocab(model.spec, old.vocab_size)
    sources = row_sources(old, new, words) if given is not None else [(i,) for i in range(old.vocab_size)]
    rows = cfg.rows or -(-len(sources) // cfg.pad_multiple) * cfg.pad_multiple
    if rows < len(sources):
        raise UserError(f"{rows} rows cannot hold {len(sources)} ids", "leave --rows out")
    made = grow.resize(model, sources, rows)
    made.config = grow.moved_ids(made.config, sources)
    generation = grow.moved_ids(checkpoint.read_generation(source), sources)
    out.mkdir(parents=True, exist_ok=True)
    copy_files(words, out)
    new.save(out)
    checkpoint.save_model(made, out, out, dtype, generation)
    kept = sum(len(row) == 1 for row in sources)
    return {
        "ids_before": old.vocab_size,
        "ids": len(sources),
        "ids_kept": kept,
        "ids_new": len(sources) - kept,
        "rows_before": model.spec.vocab,
        "rows": rows,
        "parameters_before": model.spec.parameters,
        "parameters": made.spec.parameters,
    }


def row_sources(old: Tokenizer, new: Tokenizer, folder: Path) -> Sequence[Sequence[int]]:
    """Old ids that each id of `new` starts as: by kept_ids.json of its folder, else by its pieces."""
    from caravan.model.grow import of_pieces

    path = folder / "kept_ids.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        fine = len(kept) == new.vocab_size and all(0 <= i < old.vocab_size for i in kept)
        if not fine or any(old.bytes_of(a) != new.bytes_of(b) for b, a in enumerate(kept)):
            raise UserError(
                f"{path} does not lead from the model's tokenizer to this one",
                "prune the tokenizer of this very model",
            )
        return [(i,) for i in kept]
    before, after = ([tok.bytes_of(i) for i in range(tok.vocab_size)] for tok in (old, new))
    return of_pieces(before, after, old.encode_continuation)
