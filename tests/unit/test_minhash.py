"""MinHash estimates Jaccard as well as theory says; bands meet as the curve says; real pairs are found."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caravan.data import dedup
from caravan.data.dedup import minhash
from caravan.data.dedup.keepers import Links, Ranks
from caravan.data.dedup.units import WORDS, portions, units, windows
from caravan.data.permute import mix
from caravan.types import UserError


def text(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def grams(document: str) -> set[int]:
    return set(windows(units([document]).hash_U, dedup.GRAM).tolist())


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("places", [112, 128])
def test_error_is_what_theory_says(places: int) -> None:
    """Root mean square error of the estimate near sqrt(J(1-J)/K), and no bias."""
    for shift in (30, 120, 220):
        pairs = [(text(1000 * t, 400), text(1000 * t + shift, 400)) for t in range(60)]
        true = jaccard(grams(pairs[0][0]), grams(pairs[0][1]))
        a, b = (dedup.signatures([p[side] for p in pairs], places) for side in (0, 1))
        errors = (a == b).mean(axis=1) - true
        theory = (true * (1 - true) / places) ** 0.5
        assert 0.75 * theory < np.sqrt(np.mean(errors**2)) < 1.3 * theory
        assert abs(errors.mean()) < 3 * theory / 60**0.5


def test_bands_meet_as_the_curve_says() -> None:
    """Random signatures that agree in each place with probability J."""
    draw = np.random.default_rng(0)
    for setting in (dedup.Setting(), dedup.Setting(bands=20, rows=13), dedup.Setting(bands=9, rows=5)):
        for true in (0.5, 0.7, 0.85):
            a = draw.integers(0, 1 << 32, (3000, setting.places), dtype=np.uint32)
            b = np.where(draw.random(a.shape) < true, a, a + np.uint32(1))
            met = (minhash.band_keys(a, setting) == minhash.band_keys(b, setting)).any(axis=0).mean()
            assert abs(met - setting.meet(true)) < 4 * np.sqrt(0.25 / 3000)


def test_published_points_of_the_curve() -> None:
    assert [round(dedup.Setting().meet(s), 3) for s in (0.7, 0.75, 0.8, 0.85)] == [0.565, 0.772, 0.924, 0.988]
    assert round(dedup.Setting(bands=20, rows=13).meet(0.8), 3) == 0.677
    assert round(dedup.Setting(bands=14, rows=9).meet(0.8), 3) == 0.867
    assert round(dedup.Setting(bands=450, rows=20).meet(0.75), 3) == 0.761
    assert dedup.Setting(similarity=0).agree(0.3) == pytest.approx(1)
    assert dedup.Setting(similarity=1).agree(0.9) == pytest.approx(0.9**112)
    curve = dedup.Setting().curve()
    assert curve[-1] == {"jaccard": 1.0, "meet": 1.0, "found": 1.0, "error": 0.0}
    assert all(row["found"] <= row["meet"] for row in curve)
    for wrong in ({"bands": 0}, {"rows": 20_000}, {"similarity": 1.5}):
        with pytest.raises(UserError):
            dedup.Setting(**wrong)


def found(
    tmp_path: Path, texts: list[str], similarity: float = 0.75, memory: int = 1 << 20
) -> dict[int, int]:
    near = dedup.NearDuplicates(tmp_path, dedup.Setting(similarity=similarity), memory)
    ranks, links = Ranks(), Links(len(texts))
    for part in portions(texts, 5000):
        near.add(dedup.signatures(part))
    ranks.add([mix(9, k) for k in range(len(texts))], [len(t) for t in texts])
    near.link(ranks, links)
    near.close()
    assert not list(tmp_path.iterdir())
    copies, stays = links.clusters(ranks)
    return dict(zip(copies.tolist(), stays.tolist(), strict=True))


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    texts = [text(1000 * k, 300) for k in range(400)]
    texts[7] = text(3000, 285)
    texts[9] = text(3012, 280)
    texts[30] = texts[20] + "!"
    assert found(tmp_path, texts) == found(tmp_path, texts, memory=2000) == {7: 3, 9: 3, 20: 30}


def test_half_alike_is_not_near(tmp_path: Path) -> None:
    assert found(tmp_path, [text(0, 300), text(0, 150) + " " + text(5000, 150)]) == {}


def test_meeting_in_a_band_is_not_enough(tmp_path: Path) -> None:
    a, b = dedup.signatures([text(0, 300), text(5000, 300)])
    b[:8] = a[:8]
    for similarity, links_made in ((0.75, False), (0.05, True), (0.0, True)):
        near = dedup.NearDuplicates(tmp_path, dedup.Setting(similarity=similarity), 1 << 20)
        near.add(np.stack([a, b]))
        ranks, links = Ranks(), Links(2)
        ranks.add([1, 2], [5, 5])
        near.link(ranks, links)
        near.close()
        assert (links.clusters(ranks)[0].tolist() == [1]) is links_made
        assert (near.met, near.agreed) == (1, int(links_made))


def test_numbers_are_not_blurred(tmp_path: Path) -> None:
    """Two tables of sums are two texts."""
    tables = [
        " ".join(f"{i} plus {i + add} is {2 * i + add}" for i in range(first, first + 60))
        for first, add in ((0, 3), (90, -85))
    ]
    assert found(tmp_path, tables) == {}


def test_characters_are_the_units_of_chinese(tmp_path: Path) -> None:
    chinese = "学而时习之不亦说乎有朋自远方来不亦乐乎人不知而不愠不亦君子乎" * 3
    assert found(tmp_path, [chinese, "。" + chinese.replace("学而", "习而", 1)[2:]]) == {1: 0}
    cut = units(["学，而 时abc"])
    assert np.diff(cut.range_D).tolist() == [4]


def test_units_are_words_whatever_the_batch() -> None:
    texts = ["The cat's", "", "naïve_1 ΟΔΟΣ", "日本語 text \U0001f600 x\U000e0001y", "ก็ हिन्दी"]
    together = units(texts)
    for d, one in enumerate(texts):
        assert together.of(d).tolist() == units([one]).hash_U.tolist()
        starts, ends = together.spans(d)
        assert [one[a:b] for a, b in zip(starts, ends, strict=True)] == SLOW[d]
    assert units(["THE the"]).hash_U.tolist()[0] == units(["THE the"]).hash_U.tolist()[1]


SLOW = [
    ["The", "cat", "s"], [], ["naïve_1", "ΟΔΟΣ"], ["日", "本", "語", "text", "x", "y"], ["ก", "็", "हिन्दी"],
]  # fmt: skip


def test_short_and_empty_texts(tmp_path: Path) -> None:
    a, b, c, d = dedup.signatures(["one two", "One, two!", "", "one two three"])
    assert (a == b).all() and not (a == c).any() and not (a == d).any()
    many = "\n".join(text(0, 3000) for _ in range(3))
    assert (dedup.signatures([many]) == dedup.signatures(["x", many, "y"])[1]).all()


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from caravan.data.dedup import signatures;print(signatures(['a b c d e f', '你好'])[:, :9].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(dedup.signatures(["a b c d e f", "你好"])[:, :9].tolist())


def by_level(values: np.ndarray) -> list[int]:
    """How many are at least 0.8, at least 0.5, and below."""
    return [int(n) for n in (sum(values >= 0.8), sum((values >= 0.5) & (values < 0.8)), sum(values < 0.5))]


@pytest.mark.parametrize(("similarity", "least"), [(0.75, (0.85, 0.8)), (0.8, (0.9, 0.8))])
def test_real_pages_by_true_similarity(
    kit: Path, tmp_path: Path, similarity: float, least: tuple[float, float]
) -> None:
    """133 pages of the Python documentation in two editions, judged by their 5-grams: those well above the
    threshold are found, those well below are not, and no page takes another page's edition."""
    lines = (kit / "dedup" / "python_docs_38_vs_313_en.jsonl").read_text().splitlines()
    pages = [json.loads(line) for line in lines]
    texts = [page[side] for page in pages for side in ("v38", "v313")]
    true = np.array([jaccard(grams(p["v38"]), grams(p["v313"])) for p in pages])
    segments = np.array([page["segment_jaccard"] for page in pages])
    assert (by_level(segments), by_level(true)) == ([22, 53, 58], [40, 51, 42])
    pairs = {frozenset(p) for p in found(tmp_path, texts, similarity).items()}
    hit = np.array([frozenset((2 * k, 2 * k + 1)) in pairs for k in range(len(pages))])
    assert sum(hit) == len(pairs), "a page was taken for another page"
    near = true >= similarity
    recall, precision = (hit & near).sum() / near.sum(), (hit & near).sum() / hit.sum()
    assert hit[true >= similarity + 0.1].all() and not hit[true < similarity - 0.15].any()
    assert recall >= least[0] and precision >= least[1], (recall, precision)
    assert sum(hit[segments >= 0.8]) >= 21 and sum(hit[segments < 0.5]) <= 2, "by paragraphs in common"
    signature = dedup.signatures(texts)
    errors = (signature[::2] == signature[1::2]).mean(axis=1) - true
    assert np.sqrt(np.mean(errors**2)) < 1.2 * np.sqrt(np.mean(true * (1 - true) / 112))
    print(f"recall {recall:.3f} precision {precision:.3f} pairs {near.sum()} found {hit.sum()}")


def test_words_go_together_with_their_accents() -> None:
    assert len(units(["e\u0301te\u0301"], WORDS).hash_U) == 1


def test_the_curve_of_every_setting_can_be_shown() -> None:
    """RefinedWeb's 450 bands of 20 too, whose ways to agree no float holds; small ones as by the formula."""
    wide = dedup.Setting(bands=450, rows=20)
    found = [point["found"] for point in wide.curve()]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1
    assert abs(wide.agree(0.75) - 0.5) < 0.01  # half of a symmetric bell
    for setting in (dedup.Setting(), dedup.Setting(bands=3, rows=2, similarity=0.5)):
        k, need = setting.places, math.ceil(setting.similarity * setting.places)
        for s in (0.3, 0.6, 0.75, 0.95):
            exact = sum(math.comb(k, n) * s**n * (1 - s) ** (k - n) for n in range(need, k + 1))
            assert abs(setting.agree(s) - exact) < 1e-9
        assert setting.agree(1.0) == 1 and setting.agree(0.0) == 0
