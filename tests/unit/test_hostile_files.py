"""Files made to exhaust, hang or mislead: counted, named, bounded in memory, and never half a corpus."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from pages import STORY, read

from caravan import stage
from caravan.disk import plain_errors
from caravan.stages import corpus
from caravan.store import Store
from caravan.types import UserError

ROOT = Path(corpus.__file__).parents[2]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def in_a_process(code: str, *args: str, megabytes: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose address space may grow by so many MB over what imports need."""
    head = (
        "import sys, resource\nfrom pathlib import Path\nfrom caravan.data import formats\n"
        "from caravan.data.formats import Limits\nimport pyarrow.parquet, caravan.data.extract.html.plain\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        f"cap = {megabytes}\n"
        "if cap: resource.setrlimit(resource.RLIMIT_AS, (used + (cap << 20),) * 2)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code), *args],
        env=env, capture_output=True, text=True, timeout=100, **more,
    )  # fmt: skip


READ = """
    bad = []
    found = list(formats.read_all(Path(sys.argv[1]), "corpus", bad.append, Limits(), {}))
    print(len(found), [(p.path.name, p.place, p.expected) for p in bad])
"""


def zeros(path: Path, megabytes: int, suffix: str, around: tuple[bytes, bytes] = (b"", b"")) -> None:
    """A packed file of zeros between two texts, written without holding them."""
    packers: dict[str, Any] = {
        ".gz": lambda f: gzip.open(f, "wb"),  # noqa: SIM115
        ".bz2": lambda f: bz2.open(f, "wb"),  # noqa: SIM115
        ".xz": lambda f: lzma.open(f, "wb", preset=0),  # noqa: SIM115
        ".zst": lambda f: zstandard.ZstdCompressor(level=1).stream_writer(f, closefd=False),
        "": contextlib.nullcontext,
    }
    with open(path, "wb") as file, packers[suffix](file) as packed:
        packed.write(around[0])
        for _ in range(megabytes):
            packed.write(b"x" * (1 << 20))
        packed.write(around[1])


# -- too long, too large ----------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_200_mb_is_skipped_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    zeros(
        path, 200 if not suffix else 60, suffix, (b'{"text": "first"}\n{"text": "', b'"}\n{"text": "last"}\n')
    )
    ran = in_a_process(READ, str(path), megabytes=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "2 [('a.jsonl" + suffix + "', 'line 2', 'a line of at most 16,777,216 bytes')]\n"


@pytest.mark.slow
def test_a_line_of_2_gb_that_is_not_there(tmp_path: Path) -> None:
    """A sparse file: two gigabytes of zeros without a line end."""
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "first"}\n')
        file.truncate(2 << 30)
    start = time.monotonic()
    ran = in_a_process(READ, str(tmp_path), megabytes=120)
    assert ran.stdout == "1 [('a.jsonl', 'line 2', 'a line of at most 16,777,216 bytes')]\n", ran.stderr
    assert time.monotonic() - start < 60


def test_an_array_of_100_mb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    row = b'{"text": "' + b"a word or two " * 5000 + b'"}'
    with open(tmp_path / "a.json", "wb") as file:
        file.write(b"[" + row)
        for _ in range(1400):
            file.write(b", " + row)
        file.write(b"]")
    code = READ.replace("list(", "sum(1 for _ in ").replace("len(found)", "found")
    ran = in_a_process(code, str(tmp_path), megabytes=250)
    assert ran.stdout == "1401 []\n", ran.stderr[-500:]


# -- bombs --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACK)
def test_a_bomb_is_given_up_in_bounded_memory(tmp_path: Path, suffix: str) -> None:
    zeros(tmp_path / f"a.txt{suffix}", 90 if suffix == ".gz" else 300 if suffix == ".zst" else 40, suffix)
    (tmp_path / "b.txt").write_text(" ".join(STORY))
    code = READ.replace("Limits()", "Limits(ratio_free_bytes=16 << 20)")
    ran = in_a_process(code, str(tmp_path), megabytes=120)
    assert ran.returncode == 0, ran.stderr[-800:]
    assert "it unpacks to more than 400 times its size" in ran.stdout, ran.stdout


def test_text_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    text = "".join(f"{i} {STORY[i % 5]}\n" for i in range(2000))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    values, problems, _ = read(tmp_path, ratio_free_bytes=1000, ratio=200)
    assert "".join(v.text for v in values) == text and not problems


@pytest.mark.parametrize("shape", ["texts", "lists", "zeros"])
def test_a_table_that_holds_one_text_thousands_of_times_is_given_up(tmp_path: Path, shape: str) -> None:
    """A few KB of Parquet: 10 MB of text, kept once for 4,000 rows or for one, or packed thirty times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = pa.array([0] * 4000, pa.int32())
    held = pa.DictionaryArray.from_arrays(index, pa.array(["word " * (8 << 18)]))
    if shape == "lists":
        held = pa.ListArray.from_arrays(pa.array([0, 4000], pa.int32()), held)
    if shape == "zeros":
        held = pa.array(["word " * (8 << 18)] * 30)
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": held}), path, compression="zstd", use_dictionary=shape != "zeros")
    (tmp_path / "ok.txt").write_text("Something else to read.\n")
    done = in_a_process(READ, str(tmp_path), megabytes=800)
    assert done.returncode == 0, done.stderr
    assert "400 times its size" in done.stdout and path.stat().st_size < 100_000


def test_a_table_of_one_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"{i} " + os.urandom(1 << 13).hex() for i in range(12_500)]
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    code = """
        def peak():  # of this program; what getrusage says may be its parent's
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
        before, bad = peak(), []
        found = formats.read_all(Path(sys.argv[1]), "corpus", bad.append, Limits(), {})
        print(sum(len(f.value.text) for f in found))
        print(peak() - before, bad)
    """
    done = in_a_process(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    size, grown, bad = done.stdout.split()
    assert int(size) == sum(map(len, texts)) and bad == "[]"
    assert int(grown) < 130, f"{grown} MB for a file of 200 MB"


def test_a_dictionary_of_gigabytes_is_refused(tmp_path: Path) -> None:
    params = zstandard.ZstdCompressionParameters(window_log=30, compression_level=1)
    packed = zstandard.ZstdCompressor(compression_params=params).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packed.compress(b"text\n" * 1000) + packed.flush())
    ran = in_a_process(READ, str(tmp_path), megabytes=400)
    assert "nothing that gives corpus" in ran.stderr or "a complete .zst file" in ran.stdout, ran.stderr[
        -400:
    ]


@pytest.mark.parametrize("kind", ["epub", "docx"])
def test_a_zip_bomb_is_named(tmp_path: Path, kind: str) -> None:
    name = {"epub": "META-INF/container.xml", "docx": "word/document.xml"}[kind]
    with (
        zipfile.ZipFile(tmp_path / f"a.{kind}", "w", zipfile.ZIP_DEFLATED) as file,
        file.open(name, "w") as member,
    ):
        member.write(b"<a>")
        for _ in range(100):
            member.write(b" " * (1 << 20))
    (tmp_path / "b.txt").write_text(" ".join(STORY))
    values, problems, _ = read(tmp_path)
    assert len(values) == 1 and "unpack to less than 200 times" in problems[0].expected


def test_a_zip_that_lies_about_its_sizes_is_still_bounded(tmp_path: Path) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("word/document.xml", b"<a>" + b" " * (8 << 20))
    lying = held.getvalue().replace((3 + (8 << 20)).to_bytes(4, "little"), (500).to_bytes(4, "little"))
    (tmp_path / "a.docx").write_bytes(lying)
    (tmp_path / "b.txt").write_text("text")
    _, problems, _ = read(tmp_path)
    assert problems[0].path.name == "a.docx"


# -- cut short, empty, not text --------------------------------------------------------


@pytest.mark.parametrize("suffix", [*PACK, ".parquet", ".arrow"])
@pytest.mark.parametrize("keep", [0, 1, 5, 0.3, 0.9, 0.999])
def test_cut_short_anywhere_is_named_and_never_raises(tmp_path: Path, suffix: str, keep: float) -> None:
    rows = [{"text": f"{i} " + os.urandom(40).hex()} for i in range(500)]
    if suffix in PACK:
        data = PACK[suffix](b"".join(orjson.dumps(r) + b"\n" for r in rows))
        name = f"a.jsonl{suffix}"
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        out, table = io.BytesIO(), pa.Table.from_pylist(rows)
        if suffix == ".parquet":
            pq.write_table(table, out, row_group_size=100)
        else:
            with pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
        data, name = out.getvalue(), f"a{suffix}"
    (tmp_path / name).write_bytes(data[: int(keep) if keep in (0, 1, 5) else int(len(data) * keep)])
    (tmp_path / "b.txt").write_text("text")
    values, problems, _ = read(tmp_path)
    assert values[-1].text == "text" and len(values) <= 501
    assert {p.path.name for p in problems} == {name}
    if suffix in PACK and keep:
        assert any(f"a complete {suffix} file" in p.expected for p in problems), problems


def test_bytes_that_are_no_text_in_any_encoding(tmp_path: Path) -> None:
    noise = bytes((i * 7919 >> 3) & 255 for i in range(1, 9000))
    names = "a.txt b.md c.html d.csv e.jsonl f.json g.warc h.pdf i.epub j k.py"
    for name in names.split():
        (tmp_path / name).write_bytes(noise)
    (tmp_path / "z.txt").write_text("text")
    values, problems, _ = read(tmp_path)
    assert values[-1].text == "text"
    assert {p.path.name[0] for p in problems} == set("abcdefghijk"), problems
    for value in values:
        value.text.encode()


# -- what a folder can hold -------------------------------------------------------------


def test_pipes_devices_and_loops_never_hang(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text(" ".join(STORY))
    os.mkfifo(root / "pipe.txt")
    (root / "deep" / "up").symlink_to("..")
    (root / "round").symlink_to("round")
    (root / "zero").symlink_to("/dev/zero")
    ran = in_a_process(READ, str(root), megabytes=200)
    assert ran.stdout.startswith("1 ") and all(n in ran.stdout for n in ("pipe.txt", "up", "round", "zero"))
    store = Store(tmp_path / "store")
    assert sorted(store.add(root).manifest["files"]) == ["a.txt"]
    for path in ("/dev/zero", str(root / "pipe.txt")):
        with pytest.raises(UserError, match="neither a file nor a folder"):
            store.add(path)


def test_pages_are_read_where_memory_is_limited_from_outside(tmp_path: Path) -> None:
    """`ulimit -v` below what an extractor allows itself: it keeps to the lower one."""
    (tmp_path / "a.html").write_text("<html><body><article><p>" + " ".join(STORY))
    code = """
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        bad = []
        print(len(list(formats.read_all(Path(sys.argv[1]), "corpus", bad.append, Limits(), {}))), bad)
    """
    done = in_a_process(code, str(tmp_path))
    assert done.stdout == "1 []\n", done.stdout + done.stderr


def test_a_file_that_may_not_be_read_stops_before_anything_is_published(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "data" / name).write_text(" ".join(STORY))
    real = open

    def closed(path: Any, *args: Any, **kw: Any) -> Any:
        if str(path).endswith("b.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kw)

    store = Store(tmp_path / "store")
    raw = store.add(tmp_path / "data")
    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(UserError, match=r"cannot read .*b\.txt: Permission denied"):
        stage.execute(store, "corpus", corpus.Config(), {"raw": raw}, stage.Runtime(work=tmp_path, threads=1))
    assert not store.ls("corpus")


def test_a_disk_that_fills_leaves_nothing_and_the_next_run_succeeds(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: the write fails in the middle of the corpus."""
    (tmp_path / "data.jsonl").write_bytes(
        b"".join(orjson.dumps({"text": os.urandom(3000).hex()}) + b"\n" for _ in range(300))
    )
    code = """
        import signal
        from caravan import stage
        from caravan.stages import corpus
        from caravan.store import Store
        from caravan.types import UserError
        store = Store(sys.argv[1])
        raw = store.add(sys.argv[2])
        if sys.argv[3] == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        try:
            config = corpus.Config(near_duplicates=0.0, repetition=False)
            rt = stage.Runtime(work=Path(sys.argv[1]), threads=1)
            stage.execute(store, "corpus", config, {"raw": raw}, rt)
        except UserError as error:
            print(error, "|", error.hint)
        print(len(store.ls("corpus")), len(store.verify(raw)))
    """
    args = (str(tmp_path / "store"), str(tmp_path / "data.jsonl"))
    full = in_a_process(code, *args, "full")
    assert full.returncode == 0, full.stderr[-800:]
    assert "the disk is full" in full.stdout and full.stdout.endswith("\n0 0\n")
    assert in_a_process(code, *args, "free").stdout == "1 0\n"


@pytest.mark.parametrize("number", [28, 27, 122])
def test_full_disks_and_too_large_files_are_said_plainly(number: int) -> None:
    with pytest.raises(UserError, match="the disk is full while writing"), plain_errors("writing"):
        raise OSError(number, os.strerror(number))


def test_the_corpus_counts_and_names_every_bad_file(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for i in range(5):
        (root / f"{i}.txt").write_text(STORY[i])
    (root / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut off'))
    (root / "empty.txt").write_bytes(b"")
    (root / "a.html").write_text("<script>x</script>")
    store = Store(tmp_path / "store")
    rt = stage.Runtime(work=tmp_path, threads=2)
    made = stage.execute(store, "corpus", corpus.Config(), {"raw": store.add(root)}, rt)
    assert made.facts["documents_in"] == 5 and made.facts["quarantined"] == 3
    rows = [orjson.loads(line) for line in (made / "quarantine.jsonl").read_bytes().splitlines()]
    assert [r["file"] for r in rows] == ["a.html", "bad.jsonl.gz", "empty.txt"]
    with pytest.raises(UserError, match="no HTML engine `best`"):
        config = corpus.Config(html="best")
        stage.execute(store, "corpus", config, {"raw": store.add(root)}, rt)
