"""How well a model predicts a text, in bits per byte, and `python -m smollm2.evaluate`.

bits per byte = nats of all tokens / (ln 2 x UTF-8 bytes of the text): the one figure that models with different
tokenizers share. Every token is scored exactly once; the first one is conditioned on the end-of-text token and each
block (a row as in training, where the checkpoint says how long it was, else the context) starts afresh.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .data import encode_documents
from .errors import ArgumentParser, DataError, run_command
from .model import SmolLM2
from .text import documents, read_split

MAX_LOST_SHARE = 0.001  # of a text's bytes: at some 10 bits each, an error of 0.01 bits per byte


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token, `bits_per_byte`, and how many tokens and text bytes were scored."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.inference_mode()
def score_tokens(
    model: SmolLM2,
    tokens: np.ndarray,
    text_bytes: int,
    block_length: int | None = None,
    tokens_per_batch: int = 8192,
    max_tokens: int | None = None,
    autocast=None,
    on_progress=None,
) -> Score:
    """Score (count,) token ids that stand for `text_bytes` bytes of text.

    `block_length` defaults to the model's context. `max_tokens` scores only the beginning (bytes are scaled in
    proportion). `autocast()` may give a context manager for the forward passes. Sums are kept in float64.
    """
    count = len(tokens) if max_tokens is None else min(max_tokens, len(tokens))
    if count == 0:
        raise DataError("nothing to evaluate: the text has no tokens")
    text_bytes = text_bytes * count / len(tokens)
    length = block_length or model.config.max_position_embeddings
    rows = max(1, tokens_per_batch // length)
    first = model.config.bos_token_id if model.config.bos_token_id is not None else 0
    total, was_training = 0.0, model.training
    model.eval()
    for start in range(0, count, rows * length):
        end = min(start + rows * length, count)
        targets = np.asarray(tokens[start:end], dtype=np.int64)
        inputs = np.concatenate(([first if start == 0 else tokens[start - 1]], targets[:-1])).astype(np.int64)
        pad = -len(targets) % length if len(targets) > length else 0
        targets = np.pad(targets, (0, pad), constant_values=-100)
        inputs = np.pad(inputs, (0, pad))
        shape = (-1, min(length, len(targets)))
        x = torch.from_numpy(inputs).view(shape).to(model.device)
        y = torch.from_numpy(targets).view(shape).to(model.device)
        if autocast is None:
            loss = model.loss(x, y)
        else:
            with autocast():
                loss = model.loss(x, y)
        total += float(loss) * (end - start)
        if on_progress:
            on_progress(end, count)
    model.train(was_training)
    return Score(total / count, total / (math.log(2) * text_bytes), count, round(text_bytes))


def score_file(
    model: SmolLM2, tokenizer, path, split: str = "all", held_out_fraction: float = 0.1, **options
) -> Score:
    """Score a text file, or its held-out end (`split="val"`); raises `DataError` for one that the tokenizer cannot hold."""
    size = 0
    share, lost = tokenizer.not_kept(
        text for text, _ in documents(read_split(path, split, held_out_fraction))
    )
    if share > MAX_LOST_SHARE:
        raise DataError(
            f"{path}: {lost}, expected at most {MAX_LOST_SHARE:.1%}: they cost next to nothing, so bits per byte would be far too good; "
            "take them out of the text, or evaluate a model with a byte-level tokenizer"
        )
    if lost:
        print(f"note: {path}: {lost}; bits per byte are too good by what they would cost", file=sys.stderr)

    def texts():
        nonlocal size
        for text in read_split(path, split, held_out_fraction):
            size += len(text.encode())
            yield text

    arrays = list(encode_documents(tokenizer, texts(), model.config.eos_token_id))
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)
    if len(tokens) == 0:
        raise DataError(f"{path}: nothing to evaluate in split {split!r}")
    return score_tokens(model, tokens, size, **options)


def compression_bits_per_byte(path, split: str = "val", held_out_fraction: float = 0.1) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz` need for the same text: what a model must beat to have learned anything."""
    text = "".join(read_split(path, split, held_out_fraction)).encode()
    if not text:
        raise DataError(f"{path}: nothing to compress in split {split!r}")
    packed = {"gzip -9": len(gzip.compress(text, 9, mtime=0)), "xz": len(lzma.compress(text))}
    return {name: 8 * size / len(text) for name, size in packed.items()}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m smollm2.evaluate", description="Bits per byte of a model on a text."
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a Hub id")
    parser.add_argument("--input_file", required=True)
    parser.add_argument(
        "--split",
        choices=("all", "val", "train"),
        default="all",
        help="val = what the checkpoint's run held out, else the last 10 %%",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args(argv)
    from .device import choose_device
    from .origin import trained_with
    from .pretrained import load_model_and_tokenizer

    # an unusable text is reported before a model is loaded
    from .weights import resolve

    # an unusable text is reported before a model is loaded
    next(iter(read_split(args.input_file, args.split)), None)
    folder = resolve(args.checkpoint)
    model, tokenizer = load_model_and_tokenizer(folder, device=choose_device())
    run = trained_with(
        folder
    )  # the rows and the held-out part of its own validation, so that both give the same figure
    length = min(run.sequence_length, model.config.max_position_embeddings) if run else None
    score = score_file(
        model,
        tokenizer,
        args.input_file,
        args.split,
        run.held_out_fraction if run else 0.1,
        block_length=length,
    )
    if args.json:
        print(json.dumps(asdict(score)))
    else:
        print(
            f"{args.input_file} ({args.split}): {score.bits_per_byte:.4f} bits/byte, {score.loss:.4f} nats/token"
        )
        print(f"{score.tokens:,} tokens, {score.bytes:,} bytes")
    return 0


if __name__ == "__main__":
    run_command(main)
