"""MinHash estimates Jaccard as well as theory says, and clusters keep their first."""

import subprocess
import sys

import numpy as np

from caravan.data.dedup import GRAM, WordHashes, char_hashes, near_duplicates, signature
from caravan.data.permute import mix


def units(first: int, count: int) -> np.ndarray:
    return np.array([mix(7, i) for i in range(first, first + count)], np.uint64)


def test_error_is_what_theory_says() -> None:
    """Root mean square error of the estimate near sqrt(J(1-J)/112)."""
    for shift in (50, 120):
        errors = []
        for trial in range(30):
            a, b = units(10_000 * trial, 500), units(10_000 * trial + shift, 500)
            grams = 500 - GRAM + 1
            true = (grams - shift) / (grams + shift)
            errors.append(float(np.mean(signature(a) == signature(b))) - true)
        theory = (true * (1 - true) / 112) ** 0.5
        rms = float(np.sqrt(np.mean(np.square(errors))))
        assert 0.6 * theory < rms < 1.5 * theory
        assert abs(float(np.mean(errors))) < 3 * theory / 30**0.5


def test_planted_near_duplicates_are_found_and_the_first_stays() -> None:
    texts = [units(1000 * k, 300) for k in range(40)]
    texts[7] = np.concatenate([texts[3][:290], units(90_000, 10)])
    texts[9] = np.concatenate([units(80_000, 8), texts[3][8:]])
    texts[30] = texts[20].copy()
    assert near_duplicates([signature(t) for t in texts], 0.75) == {7: 3, 9: 3, 30: 20}


def test_half_alike_is_not_near() -> None:
    base = units(0, 300)
    half = np.concatenate([base[:150], units(5000, 150)])
    assert near_duplicates([signature(base), signature(half)], 0.75) == {}


def test_meeting_in_a_band_is_not_enough() -> None:
    a, b = signature(units(0, 300)), signature(units(5000, 300))
    b[:8] = a[:8]
    assert near_duplicates([a, b], 0.75) == {}
    assert near_duplicates([a, b], 0.05) == {1: 0}


def test_numbers_are_not_blurred() -> None:
    """Two tables of sums are two texts."""
    hashes = WordHashes()
    a = hashes([w for i in range(60) for w in (str(i), "plus", str(i + 3), "is", str(2 * i + 3))])
    b = hashes([w for i in range(90, 150) for w in (str(i), "plus", str(i - 85), "is", str(2 * i - 85))])
    assert near_duplicates([signature(a), signature(b)], 0.75) == {}


def test_characters_are_the_units_of_chinese() -> None:
    text = "学而时习之不亦说乎有朋自远方来不亦乐乎人不知而不愠不亦君子乎" * 3
    near = text.replace("学而", "习而", 1)
    assert near_duplicates([signature(char_hashes(text)), signature(char_hashes(near + "。！"))], 0.75) == {
        1: 0
    }
    assert len(char_hashes("学，而 时")) == 3


def test_short_and_empty_texts() -> None:
    assert signature(units(0, 0)).shape == signature(units(0, 3)).shape == (112,)
    assert near_duplicates([signature(units(0, 3)), signature(units(0, 3))], 0.75) == {1: 0}
    assert near_duplicates([signature(units(0, 3)), signature(units(1, 3))], 0.75) == {}
    assert near_duplicates([], 0.75) == {}


def test_word_hashes_are_the_same_in_every_process() -> None:
    code = "from caravan.data.dedup import WordHashes; print(WordHashes()(['a', '你好']).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(WordHashes()(["a", "你好"]).tolist())


def test_forgetting_words_changes_nothing() -> None:
    small, large = WordHashes(most=2), WordHashes()
    for words in (["a", "b", "c"], ["d", "a"], ["c", "c"]):
        assert small(words).tolist() == large(words).tolist()
