"""Tokens on disk and back."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data import shards
from caravan.data.shards import Shards
from caravan.data.tokenizer import train
from caravan.types import UserError

ROWS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]


def written(folder, rows=ROWS, vocab_size=11) -> Shards:
    shards.write(folder, {"train": [(r, 10) for r in rows], "heldout": []}, vocab_size)
    return Shards.open(folder)


def test_round_trip(tmp_path) -> None:
    opened = written(tmp_path)
    assert [d.tolist() for d in opened.documents()] == ROWS
    assert opened.tokens.dtype == np.dtype("<u2") and opened.ends.tolist() == [3, 5, 9]
    assert (len(opened), opened.utf8_bytes, opened.vocab_size) == (9, 30, 11)
    assert len(Shards.open(tmp_path, "heldout")) == 0


def test_large_vocabulary_takes_four_bytes(tmp_path) -> None:
    opened = written(tmp_path, [[70000, 0]], 70001)
    assert opened.tokens.dtype == np.dtype("<u4") and opened.tokens.tolist() == [70000, 0]
    assert written(tmp_path / "b", [[65535]], 65536).tokens.dtype == np.dtype("<u2")


def test_id_beyond_the_vocabulary_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="does not fit a vocabulary of 11"):
        written(tmp_path, [[11]])


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_segments_are_pieces_of_documents(sizes: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    opened = Shards(np.zeros(total, np.uint16), ends, 9, 0)
    owner = np.repeat(np.arange(len(sizes)), sizes)[start:stop]
    expected = [int(n) for n in np.unique(owner, return_counts=True)[1]]
    assert list(opened.segments(start, stop)) == expected


def test_documents_end_with_end_of_text_and_batches_change_nothing(monkeypatch) -> None:
    tok = train(["one two three " * 9], 270)
    texts = ["one", "two three", "", "<|endoftext|>"]
    rows = list(shards.encode_documents(texts, tok))
    assert [r for r, _ in rows] == [[*tok.encode(t), tok.eos] if t else [] for t in texts]
    assert [n for _, n in rows] == [3, 9, 0, 13]
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1)
    assert list(shards.encode_documents(texts, tok)) == rows


def test_files_that_disagree_are_refused(tmp_path) -> None:
    written(tmp_path)
    with pytest.raises(UserError, match="no shards of split 'test'"):
        Shards.open(tmp_path, "test")
    (tmp_path / "train.bin").write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match="does not match"):
        Shards.open(tmp_path)
    written(tmp_path)
    page = json.loads((tmp_path / "shards.json").read_text())
    np.save(tmp_path / "train.ends.npy", np.array([3, 3, 9]))
    assert page["splits"]["train"]["documents"] == 3
    with pytest.raises(UserError, match="does not match"):
        Shards.open(tmp_path)


def test_the_page_says_what_the_files_hash_to(tmp_path) -> None:
    written(tmp_path / "a"), written(tmp_path / "b")
    assert shards.verify(tmp_path / "a") == []
    assert shards.content_hash(tmp_path / "a") == shards.content_hash(tmp_path / "b")
    written(tmp_path / "b", [[5, 6, 0], [7, 0], [8, 9, 9, 0]])
    assert shards.content_hash(tmp_path / "a") != shards.content_hash(tmp_path / "b")
    page = json.loads((tmp_path / "a" / "shards.json").read_text())
    digest = hashlib.sha256((tmp_path / "a" / "train.bin").read_bytes()).hexdigest()
    assert page["splits"]["train"]["files"]["train.bin"]["sha256"] == digest


def edit(path, at: int, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] = byte
    path.write_bytes(bytes(data))


def test_opening_sees_a_change_at_the_edges_and_verify_any(tmp_path) -> None:
    rows = [[k % 11 for k in range(50_000)]] * 4
    written(tmp_path, rows)
    edit(tmp_path / "train.bin", 3, 1)
    with pytest.raises(UserError, match=r"train.bin does not match shards.json"):
        Shards.open(tmp_path)
    written(tmp_path, rows)
    edit(tmp_path / "train.bin", 200_000, 99)
    assert len(Shards.open(tmp_path)) == 200_000, "a glance does not read the middle"
    wrong = shards.verify(tmp_path)
    assert wrong == ["train.bin has changed", "train.bin holds ids beyond the vocabulary of 11"]
    written(tmp_path, rows)
    edit(tmp_path / "train.ends.npy", 130, 7)
    with pytest.raises(UserError, match=r"train.ends.npy does not match"):
        Shards.open(tmp_path)
    written(tmp_path, rows)
    page = json.loads((tmp_path / "shards.json").read_text())
    (tmp_path / "shards.json").write_text(json.dumps({**page, "content_sha256": "0" * 64}))
    assert shards.verify(tmp_path) == ["shards.json has changed"]
    (tmp_path / "shards.json").write_text(json.dumps({**page, "version": 99}))
    with pytest.raises(UserError, match="newer caravan"):
        Shards.open(tmp_path)


def test_shards_without_hashes_still_open(tmp_path) -> None:
    written(tmp_path)
    page = json.loads((tmp_path / "shards.json").read_text())
    del page["version"], page["content_sha256"]
    for about in page["splits"].values():
        del about["files"]
    (tmp_path / "shards.json").write_text(json.dumps(page))
    assert len(Shards.open(tmp_path)) == 9 and shards.verify(tmp_path) == []
    np.save(tmp_path / "train.ends.npy", np.array([3, 3, 9]))
    with pytest.raises(UserError, match="does not match"):
        Shards.open(tmp_path)


def test_any_document_at_once(tmp_path) -> None:
    opened = written(tmp_path)
    assert [opened.document(k).tolist() for k in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    with pytest.raises(IndexError):
        opened.document(3)


def test_blocks_are_the_documents_and_stop_where_asked(tmp_path) -> None:
    tok = train(["one two three " * 9], 270)
    tok.save(tmp_path)
    texts = ["one", "two three", "", "你好"]
    block = shards.Encode(str(tmp_path))(texts)
    rows = list(shards.encode_documents(texts, tok))
    assert block.ids.tolist() == [i for ids, _ in rows for i in ids]
    assert block.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert block.sizes.tolist() == [size for _, size in rows] == [3, 9, 0, 6]
    some = block.first(int(block.lengths[0]) + 1)
    assert some.lengths.tolist() == block.lengths.tolist()[:2] and len(some.ids) == some.lengths.sum()
    assert block.first(10**9) is block
