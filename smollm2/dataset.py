"""A dataset of the Hub, or files of one's own -> one text file, streamed until there is enough of it.

Preparation only: training reads the token files made from this text, so no network is in the loop and the
data position stays one integer.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

from .errors import DataError
from .files import fsync_folder, remove_leftovers, sha256_json
from .text import END_OF_TEXT, SEPARATOR

BYTES_PER_TOKEN = 4.5  # of English under the SmolLM2 tokenizer, rounded up
SAMPLE_ROWS = 100  # that tell which columns hold text
BUILDERS = {  # of the datasets package, by a file's ending; .gz and the like may stand behind it
    ".txt": "text", ".text": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip


def dataset_to_text(
    spec: str, folder: Path, tokens: int, column: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Path of a text file in `folder`, a run's `data`, with about `tokens` tokens of the dataset `spec`: a
    file, a folder, or `ID[:CONFIG][@SPLIT]` of the Hub.

    A row is a document, and so is a text file. Of a local folder every text and table is read, in the order
    of their names, and what is left out is said. Raises `DataError` that names file and row.
    """
    from tqdm import tqdm

    remove_leftovers(folder)
    sources, left_out, facts = _sources(spec, folder.parent.resolve())
    readable = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(os.path.realpath(spec))).strip("-")[-60:]
    target = folder / f"dataset-{readable}-{sha256_json([spec, facts, column])[:12]}-{tokens}.txt"
    if target.exists():
        say(f"dataset: {spec}: using {target.name}, {target.stat().st_size:,} bytes, read from it earlier")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")  # see `files.remove_leftovers`
    count, written, limit = 0, 0, int(tokens * BYTES_PER_TOKEN)
    hidden = not sys.stderr.isatty()
    bar = tqdm(total=limit, unit="B", unit_scale=True, desc=f"reading {spec}", disable=hidden)
    try:
        with bar, temporary.open("wb") as file:
            for name, text in _texts(sources, column):
                document = _document(text, limit - written)
                raw = document.encode(errors="replace")  # half a surrogate pair is no character
                file.write(raw)
                count += f"\n{document}".count(f"\n{SEPARATOR}")
                written += len(raw)
                bar.update(len(raw))
                if written >= limit:
                    left_out += list(sources)[list(sources).index(name) + 1 :]
                    break
            file.flush()
            os.fsync(file.fileno())
        note = f"; not read: {', '.join(left_out[:20])}{' ...' * (len(left_out) > 20)}" * bool(left_out)
        if not written:
            raise DataError(f"--dataset {spec}: no text in files of {', '.join(BUILDERS)}{note}")
        os.replace(temporary, target)
        fsync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    say(f"dataset: {spec}: read {count:,} documents, {written:,} bytes, into {target.name}{note}")
    return target


# --- where rows come from -----------------------------------------------------------------------------------


def _sources(spec: str, output: Path) -> tuple[dict[str, Callable], list[str], list]:
    """({name: function that begins to read its rows}, names of what is not read, what tells a change)."""
    if not os.path.exists(spec):  # a path may hold the signs : and @ itself
        pattern = r"(.*?)(?::([^:@/]+))?(?:@([^:@/]+))?"
        source, config, split = re.fullmatch(pattern, spec, re.DOTALL).groups()
        if os.path.exists(source) or source.startswith((".", "/")) or source.count("/") > 1:
            raise DataError(f"--dataset {spec}: no such file or folder (a local one has no split)")
        return {spec: partial(_rows, source, split or "train", name=config)}, [], []
    root = Path(spec).resolve()
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    own = [output / name for name in ("checkpoints", "data", "logs")]  # what the run itself writes
    paths = [path for path in paths if not any(path.is_relative_to(folder) for folder in own)]
    paths = [path for path in paths if "/." not in f"/{path.relative_to(root.parent).as_posix()}"]
    files = [path for path in paths if _builder(path) and path.stat().st_size]
    left_out = [str(path.relative_to(root.parent)) for path in paths if path not in {*files}]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {str(path): partial(_file_rows, path) for path in files}, left_out, facts


def _builder(path: Path) -> str | None:
    return BUILDERS.get(Path(re.sub(r"\.(gz|bz2|xz|zst)$", "", path.name.lower())).suffix)


def _file_rows(path: Path) -> Iterator[dict]:
    # a list of one: in a folder the package would guess splits by names, and drop files without a word
    options = {"sep": "\t"} if ".tsv" in path.name.lower() else {}
    return _rows(_builder(path), "train", data_files={"train": [glob.escape(str(path))]}, **options)


def _rows(builder_name: str, split: str, **options) -> Iterator[dict]:
    try:
        from datasets import load_dataset_builder, logging
    except ImportError:
        raise DataError("--dataset needs the 'datasets' package: pip install datasets") from None
    logging.set_verbosity(logging.CRITICAL)  # its errors are told in one line
    builder = load_dataset_builder(builder_name, **options)
    if builder.info.builder_name == "text":  # its rows are lines unless asked otherwise
        builder = load_dataset_builder(builder_name, sample_by="document", **options)
    return iter(builder.as_streaming_dataset(split=split))


# --- from a row to a document -------------------------------------------------------------------------------


def _texts(sources: dict[str, Callable], wanted: str | None) -> Iterator[tuple[str, str]]:
    """(name of the source, text) of every row; an empty cell is an empty text."""
    for name, begin in sources.items():
        number = 0
        try:
            rows = map(_flat, begin())
            first = list(islice(rows, SAMPLE_ROWS))
            column = _choose(first, wanted)
            for number, row in enumerate(chain(first, rows), start=1):
                text = row.get(column) or ""
                if not isinstance(text, str):
                    found = type(text).__name__
                    raise DataError(f"row {number}: column {column!r} holds {found}, expected text")
                yield name, text.replace("\0", "")
        except DataError as error:
            raise DataError(f"--dataset {name}: {error}") from None
        except Exception as error:  # the library raises many unrelated types for what it cannot read
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise DataError(f"--dataset {name}, after row {number}: {words}") from None


def _flat(row: dict, prefix: str = "") -> dict:
    """A row whose columns within columns are called `outer.inner`."""
    flat = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _choose(rows: list[dict], wanted: str | None) -> str:
    """The column to read: `wanted`, else text, the only one that holds strings, or content."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    strings = [key for key in names if any(isinstance(row.get(key), str) for row in rows)]
    column = wanted or ("text" if "text" in names else strings[0] if len(strings) == 1 else "content")
    if rows and column not in names:
        advice = "choose one with --set data.dataset_column=NAME"
        raise DataError(f"no text column {column!r}; it has {', '.join(names)}: {advice}")
    return column


def _document(text: str, room: int) -> str:
    """A text whose last line ends a document; empty for a blank one. Separator lines of its own count."""
    if len(text) > room:  # a text of gigabytes is not wanted whole
        text = text[: text.rfind("\n", 0, room) + 1 or room]
    text = text.removeprefix("\ufeff").rstrip("\r\n")
    if f"\n{text}".endswith("\n" + END_OF_TEXT):
        text = text.removesuffix(END_OF_TEXT).rstrip("\r\n")
    return f"{text}\n{SEPARATOR}" if text.strip() else ""
