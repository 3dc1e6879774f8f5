"""Which checkpoints stay, whether the disk holds them, and what a kill left behind goes.

Whatever is removed gets a temporary name first, in one rename: a kill in the middle leaves a leftover that the next
start recognises, never half a checkpoint.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from .checkpoint import FINAL_NAMES, Manifest, candidates, read_manifest
from .errors import CheckpointError, OutputLost


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


def check_space(
    checkpoint_dir: str | Path, bytes_each: int, count: int, say: Callable[[str], None] = print
) -> None:
    """Before training: can the disk hold `count` checkpoints of `bytes_each` at the same time, those that lie there included?

    A warning when it cannot; raises `OutputLost` when there is no room for even a good one and the next.
    """
    checkpoint_dir = Path(checkpoint_dir)
    usage = shutil.disk_usage(checkpoint_dir)
    if usage.total == 0:  # some network and FUSE mounts do not tell
        return
    here = [path.stat().st_size for folder in candidates(checkpoint_dir) for path in folder.iterdir()]
    needed, free = count * bytes_each - sum(here), usage.free
    figures = (
        f"{_megabytes(free)} free for {checkpoint_dir}, and one checkpoint takes {_megabytes(bytes_each)}"
    )
    least = bytes_each if here else 2 * bytes_each
    if free < least:
        raise OutputLost(
            f"{figures}: {'no room for the next one beside the last good one' if here else 'not even two fit, the last good one and the next'}; "
            f"free {_megabytes(least - free)}, or choose another --output_dir or a smaller model"
        )
    if free < needed:
        say(
            f"warning: {figures}: the {count} that a whole run keeps do not fit; free {_megabytes(needed - free)} or lower train.keep_last"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def _is_readable(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder))
    except (CheckpointError, OSError):
        return False
