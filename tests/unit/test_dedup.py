"""Who stays, equal texts, addresses, and copies of a corpus whatever the order, shards and processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caravan import stage
from caravan.data import dedup, records, rewrite
from caravan.data.columns import Column, Names
from caravan.data.dedup import semantic, url
from caravan.data.dedup.keepers import Keyed, Links, Ranks
from caravan.data.dedup.units import WordHashes
from caravan.stages import corpus as corpus_stage
from caravan.stages import dedup as dedup_stage
from caravan.store import Artefact, Store
from caravan.types import UserError

VOCAB = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "l")]


def prose(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(VOCAB, k=words))


def ranks(chars: list[int], hashes: list[int] | None = None, heldout: list[bool] | None = None) -> Ranks:
    out = Ranks()
    out.add(hashes or list(range(len(chars))), chars, heldout or False)
    return out


def test_held_out_then_long_then_small_hash_stays() -> None:
    links = Links(6)
    links.add(np.array([0, 2, 4]), np.array([1, 1, 5]))
    copies, stays = links.clusters(ranks([10, 30, 20, 0, 5, 5], hashes=[1, 2, 3, 4, 6, 5]))
    assert dict(zip(copies.tolist(), stays.tolist(), strict=True)) == {0: 1, 2: 1, 4: 5}
    _, stays = links.clusters(ranks([10, 30, 20, 0, 5, 5], heldout=[True, False, False, False, False, False]))
    assert set(stays.tolist()) == {0, 4}


def test_links_are_the_clusters_of_a_slow_union_find() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 400, (2, 300))
    links = Links(400)
    for part in np.array_split(np.arange(300), 7):
        links.add(a[part], b[part])
    slow = list(range(400))
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        old, new = slow[x], slow[y]
        slow = [new if s == old else s for s in slow]
    roots = links.roots(np.arange(400))
    assert len(set(zip(roots.tolist(), slow, strict=True))) == len(set(slow)) == len(set(roots.tolist()))


def test_keys_in_ranges_are_keys_at_once(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    keys = draw.integers(0, 1 << 63, 500, dtype=np.uint64) * np.uint64(2)
    keys[100:200] = keys[:100]
    keys[-1] = keys[-2] = np.uint64((1 << 64) - 1)
    out = []
    for memory in (1 << 30, 1000):
        column = Keyed(tmp_path)
        for part in np.array_split(keys, 3):
            column.add(part)
        found = list(column.groups(ranks([1] * 500), memory))
        out.append([np.concatenate(x).tolist() for x in zip(*found, strict=True)])
        column.close()
        assert len(found) == (1 if memory > 1000 else 28)
    assert out[0] == out[1] and len(out[0][0]) == 202
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("http://www.Example.com:80/a/./b/../c/", "https://example.com/a/c"),
        ("https://example.com/?b=2&a=1&utm_source=x", "http://example.com?a=1&b=2#top"),
        ("http://example.com/%7Euser/%e4", "http://user:pw@example.com./~user/%E4"),
        ("http://example.com/index.html", "http://example.com"),
        ("http://例子.com/路", "http://xn--fsqu00a.com/%E8%B7%AF"),
        ("http://example.com/x;jsessionid=1F?PHPSESSID=3", "http://example.com//x"),
    ],
)
def test_spellings_of_one_address(a: str, b: str) -> None:
    assert url.normalise(a) == url.normalise(b) != ""


def test_addresses_that_differ() -> None:
    assert url.normalise("http://example.com/A") != url.normalise("http://example.com/a")
    assert url.normalise("http://example.com/?p=1") != url.normalise("http://example.com/?p=2")
    assert url.normalise("http://example.com:8080/") != url.normalise("http://example.com/")
    for other in ("books/a.txt", "", "ftp://example.com/", "http://", "http://x:port/", "http://[1/"):
        assert url.normalise(other) == ""


def rows() -> list[dict[str, str]]:
    """60 texts, and copies: d3 equal, d5 near and shorter, d7 same address; d9 shares a span with d8."""
    out = [{"id": f"d{k:02}", "text": prose(k), "source": f"http://a.b/{k}"} for k in range(60)]
    out += [
        {"id": "equal", "text": prose(3).replace(" ", "\n"), "source": ""},
        {"id": "near", "text": prose(5)[:-12], "source": ""},
        {"id": "address", "text": prose(1007, 100), "source": "https://www.a.b/7/"},
        {"id": "span", "text": prose(1008) + " " + prose(8)[40:500] + " " + prose(1009), "source": ""},
    ]
    return out


def made(store: Store, folder: Path, parts: int, seed: int) -> Artefact:
    """A corpus of the rows in another order, in so many files."""
    table = rows()
    random.Random(seed).shuffle(table)
    folder.mkdir()
    for k in range(parts):
        lines = [json.dumps(r) for r in table[k::parts]]
        (folder / f"{k}.jsonl").write_text("\n".join(lines))
    cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0.1)
    return stage.execute(store, "corpus", cfg, {"raw": store.add(folder)})


def outcome(art: Artefact) -> tuple[Any, ...]:
    kept = sorted((d.id, split, d.text) for split, d in rewrite.read(art.path))
    removed = sorted((r["id"], r["rule"], r["kept"]) for r in records.read_lines(art / "removed.jsonl.zst"))
    spans = sorted(
        (r["id"], r["start"], r["stop"], r["kept"]) for r in records.read_lines(art / "spans.jsonl.zst")
    )
    return kept, removed, spans


def test_copies_are_the_same_whatever_the_shards_and_workers(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    found = []
    for parts, threads in ((1, 1), (2, 2), (5, 1)):
        art = made(store, tmp_path / f"raw{parts}", parts, seed=parts)
        cfg = dedup_stage.Config(url=True, substring=30, memory_mb=1)
        found.append(stage.execute(store, "dedup", cfg, {"corpus": art}, stage.Runtime(threads=threads)))
    outcomes = [outcome(art) for art in found]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    kept, removed, spans = outcomes[0]
    gone = {frozenset((a, b)): rule for a, rule, b in removed}
    assert gone.keys() == {frozenset(x) for x in (("equal", "d03"), ("near", "d05"), ("address", "d07"))}
    assert set(gone.values()) == {"exact_duplicate", "near_duplicate", "url_duplicate"}
    assert len(spans) == 1 and {spans[0][0], spans[0][3]} == {"span", "d08"}
    facts = found[0].facts
    assert facts["documents_in"] == 64 and facts["documents_out"] == 61 == len(kept)
    assert facts["duplicates"]["exact"] == facts["duplicates"]["near"] == facts["duplicates"]["url"] == 1
    assert facts["clusters"] == {"2": 3} and facts["spans"]["documents"] == 1
    at = {row["jaccard"]: row["meet"] for row in facts["curve"]}
    assert at[0.8] == pytest.approx(0.9235, abs=1e-4)


def test_a_held_out_text_stays(tmp_path: Path) -> None:
    table = [{"text": prose(k)} for k in range(6)] + [
        {"text": prose(2)[:-9], "id": "out", "split": "heldout"}
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table)))
    store = Store(tmp_path / "store")
    raw = store.add(tmp_path / "a.jsonl")
    art = stage.execute(store, "corpus", corpus_stage.Config(near_duplicates=0), {"raw": raw})
    art = stage.execute(store, "dedup", dedup_stage.Config(), {"corpus": art})
    assert [d.id for s, d in rewrite.read(art.path) if s == "heldout"] == ["out"]
    assert [r["kept"] for r in records.read_lines(art / "removed.jsonl.zst")] == ["out"]
    both = stage.execute(store, "corpus", corpus_stage.Config(), {"raw": raw})
    assert both.facts["removed"] == {"near_duplicate": 1} and both.facts["heldout"] == 1


def clouds(seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """200 random directions, then 20 of them again with a little noise."""
    draw = np.random.default_rng(seed)
    table = draw.normal(size=(200, 32))
    again = draw.choice(200, 20, replace=False)
    near = table[again] + 0.05 * draw.normal(size=(20, 32))
    return np.concatenate([table, near]).astype(np.float32), again.tolist()


def on_disk(table: np.ndarray) -> semantic.Embeddings:
    rows = Column(None, table.dtype, table.shape[1])
    rows.add(table)
    return semantic.Embeddings(rows)


def at_once(table: np.ndarray, of: Ranks, cosine: float, groups: int = 0, **more: Any) -> semantic.Found:
    found = list(semantic.similar(on_disk(table), of, cosine, groups, **more))
    gone, like, value = (np.concatenate([f[k] for f in found]) for k in range(3))
    ascending = np.argsort(gone)
    return gone[ascending], like[ascending], value[ascending]


@pytest.mark.parametrize("groups", [1, 5])
def test_planted_meanings_are_found_and_nothing_else(groups: int) -> None:
    table, again = clouds()
    table[:200] *= 7  # length says nothing
    order = np.random.default_rng(3).permutation(220)
    hashes = np.arange(220)[::-1] * 977
    chars = [200 - k for k in range(220)]
    gone, like, cosine = at_once(table, ranks(chars, hashes.tolist()), 0.9, groups)
    assert dict(zip(gone.tolist(), like.tolist(), strict=True)) == {200 + k: at for k, at in enumerate(again)}
    assert (cosine > 0.9).all()
    shuffled = ranks([chars[k] for k in order], hashes[order].tolist())
    gone2, like2, _ = at_once(table[order], shuffled, 0.9, groups)
    assert {(order[g], order[k]) for g, k in zip(gone2, like2, strict=True)} == set(
        zip(gone.tolist(), like.tolist(), strict=True)
    )


@pytest.mark.parametrize("width", [1, 6])
def test_meanings_by_definition_whatever_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Against all pairs of each group, in small blocks, and with room for a few keys only."""
    draw = np.random.default_rng(7)
    table = draw.normal(size=(300, width)).astype(np.float32)
    of = ranks(draw.integers(1, 4, 300).tolist(), draw.integers(0, 1 << 62, 300).tolist())
    monkeypatch.setattr(semantic, "_BLOCK", 32)
    centres: list[np.ndarray] = []
    true = semantic._centres
    monkeypatch.setattr(semantic, "_centres", lambda *a: centres.append(true(*a)) or centres[-1])
    found = [at_once(table, of, 0.8, 3, folder=tmp_path, memory_bytes=m) for m in (1 << 30, 500)]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    group, best = (unit @ centres[0].T).argmax(axis=1), of.order(np.arange(300)).tolist()
    slow = {}
    for k, text in enumerate(best):
        above = [other for other in best[:k] if group[other] == group[text]]
        alike = [float(unit[text] @ unit[other]) for other in above]
        if alike and max(alike) >= 0.8:
            slow[text] = max(alike)
    gone, like, cosine = found[0]
    assert gone.tolist() == sorted(slow) and len(slow) > 50
    assert np.allclose(cosine, [slow[t] for t in gone.tolist()], atol=1e-5)
    assert np.allclose((unit[gone] * unit[like]).sum(axis=1), cosine, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_embeddings_are_read_and_checked(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(path: Path, wanted: list[str], memory: int = 1 << 30) -> np.ndarray:
        names = Names(None)
        names.add(wanted)
        return semantic.read(path, names, None, memory).take(np.arange(len(wanted)))

    table, _ = clouds()
    np.save(tmp_path / "a.npy", table)
    np.save(tmp_path / "turned.npy", np.asfortranarray(table.astype(np.float64)))
    ids = [f"t{k}" for k in range(220)]
    for name in ("a.npy", "turned.npy"):
        assert np.array_equal(read(tmp_path / name, ids), table)
    rows = [*zip(ids[::-1], table[::-1].tolist(), strict=True)]
    rows = [
        ("t7", table[9].tolist()),
        ("not asked for", table[9].tolist()),
        *rows,
    ]  # t7 comes again: the last
    made = pa.table({"id": [name for name, _ in rows], "embedding": [row for _, row in rows]})
    pq.write_table(made, tmp_path / "b.parquet", row_group_size=50)
    for memory in (1 << 30, 500):
        assert np.array_equal(read(tmp_path / "b.parquet", ids, memory), table)
    assert np.array_equal(read(tmp_path / "b.parquet", ["t3", "t9", "t3"]), table[[3, 9, 3]])
    for path, wanted in ((tmp_path / "a.npy", ids[:-1]), (tmp_path / "b.parquet", [*ids, "more", "most"])):
        with pytest.raises(UserError, match=r"2 texts have no embedding, the first is 'more'|rows? of"):
            read(path, wanted)
    with pytest.raises(UserError, match="expected one"):
        read(tmp_path, ids)
    pq.write_table(pa.table({"id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), tmp_path / "d.parquet")
    for name, why in (("c.parquet", "different lengths"), ("d.parquet", "`id` and `embedding`")):
        with pytest.raises(UserError, match=why):
            read(tmp_path / name, ["a", "b"])
    table[3, 3] = np.nan
    with pytest.raises(UserError, match="finite"):
        at_once(table, ranks([1] * 220), 0.9)


def test_meanings_of_a_corpus(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    art = made(store, tmp_path / "raw", 1, seed=1)
    count = art.facts["documents_out"]
    table = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    table[5] = table[2]
    np.save(tmp_path / "a.npy", table)
    cfg = dedup_stage.Config(exact=False, near=0, semantic=0.99)
    with pytest.raises(UserError, match="needs embeddings"):
        stage.execute(store, "dedup", cfg, {"corpus": art})
    out = stage.execute(store, "dedup", cfg, {"corpus": art, "embeddings": store.add(tmp_path / "a.npy")})
    (row,) = records.read_lines(out / "removed.jsonl.zst")
    ids = [d.id for _, d in rewrite.read(art.path)]
    assert {row["id"], row["kept"]} == {ids[2], ids[5]} and row["rule"] == "semantic_duplicate"


def test_our_own_model_embeds(tmp_path: Path) -> None:
    import torch

    from caravan.data import tokenizer as tokenizers
    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh

    store = Store(tmp_path / "store")
    art = made(store, tmp_path / "raw", 1, seed=1)
    tok = tokenizers.train([prose(k) for k in range(30)], 300)
    tok.save(tmp_path / "tok")
    spec, _ = derive(None, 1, tok.vocab_size, 64)
    save_model(fresh(spec, 0), tmp_path / "model", tmp_path / "tok", dtype=torch.float32)
    model = store.add(tmp_path / "model", "model")
    cfg = dedup_stage.Config(exact=False, near=0, semantic=0.9999, embed_tokens=48)
    out = stage.execute(store, "dedup", cfg, {"corpus": art, "model": model})
    pairs = [{r["id"], r["kept"]} for r in records.read_lines(out / "removed.jsonl.zst")]
    assert {"near", "d05"} in pairs, "they begin alike"
    assert len(pairs) < 6


def test_forgetting_words_changes_nothing() -> None:
    small, large = WordHashes(most=2), WordHashes()
    for words in (["a", "b", "c"], ["d", "a"], ["c", "c"]):
        assert small(words).tolist() == large(words).tolist()


def test_exact_needs_all_of_128_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from caravan.data.dedup import exact

    true = exact.digest
    monkeypatch.setattr(exact, "digest", lambda *t: (7, true(*t)[1]))
    one, links = dedup.SameKey(tmp_path, 1 << 20), Links(5)
    one.add(["a", "b", "a", "", ""])
    assert one.link(ranks([1] * 5), links) == 1
    assert links.clusters(ranks([1] * 5))[0].tolist() == [2]
