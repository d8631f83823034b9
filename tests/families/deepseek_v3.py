"""DeepSeek-V3: sigmoid scores, a bias on the choice, groups judged by their best two; FP8 blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import Case, causal, rewrite
from tests.families.deepseek_v2 import LATENT, YARN
from tests.families.mixtral import wrong_moe

THREE = LATENT | {"n_shared_experts": 1, "n_group": 3, "topk_group": 2, "num_key_value_heads": 6}
BLOCK = (16, 20)
"""Of the tiny files; the release has (128, 128). No width here is a multiple of both."""


def by_block(weight_NK: Tensor, scale_AB: Tensor) -> Tensor:
    """[N, K] every block of the weight times its scale, by padding to whole blocks."""
    (N, K), (R, C), (A, B) = weight_NK.shape, BLOCK, scale_AB.shape
    whole = torch.zeros(A * R, B * C)
    whole[:N, :K] = weight_NK.float()
    return (whole.view(A, R, B, C) * scale_AB[:, None, :, None]).view(A * R, B * C)[:N, :K]


def in_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A projection of a layer as float8 and the scales of its blocks; anything else as it is."""
    if weight.dim() != 2 or not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
        return {name: weight}
    (N, K), (R, C) = weight.shape, BLOCK
    padded = torch.nn.functional.pad(weight, (0, -K % C, 0, -N % R))
    largest_AB = padded.unflatten(1, (-1, C)).unflatten(0, (-1, R)).abs().amax((1, 3))
    scale_AB = largest_AB / 448  # the largest float8 of this kind
    small = by_block(weight, 1 / scale_AB).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: small, f"{name}_scale_inv": scale_AB}


def written_out(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files in blocks as plain ones."""
    scaled = {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")}
    return {
        name: by_block(tensor, stored[f"{name}_scale_inv"]) if name in scaled else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def rounded() -> Any:
    """A model whose projections are what its FP8 files say, written out."""
    model = causal("DeepseekV3", THREE)()
    with torch.no_grad():
        for module, p in ((n, p) for n, p in model.named_parameters() if p.dim() >= 2):
            for one in p if p.dim() == 3 else (p,):
                parts = one.chunk(2) if module.endswith("gate_up_proj") else (one,)
                for part in parts:  # experts lie one by one on disk, gate apart from up
                    name = module if module.endswith(".weight") else f"{module}.weight"
                    part.copy_(written_out(in_blocks(name, part))[name])
    return model


rounded.reference = "DeepseekV3ForCausalLM"  # type: ignore[attr-defined]


def store_in_blocks(folder: Path) -> None:
    """A folder as the release is stored."""

    def tensors(old: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t for key, tensor in old.items() for name, t in in_blocks(key, tensor).items()}

    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    said |= {"weight_block_size": list(BLOCK)}
    rewrite(folder, lambda config: config | {"quantization_config": said}, tensors)


CASES = [
    Case(name="deepseek_v3", hf=causal("DeepseekV3", THREE), wrong=wrong_moe(group_score="max")),
    Case(
        name="deepseek_v3-yarn",
        hf=causal("DeepseekV3", THREE | YARN | {"rope_interleave": False, "norm_topk_prob": False}),
        wrong=wrong_moe(renorm=True),
    ),
    Case(
        name="deepseek_v3-fp8",
        hf=rounded,
        disguise=store_in_blocks,
        written=written_out,
        wrong=wrong_moe(group_score="max"),
    ),
]
