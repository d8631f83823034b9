"""model.checkpoint: folders in and out, and every way a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from caravan.model import checkpoint, sizes, tensors
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel, ScoreHead
from caravan.types import UserError


@pytest.fixture
def model() -> Decoder:
    spec, _ = sizes.derive("nano", None, 40, 32)
    return sizes.fresh(replace(spec, layers=spec.layers[:2]), seed=2)


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    checkpoint.save_model(model, tmp_path / "m", dtype=torch.float32)
    return tmp_path / "m"


def edit(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_saved_files_are_the_same_bytes(model: Decoder, folder: Path, tmp_path: Path) -> None:
    checkpoint.save_model(checkpoint.load_model(folder), tmp_path / "again", dtype=torch.float32)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_bfloat16_is_the_default_on_disk(model: Decoder, tmp_path: Path) -> None:
    checkpoint.save_model(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(checkpoint.load_model(tmp_path, dtype=torch.bfloat16), model.bfloat16())


def test_unknown_config_keys_survive(folder: Path, tmp_path: Path) -> None:
    edit(folder, attention_dropout=0.0, our_note={"a": 1})
    checkpoint.save_model(checkpoint.load_model(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["our_note"] == {"a": 1}


def test_tokenizer_files_and_special_ids_travel(model: Decoder, tmp_path: Path) -> None:
    source = tmp_path / "tok"
    source.mkdir()
    added = [{"id": 7, "content": "<eos>"}, {"id": 9, "content": "<pad>"}]
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<eos>"}, "pad_token": "<pad>"})
    )
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "secret.txt").write_text("stays")
    checkpoint.save_model(model, tmp_path / "m", tokenizer=source, generation={"eos_token_id": [7, 8]})
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } < names and "secret.txt" not in names
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (7, 9) and "bos_token_id" not in config
    generation = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, 8], "pad_token_id": 9}


def test_the_licence_travels_and_the_readme_of_another_model_does_not(model: Decoder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "README.md", "license.py"):
        (source / name).write_text(name)
    checkpoint.save_model(model, tmp_path / "m", source)
    assert {p.name for p in (tmp_path / "m").iterdir()} & {p.name for p in source.iterdir()} == {
        "LICENSE",
        "NOTICE.txt",
    }


def test_large_models_are_written_in_shards(model: Decoder, folder: Path) -> None:
    tensors = checkpoint.export_tensors(model)
    (folder / "model.safetensors").unlink()
    checkpoint.write_tensors(tensors, folder, shard_bytes=300_000)
    assert len(list(folder.glob("model-0*-of-0*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.spec.parameters
    assert same(checkpoint.load_model(folder), model)


def shards(folder: Path, model: Decoder) -> Path:
    (folder / "model.safetensors").unlink()
    checkpoint.write_tensors(checkpoint.export_tensors(model), folder, shard_bytes=300_000)
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin"])
def test_an_index_may_not_leave_the_folder(folder: Path, model: Decoder, name: str) -> None:
    index = shards(folder, model)
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a safetensors file of this folder"):
        checkpoint.load_model(folder)


def test_an_index_must_keep_its_promises(folder: Path, model: Decoder) -> None:
    index = shards(folder, model)
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks tensor 'model\.extra\.weight'"):
        checkpoint.load_model(folder)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.*is missing"):
        checkpoint.load_model(folder)
    index.write_text("[]")
    with pytest.raises(UserError, match="not a safetensors index"):
        checkpoint.load_model(folder)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"model\.safetensors cannot be read"),
    "pickle": (pickle_only, r"no \.safetensors file"),
    "no config": (without_config, r"no config\.json"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "not an object": (lambda f: (f / "config.json").write_text("3"), "is not a JSON object"),
    "no type": (lambda f: edit(f, model_type=None), "no 'model_type'"),
    "unknown family": (lambda f: edit(f, model_type="llamma"), "unknown model family 'llamma'"),
    "rope": (lambda f: edit(f, rope_scaling={"type": "spiral", "factor": 2.0}, rope_parameters=None),
             "'type': 'spiral' is not supported"),
    "missing": (rewrite(lambda t: t.pop("model.norm.weight")), r"'model\.norm\.weight' is missing"),
    "extra": (rewrite(lambda t: t.update({"model.x": torch.zeros(1)})), r"'model\.x' has no place"),
    "too few layers": (lambda f: edit(f, num_hidden_layers=3), r"'model\.layers\.2\..*is missing"),
    "too many layers": (lambda f: edit(f, num_hidden_layers=1),
                        r"'model\.layers\.1\..*and \d+ more has no place"),
    "wrong shape": (lambda f: edit(f, vocab_size=41), r"shape \(40, 128\).*\(41, 128\)"),
    "reward": (rewrite(lambda t: t.update({"score.weight": torch.zeros(1, 128)})), "holds a reward model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_explained(case: str, folder: Path) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load_model(folder)
    if case == "pickle":
        assert "pytorch_model.bin" in str(caught.value.hint)


def test_a_stray_head_is_an_alias_or_unties(folder: Path, model: Decoder) -> None:
    rewrite(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    assert checkpoint.load_model(folder).spec.tie
    rewrite(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))(folder)
    with pytest.warns(UserWarning, match="untied"):
        untied = checkpoint.load_model(folder)
    assert not untied.spec.tie and torch.equal(untied.head_weight(), model.embed.weight + 1)


def test_loaded_weights_are_our_own_and_trainable(folder: Path) -> None:
    model = checkpoint.load_model(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    assert torch.isfinite(model.embed.weight).all()


def test_gpt2_files_without_prefix_keep_their_names(tmp_path: Path) -> None:
    from caravan.model.families import gpt2

    spec = gpt2.spec({"vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4})
    checkpoint.save_model(sizes.fresh(spec, 0, "gpt2"), tmp_path / "a", dtype=torch.float32)
    tensors = {
        k.removeprefix("transformer."): t for k, t in load_file(tmp_path / "a/model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the mask buffer that old files carry
    save_file(tensors, tmp_path / "a/model.safetensors")
    checkpoint.save_model(checkpoint.load_model(tmp_path / "a"), tmp_path / "b", dtype=torch.float32)
    del tensors["h.0.attn.bias"]
    back = load_file(tmp_path / "b/model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)


def test_reward_round_trip(model: Decoder, tmp_path: Path) -> None:
    reward = RewardModel(model, ScoreHead(128, bias=1.25))
    checkpoint.save_reward(reward, tmp_path, dtype=torch.float32)
    again = checkpoint.load_reward(tmp_path)
    assert float(again.score.bias) == 1.25 and torch.equal(again.score.weight, reward.score.weight)
    assert not again.decoder.spec.head and same(again.decoder, model)
    with pytest.raises(UserError, match="holds a reward model"):
        checkpoint.load_model(tmp_path)
    checkpoint.save_reward(again, tmp_path / "twice", dtype=torch.float32)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_reward_model_from_an_untied_model_leaves_the_head(model: Decoder, tmp_path: Path) -> None:
    untied = sizes.fresh(replace(model.spec, tie=False), seed=0)
    checkpoint.save_reward(RewardModel(untied), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    checkpoint.load_reward(tmp_path)


def test_a_language_model_is_no_reward_model(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no 'score\.weight'"):
        checkpoint.load_reward(folder)


def test_vocabulary_must_fit(model: Decoder) -> None:
    checkpoint.check_vocab(model.spec, 40)
    checkpoint.check_vocab(model.spec, 39)
    with pytest.raises(UserError, match="41 ids but the model only 40"):
        checkpoint.check_vocab(model.spec, 41)


def test_asking_whether_a_tensor_is_there_reads_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head is looked for in every tied model: the whole embedding was read to find out."""
    plain = tensors.TensorFolder(folder)
    some = next(iter(plain))
    monkeypatch.setattr(tensors.TensorFile, "read", lambda *_: pytest.fail("it was read"))
    for names in (plain, tensors.Renamed(plain), tensors.Renamed(tensors.Renamed(plain), lambda n: f"a.{n}")):
        here = f"a.{some}" if f"a.{some}" in list(names) else some
        assert here in names and "nobody.weight" not in names


@pytest.mark.parametrize("kind", [torch.int8, torch.bool])
def test_integers_are_no_weights(folder: Path, kind: torch.dtype) -> None:
    stored = load_file(folder / "model.safetensors")
    key = next(key for key in stored if "down_proj" in key)
    save_file({**stored, key: stored[key].to(kind)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"'{key}' holds {str(kind)[6:]}, not weights"):
        checkpoint.load_model(folder)
