"""Integer weights: packing, dequantising, and a linear layer on 4- or 8-bit weights with 16-bit activations.

A weight row is q * s with q a signed integer and s one scale per row (8 bits) or per group of inputs (4
bits). On disk this is the compressed-tensors "pack-quantized" layout, which transformers and vLLM read:
`weight_packed` int32 [N, K * bits / 32] with q + 2^(bits-1) packed along the inputs, lowest bits first;
`weight_scale` [N, K / g]; `weight_shape` int64 [2].

The fast products are private operators of torch: they are used only after a self-test at first use, with
bfloat16 activations (float32 ones take a scalar path, slower than no quantisation at all), and for few rows:
their time is linear in the rows, so from `PACKED_ROWS` on a dense bfloat16 copy wins. Reference and fallback
is `F.linear` on the dequantised weight.

Shapes: N outputs, K inputs, G groups per row, M rows of activations.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.types import UserError

INT8_STEP = 32
"""The 8-bit product reads inputs in whole vectors and runs past the end of others (wrong numbers or a crash
in torch 2.13): rows are padded with zeros to a multiple of this."""
PACKED_ROWS = 8
"""Rows of activations up to which the packed product is used (measured: 4-bit ties with dense at 4 to 8)."""


def pack(q_NK: Tensor, bits: int) -> Tensor:
    """int8 [N, K] in -2^(bits-1) .. 2^(bits-1)-1 -> int32 [N, ceil(K * bits / 32)]; bits is 4 or 8."""
    assert bits in (4, 8), bits
    per = 32 // bits
    unsigned = F.pad(q_NK.long() + (1 << (bits - 1)), (0, -q_NK.shape[1] % per))
    shifts = torch.arange(per, device=q_NK.device) * bits
    word = (unsigned.unflatten(1, (-1, per)) << shifts).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def unpack(packed: Tensor, bits: int, inputs: int) -> Tensor:
    """Inverse of `pack` -> int8 [N, inputs]."""
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    fields = (packed.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (fields.flatten(1)[:, :inputs] - (1 << (bits - 1))).to(torch.int8)


def expand(q_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """q * s in float32 [N, K]: the definition everything else is measured against."""
    N, K = q_NK.shape
    grouped = q_NK.float().view(N, scale_NG.shape[1], -1) * scale_NG.float().unsqueeze(-1)
    return grouped.view(N, K)


def scheme(config: Mapping[str, Any]) -> tuple[int, bool]:
    """(bits, stored transposed?) of a `quantization_config`. Raises UserError for what we do not read."""
    groups = list((config.get("config_groups") or {}).values())
    found = "/".join(str(config[key]) for key in ("quant_method", "format") if config.get(key)) or "missing"
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    good = (
        config.get("quant_method") == "compressed-tensors"
        and config.get("format") == "pack-quantized"
        and weights.get("num_bits") in (4, 8)
        and weights.get("type", "int") == "int"
        and weights.get("symmetric", True)
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") in (None, False, "weight", "static")
    )
    if not good:
        raise UserError(
            f"config.json: 'quantization_config' with 'quant_method' {found} is not read",
            "take the checkpoint it was made from (bf16 or fp16), or let the program that made it write it "
            "out in bf16; read are compressed-tensors pack-quantized, symmetric, 4 or 8 bits, per group or "
            "channel, and fp8 in blocks",
        )
    return int(weights["num_bits"]), bool(config.get("transposed", False))


def packed_names(keys: Mapping[str, Any]) -> list[str]:
    """Names (without `.weight`) of the modules stored in packed form."""
    return [key.removesuffix(".weight_packed") for key in keys if key.endswith(".weight_packed")]


def read_integers(tensors: Mapping[str, Tensor], name: str, bits: int) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale [N, G]) of one packed module. Raises UserError when its parts do not fit."""
    part = {p: f"{name}.weight_{p}" for p in ("packed", "scale", "shape")}
    for key in part.values():
        if key not in tensors:
            raise UserError(
                f"tensor '{key}' of a quantised weight is missing", "the checkpoint is incomplete"
            )
    N, K = (int(n) for n in tensors[part["shape"]].tolist())
    packed, scale = tensors[part["packed"]], tensors[part["scale"]]
    scale = scale.reshape(N, -1) if scale.shape[:1] == (N,) else scale
    if (
        packed.shape != (N, -(-K * bits // 32))
        or scale.dim() != 2
        or scale.shape[0] != N
        or K % scale.shape[1]
    ):
        raise UserError(
            f"'{name}' says it is {N} x {K} but holds {tuple(packed.shape)} and scales {tuple(scale.shape)}",
            "the checkpoint is damaged or of another layout",
        )
    return unpack(packed, bits, K), scale


class Dequantised(Mapping[str, Tensor]):
    """Plain tensors of a quantised folder under their usual names, each made when asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.bits, self.transposed = scheme(config)
        self.packed = set(packed_names(tensors))
        self.parts = {f"{name}.weight_{p}" for name in self.packed for p in ("packed", "scale", "shape")}
        self.keys_in_order = [f"{name}.weight" for name in sorted(self.packed)]
        self.keys_in_order += [key for key in tensors if key not in self.parts]

    def __getitem__(self, key: str) -> Tensor:
        name = key.removesuffix(".weight")
        if key in self.parts:
            raise KeyError(key)
        if name not in self.packed or name == key:
            return self.tensors[key]
        weight = expand(*read_integers(self.tensors, name, self.bits))
        return weight.T.contiguous() if self.transposed else weight

    def __contains__(self, key: object) -> bool:
        return key in self.keys_in_order  # a Mapping would write the tensor out in full to find out

    def __iter__(self) -> Any:
        return iter(self.keys_in_order)

    def __len__(self) -> int:
        return len(self.keys_in_order)


def dequantise(tensors: Mapping[str, Tensor], quantization_config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """All tensors of a quantised folder as plain float ones. Raises UserError for layouts we do not read."""
    return Dequantised(tensors, quantization_config)


# ---------------------------------------------------------------------------------------------- fast products


def _int4(x_MK: Tensor, packed: Tensor, scale: Tensor, group: int) -> Tensor:
    assert x_MK.dtype == torch.bfloat16, "other types take a scalar path"
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, packed, group, scale)


def _int8(x_MK: Tensor, packed: Tensor, scale: Tensor, group: int) -> Tensor:
    assert x_MK.dtype == torch.bfloat16, "other types take a scalar path"
    short = packed.shape[1] - x_MK.shape[1]
    return torch._weight_int8pack_mm(F.pad(x_MK, (0, short)) if short else x_MK, packed, scale)


def _prepare(q_NK: Tensor, scale_NG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Weight and scales in the layout of the operators."""
    if bits == 8:
        padded = F.pad(q_NK, (0, -q_NK.shape[1] % INT8_STEP))
        return padded.contiguous(), scale_NG[:, 0].to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((q_NK.int() + 8).contiguous(), 2)
    # weight = (code - 8) * scale + zero, and ours are symmetric
    both = torch.stack([scale_NG, torch.zeros_like(scale_NG)], -1).transpose(0, 1)
    return packed, both.to(torch.bfloat16).contiguous()


def _fits(N: int, K: int, G: int, bits: int) -> bool:
    return (bits == 8 and G == 1) or (bits == 4 and N % 16 == 0 and K // G in (32, 64, 128, 256))


@functools.cache
def packed_product_works(bits: int) -> bool:
    """Self-test, once per process: the private operator against the definition."""
    generator = torch.Generator().manual_seed(0)
    N, K, group = (48, 128, 32) if bits == 4 else (48, 100, 100)
    low = -(1 << (bits - 1))
    q = torch.randint(low, -low, (N, K), generator=generator, dtype=torch.int8)
    scale = torch.rand(N, K // group, generator=generator) * 0.1 + 0.01
    x = torch.randn(3, K, generator=generator).to(torch.bfloat16)
    try:
        y = (_int4 if bits == 4 else _int8)(x, *_prepare(q, scale, bits), group).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # another torch or another machine: the fallback is always right
    want = F.linear(x.float(), expand(q, scale.to(torch.bfloat16)))
    return bool((y - want).norm() < 0.02 * want.norm())


class QuantLinear(nn.Module):
    """y = x W^T + b with integer W; for inference on a CPU.

    `q_NK` int8, `scale_NG` float, `bits` 4 or 8. Activations of any float type; the result has their type.
    """

    def __init__(self, q_NK: Tensor, scale_NG: Tensor, bits: int, bias: Tensor | None = None) -> None:
        super().__init__()
        N, K = q_NK.shape
        self.in_features, self.out_features, self.bits = K, N, bits
        self.group = K // scale_NG.shape[1]
        self.bias = bias
        self.fast = _fits(N, K, scale_NG.shape[1], bits) and packed_product_works(bits)
        self.packed: Tensor | None = None
        self.scale: Tensor | None = None
        if self.fast:
            self.packed, self.scale = _prepare(q_NK, scale_NG, bits)
        self.dense_NK = expand(q_NK, scale_NG).to(torch.bfloat16 if self.fast else torch.float32)

    @property
    def weight(self) -> Tensor:
        """[N, K] multiplied out, for those who take the matrix itself (latent attention)."""
        return self.dense_NK

    def forward(self, x: Tensor) -> Tensor:
        x_MK = x.reshape(-1, self.in_features)
        if self.fast and x_MK.shape[0] <= PACKED_ROWS:
            product = _int4 if self.bits == 4 else _int8
            assert self.packed is not None and self.scale is not None
            y = product(x_MK.to(torch.bfloat16).contiguous(), self.packed, self.scale, self.group)
        else:
            y = F.linear(x_MK.to(self.dense_NK.dtype), self.dense_NK)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(x.dtype)
