"""Weights in 8-bit floats with a scale per block: what transformers reads, or a sentence."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from caravan.model import checkpoint, fp8, sizes
from caravan.model.families import llama
from caravan.model.tensors import stream_tensors
from caravan.types import UserError
from tests import peaks

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj.weight"
SAID = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


@pytest.fixture(scope="module")
def plain() -> Any:
    spec, _ = sizes.derive("nano", None, 101, 64)
    return sizes.fresh(spec, 0)


@pytest.fixture
def folder(plain: Any, tmp_path: Path) -> Path:
    """A small Llama with its up projections in blocks."""
    checkpoint.save_model(plain, tmp_path, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)

    def blocks(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith("up_proj.weight")]:
            N, K = tensors[key].shape
            tensors[f"{key}_scale_inv"] = torch.rand(-(-N // 16), -(-K // 32), generator=draw) + 0.5
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    edit(tmp_path, blocks, quantization_config=SAID)
    return tmp_path


def edit(folder: Path, change: Callable[[Tensors], Any] = lambda t: None, **config: Any) -> None:
    """The folder with other tensors and other keys in config.json."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_transformers_reads_the_same_weights(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads FP8 with it alone")
    how = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 32))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32
    )
    mine = checkpoint.export_tensors(checkpoint.load_model(folder))
    want = theirs.state_dict()
    assert any("up_proj" in key for key in mine)
    assert all(torch.equal(tensor, want[key]) for key, tensor in mine.items())


def test_what_is_saved_is_plain(folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load_model(folder)
    checkpoint.save_model(model, tmp_path / "out")
    assert "quantization_config" not in checkpoint.read_config(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert not [key for key in saved if "scale" in key]
    again = checkpoint.load_model(tmp_path / "out", torch.bfloat16)
    want = checkpoint.load_model(folder, torch.bfloat16)
    pairs = zip(want.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_one_scale_may_serve_a_whole_weight(folder: Path) -> None:
    def whole(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key] = torch.tensor(0.75)
            tensors[key.replace("weight_scale_inv", "activation_scale")] = torch.tensor(0.1)

    edit(folder, whole, quantization_config=SAID | {"weight_block_size": None, "activation_scheme": "static"})
    stored = load_file(folder / "model.safetensors")[UP]
    mine = checkpoint.export_tensors(checkpoint.load_model(folder))[UP]
    assert torch.equal(mine, stored.float() * 0.75)


def drop(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(key)


def put(key: str, shape: tuple[int, ...]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


SCALE = f"{UP}_scale_inv"
WRONG: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "no scale": (drop(SCALE), SAID, rf"'{UP}' is an 8-bit float, but '{SCALE}' is missing"),
    "no weight": (drop(UP), SAID, f"'{SCALE}' scales '{UP}', which is missing"),
    "other scales": (put(SCALE, (3, 3)), SAID, rf"'{SCALE}' has shape \(3, 3\), but '{UP}' of shape"),
    "other blocks": (len, SAID | {"weight_block_size": [64, 64]}, "blocks of 64 x 64"),
    "no blocks": (len, SAID | {"weight_block_size": [0, 16]}, "quantization_config.weight_block_size"),
    "a word": (len, "fp8", "'quantization_config' is 'fp8', wanted an object"),  # type: ignore[dict-item]
    **{
        method: (len, {"quant_method": method, "bits": 4}, f"'quant_method' {method} is not read")
        for method in ("gptq", "awq", "bitsandbytes", "mxfp4")
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_read_is_named(case: str, folder: Path) -> None:
    change, said, wanted = WRONG[case]
    edit(folder, change, quantization_config=said)
    with pytest.raises(UserError, match=wanted):
        checkpoint.load_model(folder)


@pytest.mark.skipif(not peaks.MEASURABLE, reason="peaks are read from /proc")
def test_the_weights_are_written_out_one_by_one(folder: Path, tmp_path: Path) -> None:
    spec, _ = sizes.derive(None, 12, 1024, 64)
    config = llama.config(spec) | {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 3072}
    config |= {"num_hidden_layers": 7, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    with torch.device("meta"):
        model = checkpoint.Decoder(llama.spec(config), "llama", config)
    shapes = {}
    for key, tensor in meta_export(model).items():
        small = "proj" in key
        shapes[key] = (torch.float8_e4m3fn if small else torch.bfloat16, tuple(tensor.shape))
        if small:
            shapes[f"{key}_scale_inv"] = (torch.float32, tuple(-(-n // 128) for n in tensor.shape))
    big = tmp_path / "big"
    big.mkdir()
    stream_tensors(shapes, lambda key: torch.full(shapes[key][1], 0.5, dtype=shapes[key][0]), big)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (big / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    size, peak = peaks.of_loading(big, folder, "bfloat16")
    assert size > 140_000_000 and peak <= 1.2 * size, peak / size


def meta_export(model: Any) -> Tensors:
    from caravan.model import families, rules

    table = rules.of(families.find("llama"))
    own = dict(model.named_parameters())
    return rules.export(table, rules.plan(table, model.spec, own), own)


def test_folders_in_blocks_hold_no_integers(folder: Path) -> None:
    from caravan.compress import folder as quantised

    assert fp8.stored_so(checkpoint.read_config(folder))
    assert quantised.swap(checkpoint.load_model(folder), folder) == 0


STAGES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("merge", {"method": "slerp", "t": 0.25}, ("model.0", "model.1")),
    ("merge", {"method": "task"}, ("model.0", "model.1", "base")),
    ("grow", {"rows": 130}, ("model",)),
    ("upcycle", {"experts": 2}, ("model",)),
    ("quantize", {"bits": 8}, ("model",)),
]


@pytest.mark.parametrize(("name", "settings", "roles"), STAGES, ids=lambda x: x if isinstance(x, str) else "")
def test_stages_read_it_as_the_plain_model(
    name: str, settings: dict[str, Any], roles: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """What they make of it is what they make of the same model written out, in bf16."""
    from tokenizers import Tokenizer, models

    from caravan.stage import Runtime
    from caravan.store import Artefact

    stage = importlib.import_module(f"caravan.stages.{name}")
    letters = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(90)}, merges=[]))
    letters.save(str(folder / "tokenizer.json"))
    plain, other = tmp_path / "plain", tmp_path / "other"
    model = checkpoint.load_model(folder)
    checkpoint.save_model(model, plain, folder, torch.float32)
    for p in model.parameters():
        p.data.mul_(1.25)
    checkpoint.save_model(model, other, folder, torch.bfloat16)

    def made_of(source: Path) -> dict[str, Tensor]:
        paths = dict(zip(roles, (source, other, source), strict=False))
        inputs = {role: Artefact(path, {"kind": "model"}) for role, path in paths.items()}
        out = tmp_path / f"out-{source.name}"
        out.mkdir()
        stage.run(stage.Config(**settings), inputs, out, Runtime(work=tmp_path))
        said = checkpoint.read_config(out).get("quantization_config", {})
        assert said.get("quant_method") == ("compressed-tensors" if name == "quantize" else None)
        kinds = {t.dtype for t in load_file(out / "model.safetensors").values() if t.is_floating_point()}
        assert len(kinds) == 1 and not kinds & set(fp8.FLOAT8)
        return checkpoint.export_tensors(checkpoint.load_model(out))

    got, want = made_of(folder), made_of(plain)
    for key, tensor in want.items():
        if name == "quantize":  # scales are kept in bf16 or fp32
            assert float((got[key] - tensor).norm() / tensor.norm()) < 0.01, key
        else:
            assert torch.equal(got[key], tensor.bfloat16().float()) or torch.equal(got[key], tensor), key


@pytest.mark.parametrize("name", ["grow", "upcycle", "quantize"])
def test_integers_are_refused_with_the_way_out(name: str, folder: Path, tmp_path: Path) -> None:
    from caravan.stage import Runtime
    from caravan.store import Artefact

    stage = importlib.import_module(f"caravan.stages.{name}")
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="rounded to integers") as refused:
        model = {"model": Artefact(folder, {"kind": "model"})}
        stage.run(stage.Config(), model, tmp_path / "out", Runtime(work=tmp_path))
    assert refused.value.hint == "give the model that it was made from"
