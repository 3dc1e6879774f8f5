"""A folder on a remote disk that may lie: Google Drive on Colab, or any mount that can vanish.

What is assumed of it: nothing. Files are written once under names never used before, closed, read back and
compared; the manifest comes last and alone makes a folder a checkpoint; what a folder holds is read from its
manifest, never from its name (Drive renames to "name (1)" and takes renames back). Nothing is renamed,
appended to or linked. Deleting goes through an empty file, because Drive's trash counts against the quota.
Every function may raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import FINAL_NAMES, MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from .drive_errors import MOUNT_POINT, NotThere
from .errors import CheckpointError
from .files import CHUNK_BYTES

MOUNTS_TABLE = Path("/proc/mounts")
UPLOAD_ID = "user.drive.id"  # extended attribute; ids beginning with "local" are not yet on Google's side
HEARTBEAT = "heartbeat.txt"  # host and time of the runtime that writes here
LIVE_SECONDS = 300.0  # whoever has been silent for longer is gone

# --- the place ----------------------------------------------------------------------------------------------


def check_mounted(path: str | Path) -> None:
    """Raises `NotThere` for a path in Drive's place while the kernel's mount table has no Drive there: what
    is written to a plain folder of that name is lost with the machine, and Drive refuses to mount over it."""
    if MOUNT_POINT not in Path(os.path.abspath(path)).parents:
        return
    table = MOUNTS_TABLE.read_text(encoding="utf-8", errors="replace") if MOUNTS_TABLE.exists() else ""
    if not re.search(rf"^\S+ {re.escape(str(MOUNT_POINT))} fuse\.drive", table, re.MULTILINE):
        advice = f"mount it in a notebook cell (from google.colab import drive; drive.mount('{MOUNT_POINT}'))"
        raise NotThere(f"Google Drive is not mounted at {MOUNT_POINT}: {advice}")


def check_place(folder: Path) -> None:
    """Raises `NotThere` where the folder neither exists nor could be made."""
    check_mounted(folder)
    if not os.path.isdir(folder.absolute().parent):
        raise NotThere(f"{folder.absolute().parent} does not exist (is it a mount that went away?)")


def make_folder(folder: Path) -> None:
    """Make the folder itself where it is missing, never anything above it."""
    check_place(folder)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)


def check_space(folder: Path, needed: int) -> None:
    """Raises ENOSPC before anything is written, where the mount tells how much is free."""
    facts = shutil.disk_usage(folder)
    if facts.total > 0 and facts.free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {facts.free:,} are free")


def names_in(folder: Path) -> list[str]:
    """Names in a folder; none where the folder does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


# --- what is there ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A folder that holds or should hold a checkpoint. Without a manifest, `problem` says why:
    `CheckpointError` where it is damaged or unfinished, OSError where it could not be read just now, so that
    nothing is known about it."""

    path: Path
    manifest: Manifest | None
    problem: Exception | None = None

    @property
    def step(self) -> float:
        """From the manifest; else from the name, which only decides what is looked at first."""
        match = re.search(r"step-(\d{1,15})", self.path.name)
        return self.manifest.step if self.manifest else int(match[1]) if match else math.inf


def look(path: Path) -> Entry:
    try:
        return Entry(path, read_checkpoint(path))
    except (CheckpointError, OSError) as problem:
        return Entry(path, None, problem)


def entries(folder: Path) -> list[Entry]:
    """The checkpoints in a folder, whole or not, newest first; none where the folder does not exist yet."""
    found = [look(folder / name) for name in names_in(folder)]
    claims = [entry for entry in found if entry.manifest or ".ckpt" in entry.path.name]
    files = (FileNotFoundError, NotADirectoryError)  # deleted just now, or a plain file
    there = [entry for entry in claims if not isinstance(entry.problem, files)]
    return sorted(there, key=lambda entry: (-entry.step, entry.path.name))


def read_checkpoint(folder: Path) -> Manifest:
    """The manifest of a folder that shows each file in its size, else `CheckpointError` is raised."""
    there = os.listdir(folder)
    if MANIFEST not in there:
        raise CheckpointError(f"no {MANIFEST}: its copy was never finished")
    manifest = parse_manifest(read_small(folder / MANIFEST), folder)
    for name, facts in manifest.files.items():
        size = os.stat(folder / name).st_size if name in there else 0
        if size != facts["bytes"]:
            raise CheckpointError(f"{name}: manifest says {facts['bytes']:,} bytes, Drive shows {size:,}")
    return manifest


def new_name(manifest: Manifest) -> str:
    """A name that was never used: step and run for people, a random part so that it is written once."""
    final = f"{manifest.folder.stem}-" if manifest.folder.name in FINAL_NAMES else ""
    return f"{final}step-{manifest.step:08d}-{manifest.run_id}-{secrets.token_hex(4)}.ckpt"


def is_name_of(run_id: str, name: str) -> bool:
    """Whether a copy of this run has this name, and so may be removed. All else in the folder belongs to
    somebody."""
    pattern = rf"(final_\w+-)?step-\d{{8,}}-{re.escape(run_id)}-[0-9a-f]{{8}}(\.ckpt| \(\d+\))+"
    return re.fullmatch(pattern, name) is not None


# --- bytes --------------------------------------------------------------------------------------------------


def read_small(path: Path) -> bytes:
    """The first MiB of a file."""
    with open(path, "rb") as file:
        return file.read(MAX_MANIFEST_BYTES)


def verified(path: Path, facts: dict) -> Iterator[bytes]:
    """The chunks of a file; raises `CheckpointError` at its end when they are not what its manifest entry
    says."""
    digest, total = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            total += len(chunk)
            yield chunk
    if (total, digest.hexdigest()) != (facts["bytes"], facts["sha256"]):
        raise CheckpointError(f"{path.name}: {total:,} bytes that differ from the manifest: damaged")


def check(path: Path, facts: dict) -> None:
    """Read a written file again: finds damage on the way. (It reads the mount's cache, not the server.)"""
    for _ in verified(path, facts):
        pass


def write(path: Path, source: io.BufferedIOBase, mode: str = "xb") -> None:
    """Write, fsync and close a file, by default a new one."""
    with open(path, mode) as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def erase(folder: Path) -> None:
    """Remove a checkpoint folder so that Drive's trash holds none of its bytes. The manifest goes first: what
    is half removed is not a checkpoint."""
    for name in sorted(names_in(folder), key=lambda name: name != MANIFEST):
        if not os.path.isdir(folder / name):  # a folder in it is a person's
            erase_file(folder / name)
    with contextlib.suppress(OSError):  # it holds something of a person's, or still shows what is gone
        os.rmdir(folder)


def erase_file(path: Path) -> None:
    """Empty a file, then unlink it; nothing where it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, 0)
        os.unlink(path)


def is_uploading(folder: Path) -> bool:
    """Whether Drive itself says that a copied checkpoint is not on Google's side yet. Mounts that do not
    tell: False."""
    try:
        return any(os.getxattr(folder / name, UPLOAD_ID).startswith(b"local") for name in os.listdir(folder))
    except (OSError, AttributeError):  # Python has os.getxattr on Linux alone
        return False


# --- who else writes here -----------------------------------------------------------------------------------
# A courtesy, not a lock: Drive has none, and another machine may see the file late. Names of copies never
# repeat, so two writers cannot damage each other's; this saves the quota and a person's time.


def beat(folder: Path) -> None:
    write(folder / HEARTBEAT, io.BytesIO(f"{socket.gethostname()} {time.time():.0f}".encode()), "wb")


def other_writer(folder: Path) -> str | None:
    """Another machine that copied to the folder within `LIVE_SECONDS`, in words; None where there is none, or
    nothing can be read."""
    try:
        host, seconds = read_small(folder / HEARTBEAT).decode().split()
        silent = time.time() - int(seconds)
    except (OSError, ValueError):
        return None
    is_live = abs(silent) < LIVE_SECONDS and host != socket.gethostname()
    return f"another runtime ({host}) wrote there {silent:.0f} s ago" if is_live else None
