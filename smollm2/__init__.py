"""SmolLM2-135M from scratch: the model, its data, training that loses nothing, sampling and export.

Names are loaded when first used, so that `import smollm2` and a command line's first word are instant.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "SmolLM2": "model", "KVCache": "model", "SmolLM2Config": "config", "RunConfig": "config",
    "load_config": "settings", "parameter_table": "parameters", "Tokenizer": "tokenizer", "train": "training",
}  # fmt: skip
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
