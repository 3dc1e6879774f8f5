"""Where the settings of a run come from: preset, then `--config` file, then `--set`, then the named flags.

The last one wins. Every mistake is a `ConfigError` that names the key or the place in the file. Nothing here
imports torch, so that it is reported before anything slow starts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .config import RunConfig, problems
from .errors import ConfigError, did_you_mean
from .files import kind_of

PRESET_DIR = Path(__file__).parent / "presets"
CUSTOM = "custom"  # what `RunConfig(...)` calls itself where no preset was used
FIELDS = {  # "train.learning_rate" and so on
    f"{section}.{name}": field
    for section in ("model", "data", "train", "run")
    for name, field in RunConfig.model_fields[section].annotation.model_fields.items()
}
DOTTED = {name.partition(".")[2]: name for name in FIELDS}  # the leaf alone is enough: no two are alike
EITHER = (("train.minutes", "train.max_steps"), ("data.chat_file", "data.dataset", "data.input_file"))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (bombs) and duplicate keys (the last one would win silently). Values
    stay as they were typed, as with `--set`: YAML 1.1 reads 1:30 as 90, 010 as 8 and `no` as false."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [pair for pair in pairs if pair[0].endswith(":null")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a configuration file")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str) or keys.count(key) > 1:
                wrong = "appears twice" if isinstance(key, str) else "is not a word"
                raise yaml.YAMLError(f"the key {key!r} {wrong}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """One YAML mapping from a file; raises `ConfigError` naming the file and the place."""
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        raise ConfigError(f"--config {path}: {kind_of(path)}, expected a YAML file")
    try:
        value = yaml.load(path.read_bytes().decode("utf-8-sig"), Loader=_StrictLoader)  # noqa: S506 - is safe
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        found = type(value).__name__
        raise ConfigError(f"--config {path}: found {found}, expected sections such as 'model:' and 'train:'")
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` -> (dotted key, value). The section may be left out. The value stays as it was typed, for
    pydantic to convert by the field's type; `null` is None where that is allowed, a list is JSON."""
    key, sep, value = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise ConfigError(f"--set {text!r}: expected key=value, e.g. --set train.learning_rate=1e-3")
    name = DOTTED.get(key, key)
    if name not in FIELDS:
        hint = "; it is chosen by --preset" if key == "preset" else did_you_mean(key, [*FIELDS, *DOTTED])
        raise ConfigError(f"--set {text[:60]!r}: unknown key {key[:60]!r}{hint}")
    if not str(FIELDS[name].annotation).startswith("tuple"):
        return name, _or_none(name, value)
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        raise ConfigError(f'--set {name}: expected a JSON list, e.g. \'["one", "two"]\'') from None


def _or_none(name: str, value: Any) -> Any:
    """`null`, or the `None` of a notebook's `--drive_dir {drive_dir}`, is None where that is allowed."""
    is_none = isinstance(value, str) and value.strip().lower() in ("null", "none")
    return None if is_none and name in FIELDS and "None" in str(FIELDS[name].annotation) else value


def check_asked_once(overrides: list[str], flags: dict[str, Any]) -> None:
    """Raises `ConfigError` for a command line that asks for two of which one would be passed over."""
    asked = [*map(parse_override, overrides), *flags.items()]
    named = {key for key, value in asked if _or_none(key, value) is not None}
    for either in EITHER:
        words = " and ".join(f"--{key.partition('.')[2]}" for key in either if key in named)
        if " and " in words:
            raise ConfigError(f"{words}: give one, for only one would count")


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load_config(
    preset: str | None = None, config_file: str | None = None, overrides: list[str] | tuple = (), **flags: Any
) -> RunConfig:
    """Preset + file + `key=value` overrides + dotted flags (`{"train.max_steps": 10}`; None means not given).

    Without `preset` it is the one that the file names, else nano; "auto" in a file names none. "custom"
    presets nothing: what a run wrote that was not made from a preset.
    """
    fields = read_yaml(config_file) if config_file is not None else {}
    own = fields.get("preset")
    named = [name for name in (preset, own if own != "auto" else None) if name is not None] or ["nano"]
    known = preset_names()
    for name in named:
        if name not in (*known, CUSTOM):
            raise ConfigError(f"unknown preset {name!r}{did_you_mean(str(name), known)} ({', '.join(known)})")
    base = {} if named[0] == CUSTOM else read_yaml(PRESET_DIR / f"{named[0]}.yaml")
    fields = base | fields | {"preset": named[0]}
    for section, values in fields.items():
        if isinstance(values, dict):
            typed = {leaf: _or_none(f"{section}.{leaf}", value) for leaf, value in values.items()}
            fields[section] = base.get(section, {}) | typed
    given = [parse_override(text) for text in overrides]
    given += [(key, _or_none(key, value)) for key, value in flags.items() if value is not None]
    for either in EITHER:
        asked = {key for key, value in given if value is not None} & {*either}
        if len(asked) == 1:  # else the other one of a file would count all the same
            given += [(key, None) for key in {*either} - asked if FIELDS[key].default is None]
    for key, value in given:
        section, leaf = key.split(".")
        if isinstance(fields.setdefault(section, {}), dict):  # else pydantic says what it expected there
            fields[section][leaf] = value
    try:
        return RunConfig(**fields)
    except ValidationError as error:
        raise ConfigError(problems(error, RunConfig)) from None
