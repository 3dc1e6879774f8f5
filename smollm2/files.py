"""Small file helpers: hashing, durable writes (of tensors too), and a clear word about paths that cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path

CHUNK_BYTES = 2**20


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """Hash of a JSON value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def write_durably(path: str | Path, data: bytes) -> None:
    """Write and fsync a file: after this returns, its bytes survive a power cut."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: str | Path, tensors: dict) -> None:
    """Write and fsync a safetensors file, readable by whom the umask allows: safetensors' own writer makes it 0600.
    Raises OSError as every other writer does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    path.touch()  # asking the process for its umask would change it for a moment, also for other threads
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
    with open(path, "rb+") as file:
        if stat.S_IMODE(path.stat().st_mode) != mode:  # a mount that knows no modes need not be asked
            os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def fsync_folder(folder: str | Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: str | Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones, never a mixture."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")  # see remove_temporaries
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def remove_temporaries(folder: str | Path) -> None:
    """Remove what `replace_durably` leaves in a folder when it is killed half-way."""
    for path in Path(folder).glob(".*.tmp-*"):
        path.unlink(missing_ok=True)


def kind_of(path: str | Path) -> str:
    """What lies at a path, in words, for error messages."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "no such file or folder"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError:
        return "a name that holds a NUL character"
    kinds = [(stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket")]
    return next((name for test, name in kinds if test(mode)), "a file")
