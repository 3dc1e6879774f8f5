"""What a model folder tells of its origin: the run that made it, and the weights which it began with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .config import DataConfig, PlaceConfig, problems
from .errors import CheckpointError
from .weights import read_table


def recorded(folder: Path, name: str = "state.json") -> dict[str, Any]:
    """The table in `state.json` (of a checkpoint) or `export.json` (of an export); empty without one."""
    return read_table(folder / name, "the record of a run") if (folder / name).is_file() else {}


def trained_with(folder: Path) -> DataConfig | None:
    """The data settings of the run that made a checkpoint: rows, held-out part. None for any other folder."""
    settings = recorded(folder).get("config")
    fields = settings.get("data") if isinstance(settings, dict) else None
    try:
        return DataConfig(**fields) if isinstance(fields, dict) else None
    except ValidationError as error:
        raise CheckpointError(f"{folder}/state.json: data: {problems(error, DataConfig)}") from None


def origin_name(source: str | Path) -> str:
    """What a record keeps of a source of weights: a Hub id, or a folder's name. Where it lay is private."""
    return Path(source).resolve().name if os.path.exists(source) else str(source)


def published_base(source: str | Path, folder: Path) -> str | None:
    """Hub id of the published weights that `source` (resolved: `folder`) is or comes from, if known."""
    if not os.path.exists(source):
        return str(source)
    bases = (recorded(folder, name).get("base_model") for name in ("state.json", "export.json"))
    return next((base for base in bases if isinstance(base, str) and base.count("/") == 1), None)


def whereabouts(run: PlaceConfig, is_here: bool) -> tuple[str, str]:
    """Where the run lies that was found, in the output folder (`is_here`) or on Drive alone, and how to begin
    another one."""
    if run.drive_dir is None:
        return (
            f"--output_dir {run.output_dir}",
            "choose another --output_dir, or start anew with --resume never",
        )
    place = f"--output_dir {run.output_dir}" if is_here else f"--drive_dir {run.drive_dir}"
    # --resume never refuses a Drive folder that holds a run
    return place, "choose another --output_dir and another --drive_dir"
