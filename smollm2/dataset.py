"""Datasets of the Hub, or files of one's own -> token files, streamed until there are as many as wanted.

Notable:
* one order of documents, and a place in it that three numbers name: a killed process is continued there;
* a document is trained on or held out by a hash of its text, wherever it stands and how often;
* a mixture takes the next document from the source that is furthest behind its share of the tokens;
* a dataset of the Hub is read at one commit, which the run's checkpoints name.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import hub
from .config import DataConfig, RunConfig
from .data import (
    FORMAT,
    InputFile,
    Shard,
    TokenData,
    TokenFile,
    encode,
    open_tokens,
    text_bytes,
    write_tokens,
)
from .device import tokens_to_learn_from
from .distributed import OPENED
from .errors import CheckpointError, DataError, is_terminal
from .files import dump_json, origin_name, replace_durably, sha256_bytes, sha256_json, strict_json
from .readers import KINDS, kind, opened, table
from .text import END_OF_TEXT, SEPARATOR, decoded, documents
from .token_text import spelled
from .tokenizer import Tokenizer

SAMPLE_ROWS = 100  # that tell which columns hold text
ADVICE = "choose one with --set data.dataset_column=NAME"
BYTES_PER_TOKEN = 4.5  # of English under the SmolLM2 tokenizer, rounded up
LONGEST_TOKEN = 16  # characters, on average over any text
LEAST_TOKENS = 2**20  # read even if a run needs fewer: in a second
# by a run, into its folder
WRITTEN = ("checkpoints", "data/tokens-*", "data/dataset-*", "data/commits.json", "logs", "previous-*")
# by the datasets package; a cache is what `map` or `shuffle` made of the texts
BESIDE_ARROW = ("dataset_info*.json", "dataset_dict.json", "state.json", "cache-*.arrow")


class Piece(NamedTuple):
    """Of a document: about 1 MiB of text, or all of it."""

    text: str
    ends: bool  # the document
    key: int  # 64 bits of the hash of the document's beginning
    place: tuple[int, int, int]  # behind it: file, row, piece


def open_text(config: RunConfig, pinned: dict | None) -> InputFile | Dataset:
    """The text of a run, whose checkpoint says `pinned` of its dataset."""
    data, train, output = config.data, config.train, Path(config.run.output_dir)
    if data.dataset is None:
        return InputFile(data.input_file, data.held_out_fraction, output / "data")
    once = (train.max_steps + train.continue_steps) * train.batch_size * data.sequence_length
    once = max(once, LEAST_TOKENS, tokens_to_learn_from(config, 60 * (train.minutes or 0)))
    needed = math.ceil(once / (1 - data.held_out_fraction))
    return Dataset(data, output, data.dataset_tokens or needed, pinned)


class Dataset:
    """What `--dataset` names: `ID[:CONFIG][@SPLIT]` of the Hub, a file, a folder, or `A=0.7,B=0.3` of such.

    `tokens` is how many to read, held-out ones included. `pinned` is what the checkpoint of a run says of the
    data it was made with (`TokenData.sidecar["dataset"]`): it wins over `tokens` and the newest commit.
    """

    def __init__(self, data: DataConfig, output_dir: Path, tokens: int, pinned: dict | None = None):
        self.name, self.fraction, self.output = data.dataset, data.held_out_fraction, output_dir
        named = r"\s*(.+?)\s*=\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*"
        parts = [re.fullmatch(named, part) for part in self.name.split(",")]
        is_mixture = all(parts) and not os.path.exists(self.name)
        shares = {os.path.expanduser(part[1]): float(part[2]) for part in parts} if is_mixture else {}
        weights = shares or {self.name: 1.0}
        if len(weights) < len(parts) * is_mixture or not all(weights.values()):
            raise DataError(f"--dataset {self.name}: each name once, each with a share above 0")
        self.weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        known = pinned["sources"] if pinned else {}
        self.pinned = pinned if known.keys() == {origin_name(name) for name in weights} else None
        self.tokens = self.pinned["tokens"] if self.pinned else tokens
        self._commits = output_dir / "data" / "commits.json"  # of the Hub, that were read at first
        with suppress(OSError, CheckpointError):
            known = strict_json(self._commits.read_bytes(), "commits.json") | known
        folder, column = output_dir.resolve(), data.dataset_column
        self.sources = {name: Source(name, column, folder, known.get(origin_name(name))) for name in weights}

    # --- documents

    def documents(self, tokenizer: Tokenizer | None, end: int | None, state: dict) -> Iterator[tuple]:
        """(piece, its tokens or, without a tokenizer, its characters) of the whole mixture, until its first
        source is used up. `state` says where to begin, and is kept up to date."""
        streams, sizes = {}, state["sizes"]
        for name, source in self.sources.items():
            pieces = source.pieces(*state["places"].get(name, ()))
            streams[name] = encode(tokenizer, pieces, end) if tokenizer else ((p, p.text) for p in pieces)
            sizes.setdefault(name, 0)
        while True:
            # the one that is furthest behind, unless a document was begun
            name = state["inside"] or min(streams, key=lambda name: sizes[name] / self.weights[name])
            for piece, content in streams[name]:
                state["places"][name], sizes[name] = piece.place, sizes[name] + len(content)
                state["documents"] += state["inside"] is None  # begun
                state["inside"] = None if piece.ends else name
                yield piece, content
                if piece.ends:
                    break
            else:
                return

    @cached_property
    def _first_two(self) -> list[int]:
        """Keys of the first two different documents: one is trained on, the other held out, so that no part
        of a small dataset is empty. The first is trained on, but of only two the longer one. Only one, where
        what is read has no other."""
        sizes, room = {}, self.tokens * LONGEST_TOKEN
        for piece in chain.from_iterable(source.pieces() for source in self.sources.values()):
            sizes[piece.key] = sizes.get(piece.key, 0) + len(piece.text)
            room -= len(piece.text)
            if room < 0 or len(sizes) > 2:
                break
        return sorted(sizes, key=sizes.get, reverse=True) if len(sizes) == 2 else [*sizes][:2]

    def is_held_out(self, key: int) -> bool:
        if key in self._first_two:
            return key != self._first_two[0]
        return key < self.fraction * 2**64

    def training_texts(self, limit: int) -> Iterator[str]:
        """About the first `limit` characters of what is trained on."""
        limit = min(limit, int(self.tokens * BYTES_PER_TOKEN))
        for piece, text in self.documents(None, None, new_state()):
            if not self.is_held_out(piece.key):
                yield text
                limit -= len(text)
                if limit <= 0:
                    return

    # --- tokens

    def prepare(self, tokenizer: Tokenizer, own_end: int | None, check, say) -> TokenData:
        """Its token files, read earlier or now, or from where a killed process stopped. Their identity, the
        hash of what is in them, is for `check` to refuse."""
        end = tokenizer.end_id(own_end)
        facts = {name: source.facts for name, source in self.sources.items()}
        key = {"format": FORMAT, "dataset": facts, "weights": self.weights, "tokens": self.tokens}
        key |= {"tokenizer": tokenizer.sha256, "end_id": end, "held_out_fraction": self.fraction}
        readable = re.sub(r"[^A-Za-z0-9]+", "-", origin_name(self.name)).strip("-")[-40:]
        folder = self.output / "data" / f"dataset-{readable}-{sha256_json(key)[:16]}"
        data = open_tokens(folder)
        if data and (not self.pinned or self.pinned == data.sidecar["dataset"]):
            say(f"dataset: {self.name}: using {folder.name}, read earlier")
        else:
            if not self.pinned:
                check(None)
            for name, source in self.sources.items():  # told before anything is written
                if next(source.pieces(), None) is None:
                    kinds = f"no text in files of {', '.join(KINDS)}"
                    raise DataError(f"--dataset {name}: {kinds}{self._left_out()}")
            data = self._read(folder, tokenizer, end, say)
        check(data.sha256)
        return data

    def _read(self, folder: Path, tokenizer: Tokenizer, end: int | None, say: Callable) -> TokenData:
        from tqdm import tqdm

        commits = {origin_name(name): source.revision for name, source in self.sources.items()}

        def parts(state: dict | None, shards: dict[str, Shard]) -> Iterator[tuple]:
            state, count = state or new_state(), sum(shard.tokens for shard in shards.values())
            look = {"unit": "token", "unit_scale": True, "disable": not is_terminal(sys.stderr)}
            pieces = self.documents(tokenizer, end, state)
            with tqdm(None, "tokenising", self.tokens, initial=count, **look) as bar:
                # enough may have been read when the process was killed that read it
                while count < self.tokens and (found := next(pieces, None)):
                    piece, ids = found
                    split = "val" if self.is_held_out(piece.key) else "train"
                    is_repeated = piece.key == self._first_two[0] and state["documents"] > 1
                    if is_repeated and not shards["val"].tokens:  # its end may have to be held out
                        continue
                    yield split, ids, text_bytes(piece.text, piece.ends), state
                    bar.update(len(ids))
                    count += len(ids)
            if not shards["val"].tokens:
                _hold_out_the_end(shards, self.fraction, tokenizer, end)

        def sidecar(splits: dict, state: dict) -> dict:
            facts = {"tokenizer": tokenizer.sha256, "dtype": "uint16", "vocab_size": tokenizer.vocab_size}
            facts["dataset"] = {"tokens": self.tokens, "sources": commits}
            return facts | {"splits": splits, "read": state}

        folder.mkdir(parents=True, exist_ok=True)
        self._announce(tokenizer, say)
        if any(commits.values()):
            replace_durably(self._commits, dump_json(commits))
        write_tokens(folder, parts, sidecar)
        data = open_tokens(folder)
        sizes, state = data.sidecar["read"]["sizes"], data.sidecar["read"]
        total, size = sum(sizes.values()), data.train.text_bytes + data.val.text_bytes
        shares = ", ".join(f"{count / total:.1%} {name}" for name, count in sizes.items())
        read = f"read {state['documents']:,} documents, {size:,} bytes{f' ({shares})' * (len(sizes) > 1)}"
        columns = dict.fromkeys(chain.from_iterable(source.columns for source in self.sources.values()))
        if columns and [*columns] != ["text"]:
            read += f", from the columns {', '.join(map(repr, columns))}"
        say(f"dataset: {self.name}: {read}{self._left_out(state['places'])}")
        return data

    def _announce(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        texts, began = [*self.training_texts(2**20)], time.perf_counter()
        per_token = self.tokens / max(1, sum(map(len, tokenizer.encode_batch(texts))))
        seconds = (time.perf_counter() - began) * per_token
        size = sum(len(text.encode()) for text in texts) * per_token
        words = f"up to {self.tokens:,} tokens, {size / 1e6:,.0f} MB of text, in about {seconds:,.0f} s"
        free = shutil.disk_usage(self.output).free
        disk = f"{2 * self.tokens / 1e6:,.0f} MB on a disk with {free / 1e6:,.0f} MB free"
        say(f"dataset: {self.name}: reading {words}; {disk}")

    def _left_out(self, places: dict | None = None) -> str:
        """What is not read: no text, or, where reading stopped at `places`, behind that."""
        names = list(chain.from_iterable(source.left_out for source in self.sources.values()))
        for name, (file, *_) in (places or {}).items():
            names += self.sources[name].files[file + 1 :] if self.sources[name].is_local else []
        names = list(dict.fromkeys(names))
        return f"; not read: {', '.join(names[:20])}{' ...' * (len(names) > 20)}" * bool(names)


def new_state() -> dict[str, Any]:
    """Where `Dataset.documents` begins."""
    return {"places": {}, "sizes": {}, "inside": None, "documents": 0}


def _hold_out_the_end(shards: dict[str, Shard], fraction: float, tokenizer: Tokenizer, end: int) -> None:
    """Of a dataset that is one document, or read no further than its first one."""
    train = shards["train"]
    train.facts()
    ids = np.fromfile(train.file.name, np.uint16)[train.tokens - int(train.tokens * fraction) :]
    while len(ids) and b"\x80" <= spelled(tokenizer, ids[0])[:1] < b"\xc0":  # within a character
        ids = ids[1:]
    size = sum(len(text.encode()) for text in TokenFile(ids, 0).texts(tokenizer, end))
    train.file.close()
    shards["val"].add(ids, size)
    shards["train"] = Shard(Path(train.file.name), train.tokens - len(ids), train.bytes - size)


# --- where rows come from -----------------------------------------------------------------------------------


class Source:
    """One dataset: its files, and their documents in order. `pinned` is the commit to read it at."""

    def __init__(self, spec: str, column: str | None, output: Path, pinned: str | None):
        self.spec, self.column, self.revision = spec, column, pinned
        self.left_out: dict[str, None] = {}  # in order
        self.columns: dict[str, None] = {}  # that texts came from
        self.is_local = os.path.exists(spec)  # a path may hold the signs : and @ itself
        if self.is_local:
            self.files = self._local_files(output)
            stats = [(path, os.stat(path)) for path in self.files]
            self.facts = [column, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]]
            return
        self.facts = [column, spec]
        found = re.fullmatch(r"(.*?)(?::([^:@/]+))?(?:@([^:@/]+))?", spec, re.DOTALL)
        self.repo, self.config, self.split = found.groups()
        folder, name = os.path.split(self.repo)
        is_path = os.path.isdir(folder) or "/" in folder or folder.startswith((".", "~"))
        if is_path or os.path.exists(self.repo) or (not folder and kind(name)) or {*"=,"} & {*spec}:
            advice = "a local one has no split; shares are written A=0.7,B=0.3"
            raise DataError(f"--dataset {spec}: no such file or folder ({advice})")

    def _local_files(self, output: Path) -> list[str]:
        is_file, closed = os.path.isfile(self.spec), []
        # the name of a link to a file tells its kind, also where that of the file does not
        root = Path(os.path.abspath(self.spec)) if is_file else Path(self.spec).resolve()
        walk = os.walk(root, onerror=lambda error: closed.append(Path(error.filename)))
        paths = [root] if is_file else [Path(at, name) for at, *names in walk for name in chain(*names)]
        # a link to a folder is not followed: it may lead around in a circle
        paths = sorted([path for path in paths if path.is_symlink() or not path.is_dir()] + closed)
        runs = {output, *(path.parent for path in paths if path.name == OPENED)}
        own = [folder for run in runs for name in WRITTEN for folder in run.glob(name)]
        own += [path.parent for path in paths if path.name == "manifest.json" and ".ckpt" in path.parent.name]
        paths = [path for path in paths if not any(path.is_relative_to(folder) for folder in own)]
        paths = [path for path in paths if all(part[0] != "." for part in path.relative_to(root).parts)]
        files = [path for path in paths if kind(path.name) and not any(map(path.match, BESIDE_ARROW))]
        files = [path for path in files if path.is_file() and path.stat().st_size]
        others = sorted({*paths} - {*files})
        self.left_out = dict.fromkeys(str(path.relative_to(root.parent)) for path in others)
        return [str(path) for path in files]

    @cached_property
    def files(self) -> list[str]:
        """Of the Hub: the addresses that the datasets package finds for the configuration and the split."""
        try:
            from datasets import load_dataset_builder, logging
        except ImportError:
            raise DataError("--dataset needs the 'datasets' package: pip install datasets") from None
        from huggingface_hub import HfApi

        logging.set_verbosity(logging.CRITICAL)  # its errors are told in one line
        try:
            self.revision = HfApi().dataset_info(self.repo, revision=self.revision, timeout=10).sha
            builder = load_dataset_builder(self.repo, name=self.config, revision=self.revision)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            raise DataError(f"--dataset {self.spec}: {_in_one_line(error)}") from None
        except Exception as error:  # connection errors of several libraries share no base class
            raise hub.explained(error, self.repo) from None
        splits, split = builder.config.data_files or {}, self.split or "train"
        if split not in splits:
            raise DataError(
                f"--dataset {self.spec}: no split {split!r}; it has {', '.join(map(str, splits))}"
            )
        files = [str(file) for file in splits[split]]
        self.left_out |= dict.fromkeys(file for file in files if not kind(file))
        return [file for file in files if kind(file)]

    def pieces(self, first: int = 0, row: int = 0, piece: int = 0) -> Iterator[Piece]:
        """Its documents from a place on. Raises `DataError` that names file and row."""
        for file in range(first, len(self.files)):
            name, is_empty = self.files[file], not (row or piece)
            try:
                for texts in self._rows(name, row):
                    key = None
                    for number, (text, ends) in enumerate(_documents(texts), start=1):
                        beginning = (text.rstrip("\n") + "\n")[: 2**16]  # a last line may lack its end
                        key = int(sha256_bytes(beginning.encode())[:16], 16) if key is None else key
                        if number > piece:
                            yield Piece(text, ends, key, (file, row, number))
                        key, is_empty = None if ends else key, False
                    row, piece = row + 1, 0
            except DataError as error:
                raise DataError(f"--dataset {name}, row {row + 1}: {error}") from None
            except Exception as error:  # many unrelated types for what cannot be read
                kept = "; what was read is kept: the same command goes on from there" * (not self.is_local)
                raise DataError(f"--dataset {name}, after row {row}: {_in_one_line(error)}{kept}") from None
            if is_empty:
                self.left_out[name] = None
            row = piece = 0

    def _rows(self, file: str, start: int) -> Iterator[Iterable[str]]:
        """The text of each row from `start` on, in pieces; a text file is one row."""
        if kind(file) == "text":
            with opened(file) as raw:
                yield (text.replace("\0", "") for text in decoded(raw, "the text"))
            return
        sample: list[dict] = []
        try:
            sample.extend(islice(table(file), SAMPLE_ROWS))
        except Exception:  # behind the first row it is told where it is met again, below
            if not sample:
                raise
        column = _choose(sample, self.column)
        self.columns |= {column: None} if sample else {}
        for row in table(file, start, column):
            if isinstance(row.get("text"), str) and not (self.column or column == "text"):
                raise DataError(f"a column 'text', but {column!r} is the one that was chosen: {ADVICE}")
            if column not in row:
                self.left_out[f"rows of {file} without {column!r}"] = None
            text = row.get(column)
            text = "" if text is None or text != text else text  # NaN, which is what pandas writes for none
            if not isinstance(text, str):
                raise DataError(f"column {column!r} holds {type(text).__name__}, expected text")
            # half a surrogate pair is no character
            text = text.replace("\0", "").encode(errors="replace").decode()
            text = re.sub("\r\n?", "\n", text).rstrip("\n")  # as `decoded` reads a text file
            text = text.removesuffix(END_OF_TEXT).rstrip("\n")
            yield [f"{text}\n{SEPARATOR}"]


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- from a row to documents --------------------------------------------------------------------------------


def _choose(rows: list[dict], wanted: str | None) -> str:
    """The column to read: `wanted`, else text, the only one that may hold it, or content."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    # beside messages, which are a list, or an image, which is bytes, an id is no text
    may = [key for key in names if any(isinstance(row.get(key), str | list | bytes) for row in rows)]
    column = wanted or ("text" if "text" in names else may[0] if len(may) == 1 else "content")
    if rows and column not in names:
        some = ", ".join(names[:20]) + " ..." * (len(names) > 20)
        raise DataError(f"no text column {column!r}; it has {some}: {ADVICE}")
    return column


def _documents(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """As `documents`, without blank ones; the last one ends too, with a line break."""
    begins, text = True, ""
    for text, ends in documents(texts):
        if text.strip() or not begins:
            yield text, ends
            begins = ends
    if not begins:
        yield "" if text.endswith("\n") else "\n", True
