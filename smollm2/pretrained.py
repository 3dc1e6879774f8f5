"""A model and its tokenizer, together, from a folder or the Hub: what every command begins with."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import MANIFEST, verify
from .cpu_decoder import fast_decoder
from .device import choose_decoding, choose_device
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


def load_to_write(source: str | Path, dtype: str | None = None):
    """(what writes, `Tokenizer`, a line that names the number format), as `fast_decoder` has it."""
    device = choose_device()
    name, _ = choose_decoding(dtype, device)
    halves = {"fp16": torch.float16, "bf16": torch.bfloat16} if device.type == "cuda" else {}
    model, tokenizer = load_model_and_tokenizer(source, halves.get(name, torch.float32), device)
    fast, line = fast_decoder(model, dtype, take=True)
    return fast, tokenizer, line
