"""bGPT (Wu et al. 2024, arXiv:2402.19155): bytes, patch by patch, by two GPT-2 halves.

The patch decoder reads patches of P bytes (a one-hot of 257 symbols per byte, all P of them through one
matrix) and predicts the next patch as one vector. The byte decoder spells that patch out: its first input is
the vector, then follow the bytes written so far. Symbol 256 ends a patch that is not full.

In flat form: the byte decoder's input at position n is the embedding of byte n, except at the last byte of
a patch, where it is the patch vector and a new row begins. Its state at n thus predicts byte n + 1, as any
decoder's does, and `Batch` targets apply. The bytes of a document's first patch are predicted without a
patch vector; the original never trains those, so give them weight 0.

N flat bytes, C patches, D width, V = 257 symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.attention import Segments
from caravan.model.decoder import Decoder
from caravan.model.encoders.block import AsDecoder, weights
from caravan.model.spec import Layer, Spec
from caravan.types import UserError

SYMBOLS = 257


@dataclass(frozen=True, slots=True, kw_only=True)
class BgptSpec(AsDecoder):
    """Two decoders: `patch` over patches, `byte` within one."""

    patch: Spec
    byte: Spec
    patch_size: int
    head: bool = True

    @property
    def vocab(self) -> int:
        return self.byte.vocab

    @property
    def d(self) -> int:
        return self.byte.d

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of both, patch decoder first."""
        return self.patch.layers + self.byte.layers

    @property
    def tie(self) -> bool:
        """The byte head is the byte embedding."""
        return self.byte.tie

    @property
    def max_pos(self) -> int:
        """Bytes in the longest document."""
        return self.patch.max_pos * self.patch_size

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return weights(Bgpt, self)


class Bgpt(nn.Module):
    """Both decoders, with the calling convention of one. Attributes as `Decoder`: spec, family, config,
    bare, kept."""

    def __init__(self, spec: BgptSpec, family: str = "bgpt", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.kept: dict[str, Tensor] = {}
        self.inp = nn.Linear(spec.patch_size * SYMBOLS, spec.d)
        self.patch = Decoder(replace(spec.patch, head=False), "gpt2")
        self.byte = Decoder(spec.byte, "gpt2")

    @property
    def embed(self) -> nn.Embedding:
        """Of bytes."""
        return self.byte.embed

    def patches(self, ids_N: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """[C, D]: the vector that predicts the patch behind each patch."""
        size = self.spec.patch_size
        bad = next((n for n in lengths if n % size), None)
        if bad is not None:
            raise UserError(
                f"a document of {bad} symbols does not consist of patches of {size}",
                f"fill the last patch with symbol {SYMBOLS - 1}",
            )
        counts = [n // size for n in lengths]
        x_CD = self._onehot(ids_N.view(-1, size))
        at_C = torch.cat([torch.arange(count, device=ids_N.device) for count in counts])
        return self.patch(None, at_C, Segments(counts, ids_N.device), inputs_embeds=x_CD)

    def _onehot(self, patch_CP: Tensor) -> Tensor:
        """The one-hot product as a sum of looked-up columns: the zeros need not be multiplied."""
        column_CP = patch_CP + SYMBOLS * torch.arange(patch_CP.shape[1], device=patch_CP.device)
        return F.embedding(column_CP, self.inp.weight.T).sum(1) + self.inp.bias

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Any) -> Tensor:
        """Flat symbols of whole patches -> [N, D] byte states, each predicting the symbol behind it."""
        size, lengths = self.spec.patch_size, tuple(attend.lengths)
        x_ND = self.byte.embed(ids_N).index_copy(
            0, torch.arange(size - 1, len(ids_N), size, device=ids_N.device), self.patches(ids_N, lengths)
        )
        rows: list[int] = []
        for length in lengths:
            rows += [size - 1] * (size > 1) + [size] * (length // size - 1) + [1]
        return self.byte(None, (pos_N + 1) % size, Segments(rows, ids_N.device), inputs_embeds=x_ND)

    def head_weight(self) -> Tensor:
        """[V, D] rows of the byte head."""
        return self.byte.head_weight()

    @property
    def head_bias(self) -> Tensor | None:
        """There is none."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.byte.logits(hidden)
