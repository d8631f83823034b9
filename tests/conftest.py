"""Shared fixtures. One thread per test process: the tests are many and small."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def serve() -> Iterator[Callable[[Any], Any]]:
    """Start ASGI apps on free ports, as many as a test needs; they end with it."""
    from serving import Server

    running: list[Server] = []

    def start(app: Any) -> Server:
        running.append(Server(app))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def build(serve: Callable[[Any], Any]) -> Iterator[Callable[..., Any]]:
    """Makes servers with a scripted engine, a worker and a feedback store of their own."""
    from serving import houses

    yield from houses(serve)


@pytest.fixture
def home(build: Callable[..., Any]) -> Any:
    """One such server, as it is by default."""
    return build()
