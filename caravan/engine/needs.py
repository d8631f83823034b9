"""What a model asks of the scheduler, read from its Spec: no chunks, no sharing, or a fresh start."""

from __future__ import annotations

from collections.abc import Callable

from caravan.model.encoders.bgpt import BgptSpec
from caravan.model.spec import Spec
from caravan.types import UserError

CACHE_BYTES = 2 << 30
MOST_POSITIONS = 1 << 20
"""Longest sequence, and positions in all, where the model itself has no limit (recurrent ones)."""


def is_recurrent(spec: Spec) -> bool:
    """Whether some layer carries a state from token to token, or an unfinished patch is kept. Such a state
    has no blocks that another sequence could take over, so these models share no prefixes."""
    return isinstance(spec, BgptSpec) or any(
        layer.attn is None or (layer.ffn and layer.ffn.kind == "rwkv") for layer in spec.layers
    )


def check_causal(spec: Spec) -> None:
    """Raise UserError for models whose tokens see what comes after them."""
    if not all(attn.causal for attn in spec.attns):
        raise UserError("this model reads in both directions and cannot generate", "use it as an encoder")


def cache_positions(spec: Spec, wanted: int) -> int:
    """Positions whose float32 keys and values fill 2 GiB, but no more than `wanted`. Where no layer keeps any
    only the bookkeeping costs memory."""
    per_position = sum(4 * attn.kept for attn in spec.cached)
    room = CACHE_BYTES * spec.patch_size
    return min(wanted, max(2048, room // per_position) if per_position else MOST_POSITIONS)


def regime(spec: Spec) -> Callable[[int], int] | None:
    """How a sequence's length changes the rotary frequencies of all its positions: not at all up to the
    original context (0); beyond it once (longrope), whenever it has doubled (powers), or with every token
    (dynamic NTK). None where they never change."""
    once = {attn.rope.switch for attn in spec.attns if attn.rope and attn.rope.switch is not None}
    if not once:
        return None
    scaled = [attn.rope for attn in spec.attns if attn.rope and attn.rope.scaling]
    always = min((r.switch or 0 for r in scaled if r.scaling and r.scaling.kind == "dynamic"), default=None)
    doubled = {r.switch for r in scaled if r.scaling and r.scaling.kind == "powers" and r.switch}

    def of_length(n: int) -> int:
        if always is not None and n > always:
            return n
        doublings = sum(max(-(-n // edge) - 1, 0).bit_length() for edge in doubled)
        return doublings + sum(n > edge for edge in once)

    return of_length
