"""Models with a vision tower: config.json in the words of a release gives the text model that was published,
and whatever is not text comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from caravan.model import checkpoint, families
from caravan.model.families import qwen2_vl
from caravan.types import UserError

QWEN2 = {
    "model_type": "qwen2_vl", "max_position_embeddings": 32768, "max_window_layers": 28, "rms_norm_eps": 1e-6,
    "num_hidden_layers": 28, "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {"depth": 32},
}  # fmt: skip
GEMMA = {"model_type": "gemma3_text", "sliding_window": 1024,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip

RELEASES: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen2-VL-2B": (
        QWEN2 | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
                 "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        1_543_714_304,
    ),
    "Qwen2-VL-7B": (
        QWEN2 | {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        7_615_616_512,
    ),
    "Mistral-Small-3.1-24B": (
        {"model_type": "mistral3", "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "head_dim": 128,
            "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1e9,
            "rms_norm_eps": 1e-5, "sliding_window": None, "max_position_embeddings": 131072,
            "vocab_size": 131072}},
        23_572_403_200,
    ),
    "llava-1.5-7b": (
        {"model_type": "llava", "text_config": {
            "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "vocab_size": 32064}},
        6_738_415_616 + 2 * 64 * 4096,
    ),
    # the report rounds: embedding 675M and 1,416M, the rest 3,209M and 25,600M
    "gemma-3-4b": (
        {"model_type": "gemma3", "text_config": GEMMA | {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}},
        3_884e6,
    ),
    "gemma-3-27b": (
        {"model_type": "gemma3", "text_config": GEMMA | {
            "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "head_dim": 128,
            "num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168}},
        27_016e6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
def test_releases_have_the_published_size(name: str) -> None:
    config, published = RELEASES[name]
    family = families.find(config["model_type"])
    spec = family.spec(config)
    exact = isinstance(published, int)
    assert spec.parameters == published if exact else abs(spec.parameters / published - 1) < 0.005
    assert family.spec({**config, **family.config(spec)}) == spec


def test_gemmas_text_is_read_as_gemma3_text_reads_it() -> None:
    spec = families.find("gemma3").spec(RELEASES["gemma-3-27b"][0])
    first, last = spec.layers[0].attn, spec.layers[5].attn
    assert (first.window, last.window, first.scale) == (1024, None, 168**-0.5) and spec.tie
    assert (first.rope.theta, first.rope.scaling, last.rope.theta) == (1e4, None, 1e6)
    assert last.rope.scaling.factor == 8.0


def test_shares_of_the_frequencies_come_back() -> None:
    config = RELEASES["Qwen2-VL-2B"][0]
    made = qwen2_vl.carried(config, qwen2_vl.config(qwen2_vl.spec(config)))
    for said in (made, made["text_config"]):
        assert said["rope_scaling"] == config["rope_scaling"]
        assert said["rope_parameters"]["mrope_section"] == [16, 24, 24]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny LLaVA in bf16 with keys and tensors that are not about text."""
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 31, "torch_dtype": "float16"}  # fmt: skip
    made = families.find("llava").spec({"text_config": text})
    config = {"model_type": "llava", "image_token_index": 7, "text_config": text, "vision_config": {"x": 1}}
    model = checkpoint.empty(families.find("llava"), config, made, tmp_path).to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) + i)
    checkpoint.save_model(model, tmp_path)
    edit(tmp_path, {"vision_tower.patch.weight": torch.rand(3, 5).bfloat16(),
                    "multi_modal_projector.bias": torch.rand(5).bfloat16()})  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text('{"size": 336}')
    return tmp_path


def edit(folder: Path, more: dict[str, torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors") | more
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_not_text_comes_back(folder: Path, tmp_path: Path) -> None:
    before = checkpoint.read_config(folder)
    checkpoint.save_model(checkpoint.load_model(folder, torch.bfloat16), tmp_path / "out", tokenizer=folder)
    files = [load_file(f / "model.safetensors") for f in (folder, tmp_path / "out")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    after = checkpoint.read_config(tmp_path / "out")
    assert after["text_config"]["torch_dtype"] == "float16" and after["vision_config"] == {"x": 1}
    assert after == before
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"size": 336}


def test_a_stray_tensor_is_still_named(folder: Path) -> None:
    edit(folder, {"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"layers\.9\.mlp\.up_proj\.weight' has no place"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "gemma3"}, "no 'text_config'"),
        (
            {"model_type": "llava", "text_config": {"model_type": "phi"}},
            "'phi' is not supported",
        ),
        ({"model_type": "mistral3", "text_config": {"model_type": "qwen2"}}, "'qwen2' is not supported"),
        ({"model_type": "mistral3", "text_config": 3}, "'text_config' is 3, wanted an object"),
    ],
)
def test_other_text_models_are_refused(config: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        families.find(config["model_type"]).spec(config)
