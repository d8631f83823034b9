"""Merge lists from vocabularies that only rank their pieces: SentencePiece BPE and tiktoken.

Both merge, as long as they can, the adjacent pair whose concatenation is the best-ranked piece. The
`tokenizers` library wants the pairs written out. One pair per piece is enough: the two pieces that encoding
the piece itself comes to, one step before its end. Proof: while a text is encoded, any stretch that no merge
has crossed was treated exactly as if it stood alone, so whenever two neighbours could form a piece, they are
that pair. A list of every split (what converters usually write) is ten times longer and, for pieces like
`aaa` = `a`+`aa` = `aa`+`a`, differs from the original: two splits of one piece cannot share a rank.

The proof needs ranks without ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Piece = TypeVar("Piece", str, bytes)


def canonical(
    ranks: Mapping[Piece, int], atoms: Callable[[Piece], Sequence[Piece]]
) -> list[tuple[Piece, Piece]]:
    """The pair of each piece that has one, best rank (lowest number) first.

    `ranks` holds the pieces that may be formed; `atoms(piece)` is what encoding starts from. Pieces of one
    atom, and those that other pieces never bring down to two, get no pair: nothing can form them. Nor do
    those with a part that is no piece itself, which the library could not hold.
    """
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        parts = reduce(atoms(piece), ranks)
        if len(parts) == 2 and parts[0] in ranks and parts[1] in ranks:
            merges.append((parts[0], parts[1]))
    return merges


def reduce(parts: Sequence[Piece], ranks: Mapping[Piece, int]) -> list[Piece]:
    """Merge adjacent `parts`, best concatenation first (leftmost of equals), until two are left or none can
    be merged."""
    left = list(parts)
    while len(left) > 2:
        best, at = -1, -1
        for i in range(len(left) - 1):
            rank = ranks.get(left[i] + left[i + 1], -1)
            if rank >= 0 and (at < 0 or rank < best):
                best, at = rank, i
        if at < 0:
            break
        left[at : at + 2] = [left[at] + left[at + 1]]
    return left


def characters(piece: str) -> Sequence[str]:
    """Atoms of SentencePiece BPE."""
    return tuple(piece)


def single_bytes(piece: bytes) -> Sequence[bytes]:
    """Atoms of byte-level BPE."""
    return [piece[i : i + 1] for i in range(len(piece))]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each of the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}


CHARACTER_OF = byte_characters()
BYTE_OF = {c: b for b, c in CHARACTER_OF.items()}


def as_text(piece: bytes) -> str:
    """A piece of bytes in GPT-2's stand-ins."""
    return "".join(CHARACTER_OF[b] for b in piece)


def as_bytes(piece: str) -> bytes | None:
    """The reverse of `as_text`; None if a character is no stand-in."""
    found = [BYTE_OF.get(c, -1) for c in piece]
    return None if -1 in found else bytes(found)


def pairs_of(merges: Iterable[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges of a tokenizer.json, whose older form joins each pair with a space."""
    return [
        (m.partition(" ")[0], m.partition(" ")[2]) if isinstance(m, str) else (m[0], m[1]) for m in merges
    ]
