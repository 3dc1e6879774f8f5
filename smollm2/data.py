"""Text -> tokens on disk -> batches.

* Tokens are written once, as uint16, to a memory map with a JSON sidecar (hashes, counts, bytes).
* Batch n is a pure function of (seed, n): the whole data position of a run is one integer.

The end of a document becomes the end-of-text token. `text.py` says what the text and its splits are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from .errors import DataError, UserError
from .files import (
    CHUNK_BYTES,
    commit_folder,
    dump_json,
    remove_leftovers,
    sha256_file,
    sha256_json,
    strict_json,
)
from .text import END_OF_TEXT, documents, read_split, source_identity, split_bytes
from .tokenizer import Tokenizer

FORMAT = 1
MANY_PASSES = 5  # over a small text; measured in docs/log.md
MARKUP = {".json", ".jsonl", ".csv", ".tsv", ".html", ".htm", ".xml"}


# --- tokens -------------------------------------------------------------------------------------------------


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
    tokenizer: Tokenizer, texts: Iterable[str], own_end: int | None = None
) -> Iterator[np.ndarray]:
    """uint16 token arrays of a text; a document ends with `tokenizer.end_id(own_end)`."""
    end, seen = tokenizer.end_id(own_end), 0

    def number_of_batch(piece: tuple[str, bool]) -> int:  # about 1 MiB each, tokenised together on all cores
        nonlocal seen
        seen += len(piece[0])
        return seen // CHUNK_BYTES

    for _, batch in groupby(documents(texts), number_of_batch):
        pieces, ends = zip(*batch, strict=True)
        if any(ends) and end is None:
            wrong = f"the text has {END_OF_TEXT} lines, but the tokenizer has no such token"
            raise DataError(f"{wrong}: name its own with --set model.eos_token_id=N")
        for ids, is_end in zip(tokenizer.encode_batch(pieces), ends, strict=True):
            yield np.asarray(ids + [end] * is_end, dtype=np.uint16)


def identity_key(source: dict, tokenizer: Tokenizer, held_out: float, own_end: int | None = None) -> dict:
    """All that the token files depend on; its `sha256_json` is the identity of the data."""
    key = {"format": FORMAT, "source": source, "tokenizer": tokenizer.sha256, "held_out_fraction": held_out}
    end = tokenizer.end_id(own_end)
    return key if end == tokenizer.end_of_text_id else key | {"end_id": end}


def prepare_tokens(
    path: str | Path, tokenizer: Tokenizer, cache_dir: Path, held_out: float, own_end: int | None = None
) -> TokenData:
    """Token files of a text, from the cache or newly written; `own_end` as in `encode_documents`.

    The cache folder is named by the hash of text, tokenizer and split. One that exists is whole; every byte
    is checked against the sidecar's hashes all the same (about 1 GB/s).
    """
    from tqdm import tqdm

    if Path(path).suffix.lower() in MARKUP:
        print(f"note: {path}: markup is learned with the text; --dataset reads .jsonl, .csv and .parquet")
    key = identity_key(source_identity(path), tokenizer, held_out, own_end)
    identity = sha256_json(key)
    folder = Path(cache_dir, f"tokens-{identity[:16]}")
    sidecar = _verified(folder)
    if sidecar is None:
        if folder.exists():
            print(f"data: {folder.name} is damaged; tokenising again")
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        sizes = dict(zip(("train", "val"), split_bytes(path, held_out), strict=True))
        splits = {name: {"bytes": size} for name, size in sizes.items()}
        sidecar = key | {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "splits": splits}

        def write(name: str, file: Path) -> None:
            texts = read_split(path, name, held_out)  # pieces of 1 MiB
            hidden = sizes[name] < 2**24 or not sys.stderr.isatty()
            bar = tqdm(texts, f"tokenising {name}", sizes[name] >> 20, unit="MiB", disable=hidden)
            with file.open("wb") as out:
                for ids in encode_documents(tokenizer, bar, own_end):
                    out.write(ids.tobytes())

        def closing(table: dict[str, dict]) -> dict[str, bytes]:
            for name, facts in splits.items():
                written = table[f"{name}.bin"]
                facts |= {"tokens": written["bytes"] // 2, "sha256": written["sha256"]}
            return {"tokens.json": dump_json(sidecar | {"sha256_of_this": sha256_json(sidecar)})}

        commit_folder(folder, {f"{name}.bin": partial(write, name) for name in splits}, closing)
    files = {}
    for name, facts in sidecar["splits"].items():
        file = folder / f"{name}.bin"  # a memory map cannot be empty
        tokens = np.memmap(file, np.uint16, "r") if facts["tokens"] else np.zeros(0, np.uint16)
        files[name] = TokenFile(tokens, facts["bytes"])
    return TokenData(files["train"], files["val"], identity, folder)


def _verified(folder: Path) -> dict | None:
    """The sidecar of token files that are, byte for byte, what was written; None where anything differs."""
    try:
        sidecar = strict_json((folder / "tokens.json").read_bytes(), "tokens.json")
        is_whole = sidecar.pop("sha256_of_this") == sha256_json(sidecar)
        for name, facts in sidecar["splits"].items():
            is_whole = is_whole and sha256_file(folder / f"{name}.bin") == facts["sha256"]
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return None
    return sidecar if is_whole else None


def check_length(data: TokenData, sequence_length: int, path: str | Path) -> None:
    """Raises `DataError` when the training split is shorter than one row."""
    count = len(data.train.tokens)
    if count <= sequence_length:
        wrong = f"{path}: {count:,} training tokens, but one row needs {sequence_length + 1:,}"
        raise DataError(f"{wrong}; use a longer text or --set data.sequence_length={max(2, count // 2)}")
    if len(data.val.tokens) < 2:
        raise DataError(f"{path}: the held-out part has {len(data.val.tokens)} tokens; use a longer text")


def note_on_passes(steps: int, passes_per_step: float) -> str | None:
    """A word where a run would read its text too often to learn from it, or hardly at all."""
    passes = steps * passes_per_step
    if passes > MANY_PASSES:
        better = max(1, int(MANY_PASSES / passes_per_step))
        return (
            f"note: {steps:,} steps read this text {passes:.0f} times; after about {MANY_PASSES} it is "
            "learned by heart rather than learned from: more text (--input_file, --dataset) or about "
            f"{better:,} steps do better"
        )
    if passes < 0.5:
        once = int(1 / passes_per_step)
        return f"note: {steps:,} steps read {passes:.1%} of this text; --max_steps {once:,} read it once"
    return None


# --- batches ------------------------------------------------------------------------------------------------


class BatchOrder:
    """Which rows batch n holds: a pure function of (seed, n), reshuffled and shifted anew in every epoch.

    An epoch cuts the tokens into `rows_per_epoch` rows of `sequence_length` + 1 (inputs and targets overlap
    by one), beginning at a random offset, and visits them in random order.
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

    With several workers, worker r of w takes every w-th row of the same global batch, whatever w is.
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
