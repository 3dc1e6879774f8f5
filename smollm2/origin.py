"""What a model folder tells of its origin: the run that made it, and the weights which it began with."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from .config import DataConfig, PlaceConfig, Text, problems
from .errors import CheckpointError
from .files import origin_name
from .weights import read_table


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Data(_Part):
    sequence_length: PositiveInt = 1


class _Train(_Part):
    batch_size: PositiveInt = 1


class _Settings(_Part):
    data: _Data = _Data()
    train: _Train = _Train()


class _Record(_Part):
    """What is computed with or written on a card must be of its kind: anybody may have edited a record."""

    step: NonNegativeInt | None = None
    text: Text = ""
    init_from: Text | None = None
    best: dict[str, float] = {}
    bits_per_byte: dict[str, float] = {}
    config: _Settings = _Settings()


def recorded(folder: Path, name: str = "state.json") -> dict[str, Any]:
    """The table in `state.json` (of a checkpoint) or `export.json` (of an export); empty without one. Raises
    `CheckpointError` for what is no record."""
    file = folder / name
    try:
        fields = read_table(file, "the record of a run") if file.is_file() else {}
        return _Record.model_validate(fields).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {problems(error, _Record)}") from None


def trained_with(folder: Path) -> DataConfig | None:
    """The data settings of the run that made a checkpoint: rows, held-out part. None for any other folder."""
    settings = recorded(folder).get("config")
    fields = settings.get("data") if isinstance(settings, dict) else None
    try:
        return DataConfig(**fields) if isinstance(fields, dict) else None
    except ValidationError as error:
        raise CheckpointError(f"{folder}/state.json: data: {problems(error, DataConfig)}") from None


def text_name(data: DataConfig, sidecar: dict[str, Any]) -> str:
    """What a record keeps of a text: of each source its Hub id or name, in one line that a card's table
    takes."""
    names = sidecar.get("dataset", {}).get("sources") or [origin_name(data.chat_file or data.input_file)]
    return re.sub(r"[\x00-\x1f|`]", "_", ", ".join(names))[:200]


def published_base(source: str | Path, folder: Path) -> str | None:
    """Hub id of the published weights that `source` (resolved: `folder`) is or comes from, if known."""
    if not os.path.exists(source):
        return str(source)
    bases = (recorded(folder, name).get("base_model") for name in ("state.json", "export.json"))
    return next((base for base in bases if isinstance(base, str) and base.count("/") == 1), None)


def whereabouts(run: PlaceConfig) -> tuple[str, str]:
    """Where a run lies, and how to begin another one."""
    place, elsewhere = f"--output_dir {run.output_dir}", "choose another --output_dir"
    if run.drive_dir is None:
        return place, f"{elsewhere}, or start anew with --resume never"
    # --resume never refuses a Drive folder that holds a run
    return f"{place} and --drive_dir {run.drive_dir}", f"{elsewhere} and another --drive_dir"
