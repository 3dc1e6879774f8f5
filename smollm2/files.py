"""Durable writes: a file, a file of tensors, a whole folder in one atomic step; hashes and strict JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CheckpointError

CHUNK_BYTES = 2**20
RANDOM = "[0-9a-f]" * 8  # what `token_hex(4)` of `secrets` gives, as a pattern


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hash of a JSON value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def sync(descriptor: int) -> None:
    """What was written survives a power cut, where the file system can do that: some sync files but no
    folders (vboxsf, old CIFS), some mounts nothing."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def write_durably(path: str | Path, data: bytes) -> None:
    """Write and fsync a file: after this returns, its bytes survive a power cut."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())


def write_tensors(path: str | Path, tensors: dict) -> None:
    """Write a safetensors file, readable by whom the umask allows: safetensors' own writer makes it 0600.
    Raises OSError as every other writer does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    path.touch()  # asking the process for its umask would change it for a moment, also for other threads
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise
    if path.stat().st_mode != mode:  # a mount that knows no modes need not be asked
        path.chmod(stat.S_IMODE(mode))


def fsync_folder(folder: str | Path) -> None:
    """Make renames and new names in a folder durable; Windows opens no folder (EACCES)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: str | Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old bytes or the new ones, never a mixture."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")  # see folder.tidy
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


# of a file: its bytes, or a function that writes the path it is given
Content = bytes | Callable[[Path], None]


def mark() -> str:
    """Eight characters for the name of a folder on its way, with a letter, so that no date is one."""
    return f"{secrets.token_hex(4)[1:]}f"


def commit_folder(
    target: str | Path, files: dict[str, Content], closing: Callable[[dict[str, dict]], dict[str, bytes]],
    kept: Path | None = None,
) -> dict[str, dict]:  # fmt: skip
    """Write the folder `target` in one atomic step; returns {file name: {"bytes": ..., "sha256": ...}}.

    `closing(table)` gives the files that are written last, such as a manifest. An earlier folder of that name
    stays until the new one is whole, and then goes, or on as `kept`. Raises OSError when the disk is full or
    failing: `target` is the earlier one then (the new one where only the last sync failed). What a kill
    leaves behind is for `remove_leftovers`.
    """
    target = Path(target)
    temporary = target.with_name(f"{target.name}.tmp-{mark()}")
    aside = kept or target.with_name(f"{target.name}.old-{mark()}")
    try:
        temporary.mkdir()
        table = {}
        for name, content in sorted(files.items()):
            path = temporary / name
            content(path) if callable(content) else path.write_bytes(content)
            with open(path, "rb+") as written:
                sync(written.fileno())
            table[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, data in closing(table).items():
            write_durably(temporary / name, data)
        fsync_folder(temporary)
        if target.exists():
            os.rename(target, aside)  # os.rename cannot replace a folder that is not empty
        os.rename(temporary, target)
        fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    if not kept:
        shutil.rmtree(aside, ignore_errors=True)
    return table


def remove_leftovers(folder: Path, name: str = "*.ckpt") -> None:
    """Remove what a killed `commit_folder` leaves of `name`. What had stepped aside comes back where its
    successor never arrived. By their whole names: a folder that was chosen to write to may hold a person's
    `notes.old-2025`, too, or `out.old-20251127`."""
    for path in sorted(folder.glob(f"{name}.old-{RANDOM}")):
        if path.name[-8:].isdecimal():
            continue
        target = path.with_name(path.name[: -len(".old-12345678")])
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
    for path in folder.glob(f"{name}.tmp-{RANDOM}"):
        if not path.name[-8:].isdecimal():
            shutil.rmtree(path, ignore_errors=True)


def origin_name(source: str | Path) -> str:
    """What a record keeps of a source: a Hub id, or the name of a file or folder. Where it lay is private."""
    return Path(source).resolve().name if os.path.exists(source) else str(source)


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
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kinds |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    return kinds.get(stat.S_IFMT(mode), "a file")


def strict_json(raw: bytes, where: str) -> Any:
    """JSON without NaN or infinities; raises `CheckpointError`."""

    def constant(word):
        raise ValueError(f"{word} is not a number")

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({str(error)[:80]})") from None


def dump_json(value: Any) -> bytes:
    """Canonical JSON: equal values are equal bytes. Raises ValueError for NaN, so none reaches a disk."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def load_tensors(path: str | Path) -> dict:
    """Tensors of a safetensors file on the CPU; raises `CheckpointError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        raise CheckpointError(f"{path}: {kind_of(path)}, expected a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        with open(path, "rb") as file:  # a pointer of Git LFS, a page of the web: the beginning tells
            begin = file.read(24)
        raise CheckpointError(f"{path}: {str(error)[:120]}; it begins with {begin}") from None
