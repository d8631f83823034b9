"""What a model says about given tokens: log-probabilities, rewards, and the KL between two models.

Legend: N flat tokens, D width, V vocabulary, T tokens of one sequence that are scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caravan.algos.logprobs import token_logprobs
from caravan.data.pack import lm_batch
from caravan.data.render import Rendered
from caravan.model.decoder import Decoder
from caravan.model.flat import hidden_states
from caravan.model.heads import RewardModel
from caravan.systems.train import to_device
from caravan.types import Batch

_ROWS = 512
"""Rows of logits alive at once when two whole distributions are compared."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids of which those from `start` on are scored, each given all before it (start >= 1)."""

    ids: Sequence[int]
    start: int


def _groups(sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in order, as many at a time as `batch_tokens` hold, at least one."""
    group: list[int] = []
    used = 0
    for index, size in enumerate(sizes):
        if group and used + size > batch_tokens:
            yield group
            group, used = [], 0
        group.append(index)
        used += size
    if group:
        yield group


def _batch(sequences: Sequence[Scored], device: torch.device) -> tuple[Batch, Tensor]:
    """The flat batch, and the rows N whose next token is scored."""
    batch = lm_batch([Rendered(list(s.ids), [i >= s.start for i in range(len(s.ids))]) for s in sequences])
    rows = torch.nonzero(batch.weight_N, as_tuple=True)[0].to(device)
    return to_device(batch, device), rows


def _device(model: torch.nn.Module) -> torch.device:
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@torch.no_grad()
def logprobs(
    model: Decoder, sequences: Sequence[Scored], *, batch_tokens: int = 8192,
    report: Callable[[int, int], None] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Natural log-probability of every scored token: one float32 [T] on the CPU per sequence."""
    device, out = _device(model), []
    done = 0
    for group in _groups([len(s.ids) for s in sequences], batch_tokens):
        chosen = [sequences[i] for i in group]
        batch, rows = _batch(chosen, device)
        hidden_ND = hidden_states(model, batch)[0][rows]
        logp = token_logprobs(hidden_ND, model.head_weight(), batch.targets_N[rows], **model.head_terms)
        out += logp.float().cpu().split([len(s.ids) - s.start for s in chosen])
        done += sum(batch.lengths)
        if report:
            report(done, sum(len(s.ids) for s in sequences))
    return out


@torch.no_grad()
def rewards(
    model: RewardModel, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 8192
) -> list[float]:
    """Score at the last token of each sequence."""
    device, out = _device(model), []
    for group in _groups([len(s) for s in sequences], batch_tokens):
        batch, _ = _batch([Scored(sequences[i], len(sequences[i])) for i in group], device)
        out += model.scores(batch).float().cpu().tolist()
    return out


@torch.no_grad()
def divergence(
    model: Decoder, reference: Decoder, sequences: Sequence[Scored], *, vocab: int | None = None,
    batch_tokens: int = 8192,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Per sequence (log p, log q, KL(p || q)) at each scored token, float32 [T]: p the model, q the
    reference.

    Both distributions are over the first `vocab` ids, those a sampler may draw. p must have drawn the tokens.
    """
    device, out = _device(model), []
    for group in _groups([len(s.ids) for s in sequences], batch_tokens):
        chosen = [sequences[i] for i in group]
        batch, rows = _batch(chosen, device)
        hidden_p, hidden_q = hidden_states(model, batch)[0][rows], hidden_states(reference, batch)[0][rows]
        columns: list[list[Tensor]] = [[], [], []]
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            logp_NV = torch.log_softmax(model.logits(hidden_p[part])[:, :vocab].float(), -1)
            logq_NV = torch.log_softmax(reference.logits(hidden_q[part])[:, :vocab].float(), -1)
            drawn = batch.targets_N[rows[part], None]
            columns[0].append(logp_NV.gather(1, drawn)[:, 0])
            columns[1].append(logq_NV.gather(1, drawn)[:, 0])
            columns[2].append((logp_NV.exp() * (logp_NV - logq_NV)).sum(1).clamp_min(0.0))
        sizes = [len(s.ids) - s.start for s in chosen]
        parts = [torch.cat(c).cpu().split(sizes) for c in columns]
        out += list(zip(*parts, strict=True))
    return out
