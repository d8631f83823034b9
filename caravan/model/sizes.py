"""Fresh models from one dial: a size's name or a depth; every derived number comes with its reason.

New models are of the Llama type with a tied head: every tool opens them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from caravan.model.blank import blank
from caravan.model.decoder import Decoder
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.types import UserError


@dataclass(frozen=True, slots=True)
class Reason:
    """One derived number and why it is what it is."""

    name: str
    value: object
    why: str


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers a named size fixes."""

    d: int
    depth: int
    head_dim: int
    n_kv: int
    why: str


SIZES: dict[str, Shape] = {
    "nano": Shape(128, 3, 32, 4, "for tests and a first look: seconds on one core"),
    "tiny": Shape(256, 6, 32, 8, "learns facts and small talk in minutes on two cores"),
    "small": Shape(512, 8, 64, 8, "hours on a laptop, minutes on a GPU; the shape of the benchmarks"),
    "gpt2": Shape(768, 12, 64, 12, "the 124M class of GPT-2: a night on one GPU"),
    "1b": Shape(2048, 22, 64, 8, "the 1.1B class of TinyLlama: several GPUs"),
}


def feed_forward(d: int) -> int:
    """8/3 d rounded up to a multiple of 64: a gated FFN then weighs as much as an ungated one of 4 d."""
    return 64 * math.ceil(8 * d / 3 / 64)


def shape(size: str | None, depth: int | None) -> tuple[Shape, str]:
    """The Shape of a named size or of a depth, and what it was derived from."""
    if (size is None) == (depth is None):
        raise UserError(
            "give either a size or a depth", f"sizes: {', '.join(SIZES)}; or for example --depth 8"
        )
    if size is not None:
        if size not in SIZES:
            raise UserError(f"unknown size '{size}'", f"sizes: {', '.join(SIZES)}; or give --depth")
        return SIZES[size], f"size {size}: {SIZES[size].why}"
    assert depth is not None
    if not 1 <= depth <= 128:
        raise UserError(f"depth {depth} is out of range", "from 1 to 128 layers")
    d = 64 * depth
    head_dim = 64 if depth >= 6 else 32
    n_head = d // head_dim
    n_kv = n_head if depth < 16 else max(k for k in range(1, 9) if n_head % k == 0)
    return Shape(d, depth, head_dim, n_kv, "width grows with depth"), f"depth {depth}: width is 64 x depth"


def derive(size: str | None, depth: int | None, vocab: int, context: int) -> tuple[Spec, list[Reason]]:
    """A Spec for a fresh model and the reason for every number in it.

    Exactly one of `size` and `depth` is given. Raises UserError for an unknown size or impossible numbers.
    """
    if vocab < 2 or context < 2:
        raise UserError(f"a model needs a vocabulary and a context of at least 2, not {vocab} and {context}")
    s, origin = shape(size, depth)
    n_head, d_ff = s.d // s.head_dim, feed_forward(s.d)
    theta = 10_000.0 if context <= 8192 else 500_000.0
    norm = Norm(kind="rms", eps=1e-5)
    layer = Layer(
        attn=Attn(n_head=n_head, n_kv=s.n_kv, head_dim=s.head_dim, rope=Rope(dim=s.head_dim, theta=theta)),
        ffn=FFN(kind="glu", d_ff=d_ff, act="silu"),
        norm=norm,
    )
    spec = Spec(vocab=vocab, d=s.d, layers=(layer,) * s.depth, final_norm=norm, max_pos=context, tie=True)
    shared = n_head // s.n_kv
    one_each = "one per query head: the cache is small anyway"
    kv_why = one_each if shared == 1 else f"{shared} query heads share one: a cache {shared} times smaller"
    tokens = 20 * spec.parameters
    reasons = [
        Reason("layers", s.depth, origin),
        Reason("width", s.d, origin),
        Reason(
            "head width",
            s.head_dim,
            "64 suits every attention kernel"
            if s.head_dim == 64
            else "32 keeps several heads in a narrow model",
        ),
        Reason("query heads", n_head, f"width {s.d} / head width {s.head_dim}"),
        Reason("key/value heads", s.n_kv, kv_why),
        Reason(
            "feed-forward width",
            d_ff,
            "8/3 x width rounded up to 64: a gated FFN as heavy as a plain one of 4 x",
        ),
        Reason("context", context, f"positions trained; RoPE base {theta:,.0f}"),
        Reason("vocabulary", vocab, "rows of the embedding, which is also the output head (tied)"),
        Reason("parameters", spec.parameters, "embedding once, all layers, norms"),
        Reason(
            "initial std",
            round(init_std(spec), 4),
            "min(0.02, 1/sqrt(width)); outputs of residual branches "
            f"x 1/sqrt(2 x {s.depth}) so that depth does not grow the stream",
        ),
        Reason("learning rate", suggested_lr(spec), "AdamW peak 3e-3 x sqrt(256 / width): falls with width"),
        Reason(
            "tokens", tokens, "20 per parameter (Hoffmann et al. 2022) is compute-optimal; more keeps helping"
        ),
        Reason("step-0 loss", round(math.log(vocab), 3), "ln(vocabulary): a fresh model knows nothing"),
    ]
    return spec, reasons


def init_std(spec: Spec) -> float:
    """Standard deviation of fresh weights."""
    return min(0.02, spec.d**-0.5)


def suggested_lr(spec: Spec) -> float:
    """Peak AdamW learning rate to start from: 3e-3 at width 256, falling with the square root of the
    width."""
    return float(f"{3e-3 * (256 / spec.d) ** 0.5:.1e}")


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Draw all weights of a Decoder from `seed`: the same numbers on every machine and device.

    Normal with std `init_std`; the outputs of both residual branches are scaled by 1 / sqrt(2 layers)
    (Radford et al. 2019); gains 1, biases 0. Drawn on the CPU in fp32, in the order of the parameters.
    """
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(seed)
    std, residual = init_std(model.spec), (2 * max(1, len(model.spec.layers))) ** -0.5
    for name, p in model.named_parameters():
        if p.dim() < 2:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = std * (residual if name.endswith((".o.weight", ".out.weight", ".xout")) else 1.0)
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * scale)
    for module in model.modules():
        # gains of 1 + w, or of single heads; in recurrences how fast a channel forgets is no draw around zero
        start: Any = getattr(module, "initialise", None)
        if start is not None:
            start()


def fresh(spec: Spec, seed: int, family: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    """A new Decoder with seeded weights."""
    with blank():
        model = Decoder(spec, family)
    model = model.to_empty(device="cpu").to(dtype)
    initialise(model, seed)
    return model
