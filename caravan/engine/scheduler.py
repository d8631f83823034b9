"""Who computes what in the next step: continuous batching with one token budget.

There are no prefill and decode phases. Every request has *known* tokens (prompt and what was sampled) and
*computed* ones (their keys and values are in the cache); a step lets the second number catch up with the
first, request by request, under one budget. Chunked prefill, prefix hits and recomputation after preemption
are all the same thing. (The idea of vLLM's v1 scheduler; ours serves the requests that lack one token first,
so prompts never starve sequences that are being generated, and ends chunks on block boundaries.)

A request whose next block is being computed by another one waits for it: n samples of one prompt cost one
prefill. A request that could never fit is refused when it is added, hence the oldest running one can always
go on. When blocks run out the youngest is preempted: its blocks are freed and its tokens computed again
later.

Three kinds of models need more care, and say so when the scheduler is made or a request is added:
- tokens of a *prefix* see each other in both directions: they are computed in one step, and what is cached of
  them is found only by prompts with the very same prefix;
- positions may be encoded by the *regime* a sequence's length is in (rotary embeddings that are stretched
  beyond a length): when a sequence enters another regime all of it is computed again, in one step;
- layers with a recurrent state have no blocks to share: with `share` off nothing is looked up or published.

Plain Python, no tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from caravan.engine.blocks import BlockPool, chain, root
from caravan.types import UserError


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way. Token positions [0, computed) have keys and values."""

    id: int
    tokens: list[int]
    n_prompt: int
    max_new: int
    root: bytes
    salt: str = ""
    share_output: bool = True
    prefix: int = 0
    """First tokens that see each other in both directions."""
    regime: int = 0
    """Of the present length; what was computed in another one is of no use."""
    stale: bool = False
    """Some of its cache was computed with older weights: nothing of it may be shared."""
    computed: int = 0
    cached: int = 0
    """Prompt tokens that were found in the prefix cache at the last admission."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Hash chain of the full blocks looked at so far."""
    published: int = 0
    """Leading blocks that are done with: found, published, or a twin of a published one."""
    preemptions: int = 0

    @property
    def missing(self) -> int:
        """Known tokens that are not computed."""
        return len(self.tokens) - self.computed

    @property
    def whole(self) -> int:
        """Leading tokens that must not be cut into chunks."""
        return len(self.tokens) if self.regime else self.prefix


@dataclass(frozen=True, slots=True)
class Row:
    """Compute tokens [start, start + n) of a request; `sample` when that reaches the last known one."""

    request: Request
    start: int
    n: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Requests in `admitted` start with their first `cached` tokens taken from their blocks."""

    rows: list[Row]
    admitted: list[Request]
    preempted: list[Request]


@dataclass(slots=True)
class Counts:
    """What happened so far."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    refused: int = 0


class Scheduler:
    """Requests waiting and running over one block pool."""

    def __init__(
        self,
        *,
        blocks: int,
        block_size: int,
        max_seqs: int,
        step_tokens: int,
        max_context: int,
        share: bool = True,
        regime: Callable[[int], int] | None = None,
    ) -> None:
        """
        Args:
            blocks: size of the pool. block_size: positions per block. max_seqs: running at once.
            step_tokens: tokens computed per step at most (but see Request.whole). max_context: tokens of one
                sequence at most. share: whether blocks can be found again by their content. regime: of a
                sequence's length; 0 where chunks are allowed.
        """
        assert step_tokens >= max_seqs + block_size, "every running sequence and one chunk must fit in a step"
        self.pool = BlockPool(blocks)
        self.block_size = block_size
        self.max_seqs = max_seqs
        self.step_tokens = step_tokens
        self.max_context = max_context
        self.share = share
        self.regime = regime
        self.version: int | str = 0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pending: dict[bytes, int] = {}  # hash of a block being computed -> id of the request at it
        self.counts = Counts()
        self._next_id = 0

    # ------------------------------------------------------------------ requests in and out

    def add(
        self,
        prompt: Sequence[int],
        max_new: int,
        *,
        salt: str = "",
        share_output: bool = True,
        prefix: int = 0,
    ) -> Request:
        """Queue a prompt. `max_new` is cut to the context. Raises UserError when it can never run."""
        n = len(prompt)
        if n == 0:
            raise self._refusal(
                "the prompt is empty", "give at least one token, for example the start of a turn"
            )
        if max_new < 1:
            raise self._refusal(f"max_tokens is {max_new}", "ask for at least one new token")
        if n >= self.max_context:
            raise self._refusal(
                f"the prompt has {n} tokens and the context holds {self.max_context}",
                f"shorten it to {self.max_context - 1} tokens at most",
            )
        max_new = min(max_new, self.max_context - n)
        room = len(self.pool.blocks) * self.block_size
        if n + max_new > room:
            raise self._refusal(
                f"prompt and answer need {n + max_new} cache positions and there are {room}",
                "ask for fewer new tokens or give the engine a larger cache",
            )
        request = Request(self._next_id, list(prompt), n, max_new, b"", salt, share_output, prefix)
        request.regime = self.regime(n) if self.regime else 0
        self._renew(request)
        self._next_id += 1
        self.waiting.append(request)
        return request

    def finish(self, request: Request) -> None:
        """Forget a running or waiting request and free its blocks at once (also on abort and disconnect)."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def update_weights(self, version: int | str) -> None:
        """New hash root for all that is computed from now on. Running requests go on with what they have and
        share nothing any more; waiting ones start afresh."""
        self.version = version
        self.pending.clear()
        for request in self.waiting:
            self._renew(request)
        for request in self.running:
            request.stale = True

    @property
    def busy(self) -> bool:
        """Whether a step would have something to do."""
        return bool(self.running or self.waiting)

    # ------------------------------------------------------------------ one step

    def plan(self) -> Plan:
        """Choose the rows of the next step and reserve their blocks."""
        planned: dict[int, Row] = {}
        preempted: list[Request] = []
        budget = self.step_tokens
        order = [r for r in self.running if r.missing == 1] + [r for r in self.running if r.missing > 1]
        for request in order:
            if request in preempted:
                continue
            n = self._chunk(request, budget)
            if n == 0:
                continue
            while not self._ensure(request, request.computed + n):
                victim = self.running[-1]
                self._preempt(victim)
                preempted.append(victim)
                row = planned.pop(victim.id, None)
                budget += row.n if row else 0
                if victim is request:
                    break
            else:
                planned[request.id] = self._row(request, n)
                budget -= n
        admitted = [] if preempted else self._admit(planned, budget)
        return Plan(list(planned.values()), admitted, preempted)

    def apply(self, plan: Plan, sampled: Sequence[int]) -> list[tuple[Request, int, int]]:
        """Record a computed plan; `sampled` holds one token per row with `sample`, in order.

        Returns (request, index of the block in its sequence, block id) of blocks that became shareable: their
        contents must be stored under that id before the request's next step or its end.
        """
        stored: list[tuple[Request, int, int]] = []
        tokens = iter(sampled)
        for row in plan.rows:
            request = row.request
            request.computed += row.n
            self.counts.computed_tokens += row.n
            if self.share and not request.stale and request.computed // self.block_size > request.published:
                self._publish(request, stored)
            if row.sample:
                request.tokens.append(next(tokens))
                self._enter_regime(request)
        return stored

    def _enter_regime(self, request: Request) -> None:
        regime = self.regime(len(request.tokens)) if self.regime else 0
        if regime != request.regime:
            request.regime = regime
            self._release(request)
            self._renew(request)

    def retract(self, plan: Plan) -> None:
        """A step failed: what it held is computed again from the start, in the old order."""
        for request in [r for r in reversed(self.running) if any(row.request is r for row in plan.rows)]:
            self._preempt(request)

    # ------------------------------------------------------------------ parts

    def _refusal(self, message: str, hint: str) -> UserError:
        self.counts.refused += 1
        return UserError(message, hint)

    def _chunk(self, request: Request, budget: int) -> int:
        """Tokens to compute now; a chunk that is not the last ends where a block ends. What must not be cut
        is computed even when it exceeds the budget, one such piece per step."""
        if budget <= 0:
            return 0
        if request.missing <= budget:
            return request.missing
        end = (request.computed + budget) // self.block_size * self.block_size
        return max(0, max(end, request.whole) - request.computed)

    def _row(self, request: Request, n: int) -> Row:
        return Row(request, request.computed, n, request.computed + n == len(request.tokens))

    def _ensure(self, request: Request, positions: int) -> bool:
        """Own blocks for `positions` positions; False when the pool has too few."""
        need = -(-positions // self.block_size) - len(request.blocks)
        if need <= 0:
            return True
        new = self.pool.alloc(need)
        if new is None:
            return False
        request.blocks += new
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.counts.preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self._drop_pending(request)
        self.pool.free(request.blocks)
        request.blocks = []
        request.computed = request.published = 0
        if request.stale:
            self._renew(request)

    def _renew(self, request: Request) -> None:
        prefix = chain(b"", request.tokens[: request.prefix]).hex() if request.prefix else ""
        request.root = root(self.version, f"{request.salt}\n{prefix}\n{request.regime}")
        request.hashes.clear()
        request.stale = False

    def _drop_pending(self, request: Request) -> None:
        for hash in [h for h, owner in self.pending.items() if owner == request.id]:
            del self.pending[hash]

    def _admit(self, planned: dict[int, Row], budget: int) -> list[Request]:
        """Move waiting requests into the batch, first come first served; those whose prefix is being computed
        by another request are passed over until it is there."""
        admitted: list[Request] = []
        passed: list[Request] = []
        while self.waiting and len(self.running) < self.max_seqs and budget > 0:
            if len(passed) >= 4 * self.max_seqs:
                break  # do not read a queue of thousands at every step
            request = self.waiting.popleft()
            hits, miss = self._match(request)
            if miss is not None and miss in self.pending:
                passed.append(request)
                continue
            need = -(-(len(request.tokens) + 1) // self.block_size) - len(hits)
            need = min(need, len(self.pool.blocks) - len(hits))
            if need > self.pool.free_count - self.pool.idle(hits):
                self.waiting.appendleft(request)
                break
            request.computed = request.cached = len(hits) * self.block_size
            n = self._chunk(request, budget)
            if n == 0:
                request.computed = 0
                self.waiting.appendleft(request)
                break
            self._start(request, hits, n)
            planned[request.id] = self._row(request, n)
            admitted.append(request)
            budget -= n
        self.waiting.extendleft(reversed(passed))
        return admitted

    def _start(self, request: Request, hits: list[int], n: int) -> None:
        self.pool.touch(hits)
        request.blocks = list(hits)
        request.published = len(hits)
        fits = self._ensure(request, request.computed + n)
        assert fits, "admission counted the blocks"
        self.running.append(request)
        if self.share:
            for hash in request.hashes[len(hits) : request.n_prompt // self.block_size]:
                self.pending.setdefault(hash, request.id)
        self.counts.prompt_tokens += request.n_prompt
        self.counts.cached_tokens += request.cached

    def _match(self, request: Request) -> tuple[list[int], bytes | None]:
        """Published blocks that start the sequence, and the hash of the first one not found. The last known
        token is never taken from the cache: its logits are wanted."""
        if not self.share:
            return [], None
        self._extend_hashes(request, len(request.tokens) - 1)
        hits: list[int] = []
        for hash in request.hashes[: (len(request.tokens) - 1) // self.block_size]:
            block = self.pool.lookup(hash)
            if block is None:
                return hits, hash
            hits.append(block)
        return hits, None

    def _extend_hashes(self, request: Request, final: int) -> None:
        """Bring the chain up to the full blocks of the first `final` tokens."""
        size = self.block_size
        for i in range(len(request.hashes), final // size):
            parent = request.hashes[-1] if request.hashes else request.root
            request.hashes.append(chain(parent, request.tokens[i * size : (i + 1) * size]))

    def _publish(self, request: Request, stored: list[tuple[Request, int, int]]) -> None:
        last = request.computed if request.share_output else min(request.computed, request.n_prompt)
        self._extend_hashes(request, last)
        for i in range(request.published, last // self.block_size):
            hash = request.hashes[i]
            if self.pool.publish(request.blocks[i], hash):
                stored.append((request, i, request.blocks[i]))
            if self.pending.get(hash) == request.id:
                del self.pending[hash]
            request.published = i + 1
