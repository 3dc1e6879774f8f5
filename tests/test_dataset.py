"""A dataset becomes a text with its own documents, read anew when it was changed and only then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smollm2.dataset import dataset_to_text
from smollm2.errors import DataError
from smollm2.text import documents, read_text

pytest.importorskip("datasets", reason="pip install datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def folder_of(place: Path, **files: str) -> Path:
    place.mkdir(exist_ok=True)
    for name, text in files.items():
        (place / f"{name}.txt").write_bytes(text.encode())
    return place


def read(source: Path, out: Path, tokens: int = 10_000) -> tuple[list[str], str]:
    """(documents, what was said)"""
    said: list[str] = []
    path = dataset_to_text(str(source), out, tokens, say=said.append)
    pieces = list(documents(read_text(path)))
    assert all(ends for _, ends in pieces) and len(said) == 1
    return [text for text, _ in pieces], said[0]


def test_a_text_file_is_one_document_and_its_own_separators_count(tmp_path):
    source = folder_of(
        tmp_path / "in",
        a="one\n\n\ntwo\n",
        b="three\n<|endoftext|>\nfour\n<|endoftext|>\n",
        c="\n",
        d="\ufefffive\r\n<|endoftext|>\r\n",
        e="not <|endoftext|>",
    )
    found, said = read(source, tmp_path / "out")
    assert found == ["one\n\n\ntwo\n", "three\n", "four\n", "five\n", "not <|endoftext|>\n"]
    assert "read 5 documents" in said


def test_rows_of_a_table_are_documents_and_blank_ones_are_none(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/rows.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": " "}\n{"text": "three\\n"}\n')
    assert read(tmp_path / "in", tmp_path / "out")[0] == ["one\ntwo\n", "three\n"]
    (tmp_path / "in/rows.jsonl").write_text('{"words": "one"}\n')
    with pytest.raises(DataError, match="no text column 'text'; it has words"):
        read(tmp_path / "in", tmp_path / "out")


def test_a_changed_folder_is_read_anew_and_an_unchanged_one_is_not(tmp_path):
    source = folder_of(tmp_path / "in", a="one\n")
    assert read(source, tmp_path / "out")[0] == ["one\n"]
    again = read(source, tmp_path / "out")
    assert again[0] == ["one\n"] and "read from it earlier" in again[1]
    folder_of(source, b="two\n")  # another file
    assert read(source, tmp_path / "out")[0] == ["one\n", "two\n"]
    folder_of(source, b="six\n")  # the same size
    os.utime(source / "b.txt", (1, 1))
    found, said = read(source, tmp_path / "out")
    assert found == ["one\n", "six\n"] and "read 2 documents" in said


def test_names_that_differ_only_in_their_signs_do_not_share_a_text(tmp_path):
    for name in ("my_ds", "my-ds", "資料", "данные"):
        assert read(folder_of(tmp_path / name, a=f"of {name}\n"), tmp_path / "out")[0] == [f"of {name}\n"]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_reading_stops_when_there_is_enough(tmp_path):
    source = folder_of(tmp_path / "in", **{f"f{i}": "123456789\n" * 300 for i in range(9)})
    found, _ = read(source, tmp_path / "out", tokens=1000)
    assert "".join(found) == "123456789\n" * 448 and len(found) == 2  # 4,500 bytes, separators and all
