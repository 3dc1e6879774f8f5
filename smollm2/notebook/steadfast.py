"""A notebook's run and its Drive: wait for a dead runtime's claim to end, go on here when Drive is gone, look at what is kept.

`train` refuses to guess: it stops with an error when another runtime seems to write to the same Drive folder, or when
Drive cannot be read and might hold a newer checkpoint. A notebook left alone by its reader takes the safe way instead
and says so: waiting, or training on this machine only. Neither touches what lies on Drive.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint import candidates, read_manifest, verify
from ..config import RunConfig
from ..drive_folder import check_place
from ..errors import BusyError, CheckpointError, UserError
from ..lease import LIVE_SECONDS

PAUSE_SECONDS = 15.0


def drive_problem(drive_dir: str | Path) -> str | None:
    """Why a Drive folder cannot be used now; None when it answers (or can be made)."""
    folder = Path(drive_dir)
    try:
        check_place(folder)
        there = folder if folder.exists() else folder.parent
        for name in os.listdir(there):
            os.stat(there / name)
    except OSError as error:
        return error.strerror or str(error)
    return None


def keep_training(
    config: RunConfig,
    train: Callable[[RunConfig], object],
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
):
    """`train(config)`; with `run.drive_dir` it waits while another runtime's claim on that folder is fresh (five minutes
    at most), and trains on this machine only when Drive does not answer. Errors that Drive does not explain pass."""
    waited, drive_dir = 0.0, config.run.drive_dir
    while True:
        try:
            return train(config)
        except BusyError as error:
            if not drive_dir or str(drive_dir) not in str(error) or waited > LIVE_SECONDS + PAUSE_SECONDS:
                raise
            if not waited:
                say(
                    f"{error}. Waiting for that: a runtime that died keeps its claim for {LIVE_SECONDS / 60:.0f} minutes ..."
                )
            waited += PAUSE_SECONDS
            sleep(PAUSE_SECONDS)
        except UserError as error:
            problem = config.run.drive_dir and drive_problem(config.run.drive_dir)
            if not problem:
                raise
            say(
                f"Drive does not answer ({problem}), so this run goes on WITHOUT it, on this machine only. What is on Drive stays as it is."
            )
            say(f"The message was: {str(error)[:200]}")
            config = config.model_copy(update={"run": config.run.model_copy(update={"drive_dir": None})})


def kept(folders: Iterable[tuple[str, str | Path]]) -> list[dict[str, object]]:
    """One row a checkpoint in the (place, folder) pairs, newest first: every byte of it is read and compared."""
    rows = []
    for place, folder in folders:
        try:
            paths = candidates(folder)
        except OSError as error:
            rows.append(
                {
                    "place": place,
                    "name": str(folder),
                    "step": None,
                    "bytes": 0,
                    "sha256": "",
                    "state": f"out of reach: {error.strerror}",
                }
            )
            continue
        for path in paths:
            row: dict[str, object] = {
                "place": place,
                "name": path.name,
                "step": None,
                "bytes": 0,
                "sha256": "",
                "state": "whole",
            }
            try:
                manifest = read_manifest(path)
                row |= {
                    "step": manifest.step,
                    "bytes": manifest.bytes,
                    "sha256": manifest.files["model.safetensors"]["sha256"],
                }
                verify(path)
            except (CheckpointError, OSError, KeyError) as error:
                row["state"] = f"NOT usable: {str(error)[:60]}"
            rows.append(row)
    return rows
