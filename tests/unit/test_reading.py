"""Files of every kind to documents: tables, books, Word, PDF, Markdown, encodings, the Hub."""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import FR, HANT, JA, RU, STORY, ZH, read

from caravan.data import hub
from caravan.data.extract import markdown
from caravan.types import UserError

ROWS = [{"id": f"r{i}", "text": f"row {i}, {ZH}", "n": i} for i in range(600)]


def _arrow(kind: type, path: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with kind(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def test_tables_of_every_kind_give_the_same_documents(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=100)
    _arrow(pa.ipc.new_stream, tmp_path / "b.arrow", ROWS)
    _arrow(pa.ipc.new_file, tmp_path / "c.feather", ROWS)
    for name, mark in (("d.csv", ","), ("e.tsv", "\t"), ("f.csv", ";")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text", "n"], delimiter=mark)
            writer.writeheader()
            writer.writerows(ROWS)
    (tmp_path / "g.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    (tmp_path / "h.json").write_bytes(orjson.dumps(ROWS))
    values, problems, chosen = read(tmp_path)
    assert not problems and len(chosen) == 8
    for name in chosen:
        assert [(v.id, v.text) for v in values if v.source == name] == [(r["id"], r["text"]) for r in ROWS], (
            name
        )


def test_csv_in_gbk_with_newlines_in_quotes_and_uneven_rows(tmp_path: Path) -> None:
    text = f'编号,content\n1,"{ZH}\n""second"" line"\n2,too,many\n\n3,{ZH * 3}\n'
    (tmp_path / "a.csv").write_bytes(text.encode("gbk"))
    values, problems, _ = read(tmp_path)
    assert [v.text for v in values] == [f'{ZH}\n"second" line', ZH * 3]
    assert [(p.place, p.expected) for p in problems] == [("line 4", "2 fields as in the header, not 3")]


def test_a_quote_that_never_closes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\nfirst line\n"never closed\n' + "more\n" * 50_000)
    values, problems, _ = read(tmp_path, record_bytes=140_000)
    assert values[0].text == "first line" and len(values) == 1
    assert "field larger than field limit" in problems[0].expected


def test_the_text_column_is_found_by_name_or_because_it_is_the_only_one(tmp_path: Path) -> None:
    for name, row in {
        "a": {"TEXT": "upper case", "label": "x"},
        "b": {"review": "the only text", "url": "http://a b", "stars": 5},
        "c": {"title": "Harbour", "body": "body text"},
        "d": {"id": "1", "content": "c", "text": "text before content"},
    }.items():  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_bytes(orjson.dumps(row))
    (tmp_path / "e.jsonl").write_bytes(orjson.dumps({"question": "which one", "answer": "nobody knows"}))
    (tmp_path / "f.jsonl").write_bytes(orjson.dumps({"turns": [{"from": "human"}], "schema": "of a tool"}))
    (tmp_path / "g.jsonl").write_bytes(orjson.dumps({"tools": "some words", "turns": "none"}))
    values, problems, chosen = read(tmp_path)
    assert [v.text for v in values] == ["upper case", "the only text", "body text", "text before content"]
    assert "'review' is the only column that holds text" in chosen["b.jsonl"] and "TEXT" in chosen["a.jsonl"]
    assert [p.path.name for p in problems] == ["e.jsonl", "f.jsonl", "g.jsonl"]


def test_a_cell_that_is_no_utf8_costs_its_row(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0\5\0\0\0\x08\0\0\0"), pa.py_buffer(b"one\xff\xfetwo")],
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    _arrow_table = pa.table({"text": column})
    with pa.ipc.new_stream(str(tmp_path / "b.arrow"), _arrow_table.schema) as writer:
        writer.write_table(_arrow_table)
    values, problems, _ = read(tmp_path)
    assert [v.text for v in values] == ["one", "two"] * 2
    assert [p.place for p in problems] == ["record 2"] * 2


def test_mixed_records_in_one_file_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {"text": "one"},
        {"text": 5},
        {"content": "two"},
        [],
        "three",
        {"messages": []},
        {"text": "four"},
        None,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    values, problems, _ = read(tmp_path)
    assert [v.text for v in values] == ["one", "two", "four"]
    assert [p.place for p in problems] == ["line 2", "line 4", "line 5", "line 6", "line 8"]


@pytest.mark.parametrize("layout", ["compact", "indented"])
def test_a_large_array_is_read_record_by_record(tmp_path: Path, layout: str) -> None:
    rows = [
        {"text": 'a "quoted" \\ [1, {2}] text\n' * (i % 5 + 1) + f"{i} {ZH}", "more": [{"x": [i]}]}
        for i in range(900)
    ]
    data = (
        orjson.dumps(rows) if layout == "compact" else json.dumps(rows, indent=1, ensure_ascii=False).encode()
    )
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + data)
    whole, _, _ = read(tmp_path)
    pieces, problems, _ = read(tmp_path, array_bytes=70_000)
    assert pieces == whole and len(pieces) == 900 and not problems
    (tmp_path / "a.json").write_bytes(data[: len(data) // 2])
    pieces, problems, _ = read(tmp_path, array_bytes=70_000)
    assert 100 < len(pieces) < 900 and "closed" in problems[-1].expected
    (tmp_path / "a.json").write_bytes(data.replace(b'"more"', b"more", 5))
    pieces, problems, _ = read(tmp_path, array_bytes=70_000)
    assert len(pieces) == 895 and [p.place for p in problems] == [f"record {i}" for i in range(1, 6)]


# -- books and papers ------------------------------------------------------------

CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)
PACKAGE = (
    '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
    '<dc:title>The  Notebook</dc:title></metadata><manifest><item id="n" href="nav.xhtml" properties="nav"/>'
    '<item id="b" href="b%20two.xhtml"/><item id="a" href="text/a.xhtml"/><item id="i" href="i.png" '
    'media-type="image/png"/></manifest><spine><itemref idref="n"/><itemref idref="a"/><itemref idref="i"/>'
    '<itemref idref="b"/><itemref idref="gone"/></spine></package>'
)


def epub(path: Path, **members: str) -> None:
    files = {
        "META-INF/container.xml": CONTAINER, "OEBPS/book.opf": PACKAGE, "OEBPS/nav.xhtml": "<p>Contents</p>",
        "OEBPS/text/a.xhtml": "<html><head><title>x</title><style>p{}</style></head><body><h1>One</h1><p>"
        f"{STORY[0]}</p><p>{STORY[1]}</p><pre>a\n  b</pre><script/></body></html>",
        "OEBPS/b two.xhtml": f"<html><body><h1>Two</h1><p>{ZH}<br/>{STORY[2]}</p></body></html>",
    } | members  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        for name, text in files.items():
            book.writestr(name, text)


def docx(path: Path, body: str) -> None:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("word/document.xml", f"<w:document {space}><w:body>{body}</w:body></w:document>")


def pdf(pages: list[list[str]]) -> bytes:
    """A PDF written by hand: one text object per line."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    kids = []
    for lines in pages:
        said = b" ".join(b"(%s) Tj 0 -14 Td" % x.encode("latin-1") for x in lines)
        stream = b"BT /F1 12 Tf 72 720 Td " + said + b" ET"
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        kids.append(b"%d 0 R" % (len(objects) + 1))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
    objects[1] = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(kids), len(kids))
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for i, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (i, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % p for p in places))
    out.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start))
    return out.getvalue()


def test_books_and_word_documents(tmp_path: Path) -> None:
    epub(tmp_path / "a.epub")
    docx(
        tmp_path / "b.docx",
        "<w:p><w:r><w:t>First</w:t><w:tab/><w:t>line</w:t></w:r>"
        "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
        f"</w:p><w:tbl><w:tr><w:tc><w:p><w:r><w:t>{ZH}</w:t></w:r></w:p></w:tc></w:tr></w:tbl>",
    )
    values, problems, chosen = read(tmp_path)
    assert not problems and [c.split(":")[0] for c in chosen.values()] == ["epub", "docx"]
    assert values[0].text == f"One\n\n{STORY[0]}\n\n{STORY[1]}\n\na\n  b\n\nTwo\n\n{ZH}\n{STORY[2]}"
    assert values[1].text == f"First\tline\n{ZH}"


def test_pdf_pages_without_running_titles(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    words = [f"{'abcdefgh'[i]} story that goes on" for i in range(5)]
    body = [["The Notebook", f"{w} inter-", "national trade.", w, w, f"- {i} -"] for i, w in enumerate(words)]
    (tmp_path / "a.pdf").write_bytes(pdf(body))
    (tmp_path / "b.pdf").write_bytes(pdf([[]]))
    (tmp_path / "c.pdf").write_bytes(pdf(body)[:300])
    values, problems, _ = read(tmp_path)
    assert values[0].text == "\n\n".join(f"{w} international trade.\n{w}\n{w}" for w in words)
    assert len(values) == 1 and ["text layer" in p.expected for p in problems] == [True, False]
    assert all(p.path.name in ("b.pdf", "c.pdf") for p in problems)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"META-INF/container.xml": "<container/>"}, "names its package document"),
        ({"OEBPS/book.opf": "<package"}, "sound XML"),
        ({"OEBPS/book.opf": '<!DOCTYPE x [<!ENTITY a "b">]><package/>'}, "entities of its own"),
        ({"OEBPS/text/a.xhtml": "\0" * 9_000_000}, "200 times"),
        ({"OEBPS/text/a.xhtml": "", "OEBPS/b two.xhtml": "<p/>"}, "text in its spine"),
    ],
)
def test_broken_books_are_named(tmp_path: Path, members: dict[str, str], words: str) -> None:
    epub(tmp_path / "a.epub", **members)
    (tmp_path / "b.epub").write_bytes(b"PK\3\4 no zip at all")
    (tmp_path / "c.txt").write_text("text")
    values, problems, _ = read(tmp_path)
    assert len(values) == 1 and words in problems[0].expected and "a zip file" in problems[1].expected


# -- Markdown and plain text ------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("---\ntitle: x\n---\n# One\n", "# One\n"),
        ("+++\ntitle = 1\n+++\ntext\n", "text\n"),
        ("---\nno colon here\n---\ntext\n", "---\nno colon here\n---\ntext\n"),
        ("---\na: never closed\n" + "x\n" * 300, "---\na: never closed\n" + "x\n" * 300),
        ("a <!-- b --> c\n<!--\nd\n-->\n\ne\n", "a  c\n\ne\n"),
        ("```html\n<!-- kept -->\n---\n```\nx <!-- gone -->\n", "```html\n<!-- kept -->\n---\n```\nx \n"),
        ("~~~\n```\n<!-- kept -->\n~~~\n", "~~~\n```\n<!-- kept -->\n~~~\n"),
        ("", ""),
    ],
)
def test_markdown(given: str, kept: str) -> None:
    assert "".join(markdown.lines(given.splitlines(keepends=True))) == kept


def test_old_encodings_are_read_and_named(tmp_path: Path) -> None:
    told = {"gbk": ZH, "big5": HANT, "shift_jis": JA, "koi8_r": RU, "latin-1": FR, "utf-16": ZH, "utf-32": JA}
    for codec, text in told.items():
        (tmp_path / codec).write_bytes(f"{text}\n{text}\n".encode(codec))
    (tmp_path / "twice.txt").write_text((f"{FR}\n" * 3).encode().decode("latin-1"), encoding="utf-8")
    values, problems, chosen = read(tmp_path)
    assert {v.source: v.text for v in values} == {c: f"{t}\n{t}\n" for c, t in told.items()}
    assert chosen["gbk"] == "text: text in gb18030 (guessed)"
    assert [p.path.name for p in problems] == ["twice.txt"] and "own encoding" in problems[0].expected


def test_jsonl_in_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "{ZH}"}}\n{{"text": "b"}}\n'.encode("utf-16"))
    assert [v.text for v in read(tmp_path)[0]] == [ZH, "b"]


# -- data sets of the Hub ------------------------------------------------------------

SHA = "b" * 40
buffer = io.BytesIO()
pq.write_table(pa.Table.from_pylist(ROWS[:3]), buffer)
FILES = {
    "data/train-0.parquet": buffer.getvalue(), "data/test-0.parquet": buffer.getvalue(),
    "loader.py": b"import os", "README.md": b"words", "x.jsonl": b"{}",
}  # fmt: skip


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        converted = "refs%2Fconvert%2Fparquet" in self.path or "/" + "c" * 40 in self.path
        if "/api/datasets/org/set" in self.path or ("/api/datasets/org/script" in self.path and converted):
            sha = "c" * 40 if converted else SHA
            names = list(FILES)
            entries = [{"type": "file", "path": n, "size": len(FILES[n]), "oid": "0" * 40} for n in names]
            info = {"id": "org/set", "sha": sha, "siblings": [{"rfilename": n} for n in names]}
            return self._answer(200, json.dumps(entries if "/tree/" in self.path else info).encode())
        if "/api/datasets/org/script" in self.path:
            info = {"id": "org/script", "sha": SHA, "siblings": [{"rfilename": "loader.py"}]}
            entries = [{"type": "file", "path": "loader.py", "size": 9, "oid": "0" * 40}]
            return self._answer(200, json.dumps(entries if "/tree/" in self.path else info).encode())
        name = self.path.partition("/resolve/")[2].partition("?")[0].partition("/")[2]
        if "/datasets/org/" in self.path and name in FILES:
            etag = '"' + hashlib.sha1(FILES[name]).hexdigest() + '"'
            commit = self.path.partition("/resolve/")[2].partition("/")[0]
            return self._answer(200, FILES[name], ETag=etag, X_Repo_Commit=commit)
        return self._answer(401, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CODE = """
import sys
from caravan.data import hub
from caravan.types import UserError
for reference in sys.argv[1:]:
    try:
        with hub.fetched(reference) as folder:
            print("ok", sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    except UserError as error:
        print("error", error, "|", error.hint)
"""


def test_parquet_files_of_a_data_set_and_nothing_else(endpoint: str, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once, at import."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(hub.__file__).parents[2]),
    }
    wanted = ["hf:org/set", "hf:org/set:*train*", "hf:org/script", "hf:org/set:nothing*", "hf:org/gone"]
    run = subprocess.run(
        [sys.executable, "-c", CODE, *wanted], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    both = "ok ['data/test-0.parquet', 'data/train-0.parquet']"
    said = run.stdout.splitlines()
    assert said[:3] == [both, "ok ['data/train-0.parquet']", both]
    assert "no Parquet file that fits nothing*.parquet" in said[3] and "no data set 'org/gone'" in said[4]


@pytest.mark.parametrize("text", ["hf:", "hf:../x", "hf:a/b/c", "hf:a/b:../x", "hf:a b"])
def test_malformed_ids_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a data set's Hub id"):
        hub.parse(text)
    assert hub.parse("hf:a/b@main:x/*") == ("a/b", "main", "x/*")
