"""Copies of texts: the same (`exact`), nearly the same (`minhash`), the same in part (`substring`), from one
address (`url`), or of one meaning (`semantic`). `keepers` says which of them stays."""

from caravan.data.dedup.exact import SameKey, text_key
from caravan.data.dedup.keepers import Links, Ranks
from caravan.data.dedup.minhash import GRAM, NearDuplicates, Setting, signatures
from caravan.data.dedup.units import WordHashes

__all__ = [
    "GRAM",
    "Links",
    "NearDuplicates",
    "Ranks",
    "SameKey",
    "Setting",
    "WordHashes",
    "signatures",
    "text_key",
]
