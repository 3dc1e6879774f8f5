"""A text file -> checked, normalised pieces -> documents and splits.

Nothing here ever holds a whole file. The end of a text (`data.held_out_fraction`, a tenth) is held out. A
line `<|endoftext|>` (with its newline) ends a document.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from .errors import DataError
from .files import CHUNK_BYTES, kind_of

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = END_OF_TEXT + "\n"
CONTROLS = [chr(n) for n in range(1, 32) if n not in b"\t\n\v\f\r\x1b"]  # escape begins terminal colours
BEGINNINGS = {  # of files that are no text, to say what they may be
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"%PDF": "PDF",
    b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16",
    b"PAR1": "Parquet, which --dataset reads",
}  # fmt: skip
MAX_UNBROKEN_CHARACTERS = 16 * 2**20
# the lookbehind stands last, so that it is tried only where the letters were found: ten times as fast
_SEPARATOR_LINE = re.compile(r"<\|endoftext\|>\n(?<![^\n]<\|endoftext\|>\n)")
# not \s, which counts the separators 0x1c to 0x1f as blanks: GPT-2's pattern does not
_UP_TO_LAST_BREAK = re.compile(r".*\S(?=[ \t\n\u3000])", re.DOTALL)


def read_text(path: str | Path, flag: str = "input_file") -> Iterator[str]:
    """Pieces of a UTF-8 text file, about 1 MiB each, never all of it in memory.

    A byte-order mark is dropped and CRLF or CR become LF, so that the same text gives the same tokens on
    every system. Raises `DataError` for anything that is not readable text, naming the place and the `flag`.
    """
    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        advice = "expected a text file (of a folder name one of the files, or pass --dataset)"
        raise DataError(f"--{flag} {path}: {kind_of(path)}, {advice}")
    seen = 0
    try:
        with open(path, "rb") as raw:
            for text in decoded(raw, path):
                if "\0" in text:
                    raise _refusal(raw, path, f"binary: a NUL at character {seen + text.index(chr(0)):,}")
                seen += len(text)
                yield text
    except OSError as error:
        raise DataError(f"--{flag} {path}: {error.strerror}") from None


def decoded(raw: BinaryIO, name: str | Path) -> Iterator[str]:
    """The text of an open UTF-8 file, as `read_text` reads it; the errors say `name`."""
    file, is_first = io.TextIOWrapper(raw, encoding="utf-8-sig"), True
    try:
        while text := file.read(CHUNK_BYTES):
            # a text of DOS ends with one, and a short text may hold some
            if is_first and sum(map(text.count, CONTROLS)) > max(8, len(text) // 1000):
                raise _refusal(raw, name, "binary: many control characters")
            is_first = False
            yield text
    except UnicodeDecodeError as error:
        raise not_utf8(raw, name, error) from None


def not_utf8(raw: BinaryIO, name: str | Path, error: UnicodeDecodeError) -> DataError:
    """What is wrong, and where in an open file whose newest part could not be decoded."""
    place = raw.tell() - len(error.object) + error.start
    found = f"not UTF-8 at byte offset {place:,} (byte 0x{error.object[error.start]:02x})"
    return _refusal(raw, name, found)


def _refusal(raw: BinaryIO, name: str | Path, found: str) -> DataError:
    raw.seek(0)
    head = raw.read(4)
    kinds = [f"; it begins like {kind}" for start, kind in BEGINNINGS.items() if head.startswith(start)]
    return DataError(f"{name}: {found}{''.join(kinds)}; expected plain UTF-8 text: unpack or convert it")


def documents(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece of text, whether it ends a document) with the separator lines taken out.

    Long documents come in pieces of about 1 MiB, cut in front of a run of blanks, where GPT-2's pattern
    begins a token whatever stands before and behind: chunking never changes a token.
    """
    rest = ""
    for text in texts:
        *ended, rest = _SEPARATOR_LINE.split(rest + text)
        yield from ((document, True) for document in ended)
        if len(rest) >= CHUNK_BYTES:
            found = _UP_TO_LAST_BREAK.match(rest)
            cut = found.end() if found else len(rest) // 2 if len(rest) > MAX_UNBROKEN_CHARACTERS else 0
            if cut:
                yield rest[:cut], False
                rest = rest[cut:]
    if f"\n{rest}".endswith("\n" + END_OF_TEXT):  # a last line without its newline
        yield rest.removesuffix(END_OF_TEXT), True
    elif rest:
        yield rest, False


@lru_cache(maxsize=16)
def _scan(path: str, flag: str, version: tuple) -> dict:
    """One reading of each version of a file."""
    digest, total = hashlib.sha256(), 0
    for text in read_text(path, flag):
        raw = text.encode()
        digest.update(raw)
        total += len(raw)
    if total == 0:
        raise DataError(f"{path}: empty, expected text (at least a few thousand characters)")
    return {"sha256": digest.hexdigest(), "bytes": total}


def source_identity(path: str | Path, flag: str = "input_file") -> dict:
    """SHA-256 and byte count of the normalised text; raises `DataError` for unusable text."""
    facts = os.stat(path) if os.path.isfile(path) else None  # of anything else `read_text` says what it is
    return dict(_scan(str(path), flag, facts and (facts.st_ino, facts.st_size, facts.st_mtime_ns)))


def read_split(path: str | Path, split: str, held_out_fraction: float = 0.1) -> Iterator[str]:
    """Text pieces of `"train"`, `"val"` (the end of the file) or `"all"`, cut between two characters."""
    if split == "all":
        yield from read_text(path)
        return
    left = int(source_identity(path)["bytes"] * (1 - held_out_fraction))  # training bytes still to come
    for text in read_text(path):
        raw = text.encode()
        cut = min(left, len(raw))
        while 0 < cut < len(raw) and (raw[cut] & 0xC0) == 0x80:  # step back to the character's first byte
            cut -= 1
        part = raw[:cut] if split == "train" else raw[cut:]
        if part:
            yield part.decode()
        left -= min(left, len(raw))
        if split == "train" and left == 0:
            return


def split_bytes(path: str | Path, held_out_fraction: float = 0.1) -> tuple[int, int]:
    """(training, held-out) UTF-8 bytes of the normalised text."""
    train = sum(len(text.encode()) for text in read_split(path, "train", held_out_fraction))
    return train, source_identity(path)["bytes"] - train
