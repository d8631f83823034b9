"""Stages as function calls: a recipe is Python, and its call graph is the flow.

    c = Caravan(Store())
    text = c.corpus(raw=c.add(Path("books")))
    tok = c.tokenizer(corpus=text, vocab=8192)
    base = c.pretrain(shards=c.shards(corpus=text, tokenizer=tok), size="tiny")

Every call answers from the store if the same was asked before, and resumes what was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from caravan import config, progress, stage
from caravan.refs import resolve
from caravan.store import Artefact, Store


class Caravan:
    """A store and a way of running things; `c.NAME(role=artefact, setting=value)` runs stage NAME.

    `trail` lists every artefact asked for, in order: the road of a report.
    """

    def __init__(self, store: Store, rt: stage.Runtime | None = None) -> None:
        self.store = store
        self.rt = rt or stage.Runtime()
        self.trail: list[Artefact] = []

    def add(self, path: Path | str, kind: str = "raw") -> Artefact:
        """Bring outside files in, by content."""
        art = self.store.add(path, kind)
        self.trail.append(art)
        return art

    def model(self, text: str) -> Artefact:
        """A checkpoint: artefact reference, name, folder, or hf:ORG/NAME."""
        art = resolve(self.store, text, "model", lambda name, raw: self.run(name, {"raw": raw}, {}))
        self.trail.append(art)
        return art

    def run(self, name: str, inputs: dict[str, Artefact | None], settings: dict[str, Any]) -> Artefact:
        """Run one stage with its progress shown; unknown settings are errors that name the nearest."""
        cfg = config.from_dict(stage.load("stages", name).Config, settings)
        art = progress.execute(self.store, name, cfg, inputs, self.rt)
        self.trail.append(art)
        return art

    def __getattr__(self, name: str) -> Callable[..., Artefact]:
        if name not in stage.names("stages"):
            raise AttributeError(name)
        roles = stage.load("stages", name).INPUTS

        def call(**given: Any) -> Artefact:
            inputs: dict[str, Artefact | None] = {}
            for key, value in given.items():
                if key not in roles:
                    continue
                inputs |= stage.listed(key, value) if isinstance(value, list | tuple) else {key: value}
            settings = {key: value for key, value in given.items() if key not in roles}
            return self.run(name, inputs, settings)

        return call
