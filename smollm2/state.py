"""The state of a run besides its tensors: everything that decides what happens next, as one JSON value.

No clock and no path is in it, so equal states are equal bytes.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import NonNegativeInt, StringConstraints, TypeAdapter, ValidationError

from .checkpoint import Manifest
from .config import RunConfig
from .errors import CheckpointError, ConfigError
from .files import strict_json
from .guard import NumericGuard

# Settings that may change when a run is resumed. Those that change its last digits (precision, compile, deterministic) are told in a line.
CHANGEABLE = {
    "train": {
        "max_steps", "continue_steps", "micro_batch_size", "precision", "compile", "deterministic", "on_spike", "log_every", "val_every",
        "val_max_tokens", "sample_every", "sample_tokens", "prompts", "save_every", "save_every_seconds", "keep_last",
    },
    "data": {"input_file", "dataset", "tokenizer", "tokenizer_vocab_size"},  # identified by their hashes instead
}  # fmt: skip


def fixed_settings(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The settings that must not change between a checkpoint and its resume."""
    sections = {name: getattr(config, name).model_dump(mode="json") for name in ("model", "data", "train")}
    return {
        name: {k: v for k, v in section.items() if k not in CHANGEABLE.get(name, ())}
        for name, section in sections.items()
    }


OneLine = Annotated[
    str, StringConstraints(pattern=r"^[^\x00-\x1f|`]{0,200}$")
]  # it goes into a table of the model card


@dataclass
class TrainState:
    """Where a run stands. `step` counts applied updates, `position` the batches drawn (skipped ones included)."""

    step: NonNegativeInt = 0
    position: NonNegativeInt = 0
    schedule_start: NonNegativeInt = 0
    schedule_total: NonNegativeInt = 0
    micro_batch_size: NonNegativeInt = 0
    scaler: dict[str, float] = field(default_factory=dict)
    guard: dict[str, int | list[int | float]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # {"step", "bits_per_byte"} of the best validation
    epoch: dict[str, float] = field(default_factory=lambda: {"loss_sum": 0.0, "batches": 0})
    pending: list[str] = field(
        default_factory=list
    )  # "val", "sample": due at this step, not done when it was saved
    log_lines: dict[str, int] = field(default_factory=dict)
    python_rng: list[Any] = field(default_factory=list)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    preset: OneLine = ""
    text: OneLine = ""  # name of the input file or dataset the run began with
    init_from: str | None = None  # Hub id or folder name whose weights the run began with; None: random ones
    base_model: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./-]{1,200}$")] | None = (
        None  # Hub id of the published weights behind `init_from`, where that is known
    )

    def to_json(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        return asdict(self) | {"python_rng": [version, list(internal), gauss]}

    @classmethod
    def from_json(cls, fields: Any) -> TrainState:
        """Raises `CheckpointError` for a missing, unknown or ill-typed field."""
        expected = asdict(cls())
        if isinstance(fields, dict):  # checkpoints from before these were recorded do not have them
            fields = {"preset": "", "text": "", "init_from": None, "base_model": None} | fields
        if not isinstance(fields, dict) or set(fields) != set(expected):
            differing = set(fields) ^ set(expected) if isinstance(fields, dict) else "not a table"
            raise CheckpointError(
                f"state.json: missing or unknown fields: {', '.join(sorted(differing)[:5])}"
            )
        for name, known in (
            ("best", {"step", "bits_per_byte"}),
            ("epoch", set(expected["epoch"])),
            ("scaler", {"scale", "_growth_tracker"}),
        ):
            if (fields[name] or name == "epoch") and (
                not isinstance(fields[name], dict) or set(fields[name]) != known
            ):
                raise CheckpointError(f"state.json: {name} does not hold {', '.join(sorted(known))}")
        kinds = {key: type(value) for key, value in NumericGuard().state().items()}
        if not isinstance(fields["guard"], dict) or any(
            not isinstance(value, kinds.get(key, ())) for key, value in fields["guard"].items()
        ):
            raise CheckpointError(f"state.json: guard does not hold {', '.join(kinds)}")
        try:
            for name, kind in get_type_hints(cls, include_extras=True).items():
                TypeAdapter(dict[str, kind]).validate_python(
                    {name: fields[name]}, strict=True
                )  # the values stay as they are
            cls(**fields).restore_python_rng(random.Random())
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise CheckpointError(
                f"state.json: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"state.json: python_rng: {str(error)[:80]}") from None
        return cls(**fields)

    def restore_python_rng(self, generator: Any = random) -> None:
        version, internal, gauss = self.python_rng
        generator.setstate((version, tuple(internal), gauss))


def read_state(manifest: Manifest) -> TrainState:
    """The state in a verified checkpoint; raises `CheckpointError` when it is not one, or of another step."""
    state = TrainState.from_json(strict_json((manifest.folder / "state.json").read_bytes(), "state.json"))
    if state.step != manifest.step:
        raise CheckpointError(f"state.json is of step {state.step}, the manifest of step {manifest.step}")
    return state


def check_unchanged(saved: dict[str, Any], config: RunConfig, place: str, way_out: str) -> None:
    """Raises `ConfigError` with the differences when a fixed setting changed since the checkpoint. `place`, `way_out`: see `origin.whereabouts`."""
    now = fixed_settings(config)
    changes = [
        f"{section}.{key}: {saved.get(section, {}).get(key)} -> {now.get(section, {}).get(key)}"
        for section in sorted(set(now) | set(saved))
        for key in sorted(set(now.get(section, {})) | set(saved.get(section, {})))
        if saved.get(section, {}).get(key) != now.get(section, {}).get(key)
    ]
    if changes:
        raise ConfigError(
            f"the run in {place} was made with other settings ({'; '.join(changes)}): put them back, or {way_out}"
        )


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
