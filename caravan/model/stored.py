"""The tensors of a folder for whoever works on them one by one, or keeps their type.

Weights in 8-bit floats (`fp8.py`) are how some models were released: they are read in full, and count as
bf16, the type of all else in such folders. Weights rounded to integers are refused: what was rounded is
better taken from where it came.
"""

from __future__ import annotations

from pathlib import Path

import torch

from caravan.model import checkpoint, fp8
from caravan.model.tensors import TensorFolder
from caravan.types import UserError


def weights(folder: Path) -> TensorFolder | fp8.Blocks:
    """All tensors under the names of the files, read when asked for; each has its `kind` and `shape`.

    Raises UserError for integers, and as TensorFolder and fp8.Blocks do.
    """
    config = checkpoint.read_config(folder)
    if config.get("quantization_config") and not fp8.stored_so(config):
        raise UserError(
            f"{folder} is quantised: its weights were rounded to integers",
            "give the model that it was made from",
        )
    files = TensorFolder(folder)
    return fp8.Blocks(files, config["quantization_config"]) if fp8.stored_so(config) else files


def dtype(folder: Path) -> torch.dtype:
    """bf16 if all tensors are, else fp32: the type in which nothing of a folder is lost. Raises as
    `weights`."""
    found = weights(folder)
    return torch.bfloat16 if {found.kind(key) for key in found} == {torch.bfloat16} else torch.float32
