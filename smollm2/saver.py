"""Saving without holding up training: a snapshot in memory, then writing and tidying on a thread.

The training thread only copies tensors to CPU memory. One save is in flight at a time; a new one waits for
the last. A failing disk does not stop training at once: three failed saves in a row do.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .checkpoint import Manifest, candidates, commit, prune
from .errors import NumericStop, OutputLost, UserError
from .files import Content, strict_json, write_tensors

MAX_FAILED_SAVES = 3


class Saver:
    """Owner of a run's checkpoint folder. `newest` is the manifest of the newest whole checkpoint in it;
    `events` say what became of each save, as (step, words of a log line)."""

    def __init__(self, folder: Path, run_id: str, keep_last: int, newest: Manifest | None = None):
        self.folder, self.run_id, self.keep_last, self.newest = Path(folder), run_id, keep_last, newest
        self.events: deque[tuple[int, dict]] = deque()
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._failures = 0

    def save(
        self, name: str, step: int, files: dict[str, bytes], tensors: dict[str, dict[str, torch.Tensor]],
        facts: dict, best_step: int | None,
    ) -> None:  # fmt: skip
        """Copy `tensors` ({file: {name: tensor}}) and start writing. Raises as `wait` does."""
        began = time.monotonic()
        self.wait()
        for file, group in tensors.items():
            _copy(group, self._memory.setdefault(file, {}))
        contents = files | {file: partial(_write_finite, group) for file, group in self._memory.items()}
        blocked = time.monotonic() - began  # for so long training stood still
        self._writing = self._thread.submit(self._write, name, step, contents, facts, best_step, blocked)

    def _write(
        self, name: str, step: int, contents: dict[str, Content], facts: dict, best_step: int | None,
        blocked: float,
    ) -> None:  # fmt: skip
        began, what = time.monotonic(), "save_failed"
        try:
            self.newest = commit(self.folder, name, contents, self.run_id, step, facts, best_step)
            self._failures, what = 0, "tidying_failed"
            seconds = {"seconds": round(time.monotonic() - began, 3), "blocked": round(blocked, 4)}
            saved = {"event": "saved", "name": name, "bytes": self.newest.bytes} | seconds
            self.events.append((step, saved))
            for removed in prune(self.folder, self.keep_last, best_step, self.newest):
                self.events.append((step, {"event": "removed", "name": removed}))
        except UserError:
            raise
        except Exception as error:  # of the disk, or what a writer makes of it: training goes on, bounded
            reason = getattr(error, "strerror", None) or str(error)
            self.events.append((step, {"event": what, "reason": reason}))
            self._failures += 1
            if self._failures >= MAX_FAILED_SAVES:
                lost = f"{self._failures} saves in a row failed in {self.folder} ({reason})"
                advice = "free some space and run the same command again"
                raise OutputLost(f"{lost}; {self.last_good()}: {advice}") from None

    def last_good(self) -> str:
        step = self.newest and self.newest.step
        return "nothing is saved yet" if step is None else f"the checkpoint of step {step} is untouched"

    def wait(self, for_step: int | None = None) -> None:
        """Until nothing is being written. Raises what must stop the run, and `OutputLost` when the last save
        was to be that `for_step` and did not come about."""
        if self._writing:  # a Ctrl-C while it waits here leaves it set: `close` waits again
            error, self._writing = self._writing.exception(), None
            if error:
                raise error
        if for_step is not None and (self.newest is None or self.newest.step != for_step):
            lost = f"step {for_step} could not be saved in {self.folder} (reason above); {self.last_good()}"
            raise OutputLost(f"{lost}: free or repair the disk and run the same command again")

    def copy_newest(self, name: str) -> None:
        """The newest checkpoint under another name, too: a run that has reached its end already."""
        source = self.newest
        files = {file: partial(shutil.copyfile, source.folder / file) for file in source.files}
        best = strict_json((source.folder / "state.json").read_bytes(), "state.json")["best"].get("step")
        self.newest = commit(self.folder, name, files, source.run_id, source.step, source.facts, best)


def _copy(tensors: dict[str, torch.Tensor], memory: dict[str, torch.Tensor]) -> None:
    """Into `memory` of the CPU: training may go on while that is written. It is kept from save to save: pages
    that are touched for the first time take about as long again as the copy."""
    for name, tensor in tensors.items():
        if name not in memory:
            pinned = {"pin_memory": tensor.is_cuda}
            memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", **pinned)
        memory[name].copy_(tensor.detach())


def _write_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file; refuses numbers that are not finite."""
    for name, tensor in tensors.items():
        # by NumPy: torch would start threads for this thread, too, and with more of them than cores OpenMP no
        # longer spins while it waits: from the first save on, each step of nano took 0.20 s instead of 0.145
        if tensor.is_floating_point() and not np.isfinite(tensor.numpy()).all():
            what = f"{name} holds numbers that are not finite"
            raise NumericStop(f"{what}: not saved; earlier checkpoints stay as they are")
    write_tensors(path, tensors)


def check_space(checkpoint_dir: Path, bytes_each: int, count: int, say: Callable[[str], None]) -> None:
    """Before training: can the disk hold `count` checkpoints of `bytes_each`, those that lie there included?

    A warning when it cannot; raises `OutputLost` when there is no room for even a good one and the next.
    """
    usage = shutil.disk_usage(checkpoint_dir)
    if usage.total == 0:  # some network and FUSE mounts do not tell
        return
    here = sum(path.stat().st_size for folder in candidates(checkpoint_dir) for path in folder.iterdir())
    free, each = f"{usage.free / 1e6:,.1f} MB free for {checkpoint_dir}", f"{bytes_each / 1e6:,.1f} MB"
    words = f"{free}, and one checkpoint takes {each}"
    missing = (bytes_each if here else 2 * bytes_each) - usage.free  # the last good one, and the next
    if missing > 0:
        advice = f"free {missing / 1e6:,.1f} MB, or choose another --output_dir or a smaller model"
        raise OutputLost(f"{words}: no room for the next one beside the last good one; {advice}")
    missing = count * bytes_each - here - usage.free
    if missing > 0:
        advice = f"free {missing / 1e6:,.1f} MB or lower train.keep_last"
        say(f"warning: {words}: the {count} that a whole run keeps do not fit; {advice}")
