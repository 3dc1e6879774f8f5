"""One writer for one output directory, on this machine.

POSIX `lockf` locks vanish with the process that holds them (also after kill -9), unlike `flock`, which a surviving
child keeps alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from .errors import BusyError, OutputLost

_held: set[str] = set()  # lockf does not exclude a process from itself


class OutputLock:
    """Context manager: holds `<output_dir>/.lock`; raises `BusyError` naming the other process."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / ".lock"
        self._file = None

    def __enter__(self) -> OutputLock:
        key = str(self.path.resolve())
        if key in _held:
            raise BusyError(f"{self.path.parent} is already being written by this very process")
        try:
            self._file = open(self.path, "a+")  # held open for the life of the lock
        except OSError as error:
            raise OutputLost(f"cannot write to {self.path.parent}: {error.strerror}") from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self._file.close()
                raise OutputLost(
                    f"{self.path}: {error.strerror}; --output_dir must be on a file system that has locks, e.g. this machine's own disk"
                ) from None
            self._file.seek(0)
            owner = self._file.read()
            self._file.close()
            raise BusyError(
                f"{self.path.parent} is being written by another process ({_describe(owner)}); wait for it, stop it, or choose another --output_dir"
            ) from None
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        self._file.flush()
        _held.add(key)
        return self

    def __exit__(self, *_) -> None:
        _held.discard(str(self.path.resolve()))
        self._file.close()  # the file stays: removing it would let two processes lock two different files


def _describe(owner: str) -> str:
    try:
        facts = json.loads(owner)
        return f"pid {facts['pid']} on {facts['host']}, for {time.time() - facts['since']:.0f} s"
    except (ValueError, KeyError, TypeError):
        return "unknown"
