"""The state of a run besides its tensors: everything that decides what happens next, as one JSON value.

No clock and no path is in it, so equal states are equal bytes.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints, ValidationError

from .checkpoint import Manifest
from .config import RunConfig, problems
from .errors import CheckpointError, ConfigError
from .files import strict_json
from .settings import FIELDS

# Settings that may change when a run is resumed. Those that change its last digits are told in a line.
CHANGEABLE = {
    "train": {
        "max_steps", "continue_steps", "minutes", "stop_after",
        "micro_batch_size", "precision", "compile", "deterministic",
        "log_every", "val_every", "val_max_tokens", "sample_every", "sample_tokens", "prompts", "save_every",
        "save_every_seconds", "keep_last",
    },
    # identified by their hashes instead
    "data": {
        "input_file", "dataset", "chat_file", "dataset_column", "dataset_tokens", "tokenizer",
        "tokenizer_vocab_size",
    },
}  # fmt: skip

# it goes into a table of the card
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f|`]{0,200}$")]
HubId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./-]{1,200}$")]
Number = int | float  # as it was written: 5 stays 5, so that a state is saved again as the same bytes


class TrainState(BaseModel):
    """Where a run stands. `step` counts applied updates, `position` the batches drawn (skipped ones
    included). Unknown fields of a file are another version's: passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: NonNegativeInt = 0
    position: NonNegativeInt = 0
    schedule_start: NonNegativeInt = 0
    schedule_total: NonNegativeInt = 0
    micro_batch_size: NonNegativeInt = 0
    scaler: dict[Literal["scale", "_growth_tracker"], Number] = {}
    guard: dict[str, int | list[int]] = {}
    best: dict[Literal["step", "bits_per_byte"], Number] = {}  # of the best validation
    epoch: dict[Literal["loss_sum", "batches"], Number] = {"loss_sum": 0.0, "batches": 0}
    log_lines: dict[str, int] = {}
    python_rng: list[Any] = []
    config: dict[str, dict[str, Any]] = {}
    preset: OneLine = ""
    text: OneLine = ""  # name of the input file or dataset the run began with
    init_from: str | None = None  # Hub id or folder name whose weights the run began with; None: random ones
    base_model: HubId | None = None  # Hub id of the published weights behind `init_from`, where that is known

    def to_json(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        return self.model_dump() | {"python_rng": [version, list(internal), gauss]}

    @classmethod
    def from_json(cls, fields: Any) -> TrainState:
        """Raises `CheckpointError` for what is no state of a run."""
        missing = [name for name in cls.model_fields if isinstance(fields, dict) and name not in fields]
        if missing:  # a default in the place of a lost position would train on other batches without a word
            raise CheckpointError(f"state.json: no {', '.join(missing)}")
        try:
            state = cls.model_validate(fields)
            state.restore_python_rng(random.Random())
        except (TypeError, ValueError, OverflowError) as error:
            is_ours = isinstance(error, ValidationError)
            words = problems(error, cls) if is_ours else f"python_rng: {error}"
            raise CheckpointError(f"state.json: {words[:200]}") from None
        return state

    def restore_python_rng(self, generator: Any = random) -> None:
        version, internal, gauss = self.python_rng
        generator.setstate((version, tuple(internal), gauss))


def read_state(manifest: Manifest) -> TrainState:
    """The state in a verified checkpoint; raises `CheckpointError` when it is not one, or of another step."""
    state = TrainState.from_json(strict_json((manifest.folder / "state.json").read_bytes(), "state.json"))
    if state.step != manifest.step:
        raise CheckpointError(f"state.json is of step {state.step}, the manifest of step {manifest.step}")
    return state


def fixed_settings(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The settings that must not change between a checkpoint and its resume."""
    return config.model_dump(mode="json", include={"model", "data", "train"}, exclude=CHANGEABLE)


def check_unchanged(
    state: TrainState, config: RunConfig, began_with: str | None, place: str, way_out: str
) -> None:
    """Raises `ConfigError` with the differences when a fixed setting, or the weights that the run is asked to
    begin with (`began_with`), changed since the checkpoint. `place` names where the run lies, `way_out` how
    to begin another one."""
    now, began = fixed_settings(config), state.init_from
    changes = [
        f"{section}.{key}: {was} -> {value}"
        for section, settings in now.items()
        for key, value in settings.items()
        # a setting that an earlier version did not know had its default
        if (was := state.config.get(section, {}).get(key, FIELDS[f"{section}.{key}"].default)) != value
    ]
    has_other_shape = any(change.startswith("model.") for change in changes)
    if began_with != began and (began_with or has_other_shape):  # the shape is that of the weights
        changes = [f"run.init_from: {began or 'random weights'} -> {began_with or 'random weights'}"]
    if changes:
        made = f"the run in {place} was made with other settings ({'; '.join(changes)})"
        raise ConfigError(f"{made}: put them back, or {way_out}")


def rng_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generator states as uint8 tensors, for `optim.safetensors`."""
    states = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Raises `CheckpointError` when the saved state is absent or no generator state."""
    try:
        torch.set_rng_state(tensors["rng.torch"])
        if device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"optim.safetensors: no usable random state ({str(error)[:80]})") from None
