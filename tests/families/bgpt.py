"""bGPT against two GPT-2 classes put together by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families import Case, drawn
from tests.families.bert import rebuild

SIZE, D = 4, 48
BGPT: dict[str, Any] = {
    "model_type": "bgpt",
    "architectures": ["bGPTLMHeadModel"],
    "hidden_size": D,
    "num_attention_heads": 6,
    "patch_size": SIZE,
    "patch_length": 16,
    "patch_num_layers": 3,
    "byte_num_layers": 2,
    "dtype": "float32",
}


def halves() -> tuple[Any, Any]:
    """The patch decoder's GPT2Model and the byte decoder's GPT2LMHeadModel, weights not yet set."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    shared = {"n_embd": D, "n_head": 6, "attn_implementation": "eager"}
    patch = GPT2Model(GPT2Config(**shared, n_layer=3, n_positions=16, vocab_size=1))
    byte = GPT2LMHeadModel(GPT2Config(**shared, n_layer=2, n_positions=SIZE + 1, vocab_size=257))
    return patch.eval(), byte.eval()


def weights() -> dict[str, Tensor]:
    patch, byte = halves()
    shapes = {"patch_level_decoder.patch_embedding.weight": (D, SIZE * 257)}
    shapes["patch_level_decoder.patch_embedding.bias"] = (D,)
    for prefix, model in (("patch_level_decoder.base.", patch), ("byte_level_decoder.base.", byte)):
        shapes |= {prefix + key: tuple(t.shape) for key, t in model.named_parameters()}
    return drawn(shapes)


def composed(tensors: Mapping[str, Tensor]) -> tuple[Any, Any, Tensor, Tensor]:
    """The two halves with these weights, the matrix of the patches and its offset."""
    patch, byte = halves()
    for prefix, model in (("patch_level_decoder.base.", patch), ("byte_level_decoder.base.", byte)):
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        missing = model.load_state_dict(own, strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    first = "patch_level_decoder.patch_embedding."
    return patch, byte, tensors[first + "weight"], tensors[first + "bias"]


def said(parts: tuple[Any, Any, Tensor, Tensor], row: Tensor) -> Tensor:
    """Logits of one text patch by patch, the last patch filled up with symbol 256; the first is spelled
    without a vector before it."""
    patch, byte, matrix, offset = parts
    filled = [*row.tolist(), *[256] * (-len(row) % SIZE)]
    patches = torch.tensor(filled).view(-1, SIZE)
    onehot = torch.nn.functional.one_hot(patches, 257).float().flatten(1)
    seen = patch(inputs_embeds=(onehot @ matrix.T + offset)[None]).last_hidden_state[0]
    first = byte.transformer.wte(patches[0, :-1])
    logits = [byte(inputs_embeds=first[None], position_ids=torch.arange(1, SIZE)[None]).logits[0]]
    for p in range(1, len(patches)):
        spelled = byte.transformer.wte(patches[p, :-1])
        logits.append(byte(inputs_embeds=torch.cat([seen[p - 1 : p], spelled])[None]).logits[0])
    logits.append(byte(inputs_embeds=seen[-1:][None]).logits[0])
    return torch.cat(logits)[: len(row)]


def oracle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    """Logits of texts one by one."""
    parts = composed(tensors)
    return torch.stack([said(parts, row) for row in ids_BT])


def unscaled_patches(spec: Any) -> Any:
    from tests.families import replace, wrong_attn

    return replace(spec, patch=wrong_attn(scale=1.0)(spec.patch))


CASES = [
    Case(
        name="bgpt",
        oracle=oracle,
        config=BGPT,
        tensors=weights,
        wrong=unscaled_patches,
        rebuild=rebuild,
        ids=lambda: torch.randint(0, 257, (2, 21), generator=torch.Generator().manual_seed(2)),
    )
]
