"""Token files of other programs: written here as their own writers do, read by ours; and what is refused."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from caravan import stage
from caravan.data import foreign, shardio, shards
from caravan.data.shardio import TokenFile, datatrove, llmc, megatron, nanogpt, olmo
from caravan.data.shards import Shards
from caravan.data.tokenizer import Tokenizer, train
from caravan.stages import shards as stage_shards
from caravan.store import Artefact, Store
from caravan.types import UserError

ROWS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]
FLAT = [t for row in ROWS for t in row]
ENDS = [3, 5, 9]


def ids(path: Path, numbers: list[int], dtype: str = "<u2", head: bytes = b"") -> Path:
    path.write_bytes(head + np.asarray(numbers, dtype).tobytes())
    return path


def megatron_mapped(folder: Path, code: int, dtype: str) -> Path:
    """As `MMapIndexedDataset` lays it down; the second document has two sequences."""
    lengths, documents = [3, 2, 1, 3], [0, 1, 2, 4]
    width = np.dtype(dtype).itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    index += np.asarray(lengths, "<i4").tobytes()
    index += (np.cumsum([0, *lengths[:-1]]) * width).astype("<i8").tobytes()
    (folder / "m.idx").write_bytes(index + np.asarray(documents, "<i8").tobytes())
    return ids(folder / "m.bin", FLAT, dtype)


def megatron_cached(folder: Path, code: int, dtype: str) -> Path:
    lengths = [3, 2, 4]
    index = b"TNTIDX\0\0" + struct.pack("<QQQ", 1, code, np.dtype(dtype).itemsize)
    index += struct.pack("<QQQ", 3, 3, 4) + np.arange(4, dtype="<i8").tobytes()
    index += np.cumsum([0, *lengths]).astype("<i8").tobytes() + np.asarray(lengths, "<i8").tobytes()
    (folder / "m.idx").write_bytes(index + np.arange(4, dtype="<i8").tobytes())
    return ids(folder / "m.bin", FLAT, dtype)


def llmc_file(folder: Path, magic: int, version: int, dtype: str, name: str = "a_000000.bin") -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(FLAT)
    return ids(folder / name, [0, *FLAT[:-1]], dtype, header.tobytes())


def datatrove_file(folder: Path, dtype: str) -> Path:
    ids(folder / "d.ds", FLAT, dtype)
    (folder / "d.ds.metadata").write_text("gpt2|2\n9\n9 tokens\n")
    ids(folder / "d.ds.index", ENDS, "<u8")
    return folder / "d.ds"


def olmo_file(folder: Path, dtype: str, documents: bool = True) -> Path:
    if documents:
        rows = "".join(f"{a},{b},doc{b},source,{b}\n" for a, b in zip([0, *ENDS], ENDS, strict=False))
        (folder / "o.csv.gz").write_bytes(gzip.compress(rows.encode()))
    return ids(folder / "o.npy", FLAT, dtype)


CASES: dict[str, tuple[Callable[[Path], Path], str, list[int]]] = {
    **{
        f"megatron mapped {dtype}": (
            lambda f, c=code, d=dtype: megatron_mapped(f, c, d),
            "megatron",
            [3, 5, 9],
        )
        for code, dtype in ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
    },
    "megatron cached": (lambda f: megatron_cached(f, 4, "<i4"), "megatron", ENDS),
    "megatron cached u2": (lambda f: megatron_cached(f, 8, "<u2"), "megatron", ENDS),
    "nanogpt": (lambda f: ids(f / "train.bin", FLAT), "nanogpt", ENDS),
    "llm.c": (lambda f: llmc_file(f, 20240520, 1, "<u2"), "llmc", ENDS),
    "llm.c wide": (lambda f: llmc_file(f, 20240801, 7, "<u4"), "llmc", ENDS),
    "datatrove": (lambda f: datatrove_file(f, "<u2"), "datatrove", ENDS),
    "datatrove wide": (lambda f: datatrove_file(f, "<u4"), "datatrove", ENDS),
    "olmo": (lambda f: olmo_file(f, "<u2"), "olmo", ENDS),
    "olmo without documents": (lambda f: olmo_file(f, "<u2", False), "olmo", ENDS),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format_is_found_and_read(case: str, tmp_path: Path) -> None:
    make, name, ends = CASES[case]
    path = make(tmp_path)
    found = shardio.detect(path)
    assert found and found[0] == name
    file = shardio.module(name).read(path, 11, "auto")
    assert file.tokens.tolist() == ([0, *FLAT[:-1]] if name == "llmc" else FLAT)
    assert foreign.document_ends(file, 0).tolist() == ends
    assert isinstance(file.tokens, np.memmap)


def test_every_format_of_the_folder_has_a_case() -> None:
    assert {name for _, name, _ in CASES.values()} == set(shardio.names())


@pytest.mark.parametrize("vocab", [11, 70000])
def test_what_we_write_for_megatron_its_layout_reads_back(tmp_path: Path, vocab: int) -> None:
    """A reader of its own, written from the description of the format alone."""
    rows = [np.asarray(r) for r in ROWS]
    rows[1] = np.asarray([vocab - 1, 0])
    tokens, index = megatron.write(tmp_path / "out", rows, vocab)
    data = index.read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00" and int.from_bytes(data[9:17], "little") == 1
    dtype = {8: np.uint16, 4: np.int32}[data[17]]
    count, entries = (int.from_bytes(data[at : at + 8], "little") for at in (18, 26))
    lengths = np.frombuffer(data, np.int32, count, 34)
    pointers = np.frombuffer(data, np.int64, count, 34 + 4 * count)
    documents = np.frombuffer(data, np.int64, entries, 34 + 12 * count)
    assert len(data) == 34 + 12 * count + 8 * entries and documents.tolist() == [0, 1, 2, 3]
    for row, pointer, length in zip(rows, pointers, lengths, strict=True):
        got = np.frombuffer(tokens.read_bytes(), dtype, length, int(pointer))
        assert got.tolist() == row.tolist()
    ours = megatron.read(tokens, vocab)
    assert ours.tokens.tolist() == [int(t) for r in rows for t in r]
    assert ours.ends is not None and ours.ends.tolist() == ENDS


def damaged(case: str, folder: Path) -> tuple[Path, str, int, str]:
    """(file, format, vocabulary, what the error says)."""
    idx = folder / "m.idx"
    if case == "wrong magic":
        path = megatron_mapped(folder, 8, "<u2")
        idx.write_bytes(b"RUBBISH\0\0" + idx.read_bytes()[9:])
        return path, "megatron", 11, "no Megatron index"
    if case == "cut index":
        path = megatron_mapped(folder, 8, "<u2")
        idx.write_bytes(idx.read_bytes()[:-5])
        return path, "megatron", 11, "cut off"
    if case == "cut tokens":
        path = megatron_mapped(folder, 8, "<u2")
        path.write_bytes(path.read_bytes()[:-2])
        return path, "megatron", 11, "holds 8 ids, its index 9"
    if case == "other order":
        path = megatron_mapped(folder, 8, "<u2")
        raw = bytearray(idx.read_bytes())
        raw[50:66] = np.asarray([6, 0], "<i8").tobytes()  # the pointers begin behind four lengths
        idx.write_bytes(bytes(raw))
        return path, "megatron", 11, "another order"
    if case == "unknown dtype":
        return megatron_mapped(folder, 6, "<f8"), "megatron", 11, "says dtype 6"
    if case == "absurd count":
        path = megatron_mapped(folder, 8, "<u2")
        raw = bytearray(idx.read_bytes())
        raw[18:26] = struct.pack("<Q", 1 << 60)
        idx.write_bytes(bytes(raw))
        return path, "megatron", 11, "cut off"
    if case == "narrow megatron":
        return (
            megatron_mapped(folder, 1, "u1"),
            "megatron",
            300,
            "uint8 is too narrow for a vocabulary of 300",
        )
    if case == "narrow nanogpt":
        return ids(folder / "train.bin", FLAT), "nanogpt", 70000, "uint16 is too narrow"
    if case == "odd bytes":
        path = ids(folder / "train.bin", FLAT)
        path.write_bytes(path.read_bytes()[:-1])
        return path, "nanogpt", 11, "no whole number of uint16"
    if case == "llm.c magic":
        return llmc_file(folder, 20240519, 1, "<u2"), "llmc", 11, "begins with 20240519"
    if case == "llm.c version":
        return llmc_file(folder, 20240520, 7, "<u2"), "llmc", 11, "is of version 7"
    if case == "llm.c cut":
        path = llmc_file(folder, 20240520, 1, "<u2")
        path.write_bytes(path.read_bytes()[:-4])
        return path, "llmc", 11, "holds 7 ids and says 9"
    if case == "llm.c empty":
        return ids(folder / "a.bin", []), "llmc", 11, "too short"
    if case == "datatrove cut":
        path = datatrove_file(folder, "<u2")
        path.write_bytes(path.read_bytes()[:-2])
        return path, "datatrove", 11, "16 bytes for the 9 ids"
    if case == "olmo csv":
        path = olmo_file(folder, "<u2")
        path.write_bytes(path.read_bytes()[:-2])
        return path, "olmo", 11, "ends at 9, the tokens at 8"
    assert case == "npy of floats"
    np.save(folder / "f.npy", np.zeros(3))
    return folder / "f.npy", "olmo", 11, "whole numbers"


@pytest.mark.parametrize(
    "case",
    ["wrong magic", "cut index", "cut tokens", "other order", "unknown dtype", "absurd count",
     "narrow megatron", "narrow nanogpt", "odd bytes", "llm.c magic", "llm.c version", "llm.c cut",
     "llm.c empty", "datatrove cut", "olmo csv", "npy of floats"],
)  # fmt: skip
def test_damaged_and_misread_files_are_named(case: str, tmp_path: Path) -> None:
    path, name, vocab, says = damaged(case, tmp_path)
    with pytest.raises(UserError, match=says):
        shardio.module(name).read(path, vocab, "auto")


def test_a_real_npy_is_read_without_its_header(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", np.asarray(FLAT, np.uint16))
    assert olmo.read(tmp_path / "r.npy", 11).tokens.tolist() == FLAT


def test_ends_without_an_index() -> None:
    def ends(tokens: list[int], separator: str, eos: int | None = 0) -> list[int]:
        return foreign.document_ends(TokenFile(np.asarray(tokens), None, separator), eos).tolist()

    assert ends(FLAT, "end") == ENDS and ends([*FLAT, 4], "end") == [*ENDS, 10]
    assert ends([0, 5, 6, 0, 7], "start") == [3, 5] and ends([0], "start") == [1]
    assert ends(FLAT, "end", None) == [9] and ends([], "end") == []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    train(["one two three four " * 9], 270).save(folder)
    return folder


def imported(root: Path, tokenizer: Path, tmp_path: Path, **fields: object) -> Artefact:
    store = Store(tmp_path / "store")
    inputs = {"raw": store.add(root), "tokenizer": store.add(tokenizer, "tokenizer")}
    return stage.execute(store, "shards", stage_shards.Config(**fields), inputs)  # type: ignore[arg-type]


def test_shards_of_token_files_are_those_of_the_text(tokenizer: Path, tmp_path: Path) -> None:
    """nanoGPT's two files give the documents, counts of bytes included, that encoding the text gives."""
    tok = Tokenizer.load(tokenizer)
    texts = {"train": ["one two", "three", "你好 four"], "val": ["two three"]}
    raw = tmp_path / "raw"
    raw.mkdir()
    for split, rows in texts.items():
        flat = [i for text in rows for i in [*tok.encode(text), tok.eos]]
        ids(raw / f"{split}.bin", flat)  # type: ignore[arg-type]
    (raw / "meta.pkl").write_bytes(b"never opened")
    art = imported(raw, tokenizer, tmp_path, write_megatron=True)
    for split, name in (("train", "train"), ("heldout", "val")):
        opened = Shards.open(art.path, split)
        assert [tok.decode(d[:-1].tolist()) for d in opened.documents()] == texts[name]
        assert opened.utf8_bytes == sum(len(t.encode()) for t in texts[name])
        back = megatron.read(art.path / "megatron" / f"{split}.bin", tok.vocab_size)
        assert back.tokens.tolist() == opened.tokens.tolist()
    assert art.facts["formats"] == {f"{s}.bin": "nanogpt: a .bin without a header" for s in texts}
    assert shards.verify(art.path) == []


def test_without_named_files_a_share_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(4, 200, 5).tolist(), 0] for _ in range(300)]
    raw = tmp_path / "raw"
    raw.mkdir()
    megatron.write(raw / "data", [np.asarray(r) for r in rows], 261)
    art = imported(raw, tokenizer, tmp_path, heldout_share=0.3)
    parts = [[d.tolist() for d in Shards.open(art.path, s).documents()] for s in ("train", "heldout")]
    assert sorted(parts[0] + parts[1]) == sorted(rows) and 50 < len(parts[1]) < 130
    assert [r for r in rows if r in parts[0]] == parts[0], "in the order of the file"


def test_blocks_may_be_smaller_than_a_document(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = imported(_raw(tmp_path / "raw"), tokenizer, tmp_path)
    monkeypatch.setattr(foreign, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(shards, "_BLOCK_TOKENS", 3)
    again = imported(_raw(tmp_path / "raw"), tokenizer, tmp_path / "again")
    assert again.id == whole.id


def _raw(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    ids(folder / "x.bin", [9, 8, 7, 6, 5, 4, 9, 8, 0, 5, 0, 7])
    return folder


def test_an_id_beyond_the_vocabulary_is_named(tokenizer: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    ids(raw / "train.bin", [5, 60000, 0])
    with pytest.raises(UserError, match=r"^train\.bin: a token id of 60000 does not fit") as caught:
        imported(raw, tokenizer, tmp_path)
    assert "wrong dtype" in str(caught.value.hint)
    (raw / "train.bin").rename(raw / "notes.txt")
    with pytest.raises(UserError, match="no token files"):
        imported(raw, tokenizer, tmp_path)
    with pytest.raises(UserError, match="one of --corpus and --raw"):
        stage.execute(
            Store(tmp_path / "s"),
            "shards",
            stage_shards.Config(),
            {"tokenizer": Store(tmp_path / "s").add(tokenizer, "tokenizer")},
        )


def test_a_named_format_is_taken_at_its_word(tmp_path: Path) -> None:
    path = ids(tmp_path / "train.bin", FLAT)
    assert [n for _, n, _ in shardio.find(tmp_path, "llmc")] == ["llmc"]
    with pytest.raises(UserError, match="too short for the header"):
        llmc.read(path, 11)
    with pytest.raises(UserError, match="no token format `gguf`"):
        list(shardio.find(tmp_path, "gguf"))
    assert nanogpt.read(ids(path, FLAT, "<u4"), 70000, "uint32").tokens.tolist() == FLAT
    assert datatrove.read(ids(tmp_path / "x.ds", FLAT), 11).ends is None
