"""A Hub dataset (or a local folder of one) -> one text file, streamed until there is enough of it.

Preparation only: training reads the token files made from this text, so no network is in the loop and the data
position stays one integer.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from .errors import DataError
from .files import fsync_folder
from .text import SEPARATOR

BYTES_PER_TOKEN = 4.5  # of English under the SmolLM2 tokenizer, rounded up


def dataset_to_text(source: str, folder: Path, tokens: int, split: str = "train", column: str = "text") -> Path:
    """Path of a text file with about `tokens` tokens of `source`, documents separated; raises `DataError`."""
    target = folder / f"dataset-{re.sub(r'[^A-Za-z0-9]+', '-', source).strip('-')}-{tokens}.txt"
    if target.exists():
        return target
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("--dataset needs the 'datasets' package: pip install datasets") from None
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".tmp-{os.getpid()}")
    written, limit = 0, tokens * BYTES_PER_TOKEN
    progress = tqdm(total=int(limit), unit="B", unit_scale=True, desc=f"reading {source}", disable=not sys.stderr.isatty())
    try:
        rows = iter(load_dataset(source, split=split, streaming=True))
        with progress, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                text = row.get(column)
                if not isinstance(text, str):
                    raise DataError(f"--dataset {source}: no text column {column!r}; it has {', '.join(map(str, row))}")
                file.write(text.rstrip("\n") + "\n" + SEPARATOR)
                size = len(text.encode()) + len(SEPARATOR) + 1
                written += size
                progress.update(size)
                if written >= limit:
                    break
            file.flush()
            os.fsync(file.fileno())
        if hasattr(rows, "close"):
            rows.close()
        os.replace(temporary, target)
        fsync_folder(folder)
    except DataError:
        raise
    except Exception as error:  # the library raises many unrelated types for a missing or unreachable dataset
        raise DataError(f"--dataset {source}: {type(error).__name__}: {str(error).splitlines()[0][:160]}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target
