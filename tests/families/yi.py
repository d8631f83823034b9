"""Yi under its first names."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.families import LLAMA, Case, causal, wrong_rope


def renamed(folder: Path) -> None:
    """The folder as Yi was first released."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "Yi"}))
    old = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for long, short in old.items():
            name = name.replace(long, short)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CASES = [
    Case(
        name="yi",
        hf=causal("Llama", LLAMA),
        disguise=renamed,
        wrong=wrong_rope(theta=5e6),
        reload="transformers knows only the later names",
    )
]
