"""Modules without memory."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from caravan.model.blank import blank


def test_shapes_and_nothing_else() -> None:
    with blank():
        module = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5), nn.LayerNorm(5))
    assert all(p.is_meta for p in module.parameters())
    assert [tuple(p.shape) for p in module.parameters()] == [(7, 3), (5, 3), (5,), (5,), (5,)]


def test_outside_of_it_weights_are_drawn() -> None:
    with blank():
        pass
    assert not nn.Linear(3, 5).weight.is_meta
    assert float(nn.init.normal_(torch.zeros(100)).std()) > 0.5


def test_no_compiler_is_imported_to_load_a_model() -> None:
    """What initialisers import on the meta device costs seconds, more than the weights of a small model."""
    code = (
        "import sys, torch\n"
        "from caravan.model import checkpoint\n"
        "from caravan.model.families import llama\n"
        "config = dict(model_type='llama', hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "              num_attention_heads=2, vocab_size=11)\n"
        "model = checkpoint.empty(llama, config, llama.spec(config), 'here')\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
