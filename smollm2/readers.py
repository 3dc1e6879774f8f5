"""What is in a file, local or of the Hub, packed or not: its bytes, or the rows of a table of any kind."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from .errors import DataError
from .text import not_utf8

KINDS = {  # by a file's ending; .gz and the like may stand behind it
    ".txt": "text", ".text": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
LONGEST_VALUE = 2**26  # characters of one JSON value
_BETWEEN_VALUES = re.compile(r"[\s,\[\]]*")


def kind(file: str) -> str | None:
    """What a file's name says that it holds: text, json, csv, ... or None for what is not read."""
    return KINDS.get(Path(re.sub(r"\.(gz|bz2|xz|zst)$", "", file.lower())).suffix)


def opened(file: str) -> BinaryIO:
    """What is in a file, unpacked."""
    from fsspec.compression import compr

    if file.startswith("hf://"):
        from huggingface_hub import HfFileSystem as FileSystem
    else:
        from fsspec.implementations.local import LocalFileSystem as FileSystem
    if file.lower().endswith(".zst") and "zstd" not in compr:  # "infer" would read it as it is
        raise DataError("packed with zstd: pip install zstandard")
    return FileSystem().open(file, "rb", compression="infer")


def table(file: str, start: int = 0, column: str | None = None) -> Iterator[dict]:
    """The rows of a table from `start` on, with all of their columns or at least the one; columns within
    columns are called `outer.inner`. Raises `DataError`, or what its library raises."""
    form = kind(file)
    with opened(file) as raw:
        if form == "parquet":
            rows = _parquet_rows(raw, start, column)
        elif form == "arrow":
            import pyarrow

            is_file = raw.read(6) == b"ARROW1"  # with a table of contents, as Feather, else a stream
            raw.seek(0)
            found = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(raw)
            batches = map(found.get_batch, range(found.num_record_batches)) if is_file else found
            rows = islice(chain.from_iterable(batch.to_pylist() for batch in batches), start, None)
        else:
            lines = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="" if "sv" in form else None)
            rows = islice(_json_rows(lines) if form == "json" else _csv_rows(lines, form), start, None)
        try:
            for row in rows:
                if not isinstance(row, dict):
                    raise DataError(f"{type(row).__name__}, expected an object with columns")
                yield _flat(row)
        except UnicodeDecodeError as error:
            if form in ("parquet", "arrow"):
                raise
            raise UnicodeError(not_utf8(raw, "the table", error)) from None
        size = getattr(raw, "size", None)
        if file.startswith("hf://") and form != "parquet" and size and raw.tell() < size:
            raise DataError(f"the Hub sent {raw.tell():,} of {size:,} bytes")


def _parquet_rows(raw: BinaryIO, start: int, column: str | None) -> Iterator[dict]:
    import pyarrow.parquet

    # by pages, for a group of rows may be as large as the file
    file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
    leaves = map(file.schema.column, range(len(file.schema)))
    # a date that Python does not know, in a column that nobody reads, need not be readable
    columns = [column] if column else [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if start < count:
            batches = file.iter_batches(100, row_groups=[group], columns=columns or None)
            yield from islice(chain.from_iterable(batch.to_pylist() for batch in batches), start, None)
        start = max(0, start - count)


def _csv_rows(lines: io.TextIOBase, form: str) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # a cell is a document; more is no C long on Windows
    first = next(lines, "")
    # a spreadsheet writes commas, semicolons or tabs, by the language it is set to
    delimiter = "\t" if form == "tsv" else next((c for c in ",;\t" if c in first), ",")
    rows = filter(None, csv.reader(chain([first], lines), delimiter=delimiter, strict=True))  # no empty lines
    header = next(rows, [])
    if len(set(header)) < len(header):
        raise DataError(f"the header names a column twice: {', '.join(header)}")
    for row in rows:
        if len(row) != len(header):
            raise DataError(f"{len(row)} cells, but the header has {len(header)}")
        yield dict(zip(header, row, strict=True))


def _json_rows(file: io.TextIOBase) -> Iterator[dict]:
    """Values, one after the other or in a list. One that is not whole is tried again with twice as much."""
    decoder, text, place = json.JSONDecoder(), "", 0
    while True:
        place = _BETWEEN_VALUES.match(text, place).end()
        try:
            row, place = decoder.raw_decode(text, place)
            yield row
        except ValueError:
            more = file.read(max(2**16, len(text) - place)) if len(text) - place < LONGEST_VALUE else ""
            if not more and place < len(text):
                raise
            if not more:
                return
            text, place = text[place:] + more, 0


def _flat(row: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in row.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
