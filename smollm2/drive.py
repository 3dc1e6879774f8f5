"""The second tier: committed checkpoints copied to Google Drive (or any remote folder) while training goes on.

One copy is in flight at a time, on a thread of its own; when copying falls behind, the steps in between are skipped.
A copy is: a new folder name; file by file written, fsynced, closed, read again and compared; logs; the manifest last.
No failure of the remote side reaches training: it is told once, and tried again after 5 seconds up to 5 minutes.
The other way, from Drive to a fresh machine, is `newest_on_drive`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from . import drive_folder
from .checkpoint import MANIFEST, Manifest
from .drive_errors import explain
from .drive_folder import Entry, NotThere, check_read_back, compared, entries, erase, write_once
from .drive_restore import check_places, newest_on_drive
from .errors import CheckpointError
from .files import CHUNK_BYTES, sha256_bytes
from .lease import HEARTBEAT_SECONDS, Lease, describe, live_leases
from .logs import ALL_LOGS

__all__ = ["DriveMirror", "check_places", "newest_on_drive"]

KEEP = 3  # checkpoints on Drive before a copy starts, the best one included: with the copy in flight never more than 4
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 300.0
READ_BACK_PAUSES = (1.0, 4.0)  # a fresh file may read as 0 bytes for a moment
CLOSE_SECONDS, CLOSE_SECONDS_IN_TROUBLE = 600.0, 60.0
UPLOAD_SECONDS = 120.0  # how long the end waits for Drive's word that everything is uploaded


class _SourceGone(Exception):
    """The local checkpoint was replaced by newer ones before its copy began."""


class _Abandoned(Exception):
    """The run has ended and does not wait any longer."""


class DriveMirror:
    """Copies what is submitted to `drive_dir`; calls `on_copied(step)` after each copy that was read back."""

    def __init__(
        self,
        drive_dir: str | Path,
        say: Callable[[str], None],
        on_copied: Callable[[int], None],
        *,
        pause: Callable[[float], None] | None = None,
        start: bool = True,
    ):
        """`pause(seconds)` replaces waiting, and `start=False` leaves it to the caller to call `turn`: for tests."""
        self.folder = Path(drive_dir)
        self.say, self.on_copied = say, on_copied
        self.copied: Entry | None = None
        self._changed = threading.Condition()
        self._pending: Manifest | None = None
        self._closing = self._abandoned = False
        self._pause = pause or self._wait
        self._trouble, self._delay = "", 0.0
        self._unfinished: set[Path] = set()  # folders of copies that failed half-way
        self._warned_of: set[str] = set()
        self._lease = Lease(self.folder)
        self._thread = threading.Thread(target=self._serve, name="drive", daemon=True)
        if start:
            self._thread.start()

    # --- called by the training side: never blocks, never raises

    def submit(self, manifest: Manifest) -> None:
        """Copy this checkpoint next; one that still waits is skipped."""
        with self._changed:
            self._pending = manifest
            self._changed.notify_all()

    def close(self, seconds: float | None = None) -> None:
        """Wait for the newest copy, for a bounded time, and say what is not confirmed."""
        with self._changed:
            already, self._closing = self._closing, True
            self._changed.notify_all()
        if already:
            return
        try:
            self._join(seconds)
        finally:
            with self._changed:
                self._abandoned = True
                self._changed.notify_all()
                waiting = self._pending
        if waiting is not None:
            on_drive = f"step {self.copied.step}" if self.copied else "nothing of this session"
            self.say(
                f"NOT on Drive: step {waiting.step} is only on this machine, Drive has {on_drive} "
                f"({self._trouble or 'copying takes too long'}); keep this machine and run the same command again"
            )

    def _join(self, seconds: float | None) -> None:
        began, told = time.monotonic(), False
        while self._thread.is_alive():
            limit = (
                seconds
                if seconds is not None
                else CLOSE_SECONDS_IN_TROUBLE
                if self._trouble
                else CLOSE_SECONDS
            )
            waited = time.monotonic() - began
            if waited >= limit:
                break
            if waited > 2 and not told:
                self.say(
                    f"waiting for Drive, {limit:.0f} s at most (Ctrl-C leaves at once; nothing on this machine is lost) ..."
                )
                told = True
            self._thread.join(min(0.5, limit - waited))

    # --- the thread

    def _serve(self) -> None:
        while True:
            delay = self.turn()
            with self._changed:
                was_closing = self._closing
                if self._abandoned or (was_closing and self._pending is None):
                    break
                if self._pending is None:
                    self._changed.wait_for(lambda: self._pending or self._closing, HEARTBEAT_SECONDS)
                elif delay:  # new checkpoints do not cut the pause of a failing disk short; the end of the run does, once
                    seconds = min(delay, FIRST_RETRY_SECONDS) if was_closing else delay
                    self._changed.wait_for(lambda: self._abandoned or self._closing != was_closing, seconds)  # noqa: B023 - called at once
        if not self._abandoned:
            self._await_upload()
            with contextlib.suppress(OSError):  # a lease that stays behind is dead in five minutes
                self._lease.drop()

    def turn(self) -> float | None:
        """One attempt at what is pending: 0 when something was done, the seconds to wait after a failure, None when idle."""
        with self._changed:
            job = self._pending
        try:
            self._visit()
            if job is None:
                return None
            self._copy(job)
        except _Abandoned:
            return None
        except _SourceGone:
            if self._pending is job:
                self.say(
                    f"Drive: {job.folder.name} was removed here before it could be copied; the next checkpoint will be"
                )
        except CheckpointError as error:
            self.say(f"Drive: {job.folder.name} is damaged on this machine and was not copied: {error}")
        except (
            Exception
        ) as error:  # whatever the remote side or its driver comes up with: training must not hear of it
            return self._failed(job, error)
        else:
            self._succeeded(job)
        with self._changed:
            if self._pending is job:
                self._pending = None
        return 0.0

    def _visit(self) -> None:
        """Make the folder where it may be made, keep the lease fresh, notice other writers."""
        drive_folder.open_place(self.folder)
        self._lease.beat()
        for lease in live_leases(self.folder, besides=self._lease.path):
            who = f"{lease['host']}/{lease['pid']}"
            if who not in self._warned_of:
                self._warned_of.add(who)
                self.say(
                    f"Drive: another runtime writes to {self.folder} too ({describe(lease)}); nothing is lost, but stop one of them"
                )

    def _failed(self, job: Manifest | None, error: Exception) -> float:
        self._delay = min(max(2 * self._delay, FIRST_RETRY_SECONDS), LAST_RETRY_SECONDS)
        reason = str(error) if isinstance(error, NotThere) else explain(error)
        if reason != self._trouble:
            safe = f"step {job.step} is safe on this machine and " if job else ""
            self.say(
                f"Drive: {reason}. {safe}training goes on; copying is tried again (after 5 s, at last every 5 min)"
            )
        self._trouble = reason
        return self._delay

    def _succeeded(self, job: Manifest) -> None:
        if self._trouble:
            self.say("Drive: copying works again")
        self._trouble, self._delay = "", 0.0
        try:
            self.on_copied(job.step)
        except OSError as error:  # it writes a log line; the local disk's troubles are the saver's to judge
            self.say(f"Drive: step {job.step} was copied, but that could not be logged: {error.strerror}")

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned, seconds)

    def _breathe(self) -> None:
        """Between two chunks of a long copy."""
        if self._abandoned:
            raise _Abandoned
        self._lease.beat()

    # --- one copy

    def _copy(self, job: Manifest) -> None:
        with contextlib.ExitStack() as held:
            files = _hold(job, held)
            best = json.loads(files["state.json"].read()).get("best") if "state.json" in files else None
            there = entries(self.folder)
            for entry in there:
                if entry.error:
                    raise entry.error
            twin = self._find_twin(job, there)
            if twin:
                self.copied = twin
                return
            self._make_room(there, job.run_id, best["step"] if best else None)
            drive_folder.check_space(self.folder, job.bytes)
            target = self.folder / drive_folder.new_name(job)
            self._unfinished.add(target)
            drive_folder.make_folder(target)
            for name, facts in sorted(job.files.items()):
                write_once(
                    target / name, compared(self._chunks(files[name]), name, facts)
                )  # damage must not spread
                self._read_back(target / name, facts)
            logs = drive_folder.with_table(_read_local_logs(job.folder.parent.parent / "logs"))
            for name, data in (logs | {MANIFEST: job.to_bytes()}).items():
                write_once(target / name, [data])
                self._read_back(target / name, {"bytes": len(data), "sha256": sha256_bytes(data)})
            self._unfinished.discard(target)
            self.copied = Entry(target, job)

    def _chunks(self, file: BinaryIO) -> Iterator[bytes]:
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            self._breathe()
            yield chunk

    def _read_back(self, path: Path, facts: dict) -> None:
        for pause in (*READ_BACK_PAUSES, None):
            try:
                return check_read_back(path, facts, self._breathe)
            except OSError:
                if pause is None:
                    raise
                self._pause(pause)
        return None

    def _find_twin(self, job: Manifest, there: list[Entry]) -> Entry | None:
        """The same checkpoint on Drive already, every byte of it: after a resume nothing need be copied."""
        for entry in there:
            if entry.manifest and (entry.manifest.run_id, entry.step, entry.manifest.files) == (
                job.run_id,
                job.step,
                job.files,
            ):
                if self._is_intact(entry):
                    return entry
                there[there.index(entry)] = Entry(entry.path, None, "damaged")
        return None

    def _is_intact(self, entry: Entry) -> bool:
        """Whether every byte reads back. A Drive that cannot be reached answers no here, and says so at the next write."""
        try:
            for name, facts in entry.manifest.files.items():
                self._read_back(entry.path / name, facts)
        except OSError:
            return False
        return True

    def _make_room(self, there: list[Entry], run_id: str, best_step: int | None) -> None:
        """At most `KEEP` checkpoints of this run stay: the newest that Drive has uploaded, the newest, the best, then by age.

        Folders that another machine left unfinished may be whole ones that are seen too early: the newest of them stays
        until a copy has overtaken it. Folders of other runs, and of people, are never touched.
        """
        for path in sorted(self._unfinished):
            finished = [
                entry for entry in there if entry.path == path and entry.manifest and self._is_intact(entry)
            ]
            if not finished:  # else only Drive's answer was lost, and it may be the newest that Drive has
                erase(path)
                there = [entry for entry in there if entry.path != path]
            self._unfinished.discard(path)
        ours = [entry for entry in there if entry.is_ours(run_id)]
        whole = [entry for entry in ours if entry.manifest]
        unproven = [
            entry for entry in ours if not entry.manifest and (not whole or entry.step > whole[0].step)
        ]
        uploaded = [entry for entry in whole if not drive_folder.is_uploading(entry.path)]
        best = [entry for entry in whole if entry.step == best_step]
        keep: list[Entry] = []
        for entry in uploaded[:1] + whole[:1] + best[:1] + unproven[: 1 if whole else KEEP] + whole:
            if len(keep) < KEEP and entry.step not in [kept.step for kept in keep]:
                keep.append(entry)
        for entry in reversed(ours):
            if entry not in keep:
                erase(entry.path)

    def _await_upload(self) -> None:
        """At the end: Drive's own word on the newest copy, where it gives one."""
        if not self.copied or not drive_folder.is_uploading(self.copied.path):
            return
        self.say(f"Drive is uploading step {self.copied.step} ...")
        deadline = time.monotonic() + UPLOAD_SECONDS
        while time.monotonic() < deadline and not self._abandoned:
            self._pause(2.0)
            if not drive_folder.is_uploading(self.copied.path):
                return
        self.say(
            f"Drive has NOT confirmed the upload of step {self.copied.step} yet: keep this runtime for some minutes"
        )


def _hold(job: Manifest, held: contextlib.ExitStack) -> dict[str, BinaryIO]:
    """Open every file of a local checkpoint: an open file stays readable when retention removes its name."""
    try:
        return {name: held.enter_context(open(job.folder / name, "rb")) for name in job.files}
    except FileNotFoundError:
        raise _SourceGone from None


def _read_local_logs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ALL_LOGS if (folder / name).is_file()}
