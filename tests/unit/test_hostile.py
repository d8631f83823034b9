"""Checkpoints that lie: every one is refused with the file and the key, before memory is spent on it."""

from __future__ import annotations

import importlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from caravan.model import checkpoint, families, sizes
from caravan.model.keys import MOST_LAYERS
from caravan.model.tensors import TensorFolder, stream_tensors, write_tensors
from caravan.types import UserError
from tests import peaks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from dataclasses import replace

    spec, _ = sizes.derive("nano", None, 40, 32)
    model = sizes.fresh(replace(spec, layers=spec.layers[:1]), seed=2)
    checkpoint.save_model(model, tmp_path / "m", dtype=torch.float32)
    return tmp_path / "m"


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage that rewrites the header of model.safetensors and leaves the data."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8 : 8 + length])
        text = change(value)
        text = (json.dumps(value) if text is None else text).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


NORM = "model.norm.weight"


def put(field: str, value: Any) -> Callable[[Path], None]:
    return header(lambda h: h[NORM].update({field: value}))


def length_of_header(n: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(n.to_bytes(8, "little") + path.read_bytes()[8:])

    return apply


def swap(folder: Path) -> None:
    """Two tensors at one place."""
    header(lambda h: h[NORM].update(data_offsets=h["model.layers.0.input_layernorm.weight"]["data_offsets"]))(
        folder
    )


def shards(folder: Path) -> dict[str, Any]:
    write_tensors(load_file(folder / "model.safetensors"), folder, shard_bytes=100_000)
    (folder / "model.safetensors").unlink()
    return json.loads((folder / "model.safetensors.index.json").read_text())


def index(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = shards(folder)
        text = change(value, folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(value) if text is None else text)

    return apply


def point(name: Any) -> Callable[[Path], None]:
    return index(lambda value, folder: value["weight_map"].update({NORM: name}))


def twice(value: dict[str, Any], folder: Path) -> None:
    """One tensor in two shards, of which the index names one."""
    names = sorted(set(value["weight_map"].values()) - {value["weight_map"][NORM]})
    tensors = load_file(folder / names[0])
    save_file({**tensors, NORM: torch.zeros(128)}, folder / names[0])


def link_out(folder: Path) -> None:
    outside = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00(X\x05\x00\x00\x00whatsq\x01." + b"\0" * 99)


LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty file": (lambda f: os.truncate(f / "model.safetensors", 0), r"tensors cannot be read: its h"),
    "cut in the header": (lambda f: os.truncate(f / "model.safetensors", 40), "its header should have"),
    "cut in the data": (lambda f: os.truncate(f / "model.safetensors", 90_000), r"tensor 'm.*lies at bytes"),
    "bytes behind": (lambda f: os.truncate(f / "model.safetensors", 10**6), "its tensors end at byte"),
    "header of 2^63": (length_of_header(2**63), "its header should have 9223372036854775808 bytes"),
    "header too short": (length_of_header(20), "its header is not JSON"),
    "header NaN": (header(lambda h: '{"a": NaN}'), "NaN is no number"),
    "header Infinity": (header(lambda h: '{"a": {"dtype": "F32", "shape": [Infinity]}}'), "Infinity is no"),
    "header a list": (header(lambda h: "[]"), "not a JSON object"),
    "header nested deeply": (header(lambda h: "[" * 100_000), "not JSON"),
    "key twice in a header": (header(lambda h: '{"a": 1, "a": 2}'), "'a' appears twice"),
    "entry a number": (header(lambda h: h.update({NORM: 3})), rf"'{NORM}' is described by 3"),
    "shape of words": (put("shape", ["128"]), rf"'{NORM}' is described by"),
    "shape negative": (put("shape", [-128]), rf"'{NORM}' is described by"),
    "shape a float": (put("shape", [128.0]), rf"'{NORM}' is described by"),
    "shape true": (put("shape", [True, 128]), rf"'{NORM}' is described by"),
    "huge tensor": (put("shape", [2**40, 2**20]), rf"'{NORM}' of shape .* does not fill 512 bytes"),
    "huge number": (put("shape", [10**40]), rf"'{NORM}' is described by"),
    "shape and zero": (put("shape", [0, 2**62]), rf"'{NORM}' of shape .* does not fill 512 bytes"),
    "offsets beyond": (put("data_offsets", [0, 10**15]), rf"'{NORM}' lies at bytes"),
    "offsets backwards": (put("data_offsets", [512, 0]), rf"'{NORM}' lies at bytes"),
    "offsets one": (put("data_offsets", [0]), rf"'{NORM}' is described by"),
    "type unknown": (put("dtype", "F7"), rf"'{NORM}' is of type 'F7'"),
    "type a list": (put("dtype", ["F32"]), rf"'{NORM}' is of type \['F32'\]"),
    "overlap": (swap, "does not begin where the one before it ends"),
    "a pickle by another name": (pickled, r"model\.safetensors cannot be read"),
    "link out of the folder": (link_out, r"model\.safetensors is a link to .*secret"),
    "index to a parent": (point("../m/model.safetensors"), rf"names '\.\./m/.*for '{NORM}'"),
    "index absolute": (point("/etc/passwd"), "names '/etc/passwd'"),
    "index to a number": (point(7), rf"names '7' for '{NORM}'"),
    "index with a zero byte": (point("a\0.safetensors"), "not a safetensors file of this folder"),
    "index of a missing file": (point("model-00009-of-00009.safetensors"), "model-00009.*is missing"),
    "index a list": (index(lambda v, f: "[]"), "is not a safetensors index"),
    "index without map": (index(lambda v, f: "{}"), "is not a safetensors index"),
    "index map a word": (index(lambda v, f: '{"weight_map": "all"}'), "is not a safetensors index"),
    "index with a stranger": (index(lambda v, f: v["weight_map"].update(x=v["weight_map"][NORM])),
                              "lacks tensor 'x'"),
    "a tensor in two shards": (index(twice), rf"repeats tensor '{NORM}'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_lie_is_named(case: str, folder: Path) -> None:
    damage, message = LIES[case]
    damage(folder)
    with pytest.raises(UserError, match=message):
        checkpoint.load_model(folder)


def test_links_inside_the_folder_and_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    home, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    home.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (home / path.name).symlink_to(Path("../../blobs") / path.name)
    checkpoint.load_model(home)
    (tmp_path / "elsewhere.safetensors").write_bytes((blobs / "model.safetensors").read_bytes())
    (home / "model.safetensors").unlink()
    (home / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="outside its folder"):
        checkpoint.load_model(home)


NUMBERS = {
    "num_hidden_layers": (10**9, 0, -1, 2**70, "8", 1.5, True, [1], {"a": 1}),
    "hidden_size": (10**9, -128, "128", 1e300),
    "vocab_size": (2**31 - 1, 2**31, -1, "40"),
    "intermediate_size": (2**31 - 1, 0, "x"),
    "num_attention_heads": (3, 0, 10**9),
    "head_dim": (-64, 10**9, "64"),
    "max_position_embeddings": (-1, "long", 1.5),
    "rms_norm_eps": ("small", [], {}),
    "rope_theta": ("big", [1]),
    "tie_word_embeddings": ("yes", 3),
    "model_type": (3, ["llama"], {"a": 1}, "../llama", "llama\0"),
}


@pytest.mark.parametrize("key", NUMBERS)
def test_an_absurd_number_is_named(key: str, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None) if key == "rope_theta" else None
    for value in NUMBERS[key]:
        path.write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError):
            checkpoint.load_model(folder)


@pytest.mark.parametrize("text", ["[]", "3", '"llama"', "{", "", "\xff", "[" * 100_000, '{"a": 1' * 9999])
def test_a_config_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoint.load_model(folder)


def test_a_huge_config_spends_no_memory(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 2**20,
        "num_attention_heads": 2**10,
        "num_key_value_heads": 2**10,
        "vocab_size": 2**31 - 1,
    }
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**31 - 1}))
    with pytest.raises(UserError, match="shape"):
        checkpoint.load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(),
    st.sampled_from([10**9, 2**31, 2**63, -(10**12), 0.5, -1.0, 1e308]),
    st.text(max_size=6), st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "a"]), st.integers(-1, 4)),
    st.sampled_from([["attention"], [["global"], 2], [[["global"], 2]], [None], [{}], {"x": []}]),
)  # fmt: skip


def configs() -> dict[str, dict[str, Any]]:
    """A config.json of every family: the Spec of its test case written back, or what its oracle has."""
    import tests.families as cases

    found: dict[str, dict[str, Any]] = {}
    for name, case in cases.cases():
        if name in found:
            continue
        if case.config is not None:
            found[name] = dict(case.config)
        elif case.hf is not None:
            found[name] = json.loads(case.hf().config.to_json_string())
    return found


@pytest.fixture(scope="module")
def every_config() -> dict[str, dict[str, Any]]:
    return configs()


@pytest.mark.parametrize("family", families.names())
def test_no_config_value_does_more_than_be_refused(
    family: str, every_config: dict[str, dict[str, Any]]
) -> None:
    good = every_config[family]
    good = {**good, "model_type": families.model_type(families.find(family))}
    module = importlib.import_module(f"caravan.model.families.{family}")

    @settings(max_examples=25, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(good)), min_size=1, max_size=2))
        config = {**good, **{key: data.draw(ODD) for key in keys}}
        for key in data.draw(st.lists(st.sampled_from(sorted(good)), max_size=1)):
            config.pop(key, None)
        try:  # the family's own reader: the net below it in `load_spec` names no key
            spec = module.spec(config)
        except UserError:
            return
        assert len(getattr(spec, "layers", ())) <= MOST_LAYERS

    check()


@pytest.mark.parametrize("family", sorted(set(families.names()) - {"chatglm"}))
def test_every_family_is_explained(
    family: str, every_config: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """`caravan inspect` of each; the test case of ChatGLM has another family's config."""
    from caravan.cli import inspect

    module = families.find(family)
    config = {**every_config[family], "model_type": families.model_type(module)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = inspect.report(tmp_path)
    inner = page["parameters"]["all"] == sum(
        n for k, n in page["parameters"].items() if k not in ("all", "per token")
    )
    assert inner and list(inspect._lines(page))
    if "cache" in page:
        recurrent = page["cache"]["recurrent state"] > 0
        assert recurrent == (family in RECURRENT) and (recurrent or page["cache"]["per token"] > 0)


RECURRENT = {"bgpt", "falcon_mamba", "jamba", "mamba", "mamba2", "rwkv", "rwkv5", "rwkv6", "rwkv7",
             "stripedhyena"}  # fmt: skip


def test_what_a_reader_did_not_think_of_is_still_the_files_fault(folder: Path, monkeypatch: Any) -> None:
    from caravan.model.families import llama

    for wrong in (ZeroDivisionError, TypeError, KeyError, AssertionError, ValueError):
        monkeypatch.setattr(llama, "spec", lambda config, wrong=wrong: (_ for _ in ()).throw(wrong("x")))
        with pytest.raises(UserError, match=r"config\.json cannot be understood"):
            checkpoint.load_model(folder)


LONG = {"max_position_embeddings": 64, "vocab_size": 4096}
STREAMED: dict[str, dict[str, Any]] = {
    "llama": LONG | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5,
                     "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "gpt2": {"n_embd": 1024, "n_layer": 5, "n_head": 16, "n_positions": 64, "vocab_size": 4096},
    "gptj": {"n_embd": 1024, "n_layer": 6, "n_head": 16, "n_positions": 64, "vocab_size": 4096,
             "rotary_dim": 32},
}  # fmt: skip
"""One whose rows are read as they lie, one whose matrices lie transposed in the file, one whose rows change
their order."""


@pytest.mark.skipif(not peaks.MEASURABLE, reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "bfloat16"), ("gpt2", "bfloat16"), ("gpt2", "float32"), ("gptj", "float32")],
)
def test_streaming_takes_little_more_than_the_weights(
    family: str, dtype: str, folder: Path, tmp_path: Path
) -> None:
    """In tensors of some megabytes, among which an allocator leaves holes."""
    from caravan.model.decoder import Decoder

    table = families.find(family)
    spec = table.spec(STREAMED[family])
    config = table.config(spec) | {"model_type": family}
    with torch.device("meta"):
        model = Decoder(spec, family)
    big = tmp_path / "big"
    big.mkdir()
    shapes = {k: (torch.float32, tuple(t.shape)) for k, t in _meta_export(model).items()}
    stream_tensors(shapes, lambda key: torch.full(shapes[key][1], 0.5), big, shard_bytes=60_000_000)
    (big / "config.json").write_text(json.dumps(config))
    assert len(list(big.glob("model-*.safetensors"))) > 4
    size, peak = peaks.of_loading(big, folder, dtype)
    assert size > 130_000_000 and peak <= 1.2 * size, peak / size


def _meta_export(model: Any) -> dict[str, torch.Tensor]:
    from caravan.model import rules

    table = rules.of(families.find(model.family))
    own = {name: p.detach() for name, p in model.named_parameters()}
    return rules.export(table, rules.plan(table, model.spec, own), own)


def test_what_is_streamed_out_is_what_others_read(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "a": torch.tensor(3), "c": torch.zeros(0, 4),
        "d": torch.randn(5), "e": torch.tensor([True, False, True]), "f": torch.randn(3, 2).T,
    }  # fmt: skip
    wanted = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    for shard_bytes in (10**9, 20):
        out = tmp_path / str(shard_bytes)
        out.mkdir()
        stream_tensors(wanted, tensors.__getitem__, out, shard_bytes)
        ours = TensorFolder(out)
        theirs = {key: t for path in out.glob("*.safetensors") for key, t in load_file(path).items()}
        assert ours.keys() == theirs.keys() == tensors.keys()
        assert all(torch.equal(ours[k], t) and torch.equal(theirs[k], t) for k, t in tensors.items())
