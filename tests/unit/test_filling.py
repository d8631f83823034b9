"""Reading the weights of a folder in several threads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from caravan.model import filling, tensorfile
from caravan.model.tensors import TensorFolder, write_tensors
from caravan.types import UserError


def test_every_job_is_done_once_and_readers_take_stretches() -> None:
    seen: list[tuple[int, int]] = []
    jobs = [(i, 1 + i % 7) for i in range(100)]
    filling._side_by_side(lambda i: seen.append((threading.get_ident(), i)), jobs)
    assert sorted(i for _, i in seen) == list(range(100))
    by_reader = {who: [i for w, i in seen if w == who] for who, _ in seen}
    assert all(mine == sorted(mine) for mine in by_reader.values())


def test_no_jobs_and_empty_tensors_are_fine() -> None:
    filling._side_by_side(lambda i: pytest.fail("nothing to do"), [])
    seen: list[int] = []
    filling._side_by_side(seen.append, [(0, 0), (1, 0)])
    assert sorted(seen) == [0, 1]


def test_after_an_error_no_reader_goes_on_to_the_end() -> None:
    done: list[int] = []

    def make(i: int) -> None:
        time.sleep(0.002)
        if i == 5:
            raise UserError("the disk is gone")
        done.append(i)

    with pytest.raises(UserError, match="the disk is gone"):
        filling._side_by_side(make, [(i, 1) for i in range(4000)])
    assert len(done) < 400  # one of the first jobs of one reader; the others have a thousand and more


def test_each_thread_has_a_place_of_its_own(tmp_path: Path) -> None:
    """A place shared by two threads would mix their tensors, seldom enough to be missed below."""
    write_tensors({"a": torch.arange(8.0)}, tmp_path)
    file = TensorFolder(tmp_path)._file("model.safetensors")
    mine, theirs = file._mine(), []
    mine.seek(3)
    reader = threading.Thread(target=lambda: theirs.append((file._mine(), file.read("a"))))
    reader.start()
    reader.join()
    assert theirs[0][0] is not mine and torch.equal(theirs[0][1], torch.arange(8.0))
    assert mine.tell() == 3 and file._mine() is mine


def test_threads_read_what_one_thread_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {f"{i:04d}": torch.randn(30, 7 + i % 5) for i in range(4000)}
    write_tensors(own, tmp_path, shard_bytes=1_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    files, keys = TensorFolder(tmp_path), sorted(own)
    places = [files.place(key) for key in keys]
    assert places == sorted(places, key=lambda place: place or ("", 0)) and None not in places
    got: dict[int, torch.Tensor] = {}

    def make(i: int) -> None:
        got[i] = torch.empty(own[keys[i]].shape)
        files.fill(keys[i], got[i])

    filling._side_by_side(make, [(i, 1) for i in range(len(keys))])
    assert all(torch.equal(got[i], own[key]) for i, key in enumerate(keys))


def test_a_file_cut_short_while_open_is_named(tmp_path: Path) -> None:
    write_tensors({"a": torch.ones(1000, 1000), "b": torch.ones(1000, 1000)}, tmp_path)
    files = TensorFolder(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 5_000_000)
    out = torch.empty(1000, 1000)
    with pytest.raises(UserError, match=r"model\.safetensors .*became shorter"):
        for key in "ab":
            files.fill(key, out)
    with pytest.raises(UserError, match=r"model\.safetensors .*was changed after its header was read"):
        filling._side_by_side(lambda i: files.fill("ab"[i], out), [(0, 1), (1, 1)])


def shards(folder: Path, count: int) -> dict[str, torch.Tensor]:
    own = {f"{i:03d}": torch.full((50,), float(i)) for i in range(count)}
    write_tensors(own, folder, shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == count
    return own


def read_all(files: TensorFolder) -> dict[str, torch.Tensor]:
    """In several threads, as models are filled."""
    keys, got = sorted(files), {}

    def make(i: int) -> None:
        got[keys[i]] = torch.empty(files.shape(keys[i]) or ())
        files.fill(keys[i], got[keys[i]])

    filling._side_by_side(make, [(i, 1) for i in range(len(keys))])
    return got


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    """Some systems allow 256 files; published models come in up to 200 shards, and merging opens several."""
    resource = pytest.importorskip("resource")
    own = shards(tmp_path, 90)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(3 + filling.READERS)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, before[1]))
    for number in free:
        os.close(number)
    try:
        folders = [TensorFolder(tmp_path) for _ in range(2)]
        got = [read_all(files) for files in folders]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(torch.equal(one[key], own[key]) for one in got for key in own)


@pytest.mark.parametrize("how", ["replaced", "gone"])
def test_a_shard_that_is_not_the_one_whose_header_was_read(how: str, tmp_path: Path) -> None:
    """Its tensors would lie elsewhere, or be those of another model."""
    shards(tmp_path, 8)
    files = TensorFolder(tmp_path)
    path = tmp_path / "model-00003-of-00008.safetensors"
    data = path.read_bytes()
    path.unlink()
    if how == "replaced":
        path.write_bytes(data[:-4] + bytes(4))
    says = {"replaced": "was changed after its header was read", "gone": "is missing"}[how]
    with pytest.raises(UserError, match=rf"model-00003-of-00008\.safetensors .*{says}"):
        read_all(files)


@pytest.mark.parametrize("piece", [16, 48, 1 << 20])
def test_pieces_of_any_size_make_up_the_tensor(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a piece, types of other widths one after another, places that are not side by side."""
    monkeypatch.setattr(tensorfile, "PIECE_BYTES", piece)
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    shapes = ((7, 5), (3, 40), (1, 33), (4, 3, 6), (11,), (0, 4), (4, 0), ())
    own = {
        f"{i}.{k}": torch.randn(shape).to(kind)
        for i, shape in enumerate(shapes)
        for k, kind in enumerate(kinds)
    }
    write_tensors(own, tmp_path)
    files = TensorFolder(tmp_path)
    for key, tensor in own.items():
        for dtype in (torch.float32, torch.bfloat16):
            plain = torch.empty(tensor.shape, dtype=dtype)
            turned = torch.empty(tensor.shape[::-1], dtype=dtype).permute(list(range(tensor.dim()))[::-1])
            for out in (plain, turned):
                files.fill(key, out)
                assert torch.equal(out, tensor.to(dtype)), (key, dtype)
