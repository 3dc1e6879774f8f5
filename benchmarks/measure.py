"""How it is measured: alternating windows, medians, memory of a process of its own, the device's roofs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from .contenders import DTYPES, Job, synchronize

ROOF_SECONDS = 1.0


def alternating(names: list[str], windows: int) -> list[str]:
    """A B B A A B B A ...: each name `windows` times; a slow drift of the machine falls on all alike."""
    return [name for i in range(windows) for name in (names if i % 2 == 0 else names[::-1])]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "windows": len(values),
    }


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process now, or its peak (`VmHWM`); `getrusage` would include the parent's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


class PeakMemory:
    """Peak bytes from construction to `read()`: allocated on a GPU, resident in this process on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = 0 if device.type == "cuda" else resident_bytes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int:
        """On a CPU above what the process held at construction: libraries are no part of it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_bytes("VmHWM") - self.before


def in_fresh_process(arguments: list[str]) -> dict:
    """Run this package with other arguments in a process of its own; returns the JSON line it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks {' '.join(arguments)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def best_rate(
    work: Callable[[], object], amount: float, device: torch.device, seconds: float = ROOF_SECONDS
) -> float:
    """`amount` over the shortest time that `work` took in about `seconds`."""
    work()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, seconds_of(work, device))
    return amount / best


def gemm_roof(
    device: torch.device, dtype: str, size: int | None = None, seconds: float = ROOF_SECONDS
) -> float:
    """FLOP/s of a large square product in `dtype`: what this device sustains."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    b, out = torch.randn_like(a), torch.empty_like(a)
    return best_rate(lambda: torch.mm(a, b, out=out), 2.0 * size**3, device, seconds)


def bandwidth_roof(device: torch.device) -> float:
    """Bytes/s of reading half a gigabyte (about the 135M's fp32 weights) in a matrix-vector product."""
    matrix = torch.randn(11585, 11585, device=device)
    vector, out = torch.randn(11585, device=device), torch.empty(11585, device=device)
    return best_rate(lambda: torch.mv(matrix, vector, out=out), float(matrix.nbytes), device)


def roofs(job: Job) -> dict[str, float]:
    """GEMM FLOP/s in fp32 and in the job's dtype, and the memory bandwidth in bytes/s."""
    rates = {
        f"gemm_{dtype}_flops_per_second": gemm_roof(job.device, dtype)
        for dtype in dict.fromkeys(("fp32", job.dtype if job.task == "train" else "fp32"))
    }
    return rates | {"memory_bytes_per_second": bandwidth_roof(job.device)}
