"""Make a model smaller: 8- or 4-bit weights, by rounding to nearest or by GPTQ.

The projections inside the blocks become integers with scales; embeddings, head and norms stay as they are.
The result is a plain folder in the compressed-tensors layout ("pack-quantized", symmetric), which
transformers with `compressed-tensors` installed and vLLM open, and which every stage here takes as a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"model": "model", "calibration": "conversations?"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to quantise."""

    bits: Literal[8, 4] = 8
    """Bits per weight. 8 is nearly free of loss; 4 halves the file again and is felt by small models."""
    group: int | None = None
    """Inputs that share a scale: 32, 64, 128, 256, or 0 for all of a row. None: 64 for 4 bits, 0 for 8."""
    method: Literal["rtn", "gptq"] = "rtn"
    """rtn rounds to nearest and needs no data; gptq needs conversations and loses less at 4 bits."""
    samples: int = 128
    """gptq: conversations to calibrate on."""
    tokens: int = 512
    """gptq: tokens of each conversation at most."""

    def __post_init__(self) -> None:
        if self.group not in (None, 0, 32, 64, 128, 256):
            raise UserError(
                f"group is {self.group}", "use 32, 64, 128, 256, or 0 for one scale per output row"
            )
        if self.samples < 1 or self.tokens < 1:
            raise UserError("gptq needs at least one sample of one token")

    @property
    def width(self) -> int:
        """`group` with its default filled in."""
        return self.group if self.group is not None else (64 if self.bits == 4 else 0)


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Quantise `inputs["model"]` into `out`; returns sizes and errors."""
    import torch

    from caravan.compress import folder
    from caravan.model import stored

    source = inputs["model"].path
    calibration = inputs.get("calibration")
    if cfg.method == "gptq" and calibration is None:
        raise UserError("gptq needs calibration conversations", "give --calibration, or use --method rtn")
    if rt.threads:
        torch.set_num_threads(rt.threads)
    model = folder.load_source(source)
    weights_of = stored.weights(source)
    kind = weights_of.kind(next(iter(weights_of)))
    grid = folder.Grid(cfg.bits, cfg.width, torch.bfloat16 if kind == torch.bfloat16 else torch.float32)
    if not any(grid.fits(layer.in_features) for layer in folder.projections(model).values()):
        raise UserError(
            f"no projection of this model has a number of inputs that {cfg.width} divides",
            "use a smaller --group",
        )

    def report(done: int, total: int) -> None:
        rt.report(done, total, "matrices")

    if cfg.method == "gptq":
        assert calibration is not None
        sequences = list(_calibration(calibration.path, source, cfg, model.spec.context))
        if not sequences:
            raise UserError("the calibration conversations are empty")
        weights = folder.by_gptq(model, grid, sequences, report)
    else:
        weights = folder.round_to_nearest(model, grid, report)
    left = folder.write(source, out, model, grid, weights)
    before, after = _weight_bytes(source), _weight_bytes(out)
    errors = {name: w.error for name, w in weights.items()}
    worst = max(errors, key=errors.__getitem__)
    facts: dict[str, Any] = {
        "bits": cfg.bits,
        "group": cfg.width,
        "method": cfg.method,
        "bytes_before": before,
        "bytes_after": after,
        "size_ratio": round(after / before, 4),
        "matrices": len(weights),
        "matrices_left": left,
        "weight_error_mean": sum(errors.values()) / len(errors),
        "weight_error_max": errors[worst],
        "weight_error_max_at": worst,
    }
    if cfg.method == "gptq":
        facts["calibration_tokens"] = sum(map(len, sequences))
    return facts


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _calibration(data: Path, model: Path, cfg: Config, context: int) -> Iterator[list[int]]:
    """The first `samples` training conversations as token ids."""
    from caravan.data.records import read_conversations
    from caravan.data.render import render
    from caravan.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model)
    for conversation in islice(read_conversations(data / "train.jsonl"), cfg.samples):
        ids = render(conversation.messages, tokenizer).ids[: min(cfg.tokens, context)]
        if ids:
            yield ids
