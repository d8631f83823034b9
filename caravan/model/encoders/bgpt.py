"""bGPT (Wu et al. 2024, arXiv:2402.19155): bytes, patch by patch, by two GPT-2 halves.

The patch decoder reads patches of P bytes (a one-hot of 257 symbols per byte, all P of them through one
matrix) and predicts the next patch as one vector. The byte decoder spells that patch out: its first input is
the vector, then follow the bytes written so far. Symbol 256 ends a patch that is not full.

In flat form: the byte decoder's input at position n is the embedding of byte n, except at the last byte of
a patch, where it is the patch vector and a new row begins. Its state at n thus predicts byte n + 1, as any
decoder's does, and `Batch` targets apply. The bytes of a document's first patch are predicted without a
patch vector.

A patch that is not yet full has no vector, for nobody would read it: documents may end anywhere, and a
document filled up with symbol 256 says the same at its real bytes.

N flat bytes of a pass, E of them and of the unfinished patches before them, C full patches, R rows, P bytes
per patch, D width, V = 257 symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.attention import Segments
from caravan.model.decoder import Decoder
from caravan.model.encoders.block import AsDecoder, weights
from caravan.model.spec import Attn, Layer, Spec

SYMBOLS = 257
UNFINISHED = 0
"""Index of the state that generation keeps of a row: its patch so far. Neither half has another state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BgptSpec(AsDecoder):
    """Two decoders: `patch` over patches, `byte` within one."""

    patch: Spec
    byte: Spec
    patch_size: int
    head: bool = True
    tie: bool = True
    """The byte head is the byte embedding."""

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
    def cached(self) -> list[Attn]:
        """The layers that keep keys and values, one position for every `patch_size` bytes."""
        return self.patch.attns

    @property
    def max_pos(self) -> int:
        """Bytes in the longest document."""
        return self.patch.max_pos * self.patch_size

    @property
    def head_norm(self) -> bool:
        """Whether rows of the head are normalised: they are not."""
        return self.byte.head_norm

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return weights(Bgpt, self)


class OneHot(nn.Module):
    """A linear map of the one-hot symbols of a patch, laid end to end, as a sum of looked-up columns: the
    zeros need not be multiplied, and Muon takes it for the table it is."""

    def __init__(self, size: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, size * SYMBOLS))
        nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, patch_CP: Tensor) -> Tensor:
        """[C, P] symbols -> [C, D]."""
        column_CP = patch_CP + SYMBOLS * torch.arange(patch_CP.shape[1], device=patch_CP.device)
        return F.embedding(column_CP, self.weight.T).sum(1) + self.bias


class Bgpt(nn.Module):
    """Both decoders, with the calling convention of one. Attributes as `Decoder`: spec, family, config,
    bare, spelling, kept, checkpoint_every. HEADS: what a reward model goes without; the head is the
    embedding."""

    HEADS = ()

    def __init__(self, spec: BgptSpec, family: str = "bgpt", config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.spec, self.family, self.config = spec, family, dict(config or {})
        self.bare = False
        self.spelling: tuple[str, ...] = ()
        self.kept: dict[str, Tensor] = {}
        self.inp = OneHot(spec.patch_size, spec.d)
        self.patch = Decoder(replace(spec.patch, head=False), "gpt2")
        self.patch.embed.requires_grad_(False)  # GPT-2's table of one row, which no patch is looked up in
        self.byte = Decoder(replace(spec.byte, head=spec.head), "gpt2")

    @property
    def checkpoint_every(self) -> int:
        """As a Decoder's, in either half."""
        return self.byte.checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, every: int) -> None:
        self.patch.checkpoint_every = self.byte.checkpoint_every = every

    @property
    def embed(self) -> nn.Embedding:
        """Of bytes."""
        return self.byte.embed

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Any) -> Tensor:
        """Flat symbols -> [N, D] byte states, each predicting the symbol behind it."""
        return self._texts(ids_N, pos_N, attend) if attend.whole else self._parts(ids_N, attend)

    def _texts(self, ids_N: Tensor, pos_N: Tensor, attend: Any) -> Tensor:
        """Documents from their first byte on."""
        size, device, start = self.spec.patch_size, ids_N.device, 0
        counts = [n // size for n in attend.lengths]
        x_ND = self.byte.embed(ids_N)
        if any(counts):
            ends = []
            for length, count in zip(attend.lengths, counts, strict=True):
                ends.append(start + size - 1 + size * torch.arange(count, device=device))
                start += length
            end_C = torch.cat(ends)
            said_CD = self._said(ids_N, end_C, pos_N[end_C] // size, Segments(counts, device))
            x_ND = x_ND.index_copy(0, end_C, said_CD)
        rows = [row for length in attend.lengths for row in _rows(length, 0, size)]
        return self.byte(None, (pos_N + 1) % size, Segments(rows, device), inputs_embeds=x_ND)

    def _said(self, ids_N: Tensor, end_C: Tensor, place_C: Tensor, attend: Any) -> Tensor:
        """[C, D]: the vectors that the patches with these last bytes, at these places, say of the next."""
        patch_CP = ids_N[end_C[:, None] + torch.arange(1 - self.spec.patch_size, 1, device=end_C.device)]
        return self.patch(None, place_C, attend, inputs_embeds=self.inp(patch_CP))

    def _parts(self, ids_N: Tensor, attend: Any) -> Tensor:
        """Rows that go on where their lanes stopped. The patch decoder reads the patches that become full in
        this pass and finds the earlier ones in its cache; the byte decoder reads its last row again, at most
        P inputs, from the bytes and the vector that the lane kept."""
        size, plan = self.spec.patch_size, _Parts(attend.starts, attend.lengths, self.spec.patch_size)
        at = plan.tensors(ids_N.device)
        kept = attend.state(UNFINISHED)
        weight = self.byte.embed.weight
        if kept is None:
            kept = {
                "bytes": ids_N.new_zeros(len(attend.lengths), size),
                "vector": weight.new_zeros(len(attend.lengths), weight.shape[1]),
            }
        ids_E = torch.cat([kept["bytes"].flatten(), ids_N])[at["text"]]
        x_ED = self.byte.embed(ids_E)
        coarse, order = attend.coarse(size)
        if order:
            end_C = torch.tensor([e for row in order for e in plan.ends[row]], device=ids_N.device)
            x_ED = x_ED.index_copy(0, end_C, self._said(ids_E, end_C, coarse.pos_N, coarse))
        both_D = torch.cat([kept["vector"].to(x_ED.dtype), x_ED])
        attend.keep(UNFINISHED, {"bytes": ids_E[at["bytes"]].view(-1, size), "vector": both_D[at["vector"]]})
        rows = Segments(plan.rows, ids_N.device)
        return self.byte(None, at["pos"], rows, inputs_embeds=both_D[at["inputs"]])[at["new"]]

    def head_weight(self) -> Tensor:
        """[V, D] rows of the byte head."""
        return self.byte.head_weight()

    @property
    def head_bias(self) -> Tensor | None:
        """There is none."""
        return self.byte.head_bias

    @property
    def head_terms(self) -> dict[str, Any]:
        """As `Decoder.head_terms`."""
        return self.byte.head_terms

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.byte.logits(hidden)

    def shaped(self, logits: Tensor) -> Tensor:
        """As `Decoder.shaped`."""
        return self.byte.shaped(logits)


def _rows(length: int, led: int, size: int) -> list[int]:
    """Inputs of every row of the byte decoder for so many bytes from the beginning of a patch on. The first
    patch of a document has no vector before it; `led` 1: there is one."""
    first = min(length, size - 1)
    full, left = divmod(length - first, size)
    return [n for n in (first + led, *[size] * full, left) if n]


class _Parts:
    """Where everything lies in a pass over parts of texts. `text` are all bytes of the patches that the parts
    touch, row by row: those kept of the unfinished one, then the new ones."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], size: int) -> None:
        count = len(lengths)
        self.rows: list[int] = []
        """Inputs of each row of the byte decoder."""
        self.ends: list[range] = []
        """Of each part: last bytes of its full patches in `text`."""
        self.at: dict[str, list[int]] = {
            "text": [],  # in kept bytes [R * P], new bytes
            "inputs": [],  # of the byte decoder, in kept vectors [R], `text` with its new vectors
            "pos": [],  # of those inputs in their rows
            "new": [],  # the new bytes' places among the inputs
            "bytes": [],  # to keep, in `text`: P per row; what is not in the unfinished patch is never read
            "vector": [],  # to keep, where `inputs` looks
        }
        at, new, begin = self.at, count * size, 0
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            held, led = start % size, int(start >= size)
            many = held + length
            full = many // size * size
            at["text"] += [*range(row * size, row * size + held), *range(new, new + length)]
            at["inputs"] += [*[row] * led, *range(count + begin, count + begin + many)]
            at["pos"] += [*[0] * led, *((j + 1) % size for j in range(many))]
            at["new"] += range(len(at["inputs"]) - length, len(at["inputs"]))
            at["bytes"] += [begin + min(full + j, many - 1) for j in range(size)]
            at["vector"].append(count + begin + full - 1 if full else row)
            self.ends.append(range(begin + size - 1, begin + full, size))
            self.rows += _rows(many, led, size)
            new, begin = new + length, begin + many

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.tensor(index, device=device) for name, index in self.at.items()}
