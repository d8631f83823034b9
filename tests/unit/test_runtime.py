"""Device, threads and dtype choices."""

from types import SimpleNamespace

import pytest
import torch

from caravan.systems import runtime
from caravan.types import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore_torch():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_setup_seeds_and_says_what_it_chose():
    rt = SimpleNamespace(device="cpu", threads=1)
    machine = runtime.setup(rt, seed=4, precision="fp32")
    first = torch.rand(2)
    runtime.setup(rt, seed=4, precision="fp32")
    assert torch.equal(first, torch.rand(2))
    assert (machine.device, machine.dtype, machine.threads, machine.rank, machine.world) == (
        CPU,
        torch.float32,
        1,
        0,
        1,
    )
    assert torch.are_deterministic_algorithms_enabled()


def test_unknown_and_absent_devices_are_sentences():
    with pytest.raises(UserError, match="no device called"):
        runtime.setup(SimpleNamespace(device="toaster", threads=1))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            runtime.setup(SimpleNamespace(device="cuda", threads=1))


def test_auto_is_bf16_only_where_it_is_right_and_fast(monkeypatch):
    for right in (True, False):
        for fast in (True, False):
            monkeypatch.setattr(runtime, "bf16_is_right", lambda device, right=right: right)
            monkeypatch.setattr(runtime, "has_fast_bf16", lambda device, fast=fast: fast)
            dtype, reason = runtime.choose_dtype(CPU, "auto")
            assert dtype == (torch.bfloat16 if right and fast else torch.float32) and reason
            assert runtime.choose_dtype(CPU, "fp32")[0] == torch.float32
            if right:
                assert runtime.choose_dtype(CPU, "bf16")[0] == torch.bfloat16
            else:
                with pytest.raises(UserError, match="wrong products"):
                    runtime.choose_dtype(CPU, "bf16")


def test_the_self_test_notices_wrong_products(monkeypatch):
    assert runtime.bf16_is_right(CPU)
    real = torch.Tensor.__matmul__

    def wrong(a, b):
        return real(a, b) * (1.05 if a.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert not runtime.bf16_is_right(CPU)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("200000 100000", 2), ("50000 100000", 1), ("junk", None)]
)
def test_cgroup_quota(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert runtime.cgroup_cores(tmp_path) == cores


def test_cgroup_v1_and_none(tmp_path):
    assert runtime.cgroup_cores(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert runtime.cgroup_cores(tmp_path) == 3


def test_omp_num_threads_is_respected(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert runtime.available_threads() == 1
