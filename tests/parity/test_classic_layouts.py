"""Files as the GPT, NeoX, OPT, BLOOM, Falcon and StableLM lines were first released: buffers among the
weights, tied heads written out, configs under their old names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model import checkpoint
from caravan.types import UserError
from tests import families as tiny

transformers = pytest.importorskip("transformers")

BUFFERS = {
    "gpt_neo": ("transformer.h.1.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"),
    "gptj": ("transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"),
    "codegen": ("transformer.h.1.attn.causal_mask",),
    "gpt_neox": (
        "gpt_neox.layers.1.attention.bias",
        "gpt_neox.layers.1.attention.masked_bias",
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
    ),
    "gpt_bigcode": ("transformer.h.1.attn.bias",),
    "openai_gpt": ("transformer.h.1.attn.bias",),
    "falcon": ("transformer.h.1.self_attention.maybe_rotary.inv_freq",),
    "phi": ("model.layers.1.self_attn.rotary_emb.inv_freq",),
    "persimmon": ("model.layers.1.self_attn.rotary_emb.inv_freq",),
    "stablelm": ("model.layers.1.self_attn.rotary_emb.inv_freq",),
    "xglm": ("model.embed_positions.weights",),
}
TIED = {
    "gpt_neo": "lm_head.weight",
    "opt": "lm_head.weight",
    "bloom": "lm_head.weight",
    "falcon": "lm_head.weight",
    "mpt": "lm_head.weight",
    "xglm": "lm_head.weight",
    "gpt_bigcode": "lm_head.weight",
    "openai_gpt": "lm_head.weight",
}


def saved(family: str, folder: Path, case: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """A case's model written to a folder, and its tensors."""
    model = importlib.import_module(f"tests.families.{family}").CASES[case].hf()
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    """Put other tensors and other config keys (None: the key goes) into a folder."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def logits(model: Any) -> Tensor:
    ids_BT = tiny.ids()
    rows, width = ids_BT.shape
    with torch.no_grad():
        hidden = model(ids_BT.flatten(), torch.arange(width).repeat(rows), Segments((width,) * rows))
        return model.logits(hidden).view(rows, width, -1)


def error(model: Any, theirs: Any) -> float:
    with torch.no_grad():
        want = theirs(input_ids=tiny.ids(), use_cache=False).logits
    return float((logits(model) - want).abs().max() / want.std())


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_of_early_files_are_no_weights(family: str, tmp_path: Path) -> None:
    _, tensors = saved(family, tmp_path)
    rewrite(tmp_path, tensors | {key: torch.ones(2, 3) for key in BUFFERS[family]})
    model = checkpoint.load_model(tmp_path)
    checkpoint.save_model(model, tmp_path / "again", dtype=torch.float32)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
    rewrite(tmp_path, tensors | {BUFFERS[family][0] + "es": torch.ones(2)})
    if family != "xglm" and "rotary" not in BUFFERS[family][0]:  # their patterns take all of a module
        with pytest.raises(UserError, match=r"(bias|mask)es'"):
            checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_may_be_written_out(family: str, tmp_path: Path) -> None:
    theirs, tensors = saved(family, tmp_path)
    embedding = theirs.get_input_embeddings().weight.detach().clone()
    rewrite(tmp_path, tensors | {TIED[family]: embedding})
    model = checkpoint.load_model(tmp_path)
    assert model.spec.tie and error(model, theirs) < tiny.TOLERANCE
    rewrite(tmp_path, tensors | {TIED[family]: embedding + 1})
    with pytest.warns(UserWarning, match="differs from the embedding"):
        assert not checkpoint.load_model(tmp_path).spec.tie


HEADS = {"n_head": 6, "n_layer": 4}
EPOCH = {"model_type": "stablelm_epoch", "norm_eps": 1e-5, "rope_pct": 0.25, "rope_theta": 1e4}
FIRST: list[tuple[str, int, dict[str, Any], tuple[str, ...]]] = [
    ("falcon", 0, HEADS | {"model_type": "RefinedWebModel"}, ()),
    ("falcon", 1, HEADS | {"model_type": "RefinedWeb", "n_head_kv": 2}, ("num_kv_heads",)),
    ("falcon", 3, HEADS | {"model_type": "RefinedWebModel"}, ()),
    ("stablelm", 0, EPOCH, ("layer_norm_eps", "rope_parameters")),
    ("bloom", 0, {"n_embed": 48, "num_attention_heads": 6}, ("hidden_size", "n_head")),
]
"""(family, case, keys of the first release, keys it did not have)."""
LATER = ("num_attention_heads", "num_hidden_layers", "new_decoder_architecture")
"""Keys that Falcon's first releases did not have."""


@pytest.mark.parametrize(("family", "case", "old", "gone"), FIRST)
def test_first_releases_open_and_leave_under_todays_names(
    family: str, case: int, old: dict[str, Any], gone: tuple[str, ...], tmp_path: Path
) -> None:
    theirs, tensors = saved(family, tmp_path, case)
    today = (
        ("num_attention_heads", "num_hidden_layers", "new_decoder_architecture") if family == "falcon" else ()
    )
    rewrite(tmp_path, tensors, **dict.fromkeys((*gone, *today)), **old)
    model = checkpoint.load_model(tmp_path)
    assert error(model, theirs) < tiny.TOLERANCE
    checkpoint.save_model(model, tmp_path / "again", dtype=torch.float32)
    assert checkpoint.read_config(tmp_path / "again")["model_type"] == family
    again = type(theirs).from_pretrained(
        tmp_path / "again", attn_implementation=theirs.config._attn_implementation, dtype=torch.float32
    )
    assert error(model, again.eval()) < tiny.TOLERANCE
