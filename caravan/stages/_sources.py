"""The shards of a pre-training run: opened, checked against each other, mixed, and what came of the mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

from caravan.algos.schedule import Schedule
from caravan.data import mix
from caravan.data.loader import PretrainLoader
from caravan.data.mix import Phase
from caravan.data.shards import Shards
from caravan.model.sizes import Reason
from caravan.store import Artefact
from caravan.types import UserError


class Wishes(Protocol):
    """What of pretrain's Config concerns the mix."""

    @property
    def mix(self) -> tuple[str, ...]: ...
    @property
    def mix_by(self) -> str: ...
    @property
    def mix_alpha(self) -> float: ...
    @property
    def schedule(self) -> str: ...


class Sources:
    """One or several shards of one tokenizer. Raises UserError if they have not."""

    def __init__(self, given: Sequence[Artefact]) -> None:
        self.names = [art.ref for art in given]
        if len(set(self.names)) < len(given):
            raise UserError("the same shards are given twice", "weigh them by --mix instead")
        self.tokenizer = given[0].path / "tokenizer"
        first = (self.tokenizer / "tokenizer.json").read_bytes()
        for art in given[1:]:
            if (art / "tokenizer/tokenizer.json").read_bytes() != first:
                raise UserError(
                    f"{art.ref} and {given[0].ref} were made with different tokenizers",
                    "make both with one --tokenizer",
                )
        self.train = [Shards.open(art.path, "train") for art in given]
        held = [Shards.open(art.path, "heldout") for art in given]
        self.heldout = [h if len(h) > 1 else t for h, t in zip(held, self.train, strict=True)]
        self.vocab_size = self.train[0].vocab_size

    @property
    def tokens(self) -> int:
        """Of one epoch of everything."""
        return sum(map(len, self.train))

    def phases(self, cfg: Wishes) -> list[Phase]:
        """Shares of the tokens per source, one phase after another; none for a single source."""
        if len(self.train) == 1:
            if cfg.mix or cfg.mix_alpha != 1.0 or cfg.mix_by != "proportion":
                raise UserError("a mix needs several sources", "give --shards more than once")
            return []
        sizes = [len(one) for one in self.train]
        if not cfg.mix:
            return [Phase(1.0, mix.temperature(sizes, cfg.mix_alpha))]
        if cfg.mix_alpha != 1.0:
            raise UserError("--mix and --mix-alpha both say how much each source weighs", "keep one")
        anneal = Schedule(kind="wsd").decay_share
        if cfg.mix[-1].startswith(mix.ANNEAL) and cfg.schedule != "wsd":
            raise UserError(
                f"an annealing phase needs the schedule wsd, not {cfg.schedule}", "give its share"
            )
        return [
            Phase(phase.share, mix.token_shares(phase.weights, sizes, cfg.mix_by))
            for phase in mix.parse(cfg.mix, len(sizes), anneal)
        ]

    def wanted(self, cfg: Wishes) -> int | None:
        """Tokens that epochs ask for: the length of a run of one phase."""
        if cfg.mix_by != "epochs" or len(cfg.mix) != 1 or len(self.train) == 1:
            return None
        (phase,) = mix.parse(cfg.mix, len(self.train), 1.0)
        return round(sum(w * len(one) for w, one in zip(phase.weights, self.train, strict=True)))

    def about(self, loader: PretrainLoader, step: int) -> Mapping[str, Any]:
        """For a step's metrics: its tokens of each source."""
        return {} if len(self.names) == 1 else {"tokens_by_source": self._named(loader.tokens_of(step))}

    def realised(self, loader: PretrainLoader, phases: Sequence[Phase], steps: int) -> dict[str, Any]:
        """Facts: tokens, share and epochs of each source, in all and phase by phase, as they were read."""
        if len(self.names) == 1:
            return {}
        edges = [0, *(round(steps * share) for share in accumulate(phase.share for phase in phases))]
        parts = [
            {"steps": [first, last], "tokens": self._named(loader.tokens_read(last, first))}
            for first, last in pairwise(edges)
        ]
        read = loader.tokens_read(steps)
        sizes = [len(one) for one in self.train]
        return {
            "mix": {
                name: {"tokens": n, "share": round(n / max(1, sum(read)), 6), "epochs": round(n / size, 4)}
                for name, n, size in zip(self.names, read, sizes, strict=True)
            },
            "mix_phases": parts,
        }

    def table(self, loader: PretrainLoader, phases: Sequence[Phase], steps: int) -> list[Reason]:
        """What the run will read of each source, for people."""
        if len(self.names) == 1:
            return []
        asked = [sum(p.share * p.weights[k] for p in phases) for k in range(len(self.names))]
        read = loader.tokens_read(steps)
        return [
            Reason(
                name,
                f"{n:,}",
                f"tokens: {n / max(1, sum(read)):.2%} (asked: {share:.2%}), {n / len(one):.2f} epochs",
            )
            for name, n, one, share in zip(self.names, read, self.train, asked, strict=True)
        ]

    def _named(self, counts: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.names, counts, strict=True))
