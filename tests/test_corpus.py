"""What the README promises about `input.txt`: its size, its form, that it does not repeat itself, that it is original."""

import gzip
import re
from collections import defaultdict
from pathlib import Path

import pytest

from smollm2.text import SEPARATOR


@pytest.fixture(scope="module")
def text() -> str:
    return (Path(__file__).parents[1] / "input.txt").read_bytes().decode("ascii")


@pytest.fixture(scope="module")
def pieces(text) -> list[str]:
    assert text.endswith("\n" + SEPARATOR)
    return [piece.removesuffix("\n") for piece in text.removesuffix(SEPARATOR).split(SEPARATOR)]


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def places_of_runs(pieces: list[str], length: int) -> dict[tuple[str, ...], list[int]]:
    """Of every run of words the numbers of the pieces in which it stands."""
    places = defaultdict(list)
    for number, piece in enumerate(pieces):
        for run in runs(piece, length):
            places[run].append(number)
    return places


def test_its_size_and_that_every_character_is_printable_ascii(text, pieces):
    assert 1_000_000 <= len(text) <= 1_400_000 and len(pieces) >= 1_000
    assert re.fullmatch(r"[\x20-\x7e\n]+", text) and not re.search(r"[ ]$", text, re.MULTILINE)
    assert [piece[:40] for piece in pieces if not 400 <= len(piece) <= 2_500] == []


def test_every_piece_is_a_title_a_blank_line_and_text_that_ends_with_a_sentence(pieces):
    for piece in pieces:
        title, blank, first = piece.split("\n")[:3]
        assert title and not blank and first and not title.endswith(".") and len(title) <= 80, title
        assert re.search(r"[.!?][\"')]*$", piece) and "\n\n\n" not in piece, title


def test_it_does_not_repeat_itself(pieces):
    places = places_of_runs(pieces, 8)
    assert max(len(set(where)) for where in places.values()) <= 3
    assert sum(len(where) > 1 for where in places.values()) / len(places) < 0.005


def test_openings_differ_and_some_are_once_upon_a_time(pieces):
    bodies = [piece.split("\n\n", 1)[1] for piece in pieces]
    assert len({re.split(r"(?<=[.!?])\s", body)[0] for body in bodies}) / len(bodies) >= 0.95
    assert 0.03 <= sum(body.startswith("Once upon a time") for body in bodies) / len(bodies) <= 0.10


def test_the_vocabulary_is_rich_and_the_text_does_not_compress_too_well(text):
    vocabulary = {word.strip("'") for word in re.findall(r"[a-z']+", text.lower())} - {""}
    assert 7_000 <= len(vocabulary) <= 20_000
    assert len(gzip.compress(text.encode(), 9)) / len(text) >= 0.34


def test_no_twelve_words_in_a_row_are_shared(pieces, request):
    places = places_of_runs(pieces, 12)
    assert [" ".join(run) for run, where in places.items() if len(set(where)) > 1][:3] == []
    shakespeare = request.getfixturevalue("test_data") / "tinyshakespeare/input.txt"
    theirs = set(runs(shakespeare.read_text(), 12))
    assert [" ".join(run) for run in places if run in theirs][:3] == []
