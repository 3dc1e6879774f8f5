"""The second tier: checkpoints copied to Google Drive (or any remote folder) during training, and back.

`DriveMirror` has one copy in flight, on a thread of its own; when copying falls behind, steps in between are
skipped. A copy is: a new folder name; file by file written, fsynced, closed, read again and compared; the
text logs likewise; and last the manifest, which lists them all. No failure of the remote side reaches
training: it is told once, and tried again after 5 seconds up to 5 minutes. `newest_on_drive` is the way back:
the newest checkpoint of both tiers, committed on this machine as any save is.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import drive_folder
from .checkpoint import (
    FINAL_NAMES,
    MANIFEST,
    Manifest,
    candidates,
    commit,
    enclosing_checkpoint,
    newest_usable,
    step_name,
)
from .config import PlaceConfig
from .drive_errors import NotThere, explain
from .drive_folder import Entry, check_place, entries, is_uploading, look, verified
from .errors import CheckpointError, ConfigError, NoUsableCheckpoint
from .files import replace_durably, sha256_bytes, strict_json

KEEP = 3  # checkpoints on Drive before a copy starts, the best one included: with the copy never more than 4
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 5.0, 300.0
PAUSES = (2.0, 8.0)  # Drive may need a moment: a fresh file reads as 0 bytes, a fresh mount shows nothing
CLOSE_SECONDS, CLOSE_SECONDS_IN_TROUBLE = 600.0, 60.0

Say = Callable[[str], None]


def _patiently(action: Callable, sleep: Callable[[float], object]):
    """`action()`, tried again after each of the `PAUSES`."""
    for pause in PAUSES:
        try:
            return action()
        except (OSError, CheckpointError):
            sleep(pause)
    return action()


class DriveMirror:
    """Copies what is submitted to `drive_dir`; `events` name each copy that was read back, as (step, words of
    a log line)."""

    def __init__(self, drive_dir: str | Path, say: Say, pause=None):
        """`pause(seconds)` replaces waiting and leaves it to the caller to call `turn`: for tests."""
        self.folder, self.say = Path(drive_dir), say
        self.events: deque[tuple[int, dict]] = deque()
        self.copied: Manifest | None = None  # the newest copy, as it lies on Drive
        self._newest: Manifest | None = None  # of those submitted
        self._done: Manifest | None = None  # the last one that was copied
        self._unfinished: Path | None = None  # folder of a copy that failed half-way
        self._trouble, self._delay, self._end = "", 0.0, math.inf
        self._pause, self._news = pause or time.sleep, threading.Event()
        self._thread = threading.Thread(target=self._serve, name="drive", daemon=True)
        if pause is None:
            self._thread.start()

    # --- called by the training side, and never raises

    def submit(self, manifest: Manifest) -> None:
        """Copy this checkpoint next; one that still waits is skipped. Returns at once."""
        self._newest = manifest
        self._news.set()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for the newest copy, for a bounded time, and say what is not confirmed."""
        if self._end < math.inf:  # closed already
            return
        seconds = min(seconds, CLOSE_SECONDS_IN_TROUBLE) if self._trouble else seconds
        self._end, self._delay = time.monotonic() + seconds, 0.0
        self._news.set()
        self._thread.join(min(seconds, 2.0))
        if self._thread.is_alive():
            self.say(f"waiting for Drive, at most {seconds:.0f} s; Ctrl-C leaves at once and loses nothing")
            self._thread.join(seconds)
        if self._newest is not self._done:
            lost = f"NOT on Drive: step {self._newest.step} is only on this machine"
            why = self._trouble or "copying takes too long"
            self.say(f"{lost} ({why}); keep this machine and run the same command again")

    # --- the thread

    def _serve(self) -> None:
        while time.monotonic() < self._end:
            self._news.clear()
            delay = self.turn()
            is_idle = self._newest is self._done
            if is_idle and self._end < math.inf:
                break
            self._news.wait(None if is_idle else delay)
        if self.copied and is_uploading(self.copied.folder):
            lost = f"Drive has NOT confirmed the upload of step {self.copied.step} yet"
            self.say(f"{lost}: keep this runtime for some minutes")

    def turn(self) -> float:
        """One attempt at what is pending; returns the seconds to wait after a failure, else 0."""
        job = self._newest
        if job is self._done:
            return 0.0
        try:
            drive_folder.make_folder(self.folder)
            drive_folder.beat(self.folder)
            self._copy(job)
        except Exception as error:  # whatever a driver comes up with: training must not hear of it
            reason = explain(error)
            if reason != self._trouble and time.monotonic() < self._end:
                self.say(f"Drive: {reason}. Training goes on; tried again after 5 s, at last every 5 min")
                self._trouble = reason
            self._delay = min(max(2 * self._delay, FIRST_RETRY_SECONDS), LAST_RETRY_SECONDS)
            return self._delay
        if self._trouble:
            self.say("Drive: copying works again")
        self._done, self._trouble, self._delay = job, "", 0.0
        self.events.append((job.step, {"event": "copied_to_drive"}))
        return 0.0

    # --- one copy

    def _copy(self, job: Manifest) -> None:
        there = entries(self.folder)
        for entry in there:
            if isinstance(entry.problem, OSError):  # nothing is removed on half the knowledge
                raise entry.problem
            if entry.manifest and job.files.items() <= entry.manifest.files.items():  # as after a resume
                self.copied = entry.manifest  # it was written after every file had been read back
                return
        with contextlib.ExitStack() as held:  # an open file stays readable when retention removes its name
            files = {name: held.enter_context(open(job.folder / name, "rb")) for name in job.files}
            best = strict_json((job.folder / "state.json").read_bytes(), "state.json")["best"]
            self._make_room(there, job.run_id, best.get("step"))
            drive_folder.check_space(self.folder, job.bytes)
            target = self._unfinished = self.folder / drive_folder.new_name(job)
            drive_folder.make_folder(target)
            for name, file in files.items():
                self._write(target / name, file, job.files[name])
        logs = {path.name: path.read_bytes() for path in (job.folder.parent.parent / "logs").glob("*.txt")}
        files = job.files | {name: _facts(data) for name, data in logs.items()}
        copied = job.model_copy(update={"folder": target, "files": files})
        for name, data in (logs | {MANIFEST: copied.to_bytes()}).items():
            self._write(target / name, io.BytesIO(data), _facts(data))
        self._unfinished, self.copied = None, copied

    def _write(self, path: Path, source: io.BufferedIOBase, facts: dict) -> None:
        if time.monotonic() > self._end:
            raise InterruptedError("nobody waits for it any longer")
        drive_folder.write(path, source)
        _patiently(partial(drive_folder.check, path, facts), self._pause)

    def _make_room(self, there: list[Entry], run_id: str, best_step: int | None) -> None:
        """At most `KEEP` checkpoints of this run stay: the newest that Drive has uploaded, the newest, the
        best, then by age.

        Folders that another machine left unfinished may be whole ones that are seen too early: the newest of
        them stays until a copy has overtaken it. Folders of other runs, and of people, are never touched.
        """
        ours = [entry for entry in there if drive_folder.is_name_of(run_id, entry.path.name)]
        whole = [entry for entry in ours if entry.manifest]
        newest_step = whole[0].step if whole else -1
        torn = [entry for entry in ours if not entry.manifest and entry.path != self._unfinished]
        torn = [entry for entry in torn if entry.step > newest_step]
        uploaded = [entry for entry in whole if not is_uploading(entry.path)]
        best = [entry for entry in whole if entry.step == best_step]
        keep: dict[float, Entry] = {}  # by step
        for entry in uploaded[:1] + whole[:1] + best[:1] + torn[: 1 if whole else KEEP] + whole:
            if len(keep) < KEEP:
                keep.setdefault(entry.step, entry)
        for entry in reversed(ours):
            if entry not in keep.values():
                drive_folder.erase(entry.path)


def _facts(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": sha256_bytes(data)}


# --- where a run continues ----------------------------------------------------------------------------------


def check_places(place: PlaceConfig) -> None:
    """Raises `ConfigError` for folders that cannot serve, before anything is written.

    With `--resume never` the weights to begin with must not be those which move aside, and Drive must hold no
    checkpoint: nothing there may be moved aside (Drive takes renames back), and the next start would continue
    the old run.
    """
    output_dir, drive_dir = place.output_dir, place.drive_dir
    if "://" in output_dir:  # as a path it is a folder called "gs:" of this machine
        raise ConfigError(f"--output_dir {output_dir}: an address; expected a folder: mount it first")
    if around := enclosing_checkpoint(output_dir):
        lost = f"lies in the checkpoint {around} and goes when that does; expected a folder of its own"
        run = around.parent.parent
        raise ConfigError(f"--output_dir {output_dir}: {lost}, or {run} to go on with the run that is there")
    here = Path(os.path.realpath(Path(output_dir) / "checkpoints"))
    if (
        place.resume == "never"
        and place.init_from
        and here in Path(os.path.realpath(place.init_from)).parents
    ):
        moved = f"--resume never moves run.init_from={place.init_from} aside, with the run that it is part of"
        raise ConfigError(f"{moved}: choose another --output_dir")
    flag, found = f"--drive_dir {drive_dir}", []
    try:
        drive_folder.check_mounted(output_dir)
        if drive_dir is None:
            return
        if place.resume == "never":
            check_place(Path(drive_dir))
            found = entries(Path(drive_dir))
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}, {flag}: {explain(error)}") from None
    if found:
        advice = "choose another, or move them away yourself"
        raise ConfigError(f"--resume never, but {flag} holds {len(found)} checkpoint(s): {advice}")
    there = Path(os.path.realpath(drive_dir))
    if there in (here, here.parent) or here in there.parents:
        raise ConfigError(f"{flag} is the run's own folder; expected a second place, e.g. on a mounted Drive")
    if there.is_file():
        raise ConfigError(f"{flag}: found a file, expected a folder")


def newest_on_drive(
    drive_dir: str | Path, checkpoint_dir: Path, say: Say, check=lambda manifest: None, sleep=time.sleep
) -> Manifest | None:
    """The newest checkpoint that verifies, of `checkpoint_dir` and of Drive, then copied to `checkpoint_dir`;
    one line for each that does not. On an equal step this machine's wins. None when there is none at all.
    `check` as for `checkpoint.newest_usable`.

    Raises `NoUsableCheckpoint` when there are some and none is usable, or when Drive cannot be read and this
    machine has nothing: starting from zero would hide a loss; `ConfigError` for a folder that cannot be
    meant.
    """
    flag, here, there = f"--drive_dir {drive_dir}", [look(path) for path in candidates(checkpoint_dir)], []
    try:
        check_place(Path(drive_dir))
        there = _patiently(partial(entries, Path(drive_dir)), sleep)
    except OSError as error:
        if not here:
            kind = ConfigError if isinstance(error, NotThere) else NoUsableCheckpoint
            advice = "mend that, or leave out --drive_dir: starting from zero could hide a checkpoint there"
            raise kind(f"{flag}: {explain(error)}; {advice}") from None
        say(f"{flag}: {explain(error)}; continuing with what is on this machine")
    if other := drive_folder.other_writer(Path(drive_dir)):
        say(f"warning: {flag}: {other}; if it still trains, stop one of the two: they do the same work")
    if len({entry.manifest.run_id for entry in here + there if entry.manifest}) > 1:
        raise ConfigError(f"{flag} holds checkpoints of another run; choose another folder for this one")

    def fetch(path: Path) -> Path:
        if path.parent == Path(checkpoint_dir):
            return path
        return _patiently(partial(_copy_here, path, Path(checkpoint_dir), say), sleep)

    ranked = sorted(here + there, key=lambda entry: (-entry.step, entry not in here, entry.path.name))
    return newest_usable([entry.path for entry in ranked], say, check, fetch)


def _copy_here(source: Path, checkpoint_dir: Path, say: Say) -> Path:
    """Commit a copy of a Drive checkpoint to this machine's folder, every byte compared on the way; before it
    its logs, where this machine has less of them. Raises `CheckpointError` when it is not whole."""
    there = drive_folder.read_checkpoint(source)
    files = {name: partial(_copy_file, source / name, facts) for name, facts in there.files.items()}
    for name in [name for name in files if name.endswith(".txt")]:
        del files[name]
        data = b"".join(verified(source / name, there.files[name]))
        log = checkpoint_dir.parent / "logs" / name
        if not log.is_file() or log.stat().st_size < len(data):
            log.parent.mkdir(exist_ok=True)
            replace_durably(log, data)
    # what ended a phase there ends it here, too: `--continue_steps` asks for that
    ends = [name for name in FINAL_NAMES if source.name.startswith(f"{name.removesuffix('.ckpt')}-step-")]
    name = ends[0] if ends else step_name(there.step)
    copy = commit(checkpoint_dir, name, files, there.run_id, there.step, there.facts)
    say(f"checkpoint {source.name} copied from Drive: step {copy.step}, {copy.bytes:,} bytes verified")
    return copy.folder


def _copy_file(source: Path, facts: dict, target: Path) -> None:
    with open(target, "wb") as file:
        file.writelines(verified(source, facts))
