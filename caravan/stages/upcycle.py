"""Make a dense model into one with experts: its FFNs divided among them, or copied to each.

The result is the start of further training. `split` keeps the number of weights and computes less per token
(LLaMA-MoE); `copies` keeps the function and adds weights (sparse up-cycling).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"model": "model"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How experts are made."""

    method: Literal["copies", "split"] = "copies"
    """copies: every expert is the dense FFN, the function stays. split: its neurons are shared out."""
    experts: int = 8
    """Experts per layer."""
    top_k: int = 2
    """Experts that a token passes."""
    router_std: float | None = None
    """Standard deviation of the fresh router. None: 0.02 for copies, 0.001 for split."""
    aux_coef: float = 0.01
    """Weight of the load-balancing loss in further training."""
    seed: int = 0
    """Draws routers, and which neuron goes to which expert."""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise UserError(f"experts is {self.experts}", "two or more")
        if self.router_std is not None and self.router_std < 0:
            raise UserError(f"router_std is {self.router_std}", "0 or more")


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Write the model with experts into `out`; returns the counts of weights."""
    from caravan.data.tokenizer import copy_files
    from caravan.model import checkpoint, stored, upcycle

    source = inputs["model"].path
    dtype = stored.dtype(source)
    model = checkpoint.load_model(source, dtype)
    make = upcycle.split if cfg.method == "split" else upcycle.copies
    std = {} if cfg.router_std is None else {"router_std": cfg.router_std}
    made = make(model, cfg.experts, cfg.top_k, aux_coef=cfg.aux_coef, seed=cfg.seed, **std)
    checkpoint.save_model(made, out, source, dtype, checkpoint.read_generation(source))
    copy_files(source, out)
    layers = made.spec.layers
    moe = [layer.ffn.moe for layer in layers if layer.ffn is not None and layer.ffn.moe is not None]
    idle = sum(3 * made.spec.d * m.d_ff * (m.n_expert - m.top_k) for m in moe)
    return {
        "family": made.family,
        "parameters_before": model.spec.parameters,
        "parameters": made.spec.parameters,
        "parameters_per_token": made.spec.parameters - idle,
        "experts": cfg.experts,
        "top_k": cfg.top_k,
    }
