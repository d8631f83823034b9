"""docs/data/scale.md says what bench/results say."""

import pytest

from tests import data_cost


def test_the_page_is_what_the_results_say() -> None:
    hint = "write it anew with `python -m tests.data_cost`"
    assert data_cost.PAGE.read_text() == data_cost.page(), hint


def test_hours_and_dollars_of_made_up_results() -> None:
    """One MB/s is a million seconds per terabyte: 277.8 core-hours."""
    assert data_cost.core_hours(1) == pytest.approx(277.78, abs=0.01)
    found = {
        "signals": {"ours_mb_per_second": 20.0},
        "dedup": {
            "minhash_with_clusters_gb_per_hour": 100.0, "decontaminate_mb_per_second": 50.0,
            "megabytes": 20.0, "substring_tokens": 4_000_000,
            "substring_mtok_per_second": {"with_reading": 4.0},
        },
        "memory": {
            "documents": 5, "growth": 10, "memory_mb": 2, "peak_mb": {"corpus": {"1x": 60.0, "10x": 63.0}},
        },
    }  # fmt: skip
    page = data_cost.page(0.1, found)
    assert "| signals, every family | text | 20.0 | 13.9 | 1.39 |" in page
    assert "| dedup, exact and near | text | 27.8 | 10.0 | 1.00 |" in page
    assert "| dedup, copied spans | text | 20.0 | 13.9 | 1.39 |" in page
    assert "| decontaminate | text | 50.0 | 5.6 | 0.56 |" in page
    for step in ("filter, signals given", "pii", "tokenise and shard"):
        assert f"| {step} | text | not measured | not measured | not measured |" in page
    assert "| corpus | 60.0 | 63.0 | 1.05 |" in page
    assert "Not measured" in data_cost.page(0.1, {})
