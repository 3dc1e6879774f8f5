"""Text -> tokens on disk -> batches.

* Tokens are written once, as uint16, to two memory maps with a JSON sidecar (hashes, counts, bytes): what is
  trained on, and what is held out. A killed process leaves a record of how far it came, and the next goes on.
* Batch n is a pure function of (seed, n): the whole data position of a run is one integer.

The end of a document becomes the end-of-text token. `text.py` says what a text file and its splits are;
`dataset.py` fills the same files from other sources.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, UserError, is_terminal
from .files import (
    CHUNK_BYTES,
    RANDOM,
    dump_json,
    fsync_folder,
    replace_durably,
    sha256_file,
    sha256_json,
    strict_json,
    sync,
)
from .text import END_OF_TEXT, SEPARATOR, documents, read_split, source_identity, split_bytes
from .tokenizer import Tokenizer

FORMAT = 1
BATCH_CHARACTERS = 2**18  # that one thread tokenises at a time
RECORD_SECONDS = 3.0  # between two records of how far the token files have come
MANY_PASSES = 5  # over a small text; measured in docs/log.md
MARKUP = {".json", ".jsonl", ".csv", ".tsv", ".html", ".htm", ".xml"}


# --- tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """One split on disk: `tokens` (count,) uint16 memory map, and the UTF-8 bytes of text they stand for."""

    tokens: np.ndarray
    text_bytes: int

    def texts(self, tokenizer: Tokenizer, end: int | None) -> Iterator[str]:
        """The text itself, in pieces, with its separator lines; `end` is the id that ends a document."""
        cuts = [0, *(np.flatnonzero(self.tokens == end) + 1).tolist(), len(self.tokens)]
        for first, last in pairwise(cuts):
            ids = self.tokens[first:last].tolist()
            is_ended = bool(ids) and ids[-1] == end
            text = tokenizer.decode(ids[: len(ids) - is_ended])
            is_line = not text or text.endswith("\n")  # else an end within one, which the tokenizer found
            yield text + (SEPARATOR if is_line else END_OF_TEXT) * is_ended


@dataclass(frozen=True)
class TokenData:
    """Both splits and what they were made from."""

    train: TokenFile
    val: TokenFile
    sha256: str  # the identity of the data
    folder: Path
    sidecar: dict[str, Any]


def encode(tokenizer: Tokenizer, pieces: Iterable[tuple], end: int | None) -> Iterator[tuple]:
    """(piece, its uint16 tokens) for each piece, a tuple that begins with a text and whether it ends a
    document, in order; tokenised on all cores while the next are read. The id `end` ends a document."""

    def tokens_of(batch: list[tuple]) -> list[tuple]:
        texts, ends, *_ = zip(*batch, strict=True)
        if any(ends) and end is None:
            wrong = f"documents end with {END_OF_TEXT}, but the tokenizer has no such token"
            raise DataError(f"{wrong}: name its own with --set model.eos_token_id=N")
        ids = tokenizer.encode_batch(texts)
        return [(p, np.array(i + [end] * p[1], np.uint16)) for p, i in zip(batch, ids, strict=True)]

    seen = 0

    def number_of_batch(piece: tuple) -> int:
        nonlocal seen
        seen += len(piece[0])
        return seen // BATCH_CHARACTERS

    workers, ahead = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(workers) as pool:
        for _, batch in groupby(pieces, number_of_batch):
            ahead.append(pool.submit(tokens_of, list(batch)))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[str], own_end: int | None = None
) -> Iterator[np.ndarray]:
    """uint16 token arrays of a text; a document ends with `tokenizer.end_id(own_end)`."""
    return (ids for _, ids in encode(tokenizer, documents(texts), tokenizer.end_id(own_end)))


def text_bytes(text: str, ends: bool) -> int:
    """UTF-8 bytes of a piece as a text file has it, where a separator line ends a document."""
    return len(text.encode()) + len(SEPARATOR) * ends


def identity_key(source: dict, tokenizer: Tokenizer, held_out: float, own_end: int | None = None) -> dict:
    """All that the token files depend on."""
    key = {"format": FORMAT, "source": source, "tokenizer": tokenizer.sha256, "held_out_fraction": held_out}
    end = tokenizer.end_id(own_end)
    return key if end == tokenizer.end_of_text_id else key | {"end_id": end}


@dataclass(frozen=True)
class InputFile:
    """The text of `--input_file`, with what `dataset.Dataset` has, too."""

    name: str
    held_out: float
    cache_dir: Path

    def training_texts(self, limit: int) -> Iterator[str]:
        """About `limit` characters from the beginning, without the letters of separator lines."""
        pieces = islice(read_split(self.name, "train", self.held_out), limit // CHUNK_BYTES)
        return (text for text, _ in documents(pieces))

    def prepare(self, tokenizer: Tokenizer, own_end: int | None, check, say) -> TokenData:
        return prepare_tokens(self.name, tokenizer, self.cache_dir, self.held_out, own_end, check)


def prepare_tokens(
    path: str | Path,
    tokenizer: Tokenizer,
    cache_dir: Path,
    held_out: float,
    own_end: int | None = None,
    check: Callable[[str], None] = lambda identity: None,
) -> TokenData:
    """Token files of a text, from the cache or newly written; `own_end` as in `encode_documents`.

    The cache folder is named by the hash of text, tokenizer and split: the identity of the data, which
    `check` may refuse before anything is written.
    """
    from tqdm import tqdm

    if Path(path).suffix.lower() in MARKUP:
        print(f"note: {path}: markup is learned with the text; --dataset reads .jsonl, .csv and .parquet")
    key = identity_key(source_identity(path), tokenizer, held_out, own_end)
    identity = sha256_json(key)
    check(identity)
    folder = Path(cache_dir, f"tokens-{identity[:16]}")
    if data := open_tokens(folder, identity):
        return data
    sizes = dict(zip(("train", "val"), split_bytes(path, held_out), strict=True))
    hidden = sum(sizes.values()) < 2**24 or not is_terminal(sys.stderr)

    def parts(done: int | None, shards: dict) -> Iterator[tuple]:
        pieces = ((*piece, s) for s in sizes for piece in documents(read_split(path, s, held_out)))
        encoded = encode(tokenizer, islice(pieces, done, None), tokenizer.end_id(own_end))
        with tqdm(None, "tokenising", sum(sizes.values()), unit="B", unit_scale=True, disable=hidden) as bar:
            for number, ((text, ends, split), ids) in enumerate(encoded, (done or 0) + 1):
                yield split, ids, (size := text_bytes(text, ends)), number
                bar.update(size)

    def sidecar(splits: dict, done: int) -> dict:
        splits = {name: facts | {"bytes": sizes[name]} for name, facts in splits.items()}
        return key | {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "splits": splits}

    write_tokens(folder, parts, sidecar)
    return open_tokens(folder, identity)


def open_tokens(folder: Path, identity: str | None = None) -> TokenData | None:
    """Token files that are, byte for byte (about 1 GB/s), what was written; None where anything differs."""
    try:
        sidecar = strict_json((folder / "tokens.json").read_bytes(), "tokens.json")
        is_whole = sidecar.pop("sha256_of_this") == sha256_json(sidecar)
        files = {}
        for name, facts in sidecar["splits"].items():
            file = folder / f"{name}.bin"
            is_whole = is_whole and sha256_file(file) == facts["sha256"]
            # a memory map cannot be empty
            tokens = np.memmap(file, np.uint16, "r") if facts["tokens"] else np.zeros(0, np.uint16)
            files[name] = TokenFile(tokens, facts["bytes"])
        identity = identity or sha256_json([sidecar["tokenizer"], sidecar["splits"]])
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return TokenData(files["train"], files["val"], identity, folder, sidecar) if is_whole else None


class Shard:
    """A token file that grows, with the hash of what is in it and the bytes of text it stands for."""

    def __init__(self, path: Path, tokens: int = 0, bytes: int = 0, **_):
        self.file, self.tokens, self.bytes = path.open("a+b"), tokens, bytes
        self.file.truncate(2 * tokens)
        self.file.seek(0)
        self.digest = hashlib.file_digest(self.file, "sha256")

    def add(self, ids: np.ndarray, size: int) -> None:
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size

    def facts(self) -> dict[str, Any]:
        self.file.flush()
        sync(self.file.fileno())
        return {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.digest.hexdigest()}


def write_tokens(folder: Path, parts: Callable[[Any, dict], Iterator[tuple]], sidecar: Callable) -> None:
    """Fill the token files of `folder` from `parts(place, shards)`: (split, tokens, bytes of text, the place
    behind them). A place, any JSON value (None is the beginning), is recorded now and then: there the process
    after a killed one goes on. `sidecar(facts of both splits, last place)` is written last; what a killed
    process had read for other tokens goes then, and not before."""
    record = folder / "progress.json"
    if (folder / "tokens.json").exists():
        print(f"data: {folder.name} is damaged; tokenising again")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place, shards, known = None, {}, {}
    with suppress(UserError, OSError, KeyError, TypeError, AttributeError):
        known = strict_json(record.read_bytes(), record.name)
        shards = {name: Shard(folder / f"{name}.bin", **facts) for name, facts in known["splits"].items()}
        place = known["place"]
    if place is None or {name: shard.facts() for name, shard in shards.items()} != known["splits"]:
        place, shards = None, {name: Shard(folder / f"{name}.bin") for name in ("train", "val")}

    def keep_record() -> dict[str, dict]:
        splits = {name: shard.facts() for name, shard in shards.items()}
        replace_durably(record, dump_json({"splits": splits, "place": place}))
        return splits

    keep_record()
    recorded = time.monotonic()
    try:
        for split, ids, size, behind in parts(place, shards):
            shards[split].add(ids, size)
            place = behind
            if time.monotonic() > recorded + RECORD_SECONDS:
                keep_record()
                recorded = time.monotonic()
        made = sidecar(keep_record(), place)
    finally:
        for shard in shards.values():
            shard.file.close()
    replace_durably(folder / "tokens.json", dump_json(made | {"sha256_of_this": sha256_json(made)}))
    record.unlink()
    fsync_folder(folder)
    # of the same kind, where a killed process wanted other tokens
    for other in folder.parent.glob(f"{folder.name.split('-')[0]}-*{2 * RANDOM}/progress.json"):
        if not (other.parent / "tokens.json").exists():
            shutil.rmtree(other.parent)


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
