"""Which checkpoints stay, and what a kill left behind goes.

Whatever is removed gets a temporary name first, in one rename: a kill in the middle leaves a leftover that the next
start recognises, never half a checkpoint.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from .checkpoint import FINAL_NAMES, Manifest, candidates, read_manifest
from .errors import CheckpointError


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
    """Remove a checkpoint folder. Raises OSError when its name cannot be changed; it is whole then."""
    leftover = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    os.rename(folder, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def prune(checkpoint_dir: str | Path, keep_last: int, best_step: int | None, newest: Manifest) -> list[str]:
    """Keep `newest` (verified just now), the step folders of the last `keep_last` saves, and the best; finals stay.

    A damaged folder does not count as kept: it goes once enough good ones are newer.
    """
    is_final = newest.folder.name in FINAL_NAMES
    removed, kept = [], 1
    for path in candidates(checkpoint_dir):
        match = re.fullmatch(r"step-(\d+)\.ckpt", path.name)
        if not match or path.is_symlink() or path == newest.folder or int(match[1]) > newest.step:
            continue
        superseded = is_final and int(match[1]) == newest.step
        if not superseded and (kept < keep_last or int(match[1]) == best_step):
            kept += _is_readable(path)
            continue
        remove(path)
        removed.append(path.name)
    return removed


def _is_readable(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder))
    except (CheckpointError, OSError):
        return False
