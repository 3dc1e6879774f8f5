"""What the items of `python -m benchmarks gpu` stand on: sizes, processes, one JSON line a result."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from smollm2 import SmolLM2Config, load_config

Pair = tuple[int, int]  # rows, tokens of a row


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    preset: str  # of the runs of `train`
    settings: dict[str, object]  # laid over the preset
    shapes: tuple[Pair, ...]  # of the speed comparison, the most telling one first
    exact: Pair  # rows x tokens that are compared with fp64
    decode: Pair  # tokens of the prompt, new ones
    roof: int  # side of the square matrices whose product is timed
    seconds: float  # of a timed window, and of a roof
    run: Pair  # batch of a run of `train`
    long_run: Pair
    long_seconds: float
    layers: int  # of the runs whose bits are compared: the same kernels, a smaller checkpoint
    compiles: bool
    patience: float  # times an item's seconds

    @property
    def model(self) -> SmolLM2Config:
        return load_config(self.preset, **self.settings).model


FULL = Scale(
    preset="smollm2-135m",
    settings={},
    shapes=((8, 2048), (16, 512), (8, 512), (32, 2048)),
    exact=(2, 512),
    decode=(32, 128),
    roof=8192,
    seconds=0.8,
    run=(16, 512),
    long_run=(8, 2048),
    long_seconds=150.0,
    layers=6,
    compiles=True,
    patience=1.0,
)
TINY_MODEL = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
TINY_MODEL |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
TINY = Scale(
    preset="nano",
    settings={f"model.{key}": value for key, value in TINY_MODEL.items()},
    shapes=((2, 32), (4, 16)),
    exact=(2, 64),
    decode=(4, 8),
    roof=128,
    seconds=0.02,
    run=(4, 16),
    long_run=(4, 32),
    long_seconds=1.0,
    layers=2,
    compiles=False,  # it would take longer than everything else
    patience=10.0,  # a rehearsal on a busy machine is to be slow, not red
)


class ChildDied(RuntimeError):
    """A process ended without an answer; `exit_code` is negative for a signal, as in `multiprocessing`."""

    def __init__(self, exit_code: int | None, text: str):
        super().__init__(text)
        self.exit_code = exit_code


def in_child(start: str, function: Callable, *args, timeout: float, is_leader: bool = False):
    """What `function(*args)` returns in a process of its own; `start` is "fork" or "spawn".

    Raises `RuntimeError` with type and text of what it raised, and `ChildDied` where it ended without an
    answer or had none after `timeout` seconds. Nothing of it is left running; a leader takes the processes
    that it started with it.
    """
    context = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args, is_leader))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise ChildDied(None, f"no answer after {timeout:.0f} s: killed")
        is_good, answer = receiver.recv()
    except EOFError:  # the pipe closed with nothing in it
        process.join(10)
        raise ChildDied(process.exitcode, f"died with exit code {process.exitcode}") from None
    finally:
        if is_leader:
            with contextlib.suppress(ProcessLookupError):  # it may not have come so far as to lead
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if not is_good:
        raise RuntimeError(answer)
    return answer


def _answer(sender, function: Callable, args: tuple, is_leader: bool) -> None:
    if is_leader:
        os.setpgid(0, 0)
    try:
        answer = True, function(*args)
    except Exception as error:
        answer = False, f"{type(error).__name__}: {error}"
    sender.send(answer)


def _plain(value):
    """JSON has no word for a number that is not finite; ours is its name."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Bench:
    """What an item is given."""

    scale: Scale
    out: Path
    folder: Path  # for the runs; removed at the end
    text: str
    long_text: str
    tokenizer: str
    start: str  # of processes
    facts: dict  # of this machine, in every line
    deadline: float  # on `time.monotonic`, which all processes share

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, item: str, case: str, **facts) -> None:
        """One line that survives whatever comes next."""
        line = {"item": item, "case": case} | facts | self.facts
        with open(self.out, "a") as file:
            file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        words = ", ".join(f"{key} {_short(value)}" for key, value in facts.items())
        print(f"{item}: {case}: {words}"[:400], flush=True)

    def attempt(self, item: str, case: str, work: Callable, *args, needs: float = 0.0):
        """What `work(*args)` returns; None, and a line, where it fails or `needs` more time than is left."""
        if self.left() < needs:
            self.record(item, case, skipped=f"needs {needs:.0f} s, {max(self.left(), 0):.0f} s are left")
            return None
        try:
            return work(*args)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:600]
        # only here the traceback, and with it the memory of what failed, is gone
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.record(item, case, error=text)
        return None

    def case(self, item: str, case: str, work: Callable, *args, needs: float = 0.0) -> dict | None:
        """Record the dictionary that `work(*args)` returns."""
        began = time.monotonic()
        facts = self.attempt(item, case, work, *args, needs=needs)
        if facts is not None:
            self.record(item, case, **facts, seconds=round(time.monotonic() - began, 2))
        return facts

    def child(self, function: Callable, *args):
        return in_child(self.start, function, self, *args, timeout=max(self.left() - 1, 0.1))


def _short(value) -> str:
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(_short, value))}]"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
