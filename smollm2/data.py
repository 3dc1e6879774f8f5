"""Text -> tokens on disk -> batches.

* Tokens are written once, as uint16, to a memory map with a JSON sidecar (hashes, counts, bytes).
* Batch n is a pure function of (seed, n): the whole data position of a run is one integer.

The end of a document becomes the end-of-text token. `text.py` says what the text and its splits are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataError
from .files import CHUNK_BYTES, fsync_folder, sha256_file, sha256_json, write_durably
from .text import documents, read_split, source_identity, split_bytes
from .tokenizer import END_OF_TEXT, Tokenizer

FORMAT = 1


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """One split on disk: `tokens` (count,) uint16 memory map, and the UTF-8 bytes of text they stand for."""

    tokens: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class TokenData:
    """Both splits and what they were made from."""

    train: TokenFile
    val: TokenFile
    sha256: str  # of text and tokenizer together: the identity of the data
    folder: Path


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], end_id: int | None, batch: int = 256
) -> Iterator[np.ndarray]:
    """uint16 token arrays of a text, with `end_id` where a document ends."""
    if end_id is None:
        end_id = tokenizer.end_of_text_id
    pieces: list[tuple[str, bool]] = []

    def flush():
        for (_, ends), ids in zip(pieces, tokenizer.encode_batch([text for text, _ in pieces]), strict=True):
            if ends:
                if end_id is None:
                    raise DataError(
                        f"the text has {END_OF_TEXT} lines, but the tokenizer has no such token: name its own with --set model.eos_token_id=N"
                    )
                ids.append(end_id)
            yield np.asarray(ids, dtype=np.uint16)
        pieces.clear()

    for piece in documents(texts):
        pieces.append(piece)
        if len(pieces) >= batch or len(piece[0]) > CHUNK_BYTES // 4:
            yield from flush()
    yield from flush()


def _write_split(
    folder: Path, name: str, tokenizer: Tokenizer, texts: Iterable[str], total_bytes: int, end_id: int | None
) -> dict:
    """Tokenise a split into `<name>.bin`, streaming, with progress for long texts."""
    from tqdm import tqdm

    count, done, digest = 0, 0, hashlib.sha256()

    def counted():
        nonlocal done
        for text in texts:
            done += len(text.encode())
            progress.update(len(text.encode()))
            yield text

    hidden = total_bytes < 16 * CHUNK_BYTES or not sys.stderr.isatty()
    progress = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=f"tokenising {name}", disable=hidden)
    with progress, (folder / f"{name}.bin").open("wb") as file:
        for array in encode_documents(tokenizer, counted(), end_id):
            raw = array.tobytes()
            file.write(raw)
            digest.update(raw)
            count += len(array)
        file.flush()
        os.fsync(file.fileno())
    return {"tokens": count, "bytes": done, "sha256": digest.hexdigest()}


def identity_key(
    source: dict, tokenizer: Tokenizer, held_out_fraction: float, end_id: int | None = None
) -> dict:
    """All that the token files depend on; its `sha256_json` is the identity of the data."""
    own_end = {} if end_id in (None, tokenizer.end_of_text_id) else {"end_id": end_id}
    return {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer.sha256,
        "held_out_fraction": held_out_fraction,
    } | own_end


def prepare_tokens(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    held_out_fraction: float,
    source: dict | None = None,
    end_id: int | None = None,
) -> TokenData:
    """Token files of a text, from the cache or newly written; documents end with `end_id` (default: the tokenizer's `<|endoftext|>`).

    The cache folder is named by the hash of text, tokenizer and split. It is built under a temporary name and renamed,
    so that one that exists is whole; every byte is checked against the sidecar's hashes all the same (about 1 GB/s).
    """
    key = identity_key(source or source_identity(path), tokenizer, held_out_fraction, end_id)
    identity = sha256_json(key)
    cache_dir = Path(cache_dir)
    folder = cache_dir / f"tokens-{identity[:16]}"
    if folder.exists() and (problem := _cache_problem(folder)):
        print(f"data: {folder.name} cannot be used ({problem}); tokenising again")
        shutil.rmtree(folder)
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        for stale in cache_dir.glob("tokens-*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = cache_dir / f"{folder.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        try:
            sidecar = dict(key, dtype="uint16", vocab_size=tokenizer.vocab_size, splits={})
            train_bytes, val_bytes = split_bytes(path, held_out_fraction)
            for name, size in (("train", train_bytes), ("val", val_bytes)):
                texts = read_split(path, name, held_out_fraction)
                sidecar["splits"][name] = _write_split(temporary, name, tokenizer, texts, size, end_id)
            sidecar["sha256_of_this"] = sha256_json(sidecar)
            write_durably(temporary / "tokens.json", (json.dumps(sidecar, indent=2) + "\n").encode())
            os.rename(temporary, folder)
            fsync_folder(cache_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    sidecar = json.loads((folder / "tokens.json").read_text())
    splits = {}
    for name, facts in sidecar["splits"].items():
        empty = facts["tokens"] == 0  # a memory map cannot be empty
        tokens = (
            np.zeros(0, np.uint16) if empty else np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
        )
        splits[name] = TokenFile(tokens, facts["bytes"])
    return TokenData(splits["train"], splits["val"], identity, folder)


def _cache_problem(folder: Path) -> str | None:
    try:
        sidecar = json.loads((folder / "tokens.json").read_text())
        recorded = sidecar.pop("sha256_of_this", None)
        if recorded is None:
            return "an earlier version made it, without hashes"
        if recorded != sha256_json(sidecar):
            return "tokens.json is damaged: it does not match its own sha256"
        for name, facts in sidecar["splits"].items():
            if sha256_file(folder / f"{name}.bin") != facts["sha256"]:
                return f"{name}.bin is damaged: its sha256 differs from the one in tokens.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"damaged: {type(error).__name__}: {error}"
    return None


def check_length(data: TokenData, sequence_length: int, path: str | Path) -> None:
    """Raises `DataError` when the training split is shorter than one row."""
    if len(data.train.tokens) <= sequence_length:
        raise DataError(
            f"{path}: {len(data.train.tokens):,} training tokens, but one row needs {sequence_length + 1:,}; "
            f"use a longer text or --set data.sequence_length={max(2, len(data.train.tokens) // 2)}"
        )
    if len(data.val.tokens) < 2:
        raise DataError(f"{path}: the held-out part has {len(data.val.tokens)} tokens; use a longer text")


# --- batches --------------------------------------------------------------------------------------------------------


class BatchOrder:
    """Which rows batch n holds: a pure function of (seed, n), reshuffled and shifted anew in every epoch.

    An epoch cuts the tokens into `rows_per_epoch` rows of `sequence_length` + 1 (inputs and targets overlap by one),
    beginning at a random offset, and visits them in random order.
    """

    def __init__(self, token_count: int, sequence_length: int, batch_size: int, seed: int):
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.rows_per_epoch = max(1, (token_count - 1) // sequence_length - 1)
        self.slack = token_count - 1 - self.rows_per_epoch * sequence_length
        self._epoch, self._permutation, self._offset = -1, None, 0

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            # raw 64-bit draws of PCG64 and a stable sort: the same order under every numpy version
            raw = np.random.PCG64([self.seed, epoch]).random_raw(self.rows_per_epoch + 1)
            self._offset = int(raw[0] % (self.slack + 1))
            self._permutation = np.argsort(raw[1:], kind="stable")
            self._epoch = epoch

    def row_start(self, sample: int) -> int:
        """First token of global sample number `sample` (0, 1, 2, ...)."""
        epoch, index = divmod(sample, self.rows_per_epoch)
        self._enter(epoch)
        return self._offset + int(self._permutation[index]) * self.sequence_length

    def starts(self, n: int) -> list[int]:
        """First tokens of the rows of batch n."""
        return [self.row_start(sample) for sample in range(n * self.batch_size, (n + 1) * self.batch_size)]

    def epoch_of(self, n: int) -> float:
        """Epochs completed once batch n-1 has been used."""
        return n * self.batch_size / self.rows_per_epoch


class BatchStream:
    """Endless iterator over batches position, position + 1, ... as (rows, sequence_length + 1) int64 tensors.

    With several workers, worker r of w takes every w-th row of the same global batch: batches do not depend on w.
    """

    def __init__(
        self, tokens: np.ndarray, order: BatchOrder, position: int, rank: int = 0, world_size: int = 1
    ):
        self.tokens, self.order, self.position = tokens, order, position
        self.rank, self.world_size = rank, world_size

    def batch(self, n: int):
        import torch

        width = self.order.sequence_length + 1
        starts = self.order.starts(n)[self.rank :: self.world_size]
        return torch.from_numpy(np.stack([self.tokens[s : s + width] for s in starts]).astype(np.int64))

    def __iter__(self):
        n = self.position
        while True:
            yield self.batch(n)
            n += 1
