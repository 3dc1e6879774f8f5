"""What a model folder tells of its origin: the run that made it, and the weights which that run began with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .checkpoint import strict_json
from .config import RunConfig
from .errors import CheckpointError, ConfigError

MAX_RECORD_BYTES = 16 * 2**20


def recorded(folder: Path, name: str = "state.json") -> dict[str, Any]:
    """The table in `state.json` (of a checkpoint) or `export.json` (of an export); empty for a folder that has none."""
    path = folder / name
    if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
        return {}
    table = strict_json(path.read_bytes(), str(path))
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: found {type(table).__name__}, expected the record of a run")
    return table


def trained_length(folder: Path) -> int | None:
    """Tokens of a training row, where the folder is a checkpoint that says so."""
    return recorded(folder).get("config", {}).get("data", {}).get("sequence_length")


def origin_name(source: str | Path) -> str:
    """What a record keeps of a source of weights: a Hub id as it is, of a folder its last part. Where it lay is nobody's business."""
    return Path(source).resolve().name if os.path.exists(source) else str(source)


def published_base(source: str | Path, folder: Path) -> str | None:
    """Hub id of the published weights that `source` (resolved: `folder`) is or was made from; None where nothing says so."""
    if not os.path.exists(source):
        return str(source)
    bases = (recorded(folder, name).get("base_model") for name in ("state.json", "export.json"))
    return next((base for base in bases if isinstance(base, str) and base.count("/") == 1), None)


def check_origin(began_with: str | None, config: RunConfig) -> None:
    """Raises `ConfigError` when other weights are asked for than those the run began with: a resume would not read them."""
    asked = config.run.init_from
    if asked and origin_name(asked) != began_with:
        raise ConfigError(
            f"run.init_from={asked}: the run in this output directory began with {began_with or 'random weights'}; "
            "leave it out, choose another --output_dir, or start anew with --resume never"
        )
