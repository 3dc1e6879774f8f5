"""What the README promises about `input.txt`: its size, its form, that it does not repeat itself, that it is original."""

from __future__ import annotations

import gzip
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from smollm2.text import SEPARATOR

CORPUS = Path(__file__).parents[1] / "input.txt"


@pytest.fixture(scope="module")
def text() -> str:
    return CORPUS.read_bytes().decode("ascii")


@pytest.fixture(scope="module")
def pieces(text) -> list[str]:
    assert text.endswith("\n" + SEPARATOR)
    return [piece.removesuffix("\n") for piece in text.removesuffix(SEPARATOR).split(SEPARATOR)]


@pytest.fixture(scope="module")
def bodies(pieces) -> list[str]:
    return [piece.split("\n\n", 1)[1] for piece in pieces]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def runs(text: str, length: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]


def where_runs_occur(pieces: list[str], length: int) -> dict[tuple[str, ...], set[int]]:
    places: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, piece in enumerate(pieces):
        for run in runs(piece, length):
            places[run].add(number)
    return places


def test_size(text, pieces):
    assert 1_000_000 <= len(text) <= 1_400_000
    assert len(pieces) >= 1_000
    assert all(400 <= len(piece) <= 2_500 for piece in pieces), [
        p[:40] for p in pieces if not 400 <= len(p) <= 2_500
    ]


def test_every_character_is_printable_ascii_and_no_line_ends_in_a_blank(text):
    assert re.fullmatch(r"[\x20-\x7e\n]+", text)
    assert not re.search(r"[ ]$", text, re.MULTILINE)


def test_every_piece_is_a_title_a_blank_line_and_text_that_ends_with_a_sentence(pieces):
    for piece in pieces:
        title, blank, first = piece.split("\n")[:3]
        assert title and not blank and first, piece[:80]
        assert not title.endswith(".") and len(title) <= 80, title
        assert re.search(r"[.!?][\"')]*$", piece), (title, piece[-40:])
        assert "\n\n\n" not in piece, title


def test_it_does_not_repeat_itself(pieces):
    places = where_runs_occur(pieces, 8)
    assert max(map(len, places.values())) <= 3
    counts = Counter(run for piece in pieces for run in runs(piece, 8))
    assert sum(count > 1 for count in counts.values()) / len(counts) < 0.005


def test_openings_differ_and_some_are_once_upon_a_time(bodies):
    openings = [re.split(r"(?<=[.!?])\s", body)[0] for body in bodies]
    assert len(set(openings)) / len(openings) >= 0.95
    assert 0.03 <= sum(body.startswith("Once upon a time") for body in bodies) / len(bodies) <= 0.10


def test_no_first_name_is_everywhere(pieces):
    """Capitalised words inside a sentence that never occur in small letters: names, days, months, places."""
    common = set(re.findall(r"\b[a-z]+\b", "\n".join(pieces)))
    calendar = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"}
    calendar |= {
        "january",
        "february",
        "april",
        "june",
        "july",
        "august",
        "september",
        "october",
        "november",
        "december",
    }
    calendar |= {"mr", "mrs", "earth", "venus", "mars", "english", "africa", "europe"}
    names: Counter[str] = Counter()
    for piece in pieces:
        names.update(
            {w for w in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", piece) if w.lower() not in common | calendar}
        )
    name, count = names.most_common(1)[0]
    assert count / len(pieces) <= 0.03, (name, count)


def test_the_vocabulary_is_rich_and_the_text_does_not_compress_too_well(text):
    vocabulary = {word.strip("'") for word in re.findall(r"[a-z']+", text.lower())} - {""}
    assert 7_000 <= len(vocabulary) <= 20_000
    assert len(gzip.compress(text.encode(), 9)) / len(text) >= 0.34


def test_no_twelve_words_in_a_row_are_shared(pieces, request):
    places = where_runs_occur(pieces, 12)
    shared = [" ".join(run) for run, where in places.items() if len(where) > 1]
    assert not shared, shared[:3]
    shakespeare = request.getfixturevalue("test_data") / "tinyshakespeare" / "input.txt"
    theirs = set(runs(shakespeare.read_text(), 12))
    assert not [" ".join(run) for run in places if run in theirs][:3]
