"""How well a model predicts a text, in bits per byte, and `python -m smollm2.evaluate`.

bits per byte = nats of all tokens / (ln 2 x UTF-8 bytes of the text): the one figure that models with
different tokenizers share. Every token is scored exactly once; the first one is conditioned on the
end-of-text token and each block (a row as in training, where the checkpoint says how long it was, else the
context) starts afresh.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from .checkpoint import MANIFEST, read_manifest
from .data import encode_documents
from .errors import ArgumentParser, DataError, run_command, tell
from .origin import trained_with
from .signals import loading
from .text import documents, read_split
from .weights import resolve

if TYPE_CHECKING:  # a wrong flag is answered before torch is imported
    from .model import SmolLM2

TOKENS_PER_BATCH = 8192
MAX_LOST_SHARE = 0.001  # of a text's bytes: unknown ones cost next to nothing instead of some 10 bits each


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token, `bits_per_byte`, and how many tokens and text bytes were scored."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


def score_tokens(
    model: SmolLM2,
    tokens: np.ndarray,
    text_bytes: int,
    block_length=None,
    max_tokens=None,
    autocast=nullcontext,
) -> Score:
    """Score (count,) token ids that stand for `text_bytes` bytes of text; ~id is read and not scored.

    `block_length` defaults to the model's context. `max_tokens` scores only the beginning (bytes are scaled
    in proportion). `autocast()` gives a context manager for the forward passes. Sums are kept in float64.
    """
    import torch
    import torch.nn.functional as F

    from .loss import IGNORE_INDEX, inputs_and_targets

    count = min(max_tokens or len(tokens), len(tokens))
    if count == 0:
        raise DataError("nothing to evaluate: the text has no tokens")
    text_bytes *= count / len(tokens)
    context = model.config.max_position_embeddings
    length = min(block_length or context, context)
    batch = max(1, TOKENS_PER_BATCH // length) * length
    tokens, previous = tokens[:count], model.config.bos_token_id or 0
    total, scored, was_training = 0.0, 0, model.training
    model.eval()
    for start in range(0, count, batch):
        part = np.concatenate(([previous], tokens[start : start + batch])).astype(np.int64)
        part, previous = torch.from_numpy(part).to(model.device), part[-1]
        new = len(part) - 1
        row = min(length, new)
        pad = (0, -new % row)  # the last row of the text
        inputs, targets = inputs_and_targets(part)
        learned = int((targets != IGNORE_INDEX).sum())
        inputs, targets = F.pad(inputs, pad), F.pad(targets, pad, value=IGNORE_INDEX)
        with torch.inference_mode(), autocast():
            loss = model.loss(inputs.view(-1, row), targets.view(-1, row))
        total, scored = total + float(loss) * learned, scored + learned
    model.train(was_training)
    return Score(total / max(scored, 1), total / (math.log(2) * text_bytes), scored, round(text_bytes))


def score_file(model: SmolLM2, tokenizer, path, split="all", held_out_fraction=0.1, **options) -> Score:
    """Score a text file, or its held-out end (`split="val"`); `options` as in `score_tokens`.

    Raises `DataError` for a text that the tokenizer cannot hold."""
    texts = list(read_split(path, split, held_out_fraction))
    return score_texts(model, tokenizer, texts, path, **options)


def score_texts(model: SmolLM2, tokenizer, texts: list[str], name, **options) -> Score:
    """Score a text in pieces; `name` is for messages. As `score_file`."""
    share, lost = tokenizer.not_kept(text for text, _ in documents(texts))
    if share > MAX_LOST_SHARE:
        raise DataError(f"{name}: {lost}, expected at most {MAX_LOST_SHARE:.1%}")
    if lost:
        tell(f"note: {name}: {lost}; bits per byte are too good by what they would cost")
    arrays = list(encode_documents(tokenizer, texts, tokenizer.end_id(model.config.eos_token_id)))
    if not any(map(len, arrays)):
        raise DataError(f"{name}: nothing to evaluate")
    text_bytes = sum(len(text.encode()) for text in texts)
    return score_tokens(model, np.concatenate(arrays), text_bytes, **options)


def compression_bits_per_byte(path, split: str = "val", held_out_fraction: float = 0.1) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz` need for the same text: what a model must beat."""
    text = "".join(read_split(path, split, held_out_fraction)).encode()
    if not text:
        raise DataError(f"{path}: nothing to compress in split {split!r}")
    return compressed_bits_per_byte(text)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    packed = {"gzip -9": len(gzip.compress(text, 9, mtime=0)), "xz": len(lzma.compress(text))}
    return {name: 8 * size / len(text) for name, size in packed.items()}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser("python -m smollm2.evaluate", description="Bits per byte of a model on a text")
    parser.add_path("--checkpoint", help="checkpoint folder, or a Hub id")
    parser.add_path("--input_file")
    held_out = "val = what the checkpoint's run held out, else the last 10 %%"
    parser.add_argument("--split", choices=("all", "val", "train"), default="all", help=held_out)
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args(argv)
    # an unusable text is reported before a model is loaded
    next(iter(read_split(args.input_file, args.split)), None)
    folder = resolve(args.checkpoint)
    with loading():
        from .device import choose_device, sharing_cores
        from .pretrained import load_model_and_tokenizer
    model, tokenizer = load_model_and_tokenizer(folder, device=choose_device())
    # the rows and the held-out part of the run's own validation, so that both give the same figure
    run = trained_with(folder)
    facts = read_manifest(folder).facts if run and (folder / MANIFEST).exists() else {}
    if args.split != "all" and (dataset := facts.get("dataset")):
        held_out = f"documents of {', '.join(dataset['sources'])}, not the end of a text"
        tell(f"note: this run held out {held_out}: what --split names here may have been trained on")
    options = {"held_out_fraction": run.held_out_fraction, "block_length": run.sequence_length} if run else {}
    with sharing_cores():
        score = score_file(model, tokenizer, args.input_file, args.split, **options)
    if args.json:
        print(json.dumps(asdict(score)))
        return 0
    print(f"{args.input_file} ({args.split}): {score.tokens:,} tokens, {score.bytes:,} bytes")
    print(f"{score.bits_per_byte:.4f} bits/byte, {score.loss:.4f} nats/token")
    return 0


if __name__ == "__main__":
    run_command(main)
