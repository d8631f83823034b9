"""Embeddings of texts by our own models: the mean of the last hidden states.

Legend: D texts, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from caravan.data.pack import lm_batch
from caravan.data.render import Rendered
from caravan.data.tokenizer import Tokenizer
from caravan.model.checkpoint import load_model
from caravan.model.flat import hidden_states
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.systems.runtime import setup
from caravan.systems.train import to_device


class Embedder:
    """A model folder as a function from texts to float32 [D, E]; a text is read up to `tokens` tokens."""

    def __init__(self, model: Artefact, tokens: int, rt: Runtime) -> None:
        machine = setup(rt)
        self._device = machine.device
        self._tokenizer = Tokenizer.load(model.path)
        self._model = load_model(model.path, device=machine.device).eval()
        self._tokens = min(tokens, self._model.spec.max_pos)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [D, E]; one text at a time, so that company changes no bit."""
        tok, model = self._tokenizer, self._model
        start = [tok.eos if tok.bos is None else tok.bos]
        rows = []
        for text in texts:
            ids = [i for i in start if i is not None] + tok.encode(text[: 32 * self._tokens])
            ids = ids[: self._tokens] or [0]
            batch = lm_batch([Rendered(ids, [True] * len(ids))])
            hidden_ND, _ = hidden_states(model, to_device(batch, self._device))
            rows.append(hidden_ND.float().mean(dim=0).cpu().numpy())
        return np.stack(rows)
