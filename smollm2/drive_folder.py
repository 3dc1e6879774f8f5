"""A folder on a remote disk that may lie: Google Drive on Colab, or any mount that can vanish.

What is assumed of it: nothing. Files are written once under names never used before, closed, read back and compared;
the manifest comes last and alone makes a folder a checkpoint; what a folder holds is read from its manifest, never
from its name (Drive renames to "name (1)" and takes renames back). Nothing is renamed, appended to or linked.
Deleting goes through an empty file, because Drive's trash counts against the quota. Every function may raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from .checkpoint import FINAL_NAMES, MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest, step_name
from .drive_errors import MOUNT_POINT
from .errors import CheckpointError
from .files import CHUNK_BYTES, dump_json, sha256_bytes, strict_json

MOUNTS_TABLE = Path("/proc/mounts")
UPLOAD_ID = "user.drive.id"  # extended attribute; ids beginning with "local" are not yet on Google's side
LOGS = "logs.json"  # table of contents of the log copies in a checkpoint folder
MAX_LOGS_BYTES = 64 * 2**20
_OUR_NAME = re.compile(
    r"(?:final_[a-z_]+-)?step-\d{8,}-(?P<run>[A-Za-z0-9]{1,16})-[0-9a-f]{8}(?:\.ckpt| \(\d+\))+"
)  # " (1)" is Drive's doing


class NotThere(OSError):
    """The place for the folder does not exist: Drive is not mounted, or the folder above it is missing."""


def is_drive_mounted() -> bool:
    """Whether the kernel's mount table has Drive at its mount point: a folder of that name proves nothing."""
    try:
        lines = MOUNTS_TABLE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    fields = [line.split(" ") for line in lines]
    return any(
        len(row) > 2 and row[1] == str(MOUNT_POINT) and row[2].startswith("fuse.drive") for row in fields
    )


def is_below_mount_point(path: str | Path) -> bool:
    return MOUNT_POINT in Path(os.path.abspath(path)).parents


def check_place(folder: Path) -> None:
    """Raises `NotThere` where the folder could only be made on this machine's own disk, in Drive's place: what is
    written there is lost with the machine, and Drive refuses to mount over it."""
    if is_below_mount_point(folder) and not is_drive_mounted():
        raise NotThere(
            f"Google Drive is not mounted at {MOUNT_POINT}: mount it in a notebook cell (from google.colab import drive; drive.mount('{MOUNT_POINT}'))"
        )
    if not os.path.isdir(folder.absolute().parent):
        raise NotThere(f"{folder.absolute().parent} does not exist (is it a mount that went away?)")


def open_place(folder: Path) -> None:
    """Make the folder itself where it is missing, never anything above it."""
    check_place(folder)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)


# --- what is there --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One folder that may be a checkpoint. `manifest` is None, and `problem` says why, where none can be read."""

    path: Path
    manifest: Manifest | None
    problem: str = ""
    error: OSError | None = None  # it could not be read just now: nothing is known about it

    @property
    def step(self) -> int:
        """From the manifest; where that is unreadable from the name, which only decides what is looked at first."""
        match = re.search(r"step-(\d{1,15})", self.path.name)
        return self.manifest.step if self.manifest else int(match[1]) if match else 0

    @property
    def order(self) -> tuple:
        return (self.step, self.path.name.startswith("final"), self.path.name)

    def look_again(self) -> Entry:
        """The same folder read anew; raises `CheckpointError` where it is no whole checkpoint."""
        try:
            entry = _entry(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError("it is gone") from None
        if entry.manifest is None:
            raise CheckpointError(entry.problem)
        return entry

    def is_ours(self, run_id: str) -> bool:
        """Whether a mirror of this run made it, and so may remove it. All else in the folder belongs to somebody."""
        match = _OUR_NAME.fullmatch(self.path.name)
        return (
            bool(match)
            and match["run"] == _short(run_id)
            and (self.manifest is None or self.manifest.run_id == run_id)
        )


def entries(folder: Path) -> list[Entry]:
    """Folders that hold or should hold a checkpoint, newest first. A folder that does not exist yet holds none."""
    found = []
    for name in names_in(folder):
        path = folder / name
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # a plain file, or deleted just now
            entry = _entry(path)
            if entry.manifest or ".ckpt" in name:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.order, reverse=True)


def _entry(path: Path) -> Entry:
    try:
        there = os.listdir(path)
        if MANIFEST not in there:
            return Entry(path, None, f"no {MANIFEST}: its copy was never finished")
        manifest = parse_manifest(read_small(path / MANIFEST, MAX_MANIFEST_BYTES), path)
        for name, facts in manifest.files.items():
            size = os.stat(path / name).st_size if name in there else 0
            if size != facts["bytes"]:
                raise CheckpointError(f"{name}: manifest says {facts['bytes']:,} bytes, Drive shows {size:,}")
    except CheckpointError as error:
        return Entry(path, None, str(error))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        return Entry(path, None, f"{error.strerror or error} (errno {error.errno})", error)
    return Entry(path, manifest)


def new_name(manifest: Manifest) -> str:
    """A name that was never used: step and run for people, a random part so that it is written once."""
    final = manifest.folder.name.removesuffix(".ckpt") + "-" if manifest.folder.name in FINAL_NAMES else ""
    return f"{final}{step_name(manifest.step).removesuffix('.ckpt')}-{_short(manifest.run_id)}-{secrets.token_hex(4)}.ckpt"


def _short(run_id: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", run_id)[:16] or "run"


# --- bytes ----------------------------------------------------------------------------------------------------------


def chunks_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def compared(chunks: Iterable[bytes], name: str, facts: dict) -> Iterator[bytes]:
    """The chunks of a file as they come; raises `CheckpointError` at its end when they are not what its manifest entry says."""
    digest, total = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        total += len(chunk)
        yield chunk
    if total != facts["bytes"]:
        raise CheckpointError(f"{name}: expected {facts['bytes']:,} bytes, found {total:,}")
    if digest.hexdigest() != facts["sha256"]:
        raise CheckpointError(f"{name}: sha256 differs: damaged")


def make_folder(path: Path) -> None:
    os.mkdir(path)


def names_in(folder: Path) -> list[str]:
    """Names in a folder; none where the folder does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def read_small(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file."""
    with open(path, "rb") as file:
        return file.read(limit)


def write_small(path: Path, data: bytes) -> None:
    """Write a file that is nobody's only copy: no fsync, an older one is replaced."""
    with open(path, "wb") as file:
        file.write(data)


def write_once(path: Path, chunks: Iterable[bytes]) -> None:
    """Write, fsync and close a new file."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def check_read_back(path: Path, facts: dict, on_chunk=lambda: None) -> None:
    """Read a written file again; raises OSError when other bytes come back. (This reads the mount's cache, not the server.)"""
    try:
        for _ in compared(chunks_of(path), path.name, facts):
            on_chunk()
    except CheckpointError as error:
        raise OSError(errno.EIO, f"other bytes came back than were written: {error}") from None


def erase(folder: Path) -> None:
    """Remove a checkpoint folder so that Drive's trash holds none of its bytes: empty each file, then unlink it.
    The manifest goes first: what is half removed is not a checkpoint."""
    for name in sorted(names_in(folder), key=lambda name: name != MANIFEST):
        if os.path.isdir(folder / name):
            continue  # not ours; opening a folder is another error on every system
        with contextlib.suppress(FileNotFoundError):  # gone already
            erase_file(folder / name)
    try:
        os.rmdir(folder)
    except (
        OSError
    ) as error:  # the person keeps something of their own in it, or the mount still shows what is gone
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def erase_file(path: Path) -> None:
    os.stat(path)  # opening for writing would create what is not there
    write_small(path, b"")
    os.unlink(path)


def check_space(folder: Path, needed: int) -> None:
    """Raises ENOSPC before anything is written, where the mount tells how much is free."""
    facts = disk_usage(folder)  # os.statvfs is POSIX's alone
    if facts.total > 0 and facts.free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {facts.free:,} are free")


def is_uploading(folder: Path) -> bool:
    """Whether Drive itself says that a copied checkpoint is not on Google's side yet. Mounts that do not tell: False."""
    try:
        return any(os.getxattr(folder / name, UPLOAD_ID).startswith(b"local") for name in os.listdir(folder))
    except (OSError, AttributeError):  # Python has os.getxattr on Linux alone
        return False


# --- logs -----------------------------------------------------------------------------------------------------------


def with_table(logs: dict[str, bytes]) -> dict[str, bytes]:
    """The text logs as they lie beside a checkpoint, readable by people, and the file of their hashes, last."""
    return logs | {LOGS: dump_json({name: sha256_bytes(data) for name, data in logs.items()})}


def read_logs(folder: Path, known: Iterable[str]) -> dict[str, bytes]:
    """The `known` logs of a checkpoint folder; raises `CheckpointError` or OSError when one is damaged."""
    table = strict_json(read_small(folder / LOGS, MAX_MANIFEST_BYTES), LOGS)
    logs = {}
    for name in set(known) & set(table if isinstance(table, dict) else ()):
        data = read_small(folder / name, MAX_LOGS_BYTES)
        if sha256_bytes(data) != table[name]:
            raise CheckpointError(f"{name}: {len(data):,} bytes that differ from {LOGS}")
        logs[name] = data
    return logs
