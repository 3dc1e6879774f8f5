"""A token as text: the bytes it stands for, and a word that can be shown."""

from __future__ import annotations

import re

# Byte-level BPE writes every byte as one printable character (Radford et al. 2019): those that are printable
# as they are, the others as the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
BLANK = "\u2581"  # SentencePiece's, in each of its vocabularies; a byte-level one has no such character


def spelled(tokenizer, token_id: int) -> bytes:
    """The bytes of text that a token stands for, in a byte-level vocabulary or SentencePiece's spelling."""
    name = tokenizer.token(token_id)
    if re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    is_byte_level = tokenizer.token_id(BLANK) is None
    # a special token's name is ASCII: it maps to itself
    if is_byte_level and all(character in BYTE_OF for character in name):
        return bytes(BYTE_OF[character] for character in name)
    return name.replace(BLANK, " ").encode()


def visible(raw: bytes) -> str:
    """Bytes as a label: blanks as `·`, line breaks as `↵`, half a character and what cannot be printed as
    hex."""
    try:
        text = raw.decode().replace(" ", "·").replace("\n", "↵")
    except UnicodeDecodeError:
        return raw.hex(" ")
    return "".join(c if c.isprintable() else f"[{ord(c):x}]" for c in text)


def piece(tokenizer, token_id: int) -> str:
    """A token as one visible word."""
    if tokenizer.token(token_id) is None:
        return f"[no entry {token_id}]"  # the network's vocabulary may be larger than the tokenizer's
    return visible(spelled(tokenizer, token_id))


def percent(probability: float) -> str:
    return f"{100 * probability:.{0 if probability >= 0.095 else 1}f} %"
