"""A notebook's run and its Drive: wait for a dead runtime's claim to end, go on here when Drive is gone, list
what is kept.

`train` refuses to guess: it stops with an error when another runtime seems to write to the same Drive folder,
or when Drive cannot be read and might hold a newer checkpoint. A notebook left alone by its reader takes the
safe way instead and says so: waiting, or training on this machine only. Neither touches what lies on Drive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint import verify
from ..config import RunConfig
from ..drive_errors import explain
from ..drive_folder import LIVE_SECONDS, check_place, entries
from ..errors import BusyError, CheckpointError, UserError

PAUSE_SECONDS = 15.0


def drive_problem(drive_dir: str | Path) -> str | None:
    """Why a Drive folder cannot be used now; None when it answers (or can be made)."""
    try:
        check_place(Path(drive_dir))
        problems = [entry.problem for entry in entries(Path(drive_dir))]
    except OSError as error:
        problems = [error]
    return next((explain(problem) for problem in problems if isinstance(problem, OSError)), None)


def keep_training(config: RunConfig, train: Callable[[RunConfig], object], say=print, sleep=time.sleep):
    """`train(config)`; with `run.drive_dir` it waits while another runtime's claim on that folder is fresh
    (five minutes at most), and trains on this machine only when Drive does not answer. Errors that Drive does
    not explain pass."""
    waited = 0.0
    while True:
        drive_dir = config.run.drive_dir
        try:
            return train(config)
        except UserError as error:
            is_busy = isinstance(error, BusyError)
            is_claimed = is_busy and drive_dir and str(drive_dir) in str(error)
            problem = drive_dir and not is_busy and drive_problem(drive_dir)
            if is_claimed and waited <= LIVE_SECONDS + PAUSE_SECONDS:
                if not waited:
                    say(f"{error}. Waiting for that: a dead runtime keeps its claim for five minutes ...")
                waited += PAUSE_SECONDS
                sleep(PAUSE_SECONDS)
            elif problem:
                say(f"Drive does not answer ({problem}): this run goes on WITHOUT it, on this machine only.")
                say(f"What is on Drive stays as it is. The message was: {str(error)[:200]}")
                config = config.model_copy(update={"run": config.run.model_copy(update={"drive_dir": None})})
            else:
                raise


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
