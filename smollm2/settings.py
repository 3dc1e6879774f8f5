"""Where the settings of a run come from: preset, then `--config` file, then `--set`, then the named flags.

The last one wins. Every mistake is a `ConfigError` that names the key or the place in the file. Nothing here imports
torch, so that it is reported before anything slow starts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .config import RunConfig, problems
from .errors import ConfigError, did_you_mean

PRESET_DIR = Path(__file__).parent / "presets"
MAX_YAML_BYTES = 64 * 1024
MAX_YAML_DEPTH = 20
CUSTOM = "custom"  # what `RunConfig(...)` calls itself where no preset was used


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (bombs), duplicate keys (the last one would win silently) and deep nesting."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("aliases (*name) are not allowed in a configuration file")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_YAML_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise ConfigError(f"the key {key!r} is not a word")
            if keys.count(key) > 1:
                raise ConfigError(f"the key {key!r} appears twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """One YAML mapping from a file of at most 64 KiB; raises `ConfigError` naming the file and the place."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        raise ConfigError(
            f"--config {path}: {'not a regular file' if os.path.exists(path) else 'no such file'}"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
        if len(raw) > MAX_YAML_BYTES:
            raise ConfigError(f"larger than {MAX_YAML_BYTES // 1024} KiB; a configuration is a few lines")
        value = yaml.load(raw.decode("utf-8-sig"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"--config {path}: found {type(value).__name__}, expected sections such as 'model:' and 'train:'"
        )
    return value


def _leaf_names() -> dict[str, list[str]]:
    """Leaf field name -> dotted names, e.g. learning_rate -> [train.learning_rate]."""
    leaves: dict[str, list[str]] = {}
    for section, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name in field.annotation.model_fields:
                leaves.setdefault(name, []).append(f"{section}.{name}")
    return leaves


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` -> (dotted key, value). The value is read as YAML; the section may be left out when it is clear."""
    key, sep, raw = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise ConfigError(f"--set {text!r}: expected key=value, e.g. --set train.learning_rate=1e-3")
    if key == "preset":
        raise ConfigError(
            "--set preset: a preset is chosen by --preset, or by a line 'preset: nano' in the --config file"
        )
    leaves = _leaf_names()
    dotted = {name for names in leaves.values() for name in names}
    if key in leaves and len(leaves[key]) == 1:
        key = leaves[key][0]
    if key not in dotted:
        raise ConfigError(f"--set {text!r}: unknown key {key!r}{did_you_mean(key, dotted | set(leaves))}")
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"--set {key}: value of {len(raw)} characters is too long")
    try:
        return key, yaml.load(raw, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, ConfigError, ValueError, RecursionError):
        return key, raw


def _merge(base: dict, extra: dict) -> dict:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load_config(
    preset: str | None = None, config_file: str | None = None, overrides: list[str] | tuple = (), **flags: Any
) -> RunConfig:
    """Preset + file + `key=value` overrides + dotted flags (`{"train.max_steps": 10}`; None means not given).

    Without `preset` it is the one that the file names, else nano. "custom" presets nothing: what a run wrote that was
    not made from a preset.
    """
    fields = read_yaml(config_file) if config_file is not None else {}
    named = [name for name in (preset, fields.get("preset")) if name is not None]
    for name in named:
        if name != CUSTOM and name not in preset_names():
            raise ConfigError(
                f"unknown preset {name!r}{did_you_mean(str(name), preset_names())} ({', '.join(preset_names())})"
            )
    preset = named[0] if named else "nano"
    fields = _merge({} if preset == CUSTOM else read_yaml(PRESET_DIR / f"{preset}.yaml"), fields) | {
        "preset": preset
    }
    pairs = [parse_override(text) for text in overrides] + [(k, v) for k, v in flags.items() if v is not None]
    for key, value in pairs:
        *section, leaf = key.split(".")
        target = fields
        for part in section:
            if not isinstance(target.setdefault(part, {}), dict):
                raise ConfigError(f"{part}: expected a section with keys, found {target[part]!r}")
            target = target[part]
        target[leaf] = value
    try:
        return RunConfig(**fields)
    except ValidationError as error:
        raise ConfigError(problems(error, RunConfig)) from None
