"""The folder a run writes to: made, locked and tidied when the run opens, removed again when the run was a mistake."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import OutputLost
from .files import remove_leftovers
from .lock import OutputLock


class OutputFolder:
    """Context manager: makes the folder where it is absent and holds its lock (workers other than the first hold none).

    Raises `OutputLost` where it cannot be made, `BusyError` where another process is writing it.
    """

    def __init__(self, path: str | Path, is_first_worker: bool = True):
        self.path, self.checkpoints = Path(path), Path(path) / "checkpoints"
        self._lock = OutputLock(path) if is_first_worker else contextlib.nullcontext()
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        absent = [path for path in (self.path, *self.path.parents) if not os.path.exists(path)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputLost(
                f"--output_dir {self.path}: {error.strerror}; expected a folder that can be written"
            ) from None
        self._lock.__enter__()
        if isinstance(self._lock, OutputLock):
            self._made = absent
        return self

    def __exit__(self, *details) -> None:
        self._lock.__exit__(*details)

    def tidy(self) -> None:
        """Remove what a killed run left half-way."""
        self.checkpoints.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints)
        for folder in (self.path, self.path / "logs"):
            remove_leftovers(folder)

    def archive(self, say: Callable[[str], None]) -> None:
        """`--resume never`: what an earlier run wrote moves aside; nothing is deleted."""
        found = [self.path / name for name in ("logs", "checkpoints") if (self.path / name).exists()]
        if not found:
            return
        number = 1
        while (aside := self.path / f"previous-{number}").exists():
            number += 1
        aside.mkdir()
        for path in found:
            os.rename(path, aside / path.name)
        say(f"--resume never: the earlier run was moved to {aside}")

    def unmake(self) -> None:
        """Remove the folder, and those above it, if they were made here. One that was there before stays."""
        for path in self._made[:1]:  # the deepest
            shutil.rmtree(path, ignore_errors=True)
        for path in self._made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()
