"""Folder in, folder out: the quantize stage on small models of three layouts."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from caravan.compress import folder
from caravan.data.tokenizer import train
from caravan.engine.engine import Engine
from caravan.kernels.attention import Segments
from caravan.kernels.quantized import QuantLinear, expand
from caravan.model.checkpoint import TensorFolder, load_model, save_model
from caravan.model.decoder import Decoder
from caravan.model.sizes import fresh
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.serve.load import load
from caravan.stage import Runtime
from caravan.stages import quantize
from caravan.store import Store
from caravan.types import Sampling, UserError


def build(family: str, vocab: int = 96) -> Decoder:
    gpt = family == "gpt2"
    norm = Norm(kind="layer", bias=True) if gpt else Norm()
    attn = Attn(
        n_head=4,
        n_kv=4 if gpt else 2,
        head_dim=16,
        qkv_bias=family != "llama",
        o_bias=gpt,
        rope=None if gpt else Rope(dim=16),
    )
    ffn = (
        FFN(kind="mlp", d_ff=128, act="gelu_new", bias=True) if gpt else FFN(kind="glu", d_ff=128, act="silu")
    )
    spec = Spec(
        vocab=vocab,
        d=64,
        layers=(Layer(attn=attn, ffn=ffn, norm=norm),) * 2,
        final_norm=norm,
        max_pos=64,
        pos="learned" if gpt else "none",
    )
    return fresh(spec, 0, family)


def ask(tmp_path: Path, family: str, **settings: object) -> tuple[Path, Path, dict]:
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(build(family), source, dtype=torch.bfloat16)
    facts = quantize.run(
        quantize.Config(**settings), {"model": SimpleNamespace(path=source)}, out, Runtime(work=tmp_path)
    )
    return source, out, facts


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    ids = torch.arange(40) * 7 % 96
    return model.logits(model(ids, torch.arange(40), Segments((40,))))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("bits", "worst"), [(8, 0.02), (4, 0.3)])
def test_quantised_folder_is_a_model(tmp_path: Path, family: str, bits: int, worst: float) -> None:
    source, out, facts = ask(tmp_path, family, bits=bits)
    model, small = load_model(source), load_model(out)
    off = (logits(small) - logits(model)).norm() / logits(model).norm()
    assert 0 < off < worst
    assert facts["bytes_after"] < facts["bytes_before"] and facts["matrices_left"] == []
    assert facts["weight_error_mean"] <= facts["weight_error_max"] < worst
    before, after = TensorFolder(source), TensorFolder(out)
    kept = [key for key in before if key in after]
    assert kept and all(torch.equal(before[key], after[key]) for key in kept)
    assert not any(key.endswith(("proj.weight", "c_attn.weight")) for key in after)


def test_integer_projections_serve_the_same_model(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        _, out, _ = ask(tmp_path / family, family, bits=4, group=32)
        plain, swapped = load_model(out), load_model(out)
        assert folder.swap(swapped, out) == 8
        assert isinstance(swapped.blocks[0].mix.qkv, QuantLinear)
        assert (logits(swapped) - logits(plain)).norm() < 0.03 * logits(plain).norm()
        done = Engine(swapped).generate([[1, 2, 3]], Sampling(max_tokens=5))
        assert len(done[0][0].ids) == 5


def test_swapping_a_plain_folder_changes_nothing(tmp_path: Path) -> None:
    save_model(build("llama"), tmp_path)
    assert folder.swap(load_model(tmp_path), tmp_path) == 0


@pytest.mark.parametrize(("bits", "precision"), [(8, "fp32"), (8, "bf16"), (4, "bf16")])
def test_a_served_folder_answers_as_its_dequantised_weights(
    tmp_path: Path, bits: int, precision: str
) -> None:
    tokenizer = train(["one two three four five"] * 4, 280)
    tokenizer.save(tmp_path / "tokenizer")
    model = build("llama", vocab=tokenizer.vocab_size)
    with torch.no_grad():
        for p in model.parameters():  # choices far from uniform
            p.mul_(4 if p.dim() == 2 else 1)
    source, out = tmp_path / "source", tmp_path / "out"
    save_model(model, source, tmp_path / "tokenizer", dtype=torch.float32)
    inputs = {"model": SimpleNamespace(path=source)}
    quantize.run(quantize.Config(bits=bits, group=32 if bits == 4 else 128), inputs, out, Runtime())
    deterministic = torch.are_deterministic_algorithms_enabled()
    loaded = load(Store(tmp_path / "store"), str(out), Runtime(threads=1), precision=precision)
    torch.use_deterministic_algorithms(deterministic)
    assert isinstance(loaded.engine.model.blocks[1].ffn.out, QuantLinear)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    plain = Engine(load_model(out, dtype), vocab_size=tokenizer.vocab_size)
    prompts = [tokenizer.encode(text) for text in ("one two", "three", "five four three two one", "t")]
    sampling = Sampling(temperature=0, max_tokens=24)
    answers = loaded.engine.generate(prompts, sampling)
    for (got,), (want,) in zip(answers, plain.generate(prompts, sampling), strict=True):
        shared = got.ids.index(loaded.tok.eos) if got.finish_reason == "stop" else 24
        assert got.ids[:shared] == want.ids[:shared] and shared > 4


@torch.no_grad()
def test_gptq_folder_is_closer_than_rounding_on_what_it_saw(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_model(build("llama"), source, dtype=torch.float32)
    model = folder.load_source(source)
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(0, 96, (48,), generator=generator).tolist() for _ in range(40)]
    grid = folder.Grid(4, 32, torch.float32)
    want = logits(model)

    def error(weights: dict, name: str) -> float:
        folder.write(source, tmp_path / name, load_model(source), grid, weights)
        return float((logits(load_model(tmp_path / name)) - want).norm() / want.norm())

    plain = error(folder.round_to_nearest(model, grid, lambda *_: None), "rtn")
    gptq_weights = folder.by_gptq(model, grid, text, lambda *_: None)
    better = error(gptq_weights, "gptq")
    assert better < 0.9 * plain
    last = model.blocks[1].ffn.out  # what the blocks after it saw were the quantised weights
    q, scale = gptq_weights["blocks.1.ffn.out"].q_NK, gptq_weights["blocks.1.ffn.out"].scale_NG
    assert torch.equal(last.weight, expand(q, scale))


def test_gptq_reads_a_conversations_artefact(tmp_path: Path) -> None:
    words = [f"count {i} and {i + 1} then {i * 7}" for i in range(60)]
    tokenizer = train(words * 3, 96 + 256)
    tokenizer.save(tmp_path / "tokenizer")
    model = build("llama", vocab=tokenizer.vocab_size)
    save_model(model, tmp_path / "source", tmp_path / "tokenizer")
    rows = [
        {
            "messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}],
            "id": str(i),
            "source": "test",
        }
        for i, w in enumerate(words)
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    inputs = {"model": SimpleNamespace(path=tmp_path / "source"), "calibration": SimpleNamespace(path=data)}
    cfg = quantize.Config(bits=4, group=32, method="gptq", samples=20, tokens=30)
    facts = quantize.run(cfg, inputs, tmp_path / "out", Runtime(work=tmp_path))
    assert facts["matrices"] == 8 and 20 * 5 < facts["calibration_tokens"] <= 20 * 30
    assert (tmp_path / "out" / "tokenizer.json").exists()
    load_model(tmp_path / "out")


def test_same_question_same_bytes(tmp_path: Path) -> None:
    _, one, _ = ask(tmp_path / "a", "llama", bits=4)
    _, two, _ = ask(tmp_path / "b", "llama", bits=4)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_matrices_that_do_not_divide_are_left_and_named(tmp_path: Path) -> None:
    _, out, facts = ask(tmp_path, "llama", bits=4, group=128)
    assert facts["matrices"] == 2 and "model.layers.0.self_attn.q_proj" in facts["matrices_left"]
    assert (
        "model.layers.1.mlp.up_proj"
        in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    )
    load_model(out)
    with pytest.raises(UserError, match="256 divides"):
        ask(tmp_path / "b", "llama", bits=4, group=256)


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="calibration"):
        ask(tmp_path / "a", "llama", method="gptq")
    with pytest.raises(UserError, match="group is 48"):
        quantize.Config(group=48)
    _, out, _ = ask(tmp_path / "c", "llama")
    with pytest.raises(UserError, match="rounded to integers"):
        quantize.run(quantize.Config(), {"model": SimpleNamespace(path=out)}, tmp_path / "d", Runtime())


@pytest.mark.peer
@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_reads_the_folder(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    _, out, _ = ask(tmp_path, "llama", bits=bits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(40) * 7 % 96
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]
    ours = logits(load_model(out))
    assert (ours - want).norm() < 2e-3 * want.norm()
