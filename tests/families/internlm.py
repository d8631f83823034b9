"""InternLM 1: a Llama with biases under its own keys."""

from __future__ import annotations

import json
from pathlib import Path

from tests.families import LLAMA, Case, causal, wrong_attn


def renamed(folder: Path) -> None:
    """config.json as InternLM writes it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"model_type": "internlm", "bias": config.pop("attention_bias")}
    config["rotary"] = {"base": theta, "type": "dynamic"}
    path.write_text(json.dumps(config))


CASES = [
    Case(
        name="internlm",
        hf=causal("Llama", LLAMA | {"num_key_value_heads": 6, "attention_bias": True}),
        disguise=renamed,
        wrong=wrong_attn(scale=0.3),
    )
]
