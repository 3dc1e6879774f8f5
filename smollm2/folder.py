"""The folder a run writes to: made, locked, tidied of what a kill left, cleared after a bad start."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import BusyError, OutputLost
from .files import remove_leftovers


@contextlib.contextmanager
def locked_folder(path: Path, locks: bool = True) -> Iterator[None]:
    """Make the folder where it is absent and hold its lock, which the system frees with the process, after
    kill -9 too.

    Workers other than the first pass `locks=False`. Raises `OutputLost` where the folder cannot be made or
    locked, `BusyError` where another process is writing it.
    """
    file = path / ".lock"  # it stays: removing it would let two processes lock two different files
    lock = FileLock(file, timeout=0) if locks else contextlib.nullcontext()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.__enter__()
        if locks:
            with contextlib.suppress(PermissionError):  # Windows lets nobody write or read a locked file
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        owner = ""
        with contextlib.suppress(PermissionError):
            owner = file.read_text()
        advice = "wait for it, stop it, or choose another --output_dir"
        raise BusyError(f"{path} is being written by {owner or 'another process'}; {advice}") from None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or error
        expected = "expected a folder that can be written and locked"
        raise OutputLost(f"--output_dir {path}: {reason}; {expected}") from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def tidy(path: Path) -> None:
    """Remove what a killed run left half-way."""
    (path / "checkpoints").mkdir(exist_ok=True)
    for folder in (path, path / "checkpoints", path / "logs", path / "data", *path.glob("data/*")):
        remove_leftovers(folder)
        for path in folder.glob(".*.tmp-[0-9]*"):  # of `replace_durably`
            if path.is_file():
                path.unlink()


def set_aside(path: Path, say: Callable[[str], None]) -> None:
    """`--resume never`: what an earlier run wrote moves aside; nothing is deleted. Raises `OutputLost` where
    it stays in its place, as a mount does."""
    there = [path / name for name in ("checkpoints", "logs", "report.png")]
    found = [p for p in there if p.is_file() or (p.is_dir() and any(p.iterdir()))]
    if found:
        aside = next(p for n in count(1) if not (p := path / f"previous-{n}").exists())
        aside.mkdir()
        try:
            for folder in found:
                os.rename(folder, aside / folder.name)
        except OSError as error:
            for moved in aside.iterdir():
                os.rename(moved, path / moved.name)
            aside.rmdir()
            stays = f"{folder} cannot be moved aside ({error.strerror})"
            raise OutputLost(f"--resume never: {stays}; choose another --output_dir") from None
        (path / "checkpoints").mkdir(exist_ok=True)
        say(f"--resume never: the earlier run was moved to {aside}")


def absent_folders(path: Path) -> list[Path]:
    """The folder and those above it that `locked_folder` will make, the deepest first."""
    return [folder for folder in (path, *path.parents) if not os.path.exists(folder)]


def clear(path: Path, made: list[Path]) -> None:
    """After a start that came to nothing: remove what it made. Text that was read from a dataset stays, it
    was long work."""
    if path not in made:
        return
    for entry in [*path.iterdir(), *path.glob("data/tokens-*")]:
        if entry.name != "data":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in (path / "data", *made):
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()
