"""What is saved, and how it is committed so that a kill at any instant loses nothing.

A checkpoint is a Hugging Face model folder that is also a resume point:

    config.json generation_config.json tokenizer.json tokenizer_config.json model.safetensors   for everyone
    optim.safetensors   optimizer moments by parameter name, torch RNG states
    state.json          step, data position, schedule, scaler, skips, best score
    manifest.json       size and sha256 of every other file; written last

Protocol: write all files into a temporary sibling, fsync each, the manifest last, rename the folder to its
name, fsync the parent. A folder without a valid manifest is not a checkpoint. Nothing is pickled, and file
contents depend on nothing but the run: its state, device and versions. The SHA-256 finds accidents, not
attackers: they would rewrite the manifest too.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints, ValidationError
from typing_extensions import TypedDict

from .errors import CheckpointError, NoUsableCheckpoint
from .files import Content, commit_folder, dump_json, kind_of, mark, sha256_file, sha256_json, strict_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
FINAL_NAMES = ("final_model.ckpt", "final_continued_model.ckpt")
RESUME_FILES = ("config.json", "model.safetensors", "state.json", "optim.safetensors", "tokenizer.json")


def step_name(step: int) -> str:
    return f"step-{step:08d}.ckpt"


class FileFacts(TypedDict):
    bytes: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


# never out of the folder
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}$")]


class Manifest(BaseModel):
    """The table of contents of a checkpoint folder."""

    model_config = ConfigDict(frozen=True, strict=True)

    folder: Path
    run_id: str
    step: NonNegativeInt
    files: dict[FileName, FileFacts]
    facts: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """Content of `manifest.json`, the hash of itself included."""
        body = {"format": FORMAT_VERSION} | self.model_dump(exclude={"folder"})
        return dump_json(body | {"sha256_of_this": sha256_json(body)})


def commit(
    parent: str | Path, name: str, files: dict[str, Content], run_id: str, step: int, facts: dict[str, Any],
    best_step: int | None = None,
) -> Manifest:  # fmt: skip
    """Write a checkpoint folder `parent/name` in one atomic step (see `files.commit_folder`); returns its
    manifest. A final one that it replaces goes on under its step's name where that is the best."""
    target = Path(parent) / name

    def manifest(table: dict[str, dict]) -> Manifest:
        return Manifest(folder=target, run_id=run_id, step=step, files=table, facts=facts)

    kept = None
    with contextlib.suppress(CheckpointError, OSError):
        before = read_manifest(target).step
        own = target.with_name(step_name(before))
        kept = own if before == best_step and not own.exists() else None
    return manifest(commit_folder(target, files, lambda table: {MANIFEST: manifest(table).to_bytes()}, kept))


# --- reading ------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder, checked for form but not yet against the files; raises `CheckpointError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {kind_of(folder)}, expected a checkpoint folder")
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else kind_of(path)
        raise CheckpointError(f"{MANIFEST}: {found}; expected a file of at most {MAX_MANIFEST_BYTES:,} bytes")
    return parse_manifest(path.read_bytes(), folder)


def parse_manifest(raw: bytes, folder: Path) -> Manifest:
    """The manifest of `folder` from the bytes of its file; raises `CheckpointError`."""
    body = strict_json(raw, MANIFEST)
    if not isinstance(body, dict) or body.pop("sha256_of_this", None) != sha256_json(body):
        raise CheckpointError(f"{MANIFEST}: does not match its own sha256: edited or damaged")
    if body.pop("format", None) != FORMAT_VERSION:
        raise CheckpointError(f"{MANIFEST}: of another format than {FORMAT_VERSION}: update the project")
    try:
        return Manifest(folder=folder, **body)
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST}: {' '.join(str(error).split())[:200]}") from None


def verify(folder: str | Path, only: Iterable[str] | None = None) -> Manifest:
    """Check every byte (or the `only` named files) against the manifest; raises `CheckpointError` with the
    cause."""
    name = MANIFEST
    try:
        manifest = read_manifest(folder)
        for name, entry in manifest.files.items():
            if only is not None and name not in only:
                continue
            path = manifest.folder / name
            if not path.is_file():
                raise CheckpointError(f"{name}: {kind_of(path)}, expected a file")
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{name}: manifest says {entry['bytes']:,} bytes, file has {size:,}")
            if sha256_file(path) != entry["sha256"]:
                raise CheckpointError(f"{name}: sha256 differs from the manifest: damaged")
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror or error}") from None
    return manifest


def enclosing_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint folder in which a path lies: when that is replaced or pruned, it goes, too."""
    path = Path(os.path.realpath(path))  # unlike Path.resolve it never raises
    return next((p for p in (path, *path.parents) if p.suffix == ".ckpt" and (p / MANIFEST).exists()), None)


# --- a folder of checkpoints --------------------------------------------------------------------------------


def candidates(checkpoint_dir: str | Path) -> list[Path]:
    """Every folder that claims to be a checkpoint (whole or not), newest step first; finals before steps."""
    found = [path for path in Path(checkpoint_dir).glob("*.ckpt*") if path.is_dir()]
    found = [path for path in found if ".tmp-" not in path.name and ".old-" not in path.name]
    return sorted(found, key=lambda p: (claimed_step(p), p.name in FINAL_NAMES, p.name), reverse=True)


def claimed_step(folder: Path) -> float:
    """Step of a checkpoint folder; what its name says where the manifest is damaged, or infinity: that is
    told first."""
    try:
        return read_manifest(folder).step
    except (CheckpointError, OSError):
        match = re.search(r"step-(\d+)", folder.name)
        return int(match[1]) if match else math.inf


def newest_usable(
    folders: Iterable[Path],
    say: Callable[[str], None] = print,
    check: Callable[[Manifest], object] = lambda manifest: None,
    fetch: Callable[[Path], Path] = lambda folder: folder,
) -> Manifest | None:
    """The first checkpoint that verifies, holds all that a resume needs and passes `check`; one line for each
    that does not. `fetch` brings a folder to this machine. None when there are no folders at all;
    `NoUsableCheckpoint` when there are some and none is usable: starting from zero would hide a loss."""
    folders = list(folders)
    for path in folders:
        try:
            manifest = verify(fetch(path))
            if missing := [name for name in RESUME_FILES if name not in manifest.files]:
                raise CheckpointError(f"{MANIFEST}: no {', '.join(missing)}: not a point to resume from")
            check(manifest)
            strays = {entry.name for entry in manifest.folder.iterdir()} - {MANIFEST, *manifest.files}
        except (CheckpointError, OSError) as error:
            say(f"checkpoint {path.name} is not usable: {error}; trying the one before")
            continue
        if strays:
            names = ", ".join(sorted(strays)[:5])
            say(f"checkpoint {path.name}: not in its manifest, so never read: {names}")
        return manifest
    if folders:
        found = f"{len(folders)} checkpoint(s) in {' and '.join(sorted({str(p.parent) for p in folders}))}"
        advice = "repair or move them, or pass --resume never to start anew"
        raise NoUsableCheckpoint(f"{found}, none usable (reasons above): {advice}")
    return None


def prune(checkpoint_dir: str | Path, keep_last: int, best_step: int | None, newest: Manifest) -> list[str]:
    """Keep `newest` (written just now), the step folders of the last `keep_last` saves, and the best; finals
    stay.

    A folder without a manifest does not count as kept: it goes once enough good ones are newer. What is
    removed gets a temporary name first, in one rename: a kill in the middle leaves what the next start
    tidies, never half a checkpoint.
    """
    is_final = newest.folder.name in FINAL_NAMES
    removed, kept = [], 1
    for path in candidates(checkpoint_dir):
        match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
        if not match or path == newest.folder or int(match[1]) > newest.step:
            continue
        is_superseded = is_final and int(match[1]) == newest.step
        if not is_superseded and (kept < keep_last or int(match[1]) == best_step):
            kept += (path / MANIFEST).is_file()
            continue
        leftover = path.with_name(f"{path.name}.tmp-{mark()}")
        os.rename(path, leftover)  # where this fails the folder is whole
        shutil.rmtree(leftover, ignore_errors=True)
        removed.append(path.name)
    return removed
