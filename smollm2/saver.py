"""Saving without holding up training: a snapshot in memory, then writing and tidying on a thread.

The training thread only copies tensors to CPU memory. One save is in flight at a time; a new one waits for
the last. A failing disk does not stop training at once: three failed saves in a row do.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoint import Manifest, candidates, commit, prune
from .errors import NumericStop, OutputLost, UserError
from .files import write_tensors

MAX_FAILED_SAVES = 3


@dataclass
class Save:
    """One save and what became of it. `blocked`: the seconds of `seconds` that training stood still."""

    step: int
    blocked: float = 0.0
    seconds: float = 0.0
    manifest: Manifest | None = None  # None: it failed
    removed: list[str] = field(default_factory=list)
    problem: Exception | None = None


class Saver:
    """Owner of a run's checkpoint folder. `newest` is the manifest of the newest whole checkpoint in it."""

    def __init__(self, folder: Path, run_id: str, keep_last: int, newest: Manifest | None = None):
        self.folder, self.run_id, self.keep_last, self.newest = Path(folder), run_id, keep_last, newest
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._finished: deque[Save] = deque()
        self._failures, self._error = 0, None

    def save(
        self,
        name: str,
        step: int,
        files: dict[str, bytes],
        tensors: dict[str, dict[str, torch.Tensor]],
        facts: dict,
        best_step: int | None,
    ) -> None:
        """Copy `tensors` ({file: {name: tensor}}) and start writing. Raises what must stop the run; see
        `wait`."""
        began = time.monotonic()
        self.wait()
        self._memory = {file: _copies(group, self._memory.get(file, {})) for file, group in tensors.items()}
        contents = files | {file: _tensor_writer(group) for file, group in self._memory.items()}
        save = Save(step, blocked=time.monotonic() - began)
        arguments = (save, name, contents, facts, best_step)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def _write(self, save: Save, name: str, contents: dict, facts: dict, best_step: int | None) -> None:
        began = time.monotonic()
        try:
            save.manifest = self.newest = commit(self.folder, name, contents, self.run_id, save.step, facts)
            self._failures = 0
            save.removed = prune(self.folder, self.keep_last, best_step, self.newest)
        except UserError as error:
            self._error = error
        except (
            Exception
        ) as error:  # full or failing disk, or what a writer makes of it: training goes on, bounded
            self.failed(save, error)
        save.seconds = time.monotonic() - began
        self._finished.append(save)

    def refuse(self, step: int, error: Exception) -> None:
        """Count a save that could not even begin."""
        self.wait()
        self.failed(save := Save(step), error)
        self._finished.append(save)

    def failed(self, save: Save, error: Exception) -> None:
        """Count a save (or the tidying after it) that did not work; too many in a row end the run at the next
        `wait`."""
        save.problem, self._failures = error, self._failures + 1
        if self._failures >= MAX_FAILED_SAVES:
            reason = getattr(error, "strerror", None) or error
            self._error = OutputLost(
                f"{self._failures} saves in a row failed in {self.folder} ({reason}); {self.last_good()}: "
                "free some space and run the same command again"
            )

    def last_good(self) -> str:
        return (
            f"the checkpoint of step {self.newest.step} is untouched"
            if self.newest
            else "nothing is saved yet"
        )

    def finished(self) -> list[Save]:
        """The saves that ended since this was last asked."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def wait(self) -> None:
        """Until nothing is being written. Raises the error of a save that must stop the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def expect(self, step: int) -> None:
        """Raises `OutputLost` when the last save did not come about."""
        if self.newest is None or self.newest.step != step:
            raise OutputLost(
                f"step {step} could not be saved in {self.folder} (reason above); {self.last_good()}: free "
                "or repair the disk and run the same command again"
            )

    def copy_newest(self, name: str) -> None:
        """The newest checkpoint under another name, too: a run that has reached its end already."""
        source = self.newest
        files = {
            file: lambda path, file=file: shutil.copyfile(source.folder / file, path) for file in source.files
        }
        self.newest = commit(self.folder, name, files, source.run_id, source.step, source.facts)


def _copies(tensors: dict[str, torch.Tensor], memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Independent CPU copies: training may go on while they are written. They take the place of earlier
    copies in `memory` where these fit: pages that are touched for the first time take about as long again as
    the copy."""
    copies = {}
    for name, tensor in tensors.items():
        room = memory.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = room.copy_(tensor.detach())
    return copies


def _tensor_writer(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Writer of a safetensors file that refuses numbers which are not finite."""

    def write(path: Path) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NumericStop(
                    f"{name} holds numbers that are not finite: not saved; earlier checkpoints stay as they "
                    "are"
                )
        write_tensors(path, tensors)

    return write


def check_space(checkpoint_dir: Path, bytes_each: int, count: int, say: Callable[[str], None]) -> None:
    """Before training: can the disk hold `count` checkpoints of `bytes_each`, those that lie there included?

    A warning when it cannot; raises `OutputLost` when there is no room for even a good one and the next.
    """
    usage = shutil.disk_usage(checkpoint_dir)
    if usage.total == 0:  # some network and FUSE mounts do not tell
        return
    here = [path.stat().st_size for folder in candidates(checkpoint_dir) for path in folder.iterdir()]
    free, each = usage.free / 1e6, bytes_each / 1e6
    words = f"{free:,.1f} MB free for {checkpoint_dir}, and one checkpoint takes {each:,.1f} MB"
    least = bytes_each if here else 2 * bytes_each  # the last good one, and the next
    if usage.free < least:
        missing = (least - usage.free) / 1e6
        raise OutputLost(
            f"{words}: no room for the next one beside the last good one; free {missing:,.1f} MB, or choose "
            "another --output_dir or a smaller model"
        )
    if (missing := (count * bytes_each - sum(here) - usage.free) / 1e6) > 0:
        say(
            f"warning: {words}: the {count} that a whole run keeps do not fit; free {missing:,.1f} MB or "
            "lower train.keep_last"
        )
