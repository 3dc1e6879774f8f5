"""Which device, which precision, and why: one decision, one line that explains it; memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import RunConfig
from .errors import ConfigError
from .parameters import flops_per_token

# What equal sums need of cuBLAS. torch reads it once, at a process's first product on a GPU: set any later, a
# deterministic run behind another one, or behind a measurement of the speed, is refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Precision:
    """Autocast dtype (None: plain fp32), whether gradients need a loss scaler, and the reason in words."""

    name: str
    autocast_dtype: torch.dtype | None
    needs_scaler: bool
    reason: str


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX); else autocast is slower than fp32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: a newer torch may lack them
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens_to_learn_from(config: RunConfig, seconds: float) -> int:
    """In so many seconds of `--minutes`, whose steps are not known yet; the same after a kill, for nothing is
    measured. A core learns from 10,000 a second, a GPU at a quarter of its peak in half precision (1.5 GHz);
    and the cores must have tokenised them (400,000 a second) in a tenth of the time."""
    cores = os.cpu_count() or 1
    learned = 10_000 * cores
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        per_clock = 4096 if facts.major >= 9 else 2048 if (facts.major, facts.minor) == (8, 0) else 1024
        peak = 1.5e9 * per_clock * facts.multi_processor_count
        learned = peak / 4 / flops_per_token(config.model, config.data.sequence_length)
    return int(seconds * min(learned, 400_000 * cores / 10))


def choose_precision(requested: str, device: torch.device) -> Precision:
    """bf16 from compute capability 8.0, fp16 with a loss scaler below (a T4 has no bf16 units:
    `torch.cuda.is_bf16_supported()` says True there because it can emulate), bf16 or fp32 on a CPU by its
    instructions. Raises `ConfigError` for bf16 that would be emulated."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        native, fallback = major >= 8, "fp16"
        why = f"{name} has bf16 units" if native else f"{name} has no bf16 units: fp16 with loss scaling"
    else:
        native, fallback = cpu_has_bf16(), "fp32"
        why = "this CPU multiplies bf16 in hardware" if native else "this CPU has no bf16 instructions"
    chosen, reason = requested, "as asked"
    if requested == "auto":
        chosen, reason = "bf16" if native else fallback, why
    elif requested == "bf16" and not native and device.type == "cuda":
        raise ConfigError(f"train.precision bf16: {name} only emulates it, very slowly; use fp16 or auto")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]
    return Precision(chosen, dtype, chosen == "fp16", reason)


def autocast(precision: Precision, device: torch.device):
    """Autocast context of a precision (a no-op for fp32)."""
    enabled = precision.autocast_dtype is not None
    return torch.autocast(device.type, dtype=precision.autocast_dtype or torch.bfloat16, enabled=enabled)


def inference_dtype(device: torch.device) -> torch.dtype:
    """Weights for sampling: fp32 on a CPU (exact), else the GPU's native half precision."""
    return choose_precision("auto", device).autocast_dtype if device.type == "cuda" else torch.float32


def choose_decoding(requested: str | None, device: torch.device) -> tuple[str, str]:
    """Number format of the weights that write, and why. `auto`: the fastest that costs less than 0.5 % in
    bits per byte (docs/log.md); None: what is compared with others, fp32 on a CPU. Raises `ConfigError` for
    one that the device does not multiply."""
    if device.type == "cuda":
        own = str(inference_dtype(device)).replace("torch.bfloat16", "bf16").replace("torch.float16", "fp16")
        if requested == "int8" or (requested == "bf16" and own != "bf16"):
            raise ConfigError(f"--dtype {requested}: not on {device_name(device)}; expected {own} or fp32")
        return (own, "its half precision") if requested in (None, "auto") else (requested, "as asked")
    # PyTorch's quantized tensors are deprecated; where x86's engine is not, their speed was not measured
    engine = torch.backends.quantized.engine if hasattr(torch, "quantize_per_channel") else "none"
    if requested == "int8" and engine == "none":
        raise ConfigError("--dtype int8: this PyTorch has no int8 product; expected fp32 or bf16")
    if requested != "auto":
        return requested or "fp32", "as asked"
    if engine in ("x86", "fbgemm"):
        return "int8", "fastest here; costs less than 0.5 % in bits per byte"
    return ("bf16", "this CPU multiplies it in hardware") if cpu_has_bf16() else ("fp32", "no int8 here")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def fingerprint(device: torch.device, precision: Precision, config: RunConfig) -> dict[str, str]:
    """What bit-exactness depends on besides the state; compared on resume."""
    cuda, train, micro = device.type == "cuda", config.train, config.train.micro_batch_size
    return {
        "device": device_name(device),
        "torch": torch.__version__.split("+")[0],
        "cuda": str(torch.version.cuda) if cuda else "none",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        "precision": precision.name,
        "compiled": str(train.compile).lower(),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "deterministic": str(train.deterministic or not cuda).lower(),
        # AVX2 and AVX-512 kernels add in different orders
        "cpu_capability": "none" if cuda else torch.backends.cpu.get_cpu_capability(),
        "workers": str(config.run.devices * config.run.num_nodes),
    } | ({"micro_batch": str(micro)} if micro else {})


@contextlib.contextmanager
def repeatable_sums(wanted: bool):
    """Inside it, if `wanted`, a GPU adds in the same order every time: equal steps are equal bits; slower."""
    if not wanted:
        yield
        return
    before, settings = torch.get_deterministic_debug_mode(), torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # else torch fills every empty tensor with NaN, to find reads of what was never written: only time
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = was_filling


@contextlib.contextmanager
def kept_memory():
    """Inside it glibc keeps freed memory for the next step and gives it back at the end. Else each step's
    large tensors are new pages that the kernel clears: a fifth of a step on a CPU (docs/log.md). Other C
    libraries are left alone.
    """
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)  # Windows takes no None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    libc.malloc_trim(0)  # what was freed before
    libc.mallopt(trim_threshold, -1)  # never
    libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        # where glibc's own adjustment, now off, would have ended
        libc.mallopt(trim_threshold, 64 * 2**20)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(mmap_max, 65536)
        libc.malloc_trim(0)


@contextlib.contextmanager
def sharing_cores(every: float = 1.0):
    """Inside it OpenMP's threads sleep while they wait for one another, as long as other programs want the
    cores they run on; it is looked at `every` so many seconds.

    Usually they spin, which is faster where cores are free. Where they are not, one thread spins while the
    one that it waits for has no core: a step of nano took 12 s instead of 0.14 (docs/log.md). GNU's OpenMP
    spins no longer once there are more threads than cores: a second team, idle, on a thread of its own, does
    that and changes no number. Other OpenMPs are left alone.
    """
    import psutil

    free, over = (psutil.cpu_count() or 1) - torch.get_num_threads(), threading.Event()

    def used_by_others() -> float:
        """Seconds of cores, up to now."""
        times = psutil.cpu_times()
        return times.user + getattr(times, "nice", 0) + times.system - time.process_time()

    def watch() -> None:
        team = None
        with contextlib.suppress(OSError, psutil.Error):  # a system that does not tell
            before, at = used_by_others(), time.monotonic()
            while not over.wait(every):
                now, then = used_by_others(), time.monotonic()
                is_shared = (now - before) / (then - at) > free + 0.2  # cores
                before, at = now, then
                if is_shared and team is None:
                    team = ThreadPoolExecutor(1, "second OpenMP team")
                    team.submit(torch.ones, 2**20)  # long enough that all threads fill it
                elif team and not is_shared:
                    team.shutdown()
                    team = None
        if team:
            team.shutdown()

    watcher = threading.Thread(target=watch, name="cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def choose_preset(requested: str) -> tuple[str, str]:
    """`auto` -> the preset this machine can train, and why in one line."""
    if requested != "auto":
        return requested, "as asked"
    if torch.cuda.is_available():
        return "smollm2-135m", f"a GPU is here: {torch.cuda.get_device_name()}"
    return "nano", f"no GPU here ({os.cpu_count()} CPU cores): a small model that trains in minutes"


def memory_bytes(groups: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> int:
    """Memory that this process may use: the machine's, or what a control group (version 2 or 1) leaves it."""
    import psutil

    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):  # there are none but on Linux
        for line in Path(groups).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            is_old = "memory" in controllers  # version 2 names no controllers
            name = "memory.limit_in_bytes" if is_old else "memory.max"
            folder = Path(mounted, "memory" if is_old else "", group.lstrip("/"))
            # groups around it count, too; in a container the host's path leads nowhere, but its end is there
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                    limits.append(int((place / name).read_text()))
    return min(limits)


def free_unused_memory() -> None:
    """Of a GPU, too: what refers to itself, as a compiled block does, waits for Python's collector, which
    comes by the number of objects and does not know how large they are."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU


@contextlib.contextmanager
def plain_defaults():
    """Inside it new tensors are fp32 on the CPU, whatever default an earlier cell of a notebook, or a
    `with torch.device(...)` around the call, has set."""
    dtype = torch.get_default_dtype()
    is_plain = torch.get_default_device().type == "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.nullcontext() if is_plain else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
