"""What models of their own share: the layer of those with additive position biases (pre-norm, no rotary
embedding), and the answers of their specs.

N flat tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from caravan.model import ffn
from caravan.model.blank import blank
from caravan.model.encoders.rows import Rows, attention
from caravan.model.norms import make_norm
from caravan.model.spec import Attn, Layer


class SelfAttention(nn.Module):
    """softmax(scale q k + bias) v, [q; k; v] in one product, no biases on the projections."""

    def __init__(self, d: int, layer: Layer) -> None:
        super().__init__()
        assert layer.attn is not None
        self.n_head, self.scale = layer.attn.n_head, layer.attn.scale
        inner = self.n_head * layer.attn.head_dim
        self.proj = nn.Linear(d, 3 * inner, bias=False)
        self.o = nn.Linear(inner, d, bias=False)

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of q, k and v."""
        return {"proj.weight": (self.proj.out_features // 3,) * 3}

    def qkv(self, x: Tensor) -> list[Tensor]:
        """[..., D] -> three [..., H, E]."""
        return [p.unflatten(-1, (self.n_head, -1)) for p in self.proj(x).chunk(3, -1)]

    def forward(self, x_ND: Tensor, rows: Rows, bias: Sequence[Tensor]) -> Tensor:
        """`bias[g]` broadcasts to [B, H, T, T] of group g; -inf hides a key."""
        parts = zip(*(rows.split(x) for x in self.qkv(x_ND)), bias, strict=True)
        return self.o(rows.join([attention(q, k, v, b, self.scale) for q, k, v, b in parts]).flatten(1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, d: int, layer: Layer) -> None:
        super().__init__()
        assert layer.ffn is not None
        self.n1, self.a = make_norm(d, layer.norm), SelfAttention(d, layer)
        self.n2, self.ffn = make_norm(d, layer.norm), ffn.make(d, layer.ffn)

    def forward(self, x_ND: Tensor, rows: Rows, bias: Sequence[Tensor]) -> Tensor:
        x_ND = x_ND + self.a(self.n1(x_ND), rows, bias)
        return x_ND + self.ffn(self.n2(x_ND))


class Shape(Protocol):
    """The fields that answers of `AsDecoder` are made of."""

    @property
    def d(self) -> int: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    @property
    def max_pos(self) -> int: ...


class AsDecoder:
    """What a spec of its own answers as `Spec` does, for those who take either."""

    __slots__ = ()
    lead: ClassVar[tuple[int, ...]] = ()
    prefix_token: ClassVar[None] = None
    """No token of the text says what is context."""

    @property
    def context(self: Shape) -> int:
        """Longest sequence."""
        return self.max_pos

    @property
    def attns(self: Shape) -> list[Attn]:
        """The attention of every layer."""
        return [layer.attn for layer in self.layers if layer.attn]

    @property
    def out_dim(self: Shape) -> int:
        """Width of what heads read."""
        return self.d


def weights(module: type[nn.Module], spec: object) -> int:
    """Number of weights of a module made from a spec, without making them."""
    with blank():
        return sum(p.numel() for p in module(spec).parameters())
