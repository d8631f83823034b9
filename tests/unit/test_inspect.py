"""cli.inspect and systems.memory: what is said before anything is loaded is what is measured afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from caravan import cli
from caravan.algos.optim import OptimConfig
from caravan.cli import inspect
from caravan.data.tokenizer import train
from caravan.model import checkpoint, sizes
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel
from caravan.model.mixers.knobs import Mamba
from caravan.model.spec import FFN, Layer, MoE, Norm, Spec
from caravan.store import Store
from caravan.systems import memory
from caravan.systems.train import Trainee


def spec(**changed: Any) -> Spec:
    made, _ = sizes.derive("nano", None, 300, 64)
    return replace(made, layers=made.layers[:3], **changed)


def mixture(spec: Spec) -> Spec:
    moe = MoE(n_expert=4, top_k=2, d_ff=32)
    layers = (
        *spec.layers[:1],
        *(replace(x, ffn=FFN(kind="moe", d_ff=32, act="silu", moe=moe)) for x in spec.layers[1:]),
    )
    return replace(spec, layers=layers)


SPECS = {"tied": spec(), "untied": spec(tie=False), "experts": mixture(spec())}


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_takes_what_the_formula_says(name: str, optimiser: Any, precision: str) -> None:
    model: nn.Module = sizes.fresh(SPECS[name], 0)
    want = memory.trainee(model, optimiser, precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    trainee = Trainee(model, OptimConfig(name=optimiser), dtype)
    there = [p.data for p in model.parameters()] + [trainee.grad, *trainee.optimiser.state().values()]
    assert want.bytes == held(there), want.formula


def test_ppo_is_the_sum_of_its_models() -> None:
    model = sizes.fresh(spec(tie=False), 0)
    critic = RewardModel(sizes.fresh(spec(tie=False, head=False), 0))
    policy, value = (Trainee(m, OptimConfig(), torch.bfloat16) for m in (model, critic))
    trained = sum(
        held([p.data for p in t.model.parameters()] + [t.grad, *t.optimiser.state().values()])
        for t in (policy, value)
    )
    frozen = 2 * sum(p.numel() for m in (model, critic) for p in m.parameters())
    found = memory.training(sizes.fresh(spec(tie=False), 0))
    assert found["rl (PPO)"].bytes == trained + frozen
    assert found["prefer (DPO and kin)"].bytes == found["pretrain, sft"].bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_take_what_a_quantised_folder_holds(bits: int, tmp_path: Path) -> None:
    from caravan.compress import folder

    model = sizes.fresh(SPECS["experts"], 0, "mixtral")
    model = sizes.fresh(SPECS["untied"], 0)
    want = memory.weights(model)[f"int{bits}"].bytes
    checkpoint.save_model(model, tmp_path / "a", dtype=torch.bfloat16)
    grid = folder.Grid(bits, 64 if bits == 4 else 0, torch.bfloat16)
    loaded = folder.load_source(tmp_path / "a")
    folder.write(
        tmp_path / "a", tmp_path / "b", loaded, grid, folder.round_to_nearest(loaded, grid, lambda a, b: None)
    )
    files = checkpoint.TensorFolder(tmp_path / "b")
    assert want == sum(files[k].numel() * files[k].element_size() for k in files if not k.endswith("_shape"))


def test_the_cache_is_the_engines() -> None:
    from caravan.engine.engine import Engine
    from caravan.types import Sampling

    model = sizes.fresh(spec(), 0)
    engine = Engine(model, max_seqs=1)
    engine.generate([[1] * 30], Sampling(temperature=0, max_tokens=4))
    lanes = next(v for v in _inside(engine) if type(v).__name__ == "Lanes")
    slots = lanes.capacity
    bytes_ = sum(t[:1].numel() * t.element_size() for pair in lanes.kv.values() for t in pair)
    assert bytes_ == memory.cache(model.spec, slots, width=4)
    attn = [replace(x.attn, window=8) for x in model.spec.layers if x.attn]
    slid = replace(
        model.spec, layers=tuple(replace(x, attn=a) for x, a in zip(model.spec.layers, attn, strict=True))
    )
    assert memory.cache(slid, 64) == memory.cache(slid, 8) == memory.cache(model.spec, 8)


def _inside(thing: Any, depth: int = 3) -> list[Any]:
    own = list(getattr(thing, "__dict__", {}).values())
    return own + [x for one in own if depth for x in _inside(one, depth - 1)]


def test_a_recurrent_state_is_measured() -> None:
    layer = Layer(mixer="mamba", ssm=Mamba(d_inner=12, d_state=5, d_conv=4, dt_rank=2), norm=Norm())
    made = Spec(vocab=9, d=6, layers=(layer,) * 3, final_norm=Norm(), max_pos=64)
    # 12 channels: 5 states each, and the 3 inputs the convolution looks back at
    least, most = 3 * 12 * (5 + 3) * 2, 3 * 12 * (5 + 4) * 4
    assert least <= memory.state(made) <= most
    assert memory.state(spec()) == 0 and memory.cache(made, 64) == 0


def test_parts_add_up() -> None:
    for made in SPECS.values():
        model = sizes.fresh(made, 0)
        found = memory.parts(model)
        assert sum(found.values()) == made.parameters and "other" not in found
    assert memory.idle(SPECS["experts"]) == 2 * 3 * SPECS["experts"].d * 32 * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tok = train(["one two three"], 300)
    tok.save(tmp_path / "tok")
    made = Decoder(spec(vocab=tok.vocab_size + 3))
    sizes.initialise(made, 0)
    checkpoint.save_model(made, tmp_path / "m", tmp_path / "tok")
    return tmp_path / "m"


def test_a_folder_without_weights_is_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = checkpoint.load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nwords")
    assert cli.main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    for said in (f"{made.spec.parameters:,}", "gated feed-forward", "chatml", "<|im_end|>", "apache-2.0",
                 "not here", f"18 x {made.spec.parameters:,}", "rl (PPO)", "layer 0 to 2"):  # fmt: skip
        assert said in text, said
    assert cli.main(["inspect", "--json", str(folder)]) == 0
    page = json.loads(capsys.readouterr().out)
    assert page["parameters"]["all"] == made.spec.parameters and page["licence"] == "apache-2.0"
    assert page["cache"]["per token"] == memory.cache(made.spec, 1) and page["template"] == "chatml"
    assert page["roles"]["end of turn"] == page["special"]["<|im_end|>"]


def test_an_artefact_is_explained(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    art = Store(tmp_path / "store").add(folder, "model")
    assert cli.main(["inspect", art.ref, "--store", str(tmp_path / "store")]) == 0
    assert "stored as bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "usage"),
        (["inspect", "a", "b"], "usage"),
        (["inspect", "{tmp}"], "has no config.json"),
        (["inspect", "{tmp}/file"], "is a file"),
        (["inspect", "{tmp}/none"], "no model folder or artefact"),
        (["inspect", "hf:../x"], "is not a Hub id"),
        (["inspect", "{tmp}/odd"], "unknown model family 'odd'"),
        (["inspect", "{tmp}/bad"], "'hidden_size'"),
    ],
)
def test_what_is_no_model_is_said(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for name, text in (("odd", '{"model_type": "odd"}'), ("bad", '{"model_type": "llama"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    assert cli.main([w.format(tmp=tmp_path) for w in words]) == 2
    said = capsys.readouterr()
    assert message in said.err and "hint" in said.err and not said.out


def test_licences_are_found_where_they_are_said(tmp_path: Path) -> None:
    assert inspect.licence(tmp_path, {}) is None
    (tmp_path / "LICENSE.txt").write_text("\n  MIT License\n\nmore")
    assert inspect.licence(tmp_path, {}) == "MIT License (LICENSE.txt)"
    assert inspect.licence(tmp_path, {"license": "other"}) == "other"


CLASSIFIERS = {
    "llama": ("Llama", "ForSequenceClassification", {"num_key_value_heads": 2}, 1),
    "bert": ("Bert", "ForSequenceClassification", {}, 3),
    "t5": ("T5", "ForTokenClassification", {"d_kv": 6, "d_ff": 40}, 2),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_reward_model_is_counted_with_its_own_head(name: str, tmp_path: Path) -> None:
    """Its folder has no head over the vocabulary, whatever config.json says of one."""
    transformers = pytest.importorskip("transformers")
    stem, kind, more, labels = CLASSIFIERS[name]
    sizes_ = {"vocab_size": 131, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_labels": labels, "tie_word_embeddings": False}  # fmt: skip
    config = getattr(transformers, f"{stem}Config")(**sizes_ | more)
    theirs = getattr(transformers, f"{stem}{kind}")(config)
    theirs.save_pretrained(tmp_path)
    page = inspect.report(tmp_path)
    said = page["parameters"]
    mine = checkpoint.load_reward(tmp_path) if labels == 1 else checkpoint.load_classifier(tmp_path)
    assert said["all"] == sum(p.numel() for p in mine.parameters())
    assert said["all"] == theirs.num_parameters()
    assert "output head" not in said and "other" not in said
    parts = {k: v for k, v in said.items() if k not in ("all", "per token")}
    assert sum(parts.values()) == said["all"] and parts["norms"] < parts["mixers"]
    assert list(page["training"]) == ["reward"] and "cache" not in page
    assert page["weights"]["fp32"]["bytes"] == 4 * said["all"]
    assert page["spec"].get("head") == {1: "one score per text", 3: "3 labels per text"}.get(labels)


def test_what_has_no_weights_we_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of pickles is explained, an adapter is sent back to its base."""
    (tmp_path / "old").mkdir()
    config = {"model_type": "gpt2", "vocab_size": 7, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 9}
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"PK")
    assert cli.main(["inspect", str(tmp_path / "old")]) == 0
    assert "pytorch_model.bin only, a pickle" in capsys.readouterr().out
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path / "lora")]) == 2
    assert "holds an adapter (LoRA), not a model" in capsys.readouterr().err


def test_training_a_reward_model_leaves_the_writing_half_of_t5_out(tmp_path: Path) -> None:
    from caravan.stages.reward import fresh

    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=131, d_model=24, num_layers=2, num_heads=4, d_kv=6, d_ff=40, tie_word_embeddings=False
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    page = inspect.report(tmp_path)
    assert page["parameters"]["all"] == sum(
        p.numel() for p in checkpoint.load_backbone(tmp_path).parameters()
    )
    trained = fresh(checkpoint.load_backbone(tmp_path), 0)
    assert page["training"]["reward"]["bytes"] == 18 * sum(p.numel() for p in trained.parameters())
