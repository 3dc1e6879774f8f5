"""A dataset becomes a text with its own documents: nothing is dropped without a word, a changed one is read anew."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smollm2.dataset import dataset_to_text
from smollm2.errors import DataError
from smollm2.text import documents, read_text

datasets = pytest.importorskip("datasets", reason="pip install datasets")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder that is current, with an empty folder `in`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(spec: str = "in", output: str = "out", tokens: int = 10_000, **options) -> tuple[list[str], str]:
    """(documents, what was said)"""
    said: list[str] = []
    path = dataset_to_text(spec, Path(output, "data"), tokens, say=said.append, **options)
    pieces = list(documents(read_text(path)))
    assert all(ends for _, ends in pieces) and len(said) == 1
    return [text for text, _ in pieces], said[0]


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_is_one_document_and_its_own_separators_count(place):
    write(place / "in", {"a.txt": "one\n\n\ntwo\n", "b.txt": "three\n<|endoftext|>\nfour\n<|endoftext|>\n"})
    write(
        place / "in",
        {"c.txt": "\n", "d.txt": "\ufefffive\r\n<|endoftext|>\r\n", "e.txt": "not <|endoftext|>"},
    )
    found, said = read()
    assert found == ["one\n\n\ntwo\n", "three\n", "four\n", "five\n", "not <|endoftext|>\n"]
    assert "read 5 documents" in said and "not read" not in said


def test_every_text_of_a_folder_is_read_whatever_its_name_and_others_are_named(place):
    """The datasets package drops files without a word where one of them is called test, train or dev."""
    texts = ["a.txt", "dev.txt", "night-train.txt", "test/A.TXT", "[x]{1}*?.md", "#5%.txt", "__s__/t.txt"]
    write(
        place / "in",
        {name: f"{name}\n" for name in texts} | {"t.csv": "text,n\ncell,1\n", "u.TSV": "n\ttext\n1\ttab\n"},
    )
    write(
        place / "in",
        {"rows.jsonl": jsonl({"text": "row"}), "z.jsonl.gz": gzip.compress(b'{"text": "packed"}')},
    )
    write(place / "in", {"picture.png": "x", "empty.txt": "", "LICENSE": "x", ".git/config.txt": "hidden"})
    found, said = read()
    assert sorted(found) == sorted(f"{name}\n" for name in [*texts, "row", "cell", "tab", "packed"])
    assert said.endswith("; not read: in/LICENSE, in/empty.txt, in/picture.png")


@pytest.mark.parametrize("name", ["x.jsonl", "A.TXT", "test.md", "a@b:c.txt"])
def test_a_single_file_is_read(place, name):
    write(place, {name: '{"text": "one"}' if name == "x.jsonl" else "one"})
    assert read(name)[0] == ["one\n"]


def test_what_the_run_itself_writes_is_no_text_of_the_folder_it_lies_in(place):
    write(place, {"a.txt": "one\n", "out/checkpoints/c/config.json": "{}", "out/logs/training_loss.txt": "x"})
    for said in ("read 1 documents", "read from it earlier"):
        found, words = read(".")
        assert found == ["one\n"] and said in words
        write(place, {"out/logs/generation_samples.txt": "y"})


def test_rows_of_a_table_are_documents_and_empty_ones_are_none(place):
    """A null, an empty cell or a NUL in one row condemns none of the others."""
    write(
        place / "in", {"a.jsonl": jsonl(*({"text": t} for t in ("one\ntwo", None, " ", "three\n", "fo\0ur")))}
    )
    write(place / "in", {"b.csv": 'text,label\nfive,1\n,2\n"six, ""6""\n7",3\n'})
    found, said = read()
    assert (
        found == ["one\ntwo\n", "three\n", "four\n", "five\n", 'six, "6"\n7\n'] and "read 5 documents" in said
    )


COLUMNS = [
    (None, [{"story": "a", "id": 3}], "a\n"), (None, [{"title": "t", "content": "a"}], "a\n"),
    (None, [{"title": "t", "text": None}, {"title": "t", "text": "a"}], "a\n"), ("body", [{"title": "t", "body": "a"}], "a\n"),
    (None, [{"meta": {"lang": {"code": "a"}}, "n": 1}], "a\n"), ("body", [{"text": "a"}], "no text column 'body'; it has text"),
    (None, [{"title": "t", "body": "a"}], "no text column 'content'; it has title, body: choose one with --set"),
    (None, [{"id": "x", "t": {"de": "a", "en": "b"}}], "it has id, t.de, t.en"),
    (None, [{"text": "a"}, {"text": ["b"]}], r"in/rows\.jsonl: row 2: column 'text' holds list, expected text"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "rows", "expected"), COLUMNS)
def test_the_column_is_chosen_or_named(place, column, rows, expected):
    write(place / "in", {"rows.jsonl": jsonl(*rows)})
    if expected.endswith("\n"):
        assert read(column=column)[0] == [expected]
    else:
        with pytest.raises(DataError, match=expected):
            read(column=column)


@pytest.mark.parametrize(
    "name, content", [("a.txt", b"caf\xe9"), ("a.csv", b"t,n\na,1\nb,c,d\n"), ("a.jsonl", b"{")]
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(place, name, content):
    write(place / "in", {"0.txt": "fine", name: content})
    with pytest.raises(DataError, match=rf"--dataset .*in/{name}, after row 0: ") as caught:
        read()
    assert "\n" not in str(caught.value)
    assert not list((place / "out/data").iterdir())


@pytest.mark.parametrize("config", [None, "sample-10BT"])
@pytest.mark.parametrize("split", [None, "validation"])
def test_configuration_and_split_are_part_of_the_name(monkeypatch, place, config, split):
    class Builder:
        info = datasets.DatasetInfo(builder_name="parquet")

        def as_streaming_dataset(self, split):
            return [{"text": f"split {split}"}]

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *args, **kw: asked.append((args, kw)) or Builder()
    )
    spec = "a/b" + (f":{config}" if config else "") + (f"@{split}" if split else "")
    assert read(spec)[0] == [f"split {split or 'train'}\n"]
    assert asked == [(("a/b",), {"name": config})]


@pytest.mark.parametrize("spec", ["./absent", "/a/b/c", "a/b/c", "in@train", "in/a.pdf", "in/none"])
def test_what_is_not_there_is_said(place, spec):
    write(place / "in", {"a.pdf": "%PDF", "none/a.html": "<p>"})
    with pytest.raises(
        DataError, match=rf"--dataset {spec}: no (such file or folder|text in files of \.txt, )"
    ):
        read(spec)


def test_a_changed_folder_is_read_anew_and_an_unchanged_one_is_not(place):
    write(place / "in", {"a.txt": "one\n"})
    assert "read 1 documents" in read()[1] and "read from it earlier" in read()[1]
    write(place / "in", {"b.txt": "two\n"})
    assert read()[0] == ["one\n", "two\n"]  # another file
    write(place / "in", {"b.txt": "six\n"})  # the same size
    os.utime(place / "in/b.txt", (1, 1))
    assert read()[0] == ["one\n", "six\n"]
    for name in ("my_ds", "my-ds", "資料", "данные"):  # names that differ only in their signs
        write(place, {f"{name}/a.txt": name})
        assert read(name)[0] == [f"{name}\n"]


def test_reading_stops_when_there_is_enough_and_says_what_was_not_read(place):
    write(place / "in", {f"f{i}.txt": "123456789\n" * 300 for i in range(4)})
    found, said = read(tokens=1000)
    assert "".join(found) == "123456789\n" * 448 and len(found) == 2  # 4,500 bytes, separators and all
    assert said.endswith(f"; not read: {place}/in/f2.txt, {place}/in/f3.txt")


def test_what_a_killed_process_has_half_read_goes_at_the_next_start(place):
    write(place / "in", {"a.txt": "one"})
    code = "import os, smollm2.dataset as d, pathlib as p; d._document = lambda *_: os._exit(9); "
    code += "d.dataset_to_text('in', p.Path('out/data'), 1000)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [path.suffixes[-1][:5] for path in (place / "out/data").iterdir()] == [".tmp-"]
    read()
    assert [path.suffix for path in (place / "out/data").iterdir()] == [".txt"]
