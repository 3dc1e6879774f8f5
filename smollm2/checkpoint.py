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

import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError, NoUsableCheckpoint
from .files import Content, commit_folder, dump_json, kind_of, sha256_file, sha256_json, strict_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
FINAL_NAMES = ("final_model.ckpt", "final_continued_model.ckpt")
RESUME_FILES = ("state.json", "optim.safetensors", "tokenizer.json")
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

    def to_bytes(self) -> bytes:
        """Content of `manifest.json`, the hash of itself included."""
        body = {
            "format": FORMAT_VERSION,
            "run_id": self.run_id,
            "step": self.step,
            "files": self.files,
            "facts": self.facts,
        }
        return dump_json(body | {"sha256_of_this": sha256_json(body)})


# --- writing --------------------------------------------------------------------------------------------------------


def commit(
    parent: str | Path, name: str, files: dict[str, Content], run_id: str, step: int, facts: dict[str, Any]
) -> Manifest:
    """Write a checkpoint folder `parent/name` in one atomic step (see `files.commit_folder`); returns its manifest."""
    target = Path(parent) / name

    def manifest(table: dict[str, dict]) -> Manifest:
        return Manifest(target, run_id, step, table, facts)

    return manifest(commit_folder(target, files, lambda table: {MANIFEST: manifest(table).to_bytes()}))


# --- reading --------------------------------------------------------------------------------------------------------


def _regular_file(path: Path, limit: int | None = None) -> int:
    """Size of a regular file that is not a link; raises `CheckpointError`."""
    try:
        facts = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(
            f"{path.name}: {'a link' if stat.S_ISLNK(facts.st_mode) else kind_of(path)}, expected a regular file"
        )
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
    return parse_manifest(path.read_bytes(), folder)


def parse_manifest(raw: bytes, folder: Path) -> Manifest:
    """The manifest of `folder` from the bytes of its file; raises `CheckpointError`."""
    body = strict_json(raw, MANIFEST)
    if not isinstance(body, dict):
        raise CheckpointError(f"{MANIFEST}: not a table")
    try:
        is_canonical = dump_json(body) == raw
        is_intact = body.pop("sha256_of_this", None) == sha256_json(body)
    except RecursionError:
        is_canonical = is_intact = False
    if not (is_canonical and is_intact):
        raise CheckpointError(f"{MANIFEST}: does not match its own sha256: edited or damaged")
    if not _is_count(body.get("format")) or body["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST}: format {body.get('format')!r:.20}, this version reads {FORMAT_VERSION}: update the project"
        )
    return _checked_table(folder, body)


def _checked_table(folder: Path, body: dict[str, Any]) -> Manifest:
    run_id, step, files, facts = (body.get(key) for key in ("run_id", "step", "files", "facts"))
    for key, ok in (
        ("run_id", isinstance(run_id, str)),
        ("step", _is_count(step)),
        ("files", isinstance(files, dict)),
        ("facts", isinstance(facts, dict)),
    ):
        if not ok:
            raise CheckpointError(
                f"{MANIFEST}: {key} is missing or of the wrong kind ({body.get(key)!r:.40})"
            )
    if not isinstance(facts.get("fingerprint", {}), dict):
        raise CheckpointError(f"{MANIFEST}: facts.fingerprint is not a table")
    for name, entry in files.items():
        if not _SAFE_NAME.fullmatch(name) or name == MANIFEST or ".." in name:
            raise CheckpointError(f"{MANIFEST}: file name {name[:60]!r} is not allowed")
        if (
            not isinstance(entry, dict)
            or not _is_count(entry.get("bytes"))
            or not _SHA256.fullmatch(str(entry.get("sha256")))
        ):
            raise CheckpointError(f"{MANIFEST}: no size and sha256 for {name}")
    return Manifest(folder, run_id, step, files, facts)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


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
        found.append((claimed_step(path), path.name in FINAL_NAMES, path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def claimed_step(folder: Path) -> float:
    """Step of a checkpoint folder; what its name says where the manifest is damaged, or infinity: such a one is reported first."""
    try:
        return read_manifest(folder).step
    except (CheckpointError, OSError):
        match = re.search(r"step-(\d+)", folder.name)
        return int(match[1]) if match else math.inf


def resume_point(
    path: Path, say: Callable[[str], None] = print, check: Callable[[Manifest], object] | None = None
) -> Manifest:
    """The manifest of a folder that verifies, holds all that a resume needs and passes `check`; raises `CheckpointError`."""
    manifest = verify(path)
    missing = [name for name in RESUME_FILES if name not in manifest.files]
    if missing:
        raise CheckpointError(f"{MANIFEST}: no {', '.join(missing)}: not a point to resume from")
    if check:
        check(manifest)
    strays = sorted({entry.name for entry in path.iterdir()} - set(manifest.files) - {MANIFEST})
    if strays:
        say(f"checkpoint {path.name}: not in its manifest, so never read: {', '.join(strays[:5])}")
    return manifest


def newest_usable(
    folders: Iterable[Path],
    say: Callable[[str], None] = print,
    check: Callable[[Manifest], object] | None = None,
    fetch: Callable[[Path], Path] = lambda folder: folder,
) -> Manifest | None:
    """The first checkpoint that verifies (and passes `check`); one line for each that does not. `fetch` brings a folder
    to this machine. None when there are no folders at all; `NoUsableCheckpoint` when there are some and none verifies:
    starting from zero would hide a loss."""
    folders = list(folders)
    for path in folders:
        try:
            return resume_point(fetch(path), say, check)
        except (CheckpointError, OSError) as error:
            say(f"checkpoint {path.name} is not usable: {error}; trying the one before")
    if folders:
        places = " and ".join(sorted({str(path.parent) for path in folders}))
        raise NoUsableCheckpoint(
            f"{len(folders)} checkpoint(s) in {places}, none usable (reasons above): repair or move them, "
            "or pass --resume never to start anew"
        )
    return None
