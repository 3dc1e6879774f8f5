"""Who writes to a remote folder. Drive has no locks, so each runtime keeps a small file there with a heartbeat.

It is a courtesy, not a lock: another machine may see it late. What is copied has names that never repeat, so two
writers cannot damage each other's checkpoints; the lease keeps them from wasting the quota and a person's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path

from .drive_folder import erase_file, names_in, read_small, write_small

HEARTBEAT_SECONDS = 60.0
LIVE_SECONDS = 300.0  # a lease that is older than this is dead
FORGOTTEN_SECONDS = 24 * 3600.0
PREFIX = "lease-"
MAX_LEASE_BYTES = 4096


def this_process() -> dict:
    """What tells this process from every other one on any machine, also when a process id is used again."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot_id(),
        "began": _start_ticks(os.getpid()),
    }


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _start_ticks(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class Lease:
    """This runtime's lease in `folder`. Methods raise OSError like everything there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / f"{PREFIX}{secrets.token_hex(4)}.json"
        self._me = this_process() | {"since": time.time()}
        self._next_beat = 0.0

    def beat(self) -> None:
        """Write the heartbeat when it is due."""
        if time.monotonic() < self._next_beat:
            return
        first = self._next_beat == 0.0
        write_small(self.path, json.dumps(self._me | {"heartbeat": time.time()}).encode())
        self._next_beat = time.monotonic() + HEARTBEAT_SECONDS
        if first:
            forget_old(self.folder)

    def drop(self) -> None:
        if self._next_beat:
            with contextlib.suppress(FileNotFoundError):
                erase_file(self.path)


def live_leases(folder: Path, besides: Path | None = None) -> list[dict]:
    """Leases of other runtimes with a fresh heartbeat; one whose process is known to be dead does not count."""
    me = this_process()
    return [lease for path, lease in _leases(folder) if path != besides and _is_live(lease, me)]


def _is_live(lease: dict, me: dict) -> bool:
    if abs(time.time() - lease["heartbeat"]) >= LIVE_SECONDS:
        return False
    if all(lease[key] == me[key] for key in ("host", "pid", "boot", "began")):
        return False  # an earlier run of this very process
    same_machine = lease["host"] == me["host"] and lease["boot"] == me["boot"] != "unknown"
    return not (same_machine and _start_ticks(lease["pid"]) != lease["began"])


def _leases(folder: Path) -> list[tuple[Path, dict]]:
    """Readable leases; damaged or half-uploaded ones say nothing and are passed over."""
    found = []
    for name in names_in(folder):
        if not name.startswith(PREFIX):
            continue
        try:
            lease = json.loads(read_small(folder / name, MAX_LEASE_BYTES))
            known = {"host": str, "boot": str, "pid": int, "heartbeat": (int, float), "since": (int, float)}
            if all(isinstance(lease[key], kind) for key, kind in known.items()) and "began" in lease:
                found.append((folder / name, lease))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def forget_old(folder: Path) -> None:
    """Remove the leases of machines that are long gone."""
    for path, lease in _leases(folder):
        if time.time() - lease["heartbeat"] > FORGOTTEN_SECONDS:
            with contextlib.suppress(OSError):
                erase_file(path)


def describe(lease: dict) -> str:
    return f"pid {lease['pid']} on {lease['host']}, since {time.strftime('%H:%M', time.gmtime(lease['since']))} UTC, last seen {time.time() - lease['heartbeat']:.0f} s ago"
