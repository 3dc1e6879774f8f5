"""From Drive to this machine: where a run continues when it has two places to look.

Both tiers are listed newest first; on an equal step this machine's copy wins. A checkpoint on Drive is copied into the
checkpoint folder by the same commit protocol as any save, every byte compared on the way, before it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from .checkpoint import FINAL_NAMES, Manifest, claimed_step, commit, read_manifest, resume_point, step_name
from .drive_errors import MOUNT_POINT, explain
from .drive_folder import (
    Entry,
    NotThere,
    check_place,
    chunks_of,
    compared,
    entries,
    is_below_mount_point,
    is_drive_mounted,
    read_logs,
)
from .errors import BusyError, CheckpointError, ConfigError, NoUsableCheckpoint
from .files import replace_durably
from .lease import LIVE_SECONDS, describe, live_leases
from .logs import ALL_LOGS
from .logs import COUNTED as REWOUND
from .state import read_state

RETRY_PAUSES = (2.0, 8.0)  # Drive may need a moment before it shows what it has

Result = TypeVar("Result")
Say = Callable[[str], None]


def newest_on_drive(
    drive_dir: str | Path,
    checkpoint_dir: str | Path,
    local_folders: Iterable[Path],
    say: Say,
    *,
    check: Callable[[Manifest], object] | None = None,
    take_over: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Manifest | None:
    """The newest checkpoint of both tiers that verifies, in `checkpoint_dir`; one line for each that does not.

    None when there is none at all. Raises `NoUsableCheckpoint` when there are some and none is usable, or when Drive
    cannot be read and this machine has nothing: starting from zero would hide a loss. `BusyError` when another runtime
    has been writing to the folder in the last five minutes, `ConfigError` for a folder that cannot be meant.
    """
    drive_dir, checkpoint_dir, local = Path(drive_dir), Path(checkpoint_dir), list(local_folders)
    try:
        check_place(drive_dir)
        there = _patiently(lambda: entries(drive_dir), sleep)
        others = _patiently(lambda: live_leases(drive_dir), sleep)
    except OSError as error:
        there, others = [], []
        _drive_is_away(drive_dir, error, bool(local), say)
    _check_lease(drive_dir, others, take_over, say)
    _check_same_run(drive_dir, local, there)
    ranked = [((claimed_step(path), 2, path.name in FINAL_NAMES, path.name), path) for path in local]
    ranked += [((entry.step, 1, *entry.order[1:]), entry) for entry in there]
    for _, source in sorted(ranked, key=lambda pair: pair[0], reverse=True):
        try:
            if isinstance(source, Path):
                return _usable_here(source, say, check)
            manifest = _patiently(lambda: _restore(source, checkpoint_dir), sleep, CheckpointError)  # noqa: B023 - called at once
            manifest = resume_point(manifest.folder, say, check)
            say(
                f"checkpoint {source.path.name} copied from Drive: step {manifest.step}, {manifest.bytes:,} bytes, each one verified"
            )
            _restore_logs(source.path, manifest, say, sleep)
            return manifest
        except CheckpointError as error:
            place = "on this machine" if isinstance(source, Path) else "on Drive"
            name = source.name if isinstance(source, Path) else source.path.name
            say(f"checkpoint {name} {place} is not usable: {error}; trying the one before")
    if ranked:
        raise NoUsableCheckpoint(
            f"{len(ranked)} checkpoint(s) in {checkpoint_dir} and {drive_dir}, none usable (reasons above): repair or move them, "
            "or start anew with --resume never and another --drive_dir"
        )
    return None


def check_places(output_dir: str | Path, drive_dir: str | Path | None, resume: str) -> None:
    """Raises `ConfigError` for folders that cannot serve, before anything is written.

    With `--resume never` Drive must hold no checkpoint: nothing there may be moved aside (Drive takes renames back),
    and the next start would continue the old run.
    """
    if is_below_mount_point(output_dir) and not is_drive_mounted():
        raise ConfigError(
            f"--output_dir {output_dir}: Google Drive is not mounted at {MOUNT_POINT}; choose a folder on this machine and pass "
            "the Drive folder as --drive_dir, after mounting it"
        )
    if drive_dir is None:
        return
    _check_apart(Path(drive_dir), Path(output_dir) / "checkpoints")
    if resume != "never":
        return
    try:
        check_place(Path(drive_dir))
        found = entries(Path(drive_dir))
    except OSError as error:
        raise ConfigError(f"--drive_dir {drive_dir}: {_reason(error)}") from None
    if found:
        raise ConfigError(
            f"--resume never, but --drive_dir {drive_dir} holds {len(found)} checkpoint(s), the newest of step {found[0].step}: "
            "choose another --drive_dir for the new run, or move them away yourself"
        )


def _check_apart(drive_dir: Path, checkpoint_dir: Path) -> None:
    one, other = drive_dir.resolve(), checkpoint_dir.resolve()
    if one in (other, other.parent) or other in one.parents:
        raise ConfigError(
            f"--drive_dir {drive_dir} is the run's own folder; expected a second place, e.g. a folder on a mounted Drive"
        )
    if drive_dir.exists() and not drive_dir.is_dir():
        raise ConfigError(f"--drive_dir {drive_dir}: found a file, expected a folder")


def _reason(error: OSError) -> str:
    return str(error) if isinstance(error, NotThere) else explain(error)


def _drive_is_away(drive_dir: Path, error: OSError, has_local: bool, say: Say) -> None:
    reason = _reason(error)
    if has_local:
        say(f"--drive_dir {drive_dir}: {reason}; continuing with what is on this machine")
    elif isinstance(error, NotThere):
        raise ConfigError(f"--drive_dir {drive_dir}: {reason}; or leave out --drive_dir")
    else:
        raise NoUsableCheckpoint(
            f"--drive_dir {drive_dir}: {reason}. This machine has no checkpoint, and starting from zero could hide one that is on "
            "Drive: mount Drive again and run the same command, or leave out --drive_dir"
        )


def _check_lease(drive_dir: Path, others: list[dict], take_over: bool, say: Say) -> None:
    for lease in others:
        if not take_over:
            wait = LIVE_SECONDS - (time.time() - lease["heartbeat"])
            raise BusyError(
                f"--drive_dir {drive_dir} is being written by another runtime ({describe(lease)}): stop it; or, if that machine is gone, "
                f"wait {wait:.0f} s, or pass --set run.take_over=true"
            )
        say(f"taking over {drive_dir} from another runtime ({describe(lease)})")


def _check_same_run(drive_dir: Path, local: list[Path], there: list[Entry]) -> None:
    for path in local:
        try:
            run_id = read_manifest(path).run_id
        except (CheckpointError, OSError):
            continue
        foreign = [entry for entry in there if entry.manifest and entry.manifest.run_id != run_id]
        if foreign:
            raise ConfigError(
                f"--drive_dir {drive_dir} holds checkpoints of another run ({foreign[0].path.name}); choose another --drive_dir for this one"
            )
        return


def _patiently(
    action: Callable[[], Result], sleep: Callable[[float], None], errors=(OSError, CheckpointError)
) -> Result:
    """`action()`, tried again twice: what Drive shows can be late or fail for a moment."""
    for pause in RETRY_PAUSES:
        try:
            return action()
        except errors:
            sleep(pause)
    return action()


def _usable_here(folder: Path, say: Say, check: Callable[[Manifest], object] | None) -> Manifest:
    try:
        return resume_point(folder, say, check)
    except OSError as error:
        raise CheckpointError(error.strerror or str(error)) from None


def _restore(entry: Entry, checkpoint_dir: Path) -> Manifest:
    """Commit a copy of a Drive checkpoint to this machine's folder; raises `CheckpointError` when it is not whole.
    OSError means that this machine's disk is full or failing."""
    manifest = entry.look_again().manifest
    files = {name: _copier(entry.path / name, facts) for name, facts in manifest.files.items()}
    return commit(
        checkpoint_dir, step_name(manifest.step), files, manifest.run_id, manifest.step, manifest.facts
    )


def _copier(source: Path, facts: dict) -> Callable[[Path], None]:
    def chunks():  # only Drive's errors are a reason to try another checkpoint, not those of this machine's disk
        try:
            yield from chunks_of(source)
        except OSError as error:
            raise CheckpointError(f"{source.name}: {explain(error)}") from None

    def copy(target: Path) -> None:
        with open(target, "wb") as file:
            file.writelines(compared(chunks(), source.name, facts))

    return copy


def _restore_logs(source: Path, manifest: Manifest, say: Say, sleep: Callable[[float], None]) -> None:
    """The logs beside the checkpoint, where this machine has none or fewer lines than the checkpoint knows of."""
    try:
        logs = _patiently(lambda: read_logs(source, ALL_LOGS), sleep)
    except (OSError, CheckpointError) as error:
        say(
            f"the logs beside {source.name} could not be read ({explain(error) if isinstance(error, OSError) else error}); the logs on this machine begin at step {manifest.step}"
        )
        return
    known_lines = read_state(manifest).log_lines
    folder = manifest.folder.parent.parent / "logs"
    folder.mkdir(exist_ok=True)
    for name, data in sorted(logs.items()):
        path = folder / name
        here = path.read_bytes() if path.is_file() else b""
        is_short = name in REWOUND and here.count(b"\n") < known_lines.get(name, 0)
        if is_short or data.startswith(here):
            replace_durably(path, data)
