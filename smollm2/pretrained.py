"""A model and its tokenizer, together, from a folder or the Hub: what every command begins with."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import MANIFEST, verify
from .errors import CheckpointError
from .model import SmolLM2
from .tokenizer import Tokenizer
from .weights import OPTIONAL_FILES, resolve


def load_model_and_tokenizer(source: str | Path, dtype=torch.float32, device="cpu"):
    """(`SmolLM2`, `Tokenizer`) of one folder or Hub id; raises `CheckpointError` for a damaged file."""
    folder = resolve(source)
    if (folder / MANIFEST).exists():  # `from_pretrained` verifies the others
        verify(folder, only=OPTIONAL_FILES)
    model, tokenizer = SmolLM2.from_pretrained(folder, dtype, device), Tokenizer.from_file(folder)
    if (ours := tokenizer.vocab_size) > (theirs := model.config.vocab_size):
        raise CheckpointError(f"{folder}: a tokenizer of {ours:,} entries, but a model of {theirs:,}")
    return model, tokenizer
