"""A notebook trains on when its Drive is gone, and lists what is kept where.

`train` refuses to guess: it stops with an error when Drive cannot be read and might hold a newer checkpoint.
A notebook left alone by its reader trains on this machine only and says so; what lies on Drive stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint import verify
from ..config import RunConfig
from ..drive_errors import explain
from ..drive_folder import check_place, entries
from ..errors import BusyError, CheckpointError, UserError


def drive_problem(drive_dir: str | Path) -> str | None:
    """Why a Drive folder cannot be used now; None when it answers (or can be made)."""
    try:
        check_place(Path(drive_dir))
        problems = [entry.problem for entry in entries(Path(drive_dir))]
    except OSError as error:
        problems = [error]
    return next((explain(problem) for problem in problems if isinstance(problem, OSError)), None)


def keep_training(config: RunConfig, train: Callable[[RunConfig], object], say=print):
    """`train(config)`; with `run.drive_dir` it trains on this machine only when Drive does not answer. Errors
    that Drive does not explain pass."""
    try:
        return train(config)
    except UserError as error:
        if isinstance(error, BusyError) or not config.run.drive_dir:
            raise
        problem = drive_problem(config.run.drive_dir)
        if problem is None:
            raise
        say(f"Drive does not answer ({problem}): this run goes on WITHOUT it, on this machine only.")
        say(f"What is on Drive stays as it is. The message was: {str(error)[:200]}")
        return train(config.model_copy(update={"run": config.run.model_copy(update={"drive_dir": None})}))


def kept(folders: Iterable[tuple[str, str | Path]]) -> list[dict[str, object]]:
    """One row a checkpoint in the (place, folder) pairs, newest first; every byte is read and compared."""
    rows = []
    for place, folder in folders:
        row = {"place": place, "name": str(folder), "step": None, "bytes": 0, "sha256": "", "state": "whole"}
        try:
            for entry in entries(Path(folder)):
                rows.append(row | {"name": entry.path.name, "step": entry.step} | _verified(entry.path))
        except OSError as error:
            rows.append(row | {"state": f"out of reach: {explain(error)}"})
    return rows


def _verified(folder: Path) -> dict[str, object]:
    try:
        manifest = verify(folder)
    except (CheckpointError, OSError) as error:
        return {"state": f"NOT usable: {str(error)[:60]}"}
    return {"bytes": manifest.bytes, "sha256": manifest.files["model.safetensors"]["sha256"]}
