"""What is saved, and how it is committed so that a kill at any instant loses nothing.

A checkpoint is a Hugging Face model folder that is also a resume point:

    config.json generation_config.json tokenizer.json tokenizer_config.json model.safetensors   for everyone
    optim.safetensors   AdamW moments by parameter name, torch RNG states
    state.json          step, data position, schedule, scaler, skips, best score
    manifest.json       size and sha256 of every other file; written last

Protocol: write all files into a temporary sibling, fsync each, the manifest last, rename the folder to its name, fsync
the parent. A folder without a valid manifest is not a checkpoint. Nothing is pickled, and file contents depend on the
training state alone. The SHA-256 finds accidents, not attackers: they would rewrite the manifest too.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError, NoUsableCheckpoint
from .files import fsync_folder, kind_of, sha256_file, sha256_json, write_durably

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
FINAL_NAMES = ("final_model.ckpt", "final_continued_model.ckpt")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def step_name(step: int) -> str:
    return f"step-{step:08d}.ckpt"


@dataclass(frozen=True)
class Manifest:
    """The verified table of contents of a checkpoint folder."""

    folder: Path
    run_id: str
    step: int
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


def strict_json(raw: bytes, where: str) -> Any:
    """JSON without duplicate keys, NaN or infinities; raises `CheckpointError`."""

    def pairs(items):
        keys = [key for key, _ in items]
        if len(keys) != len(set(keys)):
            raise ValueError("a key appears twice")
        return dict(items)

    def constant(word):
        raise ValueError(f"{word} is not a number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({str(error)[:80]})") from None


def dump_json(value: Any) -> bytes:
    """Canonical JSON: equal values are equal bytes. Raises ValueError for NaN, so none reaches a disk."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


# --- writing --------------------------------------------------------------------------------------------------------


def commit(
    parent: str | Path, name: str, files: dict[str, bytes | Callable[[Path], None]], run_id: str, step: int, facts: dict[str, Any]
) -> Manifest:
    """Write a checkpoint folder `parent/name` in one atomic step and return its manifest.

    `files` maps names to bytes or to a function that writes the given path. An existing folder of that name is kept
    until the new one is whole: a final folder steps aside under its step name, a step folder is replaced.
    Raises OSError when the disk is full or failing; then nothing under `name` has changed and no leftover remains.
    """
    parent = Path(parent)
    temporary = parent / f"{name}.tmp-{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        table = {}
        for file_name, content in sorted(files.items()):
            path = temporary / file_name
            if callable(content):
                content(path)
                with open(path, "rb+") as written:
                    os.fsync(written.fileno())
            else:
                write_durably(path, content)
            table[file_name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        body = {"format": FORMAT_VERSION, "run_id": run_id, "step": step, "files": table, "facts": facts}
        body["sha256_of_this"] = sha256_json(body)
        write_durably(temporary / MANIFEST, dump_json(body))
        fsync_folder(temporary)
        _put_in_place(temporary, parent / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Manifest(parent / name, run_id, step, table, facts)


def _put_in_place(temporary: Path, target: Path) -> None:
    if target.exists():
        # os.rename cannot replace a folder that is not empty: move the old one to a name that still says what it is
        try:
            aside = target.with_name(step_name(read_manifest(target).step))
        except CheckpointError:
            aside = None
        if aside is None or aside == target or aside.exists():
            aside = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
        os.rename(target, aside)
        os.rename(temporary, target)
        fsync_folder(target.parent)
        if ".old-" in aside.name:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, target)
        fsync_folder(target.parent)


# --- reading --------------------------------------------------------------------------------------------------------


def _regular_file(path: Path, limit: int | None = None) -> int:
    """Size of a regular file that is not a link; raises `CheckpointError`."""
    try:
        facts = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{path.name}: {'a link' if stat.S_ISLNK(facts.st_mode) else kind_of(path)}, expected a regular file")
    if limit is not None and facts.st_size > limit:
        raise CheckpointError(f"{path.name}: {facts.st_size:,} bytes, expected at most {limit:,}")
    return facts.st_size


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder, checked for form but not yet against the files; raises `CheckpointError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {kind_of(folder)}, expected a checkpoint folder")
    path = folder / MANIFEST
    _regular_file(path, MAX_MANIFEST_BYTES)
    body = strict_json(path.read_bytes(), MANIFEST)
    if not isinstance(body, dict):
        raise CheckpointError(f"{MANIFEST}: not a table")
    digest = body.pop("sha256_of_this", None)
    if digest != sha256_json(body):
        raise CheckpointError(f"{MANIFEST}: does not match its own sha256: edited or damaged")
    if body.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{MANIFEST}: format {body.get('format')!r}, this version reads {FORMAT_VERSION}: update the project")
    files = body["files"]
    for name, entry in files.items():
        if not _SAFE_NAME.fullmatch(name) or name == MANIFEST or ".." in name:
            raise CheckpointError(f"{MANIFEST}: file name {name[:60]!r} is not allowed")
        if not isinstance(entry.get("bytes"), int) or not _SHA256.fullmatch(str(entry.get("sha256"))):
            raise CheckpointError(f"{MANIFEST}: no size and sha256 for {name}")
    return Manifest(folder, body["run_id"], body["step"], files, body["facts"])


def verify(folder: str | Path, only: Iterable[str] | None = None) -> Manifest:
    """Check every byte (or the `only` named files) against the manifest; raises `CheckpointError` with the cause."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if only is not None and name not in only:
            continue
        path = manifest.folder / name
        size = _regular_file(path)
        if size != entry["bytes"]:
            raise CheckpointError(f"{name}: manifest says {entry['bytes']:,} bytes, file has {size:,}")
        if sha256_file(path) != entry["sha256"]:
            raise CheckpointError(f"{name}: sha256 differs from the manifest: damaged")
    for required in ("config.json", "model.safetensors"):
        if required not in manifest.files:
            raise CheckpointError(f"{MANIFEST}: no {required}")
    return manifest


def candidates(checkpoint_dir: str | Path) -> list[Path]:
    """Every folder that claims to be a checkpoint (whole or not), newest step first; finals before steps."""
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if ".tmp-" in path.name or ".old-" in path.name or not path.is_dir() or ".ckpt" not in path.name:
            continue
        try:
            step = read_manifest(path).step
        except CheckpointError:
            match = re.search(r"step-(\d+)", path.name)
            step = int(match[1]) if match else math.inf  # a damaged final: report it first
        found.append((step, path.name in FINAL_NAMES, path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def newest_usable(folders: Iterable[Path], say: Callable[[str], None] = print) -> Manifest | None:
    """The first checkpoint that verifies; one line for each that does not. None when there are no folders at all;
    `NoUsableCheckpoint` when there are some and none verifies: starting from zero would hide a loss."""
    folders = list(folders)
    for path in folders:
        try:
            manifest = verify(path)
            if "state.json" not in manifest.files:
                raise CheckpointError("no state.json: weights only, not a point to resume from")
            return manifest
        except (CheckpointError, OSError) as error:
            say(f"checkpoint {path.name} is not usable: {error}; trying the one before")
    if folders:
        raise NoUsableCheckpoint(
            f"{len(folders)} checkpoint(s) in {folders[0].parent}, none usable (reasons above): repair or move them, "
            "or pass --resume never to start anew"
        )
    return None


def check_safetensors_header(path: Path) -> None:
    """Bound the header before anything is allocated for it; raises `CheckpointError`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{path.name}: header of {length:,} bytes in a file of {size:,}: not a safetensors file")


def load_tensors(path: str | Path) -> dict:
    """Tensors of a safetensors file on the CPU; raises `CheckpointError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    check_safetensors_header(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path.name}: {str(error)[:120]}") from None


# --- tidying up -----------------------------------------------------------------------------------------------------


def remove_leftovers(checkpoint_dir: str | Path) -> None:
    """Remove what a killed save left behind. An `.old-` folder is put back when its successor never arrived."""
    for path in sorted(Path(checkpoint_dir).glob("*.old-*")):
        target = path.with_name(path.name.split(".old-")[0])
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
    for path in Path(checkpoint_dir).glob("*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: a half-removed one is not a checkpoint any more."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoint_dir: str | Path, keep_last: int, best_step: int | None, newest: Manifest) -> list[str]:
    """Keep `newest` (verified just now), the step folders of the last `keep_last` saves, and the best; finals stay."""
    is_final = newest.folder.name in FINAL_NAMES
    removed, kept = [], int(is_final)
    for path in candidates(checkpoint_dir):
        match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
        if not match or int(match[1]) > newest.step or path == newest.folder:
            kept += path == newest.folder and not is_final
            continue
        superseded = is_final and int(match[1]) == newest.step
        if not superseded and (kept < keep_last or int(match[1]) == best_step):
            kept += 1
            continue
        remove(path)
        removed.append(path.name)
    return removed
