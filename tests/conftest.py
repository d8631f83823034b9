"""Shared fixtures. One thread per test process: the tests are many and small."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("caravan", deadline=None)
settings.load_profile("caravan")


@pytest.fixture(scope="session")
def kit() -> Path:
    """The folder of real test data kept beside the checkout, or CARAVAN_KIT; the test is skipped without
    it."""
    root = Path(os.environ.get("CARAVAN_KIT", Path(__file__).parents[2] / "shared" / "kit"))
    if not (root / "README.md").exists():
        pytest.skip("the data kit is not beside the checkout (set CARAVAN_KIT)")
    return root
