"""Saving without holding up training: a snapshot in memory, then writing on a thread.

The training thread only copies tensors to CPU memory. One save is in flight at a time; a new one waits for the last.
A failing disk does not stop training at once: three failed saves do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .checkpoint import Manifest, commit
from .errors import NumericStop, OutputLost, UserError
from .files import dump_json, write_tensors
from .retention import prune

MAX_FAILED_SAVES = 3


def tensor_file(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    """Writer of a safetensors file that refuses numbers which are not finite."""

    def write(path: Path) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NumericStop(
                    f"{name} holds numbers that are not finite: not saved; the last checkpoint is untouched"
                )
        write_tensors(path, tensors)

    return write


def snapshot(tensors: dict[str, torch.Tensor], memory: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Independent CPU copies: training may go on while they are written. They take the place of earlier copies in
    `memory` where these fit: pages that are touched for the first time take about as long again as the copy."""
    copies = {}
    for name, tensor in tensors.items():
        room = memory.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = room.copy_(tensor.detach())
    return copies


class Saver:
    """Commits snapshots to one folder, newest last, and prunes old ones once a newer one is in place."""

    def __init__(
        self,
        checkpoint_dir: Path,
        run_id: str,
        keep_last: int,
        on_saved: Callable[[Manifest, float, float, list[str]], None],
        on_failed: Callable[[int, Exception], None],
    ):
        self.folder, self.run_id, self.keep_last = Path(checkpoint_dir), run_id, keep_last
        self.on_saved, self.on_failed = on_saved, on_failed
        self.failures = 0
        self._copies: dict[str, dict[str, torch.Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(
        self,
        name: str,
        step: int,
        small_files: dict[str, bytes],
        tensors: dict[str, dict],
        state: dict,
        facts: dict,
        best_step: int | None,
    ) -> None:
        """Copy `tensors` ({file: {name: tensor}}) and start writing. Raises what the previous save ran into.

        `on_saved` is told how many seconds the writing took and how many of them training was held up here."""
        started = time.monotonic()
        self.wait()
        self._copies = copies = {
            file: snapshot(group, self._copies.get(file, {})) for file, group in tensors.items()
        }
        files = dict(small_files) | {"state.json": dump_json(state)}
        files |= {file: tensor_file(group) for file, group in copies.items()}
        blocked = time.monotonic() - started
        self._thread = threading.Thread(
            target=self._write,
            args=(name, step, files, facts, best_step, blocked),
            name="checkpoint",
            daemon=False,
        )
        self._thread.start()

    def _write(
        self, name: str, step: int, files: dict, facts: dict, best_step: int | None, blocked: float
    ) -> None:
        started = time.monotonic()
        try:
            manifest = commit(self.folder, name, files, self.run_id, step, facts)
            self.failures = 0
            removed, problem = [], None
            try:
                removed = prune(self.folder, self.keep_last, best_step, manifest)
            except OSError as error:  # the new checkpoint is in place all the same
                problem = OSError(
                    error.errno, f"saved, but older checkpoints could not be removed: {error.strerror}"
                )
            self.on_saved(manifest, time.monotonic() - started, blocked, removed)
            if problem:
                self.failed(step, problem)
        except UserError as error:
            self._error = error
        except (
            Exception
        ) as error:  # full or failing disk, or what a writer makes of it: training goes on, bounded
            self.failed(step, error)

    def failed(self, step: int, error: Exception) -> None:
        """Count a save (or the tidying after it) that did not work; too many in a row end the run at the next `wait`."""
        self.failures += 1
        self.on_failed(step, error)
        if self.failures >= MAX_FAILED_SAVES:
            reason = getattr(error, "strerror", None) or error
            self._error = OutputLost(
                f"{self.failures} saves in a row failed ({reason}); the last good checkpoint in {self.folder} is untouched: free some space and run the same command again"
            )

    def wait(self) -> None:
        """Until nothing is being written. Raises the error of a save that must stop the run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
