"""Generation for rollouts, evaluation, chat and the server alike: continuous batching over one cache.

    engine = Engine(model, stop_ids=tok.stop_ids, vocab_size=tok.vocab_size, decode=tok.decode)
    engine.generate(prompts, Sampling(temperature=0.8, max_tokens=64), n=4)         # everything at once
    id = engine.submit(prompt, sampling); events = engine.step(); engine.abort(id)  # a server's loop

A step: plan (scheduler) -> forward (runner) -> draw (algos.sampling) -> stop checks -> publish blocks ->
events. What a request draws is a function of (seed, its index, position in the answer): its neighbours, the
budget and the order of arrival do not matter, up to rounding of the products
(docs/engine.md).

The weights are those of the module passed in, read at every step. After changing them call `update_weights`:
it gives the prefix cache a new root, for keys and values of the old weights must never be found again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from caravan.algos.sampling import sample, stream_key, uniform
from caravan.engine import needs
from caravan.engine.lanes import Lanes
from caravan.engine.runner import Runner
from caravan.engine.scheduler import Request, Scheduler
from caravan.engine.text import TextStream
from caravan.kernels.attention import Segments
from caravan.model.decoder import Decoder, prefix, prefixes
from caravan.types import Completion, Sampling, UserError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Event:
    """What one step gave to one request."""

    id: int
    new_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the distribution drawn from (temperature, truncated, renormalised)."""
    raw_logprobs: tuple[float, ...]
    """At the same temperature without top-k and top-p."""
    text: str
    """New text that is safe to show: whole characters, no stop text or possible beginning of one."""
    finished: bool
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class _Active:
    request: Request
    sampling: Sampling
    key: int
    stream: TextStream | None
    logprobs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class Engine:
    """One model, many requests. Any thread may call; each call holds the engine for its duration."""

    def __init__(
        self,
        model: Decoder,
        *,
        stop_ids: frozenset[int] = frozenset(),
        max_seqs: int = 16,
        max_tokens: int | None = None,
        block_size: int = 16,
        decode: Callable[[list[int]], str] | None = None,
        vocab_size: int | None = None,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        version: int | str = 0,
    ) -> None:
        """
        Args:
            model: a Decoder. stop_ids: tokens that end an answer. max_seqs: sequences computed at once.
            max_tokens: prompt and answer of one sequence at most; the model's context by default.
            block_size: positions per block of the prefix cache. decode: ids -> text, needed for stop texts.
            vocab_size: ids the tokenizer knows; rows of the embedding beyond it are never drawn.
            step_tokens: tokens computed per step at most (prompts are cut into such chunks).
            cache_tokens: positions in all running sequences together at most, and size of the prefix cache;
                by default as many as `max_seqs` full contexts need, within 2 GiB.
            version: name of the present weights.
        """
        context = min(max_tokens or model.spec.context, model.spec.context, needs.MOST_POSITIONS)
        if vocab_size is not None and vocab_size > model.spec.vocab:
            raise UserError(
                f"the tokenizer knows {vocab_size} ids and the model only {model.spec.vocab}",
                "use the tokenizer the model was trained with",
            )
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.vocab_size = vocab_size
        needs.check_causal(model.spec)
        blocks = -(-(cache_tokens or needs.cache_positions(model.spec, max_seqs * context)) // block_size)
        self.scheduler = Scheduler(
            blocks=blocks,
            block_size=block_size,
            max_seqs=max_seqs,
            step_tokens=max(step_tokens or 512, max_seqs + block_size),
            max_context=context + len(model.spec.lead),
            share=not needs.is_recurrent(model.spec),
            regime=needs.regime(model.spec),
        )
        self.scheduler.version = version
        whole = self.scheduler.regime is not None or model.spec.prefix_token is not None
        reach = None if whole else self.scheduler.step_tokens
        self.lanes = Lanes(max_seqs, blocks, block_size, self.scheduler.max_context, reach)
        self.runner = Runner(model, self.lanes)
        self._active: dict[int, _Active] = {}
        self._lock = threading.RLock()
        known = model.spec.vocab if vocab_size is None else vocab_size
        self._stop_list = sorted(id for id in self.stop_ids if 0 <= id < known)

    # ------------------------------------------------------------------ one request

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        index: int = 0,
        salt: str = "",
        share_output: bool = True,
        text: bool = True,
    ) -> int:
        """Queue a prompt; returns the id its events carry.

        `index` tells requests of one seed apart (sample number, prompt number). `salt` keeps prefix caches of
        different tenants apart. `share_output` lets later prompts reuse the answer's cache (multi-turn chat).
        `text` False: no text in the events unless stop texts need it. Raises UserError when it can never run.
        """
        _check(sampling)
        if sampling.stop and self.decode is None:
            raise UserError("stop texts need a tokenizer", "pass decode= to the engine or use stop_ids")
        limit = self.model.spec.vocab if self.vocab_size is None else self.vocab_size
        if prompt_ids and (min(prompt_ids) < 0 or max(prompt_ids) >= limit):
            raise UserError(
                f"the prompt holds token ids outside 0..{limit - 1}", "check that the tokenizer fits"
            )
        with self._lock:
            lead = self.model.spec.lead
            request = self.scheduler.add(
                [*lead, *prompt_ids] if prompt_ids else [],
                sampling.max_tokens,
                salt=salt,
                share_output=share_output,
                prefix=len(lead) + prefix(self.model.spec, prompt_ids),
            )
            wants_text = self.decode is not None and (text or sampling.stop)
            stream = TextStream(self.decode, sampling.stop) if wants_text and self.decode else None
            self._active[request.id] = _Active(request, sampling, stream_key(sampling.seed, index), stream)
            return request.id

    def abort(self, id: int) -> None:
        """Drop a request and free its blocks at once; unknown or finished ids are ignored."""
        with self._lock:
            active = self._active.pop(id, None)
            if active is not None:
                self._release(active.request)

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or running."""
        return self.scheduler.busy

    def stats(self) -> dict[str, int]:
        """Requests and blocks now, tokens so far."""
        with self._lock:
            s = self.scheduler
            return {
                "running": len(s.running),
                "waiting": len(s.waiting),
                "blocks": len(s.pool.blocks),
                "blocks_owned": s.pool.owned_count,
                "preemptions": s.counts.preemptions,
                "prompt_tokens": s.counts.prompt_tokens,
                "cached_tokens": s.counts.cached_tokens,
                "computed_tokens": s.counts.computed_tokens,
                "refused": s.counts.refused,
            }

    @torch.no_grad()
    def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector of unit length per text: the mean of its final hidden states (after the last norm),
        float32, [spec.out_dim] numbers each."""
        with self._lock:
            vectors = [self._embedded(ids) for ids in prompts]
        return [vector.tolist() for vector in vectors]

    def _embedded(self, ids: Sequence[int]) -> torch.Tensor:
        limit = self.model.spec.vocab if self.vocab_size is None else self.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= limit or len(ids) > self.scheduler.max_context:
            raise UserError(
                f"a text of {len(ids)} tokens cannot be embedded",
                f"give 1 to {self.scheduler.max_context} ids in 0..{limit - 1}",
            )
        ids_N, lengths = torch.tensor(ids, device=self.runner.device), (len(ids),)
        attend = Segments(lengths, ids_N.device, prefixes(self.model.spec, ids_N, lengths))
        hidden_ND = self.model(ids_N, torch.arange(len(ids), device=ids_N.device), attend)
        return F.normalize(hidden_ND.float().mean(0), dim=0)

    def update_weights(self, version: int | str) -> None:
        """The module's weights have changed: nothing computed before may be found in the prefix cache."""
        with self._lock:
            self.scheduler.update_weights(version)
            self.runner.refresh()

    # ------------------------------------------------------------------ a step

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Compute one batch; one event per request that got a token. [] when there is nothing to do."""
        with self._lock:
            plan = self.scheduler.plan()
            if not plan.rows:
                return []
            rows = [self._active[row.request.id] for row in plan.rows if row.sample]
            try:
                ids, logprobs, raw = self._draw(self.runner.run(plan), rows)
            except BaseException:
                self.scheduler.retract(plan)
                for row in plan.rows:
                    self.lanes.close(row.request.id)
                raise
            self.lanes.store(self.scheduler.apply(plan, ids))
            return [self._event(*of) for of in zip(rows, ids, logprobs, raw, strict=True)]

    def _draw(
        self, logits_BV: torch.Tensor, rows: list[_Active]
    ) -> tuple[list[int], list[float], list[float]]:
        if not rows:
            return [], [], []
        if self.vocab_size is not None:
            logits_BV = logits_BV[:, : self.vocab_size]
        done = [len(a.request.tokens) - a.request.n_prompt for a in rows]
        early = [b for b, a in enumerate(rows) if done[b] < a.sampling.min_tokens]
        if early and self._stop_list:
            logits_BV = logits_BV.clone()
            logits_BV[torch.tensor(early)[:, None], torch.tensor(self._stop_list)] = float("-inf")
        draw = sample(
            logits_BV,
            [a.sampling.temperature for a in rows],
            [a.sampling.top_k for a in rows],
            [a.sampling.top_p for a in rows],
            [uniform(a.key, n) for a, n in zip(rows, done, strict=True)],
        )
        return draw.ids_B.tolist(), draw.logprob_B.tolist(), draw.raw_logprob_B.tolist()

    def _event(self, active: _Active, id: int, logprob: float, raw: float) -> Event:
        """Book a drawn token, see whether it ends the answer, and say what is new."""
        request = active.request
        active.logprobs.append(logprob)
        reason: FinishReason | None = None
        text = ""
        if id in self.stop_ids:
            reason = "stop"
        elif active.stream is not None:
            text, stopped = active.stream.push(id)
            reason = "stop" if stopped else None
        if reason is None and len(request.tokens) - request.n_prompt >= request.max_new:
            reason = "length"
        if reason is not None:
            if active.stream is not None:
                rest, stopped = active.stream.flush()
                text += rest
                reason = "stop" if stopped else reason
            self._release(request)
            del self._active[request.id]
        active.text.append(text)
        return Event(request.id, (id,), (logprob,), (raw,), text, reason is not None, reason)

    def _release(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.lanes.close(request.id)

    # ------------------------------------------------------------------ many prompts

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int = 1
    ) -> list[list[Completion]]:
        """`n` answers to each prompt, in order. The samples of a prompt share its prefill.

        Prompt i, sample j draws from stream (seed, i * n + j). Other requests under way go on meanwhile, but
        their events are lost: use one engine for serving and another for this.
        """
        with self._lock:
            self.runner.refresh()
            result: dict[int, Completion] = {}
            order: list[int] = []
            active: dict[int, _Active] = {}
            try:
                for i, prompt in enumerate(prompts):
                    for j in range(n):
                        id = self.submit(prompt, sampling, index=i * n + j, share_output=False, text=False)
                        order.append(id)
                        active[id] = self._active[id]
                while len(result) < len(order):
                    for event in self.step():
                        if event.finished and event.id in active:
                            result[event.id] = self._completion(active[event.id], event.finish_reason)
            finally:
                for id in order:
                    self.abort(id)
            done = [result[id] for id in order]
            return [done[i : i + n] for i in range(0, len(done), n)]

    def _completion(self, active: _Active, reason: FinishReason | None) -> Completion:
        assert reason is not None
        ids = active.request.tokens[active.request.n_prompt :]
        if active.stream is not None:
            text = "".join(active.text)
        else:
            text = self.decode([id for id in ids if id not in self.stop_ids]) if self.decode else ""
        return Completion(tuple(ids), tuple(active.logprobs), reason, text)


def _check(sampling: Sampling) -> None:
    """Raise UserError for values that make no sense."""
    for wrong, message in (
        (not sampling.temperature >= 0, f"temperature is {sampling.temperature}; it must be 0 or more"),
        (sampling.top_k < 0, f"top_k is {sampling.top_k}; it must be 0 (all) or more"),
        (not 0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}; it must be above 0 and at most 1"),
        (any(not s for s in sampling.stop), "a stop text is empty"),
    ):
        if wrong:
            raise UserError(message)
