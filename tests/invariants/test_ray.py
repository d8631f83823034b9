"""Steps on a local Ray cluster of several workers, one of which is killed: the same bytes come out."""

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest

from caravan import stage
from caravan.data import shards as shard_files
from caravan.data import steps
from caravan.data.pool import mapped
from caravan.stage import Runtime
from caravan.stages import corpus, shards, signals, tokenizer
from caravan.store import Artefact, Store
from caravan.types import UserError

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs the extra `ray`")


class DieOnce:
    """Work whose first batch kills the process that was to do it."""

    def __init__(self, work: Callable[[Any], Any], flag: Path) -> None:
        self._work, self._flag = work, flag

    def __call__(self, batch: Any) -> Any:
        try:
            os.close(os.open(self._flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return self._work(batch)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A head and two more nodes, one worker each."""
    from ray.cluster_utils import Cluster

    store = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={**store, "include_dashboard": False})
    for _ in range(2):
        made.add_node(**store)
    made.wait_for_nodes()
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()
    made.shutdown()


def run(folder: Path, rt: Runtime) -> dict[str, Artefact]:
    """raw -> corpus -> tokenizer, shards, signals in a store of its own."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(500)]
    texts = [" ".join(rng.choices(words, k=100)) for _ in range(300)]
    texts[200] = texts[100]
    folder.mkdir()
    (folder / "raw.jsonl").write_bytes(b"".join(orjson.dumps({"text": t}) + b"\n" for t in texts))
    store = Store(folder / "store")
    made = {
        "corpus": stage.execute(
            store, "corpus", corpus.Config(), {"raw": store.add(folder / "raw.jsonl")}, rt
        )
    }
    made["tokenizer"] = stage.execute(store, "tokenizer", tokenizer.Config(vocab=400), made)
    made["shards"] = stage.execute(store, "shards", shards.Config(), dict(made), rt)
    given = {"corpus": made["corpus"]}
    made["signals"] = stage.execute(store, "signals", signals.Config(families=("gopher",)), given, rt)
    return made


def test_workers_may_die_and_nothing_changes(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "item_batches", partial(steps.item_batches, most=20_000))
    monkeypatch.setattr(shard_files, "CHUNK_BYTES", 20_000)
    plain = run(tmp_path / "plain", Runtime(threads=1))
    pooled = run(tmp_path / "pooled", Runtime(threads=2))
    judged, encode = corpus.judged, shard_files.Encode
    flags = [tmp_path / "judge", tmp_path / "encode"]
    monkeypatch.setattr(corpus, "judged", lambda *a: DieOnce(judged(*a), flags[0]))
    monkeypatch.setattr(shard_files, "Encode", lambda *a: DieOnce(encode(*a), flags[1]))
    clustered = run(tmp_path / "ray", Runtime(threads=3, engine="ray"))
    assert all(flag.exists() for flag in flags), "nobody was killed"
    assert ray.is_initialized(), "a cluster that was there before stays"
    for name in plain:
        assert plain[name].id == pooled[name].id == clustered[name].id, name


def test_order_errors_and_an_early_end(cluster: None) -> None:
    assert list(mapped(lambda b: b * b, range(40), 3, "ray")) == [k * k for k in range(40)]

    def complain(batch: int) -> int:
        if batch == 3:
            raise UserError("no threes")
        return batch

    with pytest.raises(UserError, match="no threes"):
        list(mapped(complain, range(9), 3, "ray"))
    answers = mapped(lambda b: b, iter(range(10**9)), 3, "ray")
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    answers.close()
