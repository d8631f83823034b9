"""Answers sampled for training: flat, ragged, frozen; no padding is ever stored.

The sampler works on the training module's own weights, so nothing is copied and nothing is stale. What is
drawn is a pure function of (weights, seed, prompt number, sample number, position): a run killed in the
middle of a rollout draws it again. No top-k or top-p here: they would make the distribution drawn from
another than the one in the ratio.

Shapes: S sequences (prompt and answer), N their tokens end to end, R answer tokens end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from caravan.data.loader import first_fit
from caravan.data.pack import GroupBatch, group_batch
from caravan.data.render import Rendered
from caravan.engine.engine import Engine
from caravan.model.decoder import Decoder
from caravan.types import Sampling


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was sampled. Every answer has at least one token; the end-of-turn token is one of them."""

    ids_N: tuple[int, ...]
    """Prompt and answer of every sequence, exactly as sampled: never decoded and encoded again."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, [S]."""
    prompt_lengths: tuple[int, ...]
    """Of which prompt, [S]."""
    done: tuple[bool, ...]
    """Did the answer end by itself? [S]"""
    sampled_logp_R: tuple[float, ...]
    """The sampler's own log-probs: to watch, not to train on (other kernels, other rounding)."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def response_lengths(self) -> tuple[int, ...]:
        return tuple(n - p for n, p in zip(self.lengths, self.prompt_lengths, strict=True))

    def sequences(self) -> list[Rendered]:
        """Each sequence with the mask on its answer."""
        rows, start = [], 0
        for length, prompt in zip(self.lengths, self.prompt_lengths, strict=True):
            ids = list(self.ids_N[start : start + length])
            rows.append(Rendered(ids, [False] * prompt + [True] * (length - prompt)))
            start += length
        return rows

    def batches(self, chosen: Sequence[int], micro_tokens: int) -> list[GroupBatch]:
        """The chosen sequences as flat batches of at most `micro_tokens`; `index` says which each batch
        holds."""
        rows = self.sequences()
        return [
            group_batch([[rows[chosen[i]]] for i in part], [chosen[i] for i in part])
            for part in first_fit([self.lengths[i] for i in chosen], micro_tokens)
        ]


def sample(
    model: Decoder,
    prompts: Sequence[tuple[int, Sequence[int]]],
    samples: int,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    stop_ids: frozenset[int],
    vocab_size: int,
    max_seqs: int = 64,
) -> Rollout:
    """`samples` answers to each of `prompts`, given as (number of the prompt in the whole step, its ids).

    The numbers, not the places in this list, choose the random streams: ranks that share a step draw what one
    rank would. A fresh engine every time, so that nothing of an earlier step, not even the size of a cache,
    can matter.
    """
    assert temperature > 0, "a policy that is sampled greedily has no ratio"
    longest = max((len(ids) for _, ids in prompts), default=0) + max_new_tokens
    rows = min(max_seqs, max(1, len(prompts) * samples))
    engine = Engine(
        model,
        stop_ids=stop_ids,
        max_seqs=rows,
        max_tokens=longest,
        cache_tokens=rows * (longest + 16),
        step_tokens=1024,
        vocab_size=vocab_size,
    )
    sampling = Sampling(temperature=temperature, max_tokens=max_new_tokens, seed=seed)
    order: list[tuple[int, Sequence[int]]] = []
    for number, ids in prompts:
        for j in range(samples):
            id = engine.submit(ids, sampling, index=number * samples + j, share_output=False, text=False)
            order.append((id, ids))
    new_ids: dict[int, list[int]] = {id: [] for id, _ in order}
    logps: dict[int, list[float]] = {id: [] for id, _ in order}
    ended: dict[int, bool] = {}
    while engine.busy:
        for event in engine.step():
            new_ids[event.id] += event.new_ids
            logps[event.id] += event.logprobs
            if event.finished:
                ended[event.id] = event.finish_reason == "stop"
    return Rollout(
        ids_N=tuple(t for id, prompt in order for t in (*prompt, *new_ids[id])),
        lengths=tuple(len(prompt) + len(new_ids[id]) for id, prompt in order),
        prompt_lengths=tuple(len(prompt) for _, prompt in order),
        done=tuple(ended[id] for id, _ in order),
        sampled_logp_R=tuple(x for id, _ in order for x in logps[id]),
    )
