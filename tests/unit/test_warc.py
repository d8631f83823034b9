"""Web archives: records, HTTP answers, damage, limits."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from pathlib import Path

import pages
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import FR, STORY, ZH, read

from caravan.data.extract import warc

KINDS = frozenset(("response", "resource", "conversion"))


def record(kind: str, url: str, block: bytes, **more: str) -> bytes:
    extra = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in more.items())
    extra += f"Content-Length: {len(block)}\r\n"
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n{extra}\r\n"
    return head.encode() + block + b"\r\n\r\n"


def http(
    body: bytes, status: str = "200 OK", kind: str = "text/html; charset=utf-8", **headers: str
) -> bytes:
    extra = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}\r\n".encode() + body


def page(i: int) -> bytes:
    return pages.page(f"Part {i}", STORY, "named", i).encode()


def archive() -> list[bytes]:
    long = zlib.compress(page(3))
    return [
        record("warcinfo", "", b"software: x\r\n"),
        record("request", "http://a/0", b"GET / HTTP/1.1\r\n\r\n"),
        record("response", "http://a/0", http(page(0))),
        record("response", "http://a/1", http(b"gone", "404 Not Found")),
        record("response", "http://a/2", http(f"<p>{ZH * 9}".encode("gbk"), kind="text/html; charset=GBK")),
        record("response", "http://a/3", http(long, Content_Encoding="deflate")),
        record("response", "http://a/4", http(b"5\r\n<p>fo\r\n4;x\r\nur w\r\n8\r\nords and\r\n0\r\n\r\n",
                                              Transfer_Encoding="chunked")),
        record("response", "http://a/5", http(b"\x89PNG", kind="image/png")),
        record("resource", "http://a/6", page(6), Content_Type="text/html"),
        record("conversion", "http://a/7", f"{FR}\n{ZH}".encode(), Content_Type="text/plain"),
    ]  # fmt: skip


URLS = [f"http://a/{i}" for i in (0, 2, 3, 4, 6, 7)]
PACK = {
    ".warc": b"".join, ".warc.gz": lambda rs: b"".join(map(gzip.compress, rs)),
    ".warc.zst": lambda rs: zstandard.compress(b"".join(rs)),
    ".warc.bz2": lambda rs: bz2.compress(b"".join(rs)),
    ".wet.gz": lambda rs: gzip.compress(b"".join(rs)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACK)
def test_pages_and_texts_in_any_packing(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(PACK[suffix](archive()))
    values, problems, chosen = read(tmp_path, workers=2)
    assert [v.id for v in values] == URLS and not problems
    assert all(p in values[0].text and p in values[2].text for p in STORY)
    assert ZH in values[1].text and values[3].text == "four words and" and values[5].text == f"{FR}\n{ZH}"
    assert {v.source for v in values} == {f"x{suffix}"} and "WARC header" in chosen[f"x{suffix}"]


def test_a_damaged_member_costs_one_record(tmp_path: Path) -> None:
    members = [gzip.compress(r) for r in archive()]
    hurt = bytearray(members[2])
    hurt[40:60] = b"\0" * 20
    (tmp_path / "x.warc.gz").write_bytes(b"".join([*members[:2], bytes(hurt), *members[3:]]))
    values, problems, _ = read(tmp_path)
    assert [v.id for v in values] == URLS[1:]
    assert (
        len(problems) <= 2 and "a sound gzip member" in problems[0].expected and "byte" in problems[0].place
    )


def test_a_truncated_archive_gives_what_is_there(tmp_path: Path) -> None:
    whole = PACK[".warc.gz"](archive())
    (tmp_path / "x.warc.gz").write_bytes(whole[:-30])
    values, problems, _ = read(tmp_path)
    assert [v.id for v in values] == URLS[:-1]
    assert any("stops inside a member" in p.expected for p in problems)
    (tmp_path / "x.warc.gz").unlink()
    (tmp_path / "x.warc").write_bytes(b"".join(archive())[:-30])
    values, problems, _ = read(tmp_path)
    assert [v.id for v in values] == URLS[:-1] and "the file ends inside it" in problems[0].expected


def test_large_blocks_are_passed_by_unread() -> None:
    huge = record("response", "http://a/big", http(b"x" * 300_000))
    data, met = b"".join([huge, *archive()]), []
    found = list(warc.records(io.BytesIO(data), lambda *p: met.append(p), 100_000, KINDS))
    assert found[0].url == "http://a/0" and len(found) == 8
    assert met == [("record 1", f"a block of at most 100,000 bytes, not {len(http(b'x' * 300_000)):,}")]


def test_an_answer_may_not_unpack_to_too_much(tmp_path: Path) -> None:
    bomb = record(
        "response", "http://a/bomb", http(gzip.compress(b"\0" * 5_000_000), Content_Encoding="gzip")
    )
    (tmp_path / "x.warc").write_bytes(bomb + b"".join(archive()))
    values, problems, _ = read(tmp_path, page_bytes=1_000_000)
    assert len(values) == len(URLS) and "at most 1,000,000 bytes unpacked" in problems[0].expected
    assert problems[0].sample == "http://a/bomb"


@pytest.mark.parametrize(
    "head",
    [
        b"WARC/1.0\r\nWARC-Type: response\r\n\r\n",
        b"WARC/1.0\r\nContent-Length: -5\r\n\r\n",
        b"WARC/1.0\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"WARC/1.0\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    ],
)
def test_broken_headers_are_named_and_the_next_record_is_found(head: bytes) -> None:
    met: list[tuple[str, str]] = []
    data = head + b"".join(archive())
    found = list(warc.records(io.BytesIO(data), lambda *p: met.append(p), 1 << 20, KINDS))
    assert found[-1].url == "http://a/7" and met and met[0][0] == "record 1"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1200), st.binary(max_size=12), st.booleans())
def test_no_damage_hangs_or_raises(at: int, noise: bytes, packed: bool) -> None:
    parts = archive()[2:5]
    data = bytearray(b"".join(map(gzip.compress, parts)) if packed else b"".join(parts))
    data[at : at + len(noise)] = noise
    for one in warc.records(io.BytesIO(bytes(data)), lambda *p: None, 1 << 20, KINDS):
        try:
            warc.answer(one.block, 1 << 20)
        except ValueError as error:
            assert str(error)
