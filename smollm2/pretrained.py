"""A model and its tokenizer, together, from a folder or the Hub: what every command begins with."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import CheckpointError
from .model import SmolLM2
from .tokenizer import Tokenizer
from .weights import resolve


def load_model_and_tokenizer(
    source: str | Path, dtype: torch.dtype = torch.float32, device="cpu"
) -> tuple[SmolLM2, Tokenizer]:
    """(model, tokenizer) of one folder or Hub id."""
    folder = resolve(source)
    model, tokenizer = SmolLM2.from_pretrained(folder, dtype, device), Tokenizer.from_file(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"its tokenizer has {tokenizer.vocab_size:,} entries, its model {model.config.vocab_size:,}"
        raise CheckpointError(f"{folder}: {sizes}: they do not belong together")
    return model, tokenizer
