"""Weights stored as 8-bit floats with a scale per block (DeepSeek-V3, section 3.3 of arXiv:2412.19437),
read as the plain weights they stand for.

A weight [N, K] lies in the file as float8 beside `<key>_scale_inv` [ceil(N / R), ceil(K / C)]; element (n, k)
is the product of its float8 and the scale of its block (n // R, k // C), where `weight_block_size` of the
quantization_config is [R, C], or null for one scale per weight. Blocks at the edges may be cut. Rows of
blocks are multiplied in fp32 and written where the weight stays, so memory holds one stored tensor more than
the weights, as for any other file. Scales of activations belong to other ways of computing and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from caravan.model import keys
from caravan.model.tensors import TensorFolder, Tensors
from caravan.types import UserError

SCALE, ACTIVATION = "_scale_inv", ".activation_scale"
DEFAULT = [128, 128]
KEY = "weight_block_size"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INCOMPLETE = "the download is incomplete, or the files are of two layouts"
_DAMAGED = "the checkpoint is damaged or of another layout"


def stored_so(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights are 8-bit floats in blocks."""
    said = config.get("quantization_config")
    return isinstance(said, Mapping) and said.get("quant_method") == "fp8"


class Blocks(Tensors):
    """The tensors of such a folder under their usual names; scaled ones are fp32 when asked for.

    Raises UserError naming the key: when a scale has no weight, a float8 no scale, or the two do not fit.
    """

    def __init__(self, tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.block = _block(quantization_config)
        scales = {key for key in tensors if key.endswith(SCALE)}
        self.scaled = {key.removesuffix(SCALE) for key in scales}
        alone = sorted(self.scaled - tensors.keys())
        if alone:
            raise UserError(f"'{alone[0]}{SCALE}' scales '{alone[0]}', which is missing", _INCOMPLETE)
        self.plain = [key for key in tensors if key not in scales and not key.endswith(ACTIVATION)]
        if isinstance(tensors, TensorFolder):
            self._all_scaled(tensors)

    def _all_scaled(self, files: TensorFolder) -> None:
        for key in self.plain:
            if key not in self.scaled and files.entry(key).dtype in FLOAT8:  # a cast would pass for a weight
                raise UserError(f"'{key}' is an 8-bit float, but '{key}{SCALE}' is missing", _INCOMPLETE)

    def shape(self, key: str) -> tuple[int, ...] | None:
        return self.tensors.shape(key) if isinstance(self.tensors, Tensors) else None

    def kind(self, key: str) -> torch.dtype:
        """The type to write a tensor in: bf16 for scaled ones."""
        assert isinstance(self.tensors, TensorFolder)
        return torch.bfloat16 if key in self.scaled else self.tensors.kind(key)

    def fill(self, key: str, out: Tensor) -> None:
        if key in self.scaled:
            self._multiply(key, self.tensors[key], out)
        elif isinstance(self.tensors, Tensors):
            self.tensors.fill(key, out)
        else:
            out.copy_(self[key])

    def __getitem__(self, key: str) -> Tensor:
        stored = self.tensors[key]
        if key not in self.scaled:
            return stored
        result = torch.empty(stored.shape)
        self._multiply(key, stored, result)
        return result

    def _multiply(self, key: str, stored: Tensor, out: Tensor) -> None:
        scale = self.tensors[key + SCALE].float()
        if stored.dim() != 2:
            raise UserError(f"'{key}' has {stored.dim()} axes, a weight in blocks has 2", _DAMAGED)
        rows, columns = self.block or stored.shape
        blocks = (-(-stored.shape[0] // rows), -(-stored.shape[1] // columns))
        if tuple(scale.shape) != blocks and not (scale.numel() == 1 and blocks == (1, 1)):
            raise UserError(
                f"'{key}{SCALE}' has shape {tuple(scale.shape)}, but '{key}' of shape {tuple(stored.shape)} "
                f"has {blocks} blocks of {rows} x {columns}",
                f"'{KEY}' of the quantization_config does not belong to these weights",
            )
        wide = scale.view(blocks).repeat_interleave(columns, 1)[:, : stored.shape[1]]
        for i, scale_K in enumerate(wide):
            own = slice(i * rows, (i + 1) * rows)
            out[own] = (stored[own].float() * scale_K).to(out.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)


def _block(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """(R, C), None for one scale per weight."""
    value = said.get(KEY, DEFAULT)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise keys.wrong(f"quantization_config.{KEY}", value, "two whole numbers above 0, or null")
    return value[0], value[1]
