"""What a machine can hold, and settings of the process that are put back."""

import contextlib
import re
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from smollm2 import plan as planning
from smollm2.config import RunConfig
from smollm2.device import (
    choose_precision,
    fingerprint,
    kept_memory,
    memory_bytes,
    repeatable_sums,
    sharing_cores,
)
from smollm2.errors import ConfigError
from smollm2.settings import load_config

GIB = 2**30
UNLIMITED = 9223372036854771712  # what version 1 writes for "no limit"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"memory.max": 2 * GIB}, 2),  # version 2, seen from inside the container
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 3 * GIB}, 3),  # the group around it
        ("0::/a/b\n", {"a/b/memory.max": 2 * GIB, "a/memory.max": 3 * GIB}, 2),
        # version 1
        ("5:cpu:/x\n4:memory:/docker/0123\n0::/\n", {"memory/memory.limit_in_bytes": 2 * GIB}, 2),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": 2 * GIB}, 2),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED}, 64),
        ("0::/\n", {"memory.max": "max"}, 64),
        ("0::/\n", {}, 64),
        (None, {}, 64),  # not Linux
    ],
)
def test_a_containers_memory_is_what_counts(tmp_path, monkeypatch, groups, files, expected):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    if groups:
        (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(f"{text}\n")
    assert memory_bytes(str(tmp_path / "cgroup"), str(tmp_path / "fs")) == expected * GIB


@pytest.mark.parametrize(
    ("gib", "device", "batch", "needed"),
    [
        (3.0, "cpu", 16, "134,515,008 parameters and a train.batch_size of 16 x 512 tokens need 5.5 GiB"),
        (6.0, "cpu", 16, None),
        (0.2, "cpu", 16, "need 5.5 GiB"),  # not even the weights fit: the whole need is told all the same
        (2.0, "cuda", 16, None),  # gradients and moments are on the GPU
        (1.0, "cuda", 2**18, "262,144 x 512 tokens need 1.8 GiB"),
    ],
)
def test_what_cannot_fit_is_refused_with_both_figures(monkeypatch, gib, device, batch, needed):
    monkeypatch.setattr(planning, "memory_bytes", lambda: int(gib * GIB))
    config = load_config("smollm2-135m", **{"train.batch_size": batch})
    words = f"{re.escape(needed or '')} .* has {gib} GiB: choose a smaller train.micro"
    with pytest.raises(ConfigError, match=words) if needed else contextlib.nullcontext():
        planning.check_memory(config, torch.device(device), is_half=True)


def test_repeatable_sums_leave_the_process_as_it_was_and_fill_no_memory():
    def settings():
        fills = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), fills

    before = settings()
    with repeatable_sums(True):
        assert settings() == (True, False)
    with repeatable_sums(False):
        assert settings() == before
    with pytest.raises(ZeroDivisionError), repeatable_sums(True):
        raise ZeroDivisionError
    assert settings() == before == (False, True)


def test_a_coarser_matrix_product_is_told_when_a_run_goes_on():
    """Set in an earlier cell, "medium" multiplies fp32 as bf16, on some CPUs as well."""
    facts = (torch.device("cpu"), choose_precision("fp32", torch.device("cpu")), RunConfig())
    before = fingerprint(*facts)
    torch.set_float32_matmul_precision("medium")
    try:
        assert fingerprint(*facts) == before | {"float32_matmul": "medium"} != before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_memory_is_kept_only_where_there_is_a_c_library_to_ask(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", lambda name: name.lower())  # as there, no None
    with kept_memory():
        pass


def teams() -> int:
    return sum(thread.name.startswith("second OpenMP team") for thread in threading.enumerate())


def test_threads_wait_asleep_only_while_others_want_their_cores(monkeypatch):
    others, used, at = 0.0, 0.0, time.monotonic()  # cores; seconds of them, up to `at`

    def use(cores: float) -> None:
        nonlocal others, used, at
        used, at, others = used + others * (time.monotonic() - at), time.monotonic(), cores

    def cpu_times():
        return SimpleNamespace(user=time.process_time() + used + others * (time.monotonic() - at), system=0.0)

    def becomes(count: int) -> bool:
        until = time.monotonic() + 20
        while teams() != count and time.monotonic() < until:
            time.sleep(0.01)
        return teams() == count

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(psutil, "cpu_count", torch.get_num_threads)  # none to spare
    with sharing_cores(every=0.02):
        time.sleep(0.2)
        assert teams() == 0
        for cores in (1.0, 0.0, 1.0):
            use(cores)
            assert becomes(int(cores))
    assert teams() == 0


def test_a_system_that_does_not_tell_of_its_cores_trains_all_the_same(monkeypatch):
    def cpu_times():
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    with sharing_cores(every=0.01):
        time.sleep(0.05)
