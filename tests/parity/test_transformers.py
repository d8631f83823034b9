"""Our decoder against transformers on tiny random models: logits, files, gradients, packing, wrong knobs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from caravan.kernels.attention import Segments
from caravan.model import checkpoint
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel, ScoreHead
from caravan.model.spec import Spec
from caravan.types import Batch

TOLERANCE = 5e-5  # of max|diff| / std: a customary atol of 1e-3 accepts the wrong GELU
VOCAB, LENGTH = 101, 21

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 68,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 64, "n_inner": None}

# name: configuration class, model class, arguments
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "llama-mqa-wide": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"num_key_value_heads": 1, "head_dim": 12}),
    "llama-bias": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama-yarn": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"rope_parameters": YARN}),
    "llama-gelu": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"hidden_act": "gelu"}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA | {"head_dim": 12}),
    "mistral": ("MistralConfig", "MistralForCausalLM", LLAMA | {"sliding_window": 32}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt2-relu-inner": (
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT2 | {"n_inner": 52, "activation_function": "relu"},
    ),
    "gpt2-scales": (
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    ),
    "gpt2-untied": ("GPT2Config", "GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
}


def reference(name: str, folder: Path, classifier: bool = False) -> Any:
    """A tiny random transformers model, every parameter moved away from its initial value, and its saved
    folder."""
    transformers = pytest.importorskip("transformers")
    config_class, model_class, arguments = MODELS[name]
    if classifier:
        model_class = model_class.replace("ForCausalLM", "ForSequenceClassification")
        model_class = model_class.replace("LMHeadModel", "ForSequenceClassification")
        arguments = arguments | {"num_labels": 1, "pad_token_id": 0}
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(7)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def ours(model: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, V] logits of rows laid end to end as segments of one flat batch."""
    rows, width = ids_BT.shape
    attend = Segments((width,) * rows)
    hidden = model(ids_BT.flatten(), torch.arange(width).repeat(rows), attend)
    return model.logits(hidden).view(rows, width, -1)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_files_agree_in_both_directions(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hf = reference(name, tmp_path / "hf")
    model = checkpoint.load_model(tmp_path / "hf")
    with torch.no_grad():
        want = hf(tokens()).logits
        assert error(ours(model, tokens()), want) < TOLERANCE

    checkpoint.save_model(model, tmp_path / "ours", dtype=torch.float32)
    theirs, mine = (
        load_file(tmp_path / "hf/model.safetensors"),
        load_file(tmp_path / "ours/model.safetensors"),
    )
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert error(again(tokens()).logits, want) < 1e-6


@pytest.mark.parametrize("name", ["llama", "llama-llama3", "qwen2", "gpt2"])
def test_old_and_new_config_keys_give_the_same_spec(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = checkpoint.load_spec(tmp_path)
    rope = config.pop("rope_parameters", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    if rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.load_spec(tmp_path) == new


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_agree(name: str, tmp_path: Path) -> None:
    hf = reference(name, tmp_path)
    model = checkpoint.load_model(tmp_path)
    ids = tokens()
    for logits in (hf(ids).logits, ours(model, ids)):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    mine = checkpoint.export_tensors(model)
    for key, p in hf.named_parameters():
        assert error(mine[key], p.grad) < 1e-4, key


def test_packed_segments_equal_single_documents(tmp_path: Path) -> None:
    hf = reference("qwen2", tmp_path)
    model = checkpoint.load_model(tmp_path)
    ids, lengths = tokens().flatten(), (5, 1, 13, 9, 14)
    pos = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        packed = model.logits(model(ids, pos, Segments(lengths)))
        single = torch.cat([hf(part[None]).logits[0] for part in ids.split(lengths)])
    assert error(packed, single) < TOLERANCE


def change(spec: Spec, part: str, **values: Any) -> Spec:
    """The Spec with some values of every layer's attn, ffn or norm changed."""
    layers = tuple(replace(layer, **{part: replace(getattr(layer, part), **values)}) for layer in spec.layers)
    return replace(spec, layers=layers)


WRONG = {
    "eps": ("llama", lambda s: change(s, "norm", eps=1e-4)),
    "theta": ("llama", lambda s: change(s, "attn", rope=replace(s.layers[0].attn.rope, theta=2e4))),
    "scaling": (
        "llama-llama3",
        lambda s: change(s, "attn", rope=replace(s.layers[0].attn.rope, scaling=None)),
    ),
    "yarn": ("llama-yarn", lambda s: change(s, "attn", rope=replace(s.layers[0].attn.rope, scaling=None))),
    "partial": ("llama", lambda s: change(s, "attn", rope=replace(s.layers[0].attn.rope, dim=4))),
    "scale": ("llama", lambda s: change(s, "attn", scale=1.0)),
    "act": ("llama", lambda s: change(s, "ffn", act="gelu")),
    "gelu": ("gpt2", lambda s: change(s, "ffn", act="gelu")),
    "layer-scale": ("gpt2-scales", lambda s: change(s, "attn", scale=8**-0.5)),
    "final-eps": ("gpt2", lambda s: replace(s, final_norm=replace(s.final_norm, eps=1e-2))),
    "embed-scale": ("llama", lambda s: replace(s, embed_scale=7.0)),
    "logit-scale": ("llama", lambda s: replace(s, logit_scale=0.5)),
}


@pytest.mark.parametrize("knob", WRONG)
def test_one_wrong_knob_is_noticed(knob: str, tmp_path: Path) -> None:
    name, mutate = WRONG[knob]
    hf = reference(name, tmp_path)
    right = checkpoint.load_model(tmp_path)
    wrong = Decoder(mutate(right.spec), right.family)
    wrong.load_state_dict(right.state_dict())
    with torch.no_grad():
        assert error(ours(wrong, tokens()), hf(tokens()).logits) > 2 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_reward_models_are_sequence_classifiers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hf = reference(name, tmp_path / "hf", classifier=True)
    model = checkpoint.load_reward(tmp_path / "hf")
    ids = tokens()
    batch = Batch(
        ids.flatten(), torch.arange(LENGTH).repeat(2), (LENGTH, LENGTH), ids.flatten(), torch.ones(42)
    )
    with torch.no_grad():
        want = hf(ids).logits[:, 0]
        assert error(model.scores(batch), want) < TOLERANCE
        biased = RewardModel(model.decoder, ScoreHead(48, bias=0.25))
        biased.score.weight.copy_(model.score.weight)
        checkpoint.save_reward(biased, tmp_path / "ours", dtype=torch.float32)
        again = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "ours", pad_token_id=0, attn_implementation="eager"
        ).eval()
        assert error(again(ids).logits[:, 0], want) < 2e-5  # 4e-6 observed: fp32 sums in another order
        assert error(checkpoint.load_reward(tmp_path / "ours").scores(batch), want - 0.25) < TOLERANCE
