"""A text file -> checked, normalised pieces -> documents and splits.

Nothing here ever holds a whole file. The last 10 % of a text is held out. A line `<|endoftext|>` (with its newline)
ends a document.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import DataError
from .files import CHUNK_BYTES, kind_of
from .tokenizer import END_OF_TEXT

SEPARATOR = END_OF_TEXT + "\n"
CONTROLS = bytes(
    n for n in range(1, 32) if n not in b"\t\n\v\f\r\x1b"
)  # NUL is told apart; escape begins terminal colours
CONTROL_SAMPLE_BYTES = 64 * 1024
MAX_UNBROKEN_CHARACTERS = 16 * 2**20
MAGIC = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"%PDF": "a PDF",
    b"\xff\xfe\0\0": "UTF-32 text",  # before UTF-16, whose mark it begins with
    b"\0\0\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x89PNG": "a picture",
    b"\x80\x02": "a pickle",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ": "an xz file",
    b"BZh": "a bzip2 file",
}


def read_text(path: str | Path) -> Iterator[str]:
    """Pieces of a UTF-8 text file, about 1 MiB each, never all of it in memory.

    A byte-order mark is dropped and CRLF or CR become LF, so that the same text gives the same tokens on every
    system. Raises `DataError` for anything that is not readable text, naming the byte offset.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file it never raises
        hint = (
            f"; pass one of the files in it, e.g. --input_file {path}/input.txt"
            if os.path.isdir(path)
            else ""
        )
        raise DataError(f"--input_file {path}: {kind_of(path)}, expected a text file{hint}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"--input_file {path}: {error.strerror}") from None
    with file:
        head = file.read(CONTROL_SAMPLE_BYTES)
        for magic, kind in MAGIC.items():
            if head.startswith(magic):
                raise DataError(
                    f"{path} looks like {kind}; expected plain UTF-8 text: unpack or convert it first"
                )
        controls = len(head) - len(head.translate(None, CONTROLS))
        if controls > len(head) // 1000:
            raise DataError(
                f"{path} looks binary: {controls} control characters in its first {len(head):,} bytes; expected plain UTF-8 text"
            )
        file.seek(3 if head.startswith(codecs.BOM_UTF8) else 0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, held_cr = file.tell(), False
        while True:
            chunk = file.read(CHUNK_BYTES)
            if b"\0" in chunk:
                position = offset + chunk.index(b"\0")
                raise DataError(
                    f"{path} looks binary: a NUL byte at offset {position:,}; expected plain UTF-8 text"
                )
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                position = offset - pending + error.start
                raise DataError(
                    f"{path}: not UTF-8 at byte offset {position:,} (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
                ) from None
            offset += len(chunk)
            text = ("\r" if held_cr else "") + text
            held_cr = bool(chunk) and text.endswith("\r")  # its LF may begin the next piece
            text = (text[:-1] if held_cr else text).replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield text
            if not chunk:
                return


def _cut(text: str) -> int:
    """The last position where the text can be cut without changing its tokens: before a lone blank or line break
    between two non-blank characters (GPT-2's pattern starts a token there); 0 if there is none."""
    for mark in ("\n", " "):
        position = text.rfind(mark, 1, len(text) - 1)
        while position > 0:
            if not text[position - 1].isspace() and not text[position + 1].isspace():
                return position
            position = text.rfind(mark, 1, position)
    return 0


def documents(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece of text, whether it ends a document) with the separator lines taken out.

    Pieces are cut only where the tokenisation of the whole text has a boundary, so chunking never changes a token.
    """
    rest, at_line_start = "", True
    for text in texts:
        rest += text
        while True:
            found = rest.find(SEPARATOR)
            while found >= 0 and not (
                rest[found - 1] == "\n" if found else at_line_start
            ):  # only a whole line counts
                found = rest.find(SEPARATOR, found + 1)
            if found < 0:
                break
            yield rest[:found], True
            rest, at_line_start = rest[found + len(SEPARATOR) :], True
        if len(rest) >= CHUNK_BYTES:
            # keep a tail in which the beginning of a separator line may hide
            cut = _cut(rest[: -len(SEPARATOR)])
            cut = cut or (len(rest) // 2 if len(rest) > MAX_UNBROKEN_CHARACTERS else 0)
            if cut:
                yield rest[:cut], False
                rest, at_line_start = rest[cut:], False
    if (rest == END_OF_TEXT and at_line_start) or rest.endswith(
        "\n" + END_OF_TEXT
    ):  # a last line without its newline
        yield rest.removesuffix(END_OF_TEXT), True
    elif rest:
        yield rest, False


def split_bytes(path: str | Path, held_out_fraction: float = 0.1) -> tuple[int, int]:
    """(training, held-out) UTF-8 bytes of the normalised text; the cut falls between two characters."""
    total = sum(len(text.encode()) for text in read_text(path))
    train = int(total * (1 - held_out_fraction))
    seen = 0
    for text in read_text(path):
        raw = text.encode()
        if seen + len(raw) > train:
            inside = train - seen
            while (
                inside and (raw[inside] & 0xC0) == 0x80
            ):  # a continuation byte: step back to the character's start
                inside -= 1
            return seen + inside, total - seen - inside
        seen += len(raw)
    return total, 0


def read_split(path: str | Path, split: str, held_out_fraction: float = 0.1) -> Iterator[str]:
    """Text pieces of `"train"`, `"val"` (the end of the file) or `"all"`."""
    if split == "all":
        yield from read_text(path)
        return
    train_bytes, _ = split_bytes(path, held_out_fraction)
    seen = 0
    for text in read_text(path):
        raw = text.encode()
        cut = min(max(train_bytes - seen, 0), len(raw))
        part = raw[:cut] if split == "train" else raw[cut:]
        seen += len(raw)
        if part:
            yield part.decode()


def source_identity(path: str | Path) -> dict:
    """Hash and byte counts of an input text, from one reading of it; raises `DataError` for unusable text."""
    digest, total = hashlib.sha256(), 0
    for text in read_text(path):
        raw = text.encode()
        digest.update(raw)
        total += len(raw)
    if total == 0:
        raise DataError(f"{path}: empty, expected text (at least a few thousand characters)")
    return {"sha256": digest.hexdigest(), "bytes": total}
