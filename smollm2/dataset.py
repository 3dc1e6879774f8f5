"""A Hub dataset (or a local folder of one) -> one text file, streamed until there is enough of it.

Preparation only: training reads the token files made from this text, so no network is in the loop and the data
position stays one integer.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import DataError
from .files import fsync_folder, sha256_json
from .text import SEPARATOR
from .tokenizer import END_OF_TEXT

BYTES_PER_TOKEN = 4.5  # of English under the SmolLM2 tokenizer, rounded up


def _target_name(source: str, tokens: int, split: str, column: str) -> str:
    """Name of the text file: another source, or a local folder in which a file was changed, gets another one."""
    paths = (
        sorted(path for path in Path(source).rglob("*") if path.is_file()) if os.path.isdir(source) else []
    )
    files = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-60:]
    return f"dataset-{readable}-{sha256_json([source, split, column, files])[:12]}-{tokens}.txt"


def _document(text: str) -> str:
    """One row as text whose last line ends a document; empty for a blank one. Separator lines of its own count."""
    text = text.removeprefix("\ufeff").rstrip("\r\n")
    if text == END_OF_TEXT or text.endswith("\n" + END_OF_TEXT):
        text = text.removesuffix(END_OF_TEXT).rstrip("\r\n")
    return f"{text}\n{SEPARATOR}" if text.strip() else ""


def dataset_to_text(
    source: str,
    folder: Path,
    tokens: int,
    split: str = "train",
    column: str = "text",
    say: Callable[[str], None] = print,
) -> Path:
    """Path of a text file with about `tokens` tokens of `source`, documents separated; raises `DataError`.

    A row is a document; of a dataset of plain text files each file is one. Says whether the file was there or was made.
    """
    target = folder / _target_name(source, tokens, split, column)
    if target.exists():
        say(f"dataset: {source}: using {target.name}, {target.stat().st_size:,} bytes, read from it earlier")
        return target
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise DataError("--dataset needs the 'datasets' package: pip install datasets") from None
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".tmp-{os.getpid()}")
    count, written, limit = 0, 0, tokens * BYTES_PER_TOKEN
    progress = tqdm(
        total=int(limit), unit="B", unit_scale=True, desc=f"reading {source}", disable=not sys.stderr.isatty()
    )
    try:
        builder = load_dataset_builder(source)
        if builder.info.builder_name == "text":  # its rows are lines unless asked otherwise
            builder = load_dataset_builder(source, sample_by="document")
        rows = iter(builder.as_streaming_dataset(split=split))
        with progress, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                text = row.get(column)
                if not isinstance(text, str):
                    raise DataError(
                        f"--dataset {source}: no text column {column!r}; it has {', '.join(map(str, row))}"
                    )
                room = int(limit - written)  # a file of gigabytes is not wanted whole
                document = _document(
                    text if len(text) <= room else text[: text.rfind("\n", 0, room) + 1 or room]
                )
                file.write(document)
                count += f"\n{document}".count(f"\n{SEPARATOR}")
                written += len(document.encode())
                progress.update(len(document.encode()))
                if written >= limit:
                    break
            file.flush()
            os.fsync(file.fileno())
        if hasattr(rows, "close"):
            rows.close()
        os.replace(temporary, target)
        fsync_folder(folder)
        say(f"dataset: {source}: read {count:,} documents, {written:,} bytes, into {target.name}")
    except DataError:
        raise
    except Exception as error:  # the library raises many unrelated types for a missing or unreachable dataset
        raise DataError(
            f"--dataset {source}: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return target
