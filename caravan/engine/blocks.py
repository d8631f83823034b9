"""Blocks of the key/value cache: who owns them, which are free, which can be found again by their content.

A block is `block_size` consecutive positions of one sequence. Blocks are counted, never copied on write: only
*full* blocks of *final* tokens are published under a hash, and a published block is never written again, so
any number of sequences may share it. The hash of a block is a chain, h_i = blake2b(h_{i-1} || tokens_i),
whose root names the weights the keys were computed with: after an update of the weights nothing old can be
found, and nothing has to be flushed (stale caches are the most repeated bug of RLHF engines).

Freed blocks keep their hash and go to the tail of the free list; the head is what is evicted next. The list
is doubly linked so that a hit takes a block out of its middle in O(1). (The design of vLLM's v1 block pool,
arXiv 2309.06180; no block is merged with a twin, so tables only ever grow.)

No tensors here: this file and scheduler.py are plain Python and are tested property by property.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of one full block after `parent`, the hash of everything before it."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def root(weights_version: int | str, salt: str = "") -> bytes:
    """Start of a chain. Another version of the weights or another salt shares nothing."""
    return hashlib.blake2b(f"{weights_version!r}\n{salt}".encode(), digest_size=16).digest()


class Block:
    """One block; `prev`/`next` are links of the free list and None while the block is owned."""

    __slots__ = ("hash", "id", "next", "prev", "ref")

    def __init__(self, id: int) -> None:
        self.id = id
        self.ref = 0
        self.hash: bytes | None = None
        self.prev: Block | None = None
        self.next: Block | None = None


class BlockPool:
    """`count` blocks with reference counts, a free list in eviction order and an index by hash."""

    def __init__(self, count: int) -> None:
        assert count >= 1, count
        self.blocks = [Block(i) for i in range(count)]
        self.by_hash: dict[bytes, int] = {}
        self.free_count = 0
        self._list = Block(-1)  # sentinel: next = first to evict, prev = last
        self._list.prev = self._list.next = self._list
        for block in self.blocks:
            self._link(block)

    def alloc(self, n: int) -> list[int] | None:
        """`n` blocks with one reference each, or None (and nothing changed) when fewer are free."""
        if n > self.free_count:
            return None
        taken = []
        for _ in range(n):
            block = self._list.next
            assert block is not None and block is not self._list
            self._unlink(block)
            if block.hash is not None:
                del self.by_hash[block.hash]
                block.hash = None
            block.ref = 1
            taken.append(block.id)
        return taken

    def free(self, ids: Sequence[int]) -> None:
        """Drop one reference of each block, last first: the tail of a sequence is evicted before its head."""
        for i in reversed(ids):
            block = self.blocks[i]
            assert block.ref > 0, f"block {i} freed twice"
            block.ref -= 1
            if block.ref == 0:
                self._link(block)

    def touch(self, ids: Sequence[int]) -> None:
        """Add one reference to each block, taking those nobody owned out of the free list."""
        for i in ids:
            block = self.blocks[i]
            if block.ref == 0:
                self._unlink(block)
            block.ref += 1

    def lookup(self, hash: bytes) -> int | None:
        """The block published under `hash`, owned or free."""
        return self.by_hash.get(hash)

    def publish(self, id: int, hash: bytes) -> bool:
        """Make an owned, full block findable. False when a twin already is (the block stays private)."""
        block = self.blocks[id]
        assert block.ref > 0 and block.hash is None, f"block {id} cannot be published"
        if hash in self.by_hash:
            return False
        block.hash = hash
        self.by_hash[hash] = id
        return True

    def idle(self, ids: Sequence[int]) -> int:
        """How many of `ids` nobody owns: touching them takes that many from the free list."""
        return sum(self.blocks[i].ref == 0 for i in ids)

    @property
    def owned_count(self) -> int:
        """Blocks with at least one reference."""
        return len(self.blocks) - self.free_count

    def free_ids(self) -> list[int]:
        """The free list in eviction order, for tests and statistics."""
        ids, block = [], self._list.next
        while block is not None and block is not self._list:
            ids.append(block.id)
            block = block.next
        return ids

    def _link(self, block: Block) -> None:
        last = self._list.prev
        assert last is not None
        block.prev, block.next = last, self._list
        last.next = self._list.prev = block
        self.free_count += 1

    def _unlink(self, block: Block) -> None:
        before, after = block.prev, block.next
        assert before is not None and after is not None
        before.next, after.prev = after, before
        block.prev = block.next = None
        self.free_count -= 1
