"""A dataset becomes tokens: every text is read or named, no document is in both parts, and neither a kill, a
second reading nor a Hub that fails changes a token."""

import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path, PurePath

import pytest
from fake_hub import FIRST, SECOND, FakeHub
from fsspec.compression import compr
from huggingface_hub import HfApi
from tiny_models import metaspace_tokenizer

import smollm2.data as data_module
import smollm2.readers as rows_module
from smollm2.config import DataConfig
from smollm2.data import TokenData, prepare_tokens
from smollm2.dataset import Dataset
from smollm2.errors import DataError, UserError
from smollm2.folder import absent_folders, clear
from smollm2.readers import _json_rows
from smollm2.tokenizer import END_OF_TEXT, Tokenizer
from smollm2.training import train
from tests.soak import small_config

datasets = pytest.importorskip("datasets", reason="pip install datasets")
pyarrow = pytest.importorskip("pyarrow")

TOKENIZER = Tokenizer.train(["the king said one two three\n" * 50], 300)


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


def prepare(spec: str = "in", tokens: int = 10_000, say=print, pinned=None, **options) -> TokenData:
    dataset = Dataset(DataConfig(dataset=spec, **options), Path("out"), tokens, pinned)
    return dataset.prepare(TOKENIZER, None, lambda identity: None, say)


def parts(data: TokenData) -> list[list[str]]:
    """The documents of both parts."""
    found = []
    for part in (data.train, data.val):
        text = "".join(part.texts(TOKENIZER, 0))
        assert len(text.encode()) == part.text_bytes
        found.append(text.split(f"{END_OF_TEXT}\n")[:-1])
    return found


def read(spec: str = "in", tokens: int = 10_000, **options) -> tuple[list[str], str]:
    """(documents, what was said at the end)"""
    said: list[str] = []
    train, val = parts(prepare(spec, tokens, said.append, **options))
    assert len(said) <= 2 and not {*train} & {*val}
    return sorted(train + val), said[-1]


def hashes(folder: str = "out") -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*.bin")}


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_is_one_document_and_its_own_separators_count(place):
    write(place / "in", {"a.txt": "one\n\n\ntwo\n", "b.txt": "three\n<|endoftext|>\nfour\n<|endoftext|>\n"})
    write(place / "in", {"c.txt": "\n", "d.txt": "\ufefffive\r\n<|endoftext|>\r\n", "e.txt": "six\0"})
    found, said = read()
    assert found == sorted(["one\n\n\ntwo\n", "three\n", "four\n", "five\n", "six\n"])
    assert "read 5 documents" in said and said.endswith(f"; not read: {place}/in/c.txt")


def test_every_text_of_a_folder_is_read_whatever_its_name_and_others_are_named(place):
    """The datasets package drops files without a word where one of them is called test, train or dev."""
    from pyarrow import feather

    texts = ["a.txt", "dev.txt", "night-train.txt", "test/A.TXT", "[x]{1}*?.md", "#5%.txt", "__s__/t::u.txt"]
    tables = {"t.csv": "text,n\ncell,1\n", "u.TSV": "n\ttext\n1\ttab\n", "rows.jsonl": jsonl({"text": "row"})}
    packed = {"z.jsonl.gz": gzip.compress(b'{"text": "packed"}'), "y.txt.gz": gzip.compress(b"y")}
    lists = {"l.json": '[{"text": "first"},\n {"text": "second"}]', "p.json": '{\n "text": "pretty"\n}\n'}
    write(place / "in", {name: f"{name}\n" for name in texts} | tables | packed | lists)
    write(place / "in", {"picture.png": "x", "empty.txt": "", "LICENSE": "x", ".git/config.txt": "hidden"})
    write(place / "in", {"without rows.csv": "text\n"})
    datasets.Dataset.from_dict({"text": ["arrow"]}).save_to_disk(place / "saved")
    os.rename(next((place / "saved").glob("*.arrow")), place / "in" / "a.arrow")
    datasets.Dataset.from_dict({"text": ["stored"]}).to_parquet(place / "in/a.parquet")
    datasets.Dataset.from_dict({"text": []}).to_parquet(place / "in/without rows.parquet")
    datasets.Dataset.from_dict({"text": ["kept"]}).save_to_disk(place / "in/saved")
    write(place / "in", {"saved/cache-1c80317fa3b1799d.arrow": "what map made of it"})
    write(place / "in", {"dataset_infos.json": '{"default": {"description": "a", "citation": "b"}}'})
    feather.write_feather(pyarrow.table({"text": ["quick"]}), str(place / "in/f.feather"))
    (place / "in/linked").symlink_to(place / "saved")
    (place / "in/lost.txt").symlink_to(place / "nowhere")
    rows = [
        "kept",
        "quick",
        "row",
        "cell",
        "tab",
        "packed",
        "y",
        "first",
        "second",
        "pretty",
        "arrow",
        "stored",
    ]
    found, said = read()
    assert found == sorted(f"{name}\n" for name in [*texts, *rows])
    empty = ", ".join(f"{place}/in/without rows.{kind}" for kind in ("csv", "parquet"))
    others = "LICENSE, dataset_infos.json, empty.txt, linked, lost.txt, picture.png, saved/cache-1c80317fa3b1799d.arrow, "
    others += "saved/dataset_info.json, saved/state.json"
    assert said.endswith(f"; not read: in/{others.replace(', ', ', in/')}, {empty}")


def test_a_folder_that_may_not_be_read_is_named(place, monkeypatch):
    write(place / "in", {"a.txt": "a\n<|endoftext|>\nb", "closed/c.txt": "c"})
    scan = os.scandir

    def refuse(path):  # root may read everything
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read()[1].endswith("; not read: in/closed")


def test_a_link_to_a_file_is_read_by_its_own_name(place):
    """The Hub's cache keeps files under the name of their hash."""
    write(place, {"blobs/5f0e": jsonl({"text": "a"}, {"text": "b"})})
    (place / "train-0.jsonl").symlink_to("blobs/5f0e")
    assert read("train-0.jsonl")[0] == ["a\n", "b\n"]


def test_a_folder_of_many_files_is_looked_through_once(place, monkeypatch):
    hashed, of_path = [], PurePath.__hash__
    write(place / "in", {f"{n}.txt": "a" for n in range(500)})
    monkeypatch.setattr(PurePath, "__hash__", lambda path: hashed.append(path) or of_path(path))
    assert len(Dataset(DataConfig(dataset="in"), Path("out"), 1000).sources["in"].files) == 500
    assert len(hashed) < 5000


@pytest.mark.parametrize("name", ["x.jsonl", "A.TXT", ".x.md", "a@b:c.txt", "a=0.5,b=0.5.txt"])
def test_a_single_document_is_read_and_its_end_held_out(place, name):
    text = "the king said one. " * 40
    write(place, {name: json.dumps({"text": text}) if name == "x.jsonl" else text})
    data = prepare(name)
    train, val = ("".join(part.texts(TOKENIZER, 0)) for part in (data.train, data.val))
    assert train + val == f"{text}\n{END_OF_TEXT}\n"
    assert (data.train.text_bytes, data.val.text_bytes) == (len(train), len(val))
    assert len(data.val.tokens) == (len(data.train.tokens) + len(data.val.tokens)) // 10


@pytest.mark.parametrize("count", [41, 42, 43])
def test_the_end_of_a_single_document_begins_with_a_whole_character(place, count):
    """One token is one byte here, of three."""
    write(place, {"a.txt": "大江東去浪淘盡" * count})
    data = prepare("a.txt")
    train, val = (list(part.texts(TOKENIZER, 0)) for part in (data.train, data.val))
    assert "\ufffd" not in "".join(train + val)
    assert [part.text_bytes for part in (data.train, data.val)] == [
        len("".join(t).encode()) for t in (train, val)
    ]
    write(place, {"b.txt": "a"})
    assert len(prepare("b.txt").val.tokens) == 0  # for `check_length` to refuse


def test_what_the_run_itself_writes_is_no_text_of_the_folder_it_lies_in(place):
    write(place, {"a.txt": "1\n<|endoftext|>\n2", "other/.opened": "", "drive/s-1.ckpt/manifest.json": ""})
    for name in ("out/checkpoints/c", "out/logs", "out/previous-1/logs", "other/logs", "drive/s-1.ckpt"):
        write(place / name, {"config.json": "{}", "training_loss.txt": "x"})
    for said in ("read 2 documents", "read earlier"):
        found, words = read(".")
        assert found == ["1\n", "2\n"] and said in words
        write(place, {"out/logs/generation_samples.txt": "y"})


def test_rows_of_a_table_are_documents_and_empty_ones_are_none(place):
    """A null, an empty cell or a NUL in one row condemns none of the others."""
    texts = ("one\ntwo", None, " ", "three\n<|endoftext|>\n", "fo\0ur<|endoftext|>", "half \ud800")
    write(place / "in", {"a.jsonl": jsonl(*({"text": t} for t in texts))})
    write(place / "in", {"b.csv": 'text,label\nfive,1\n,2\n"six, ""6""\n7",3\n'})
    write(
        place / "in",
        {
            "c.csv": "id;text\n1;a, b\n2;\n",
            "e.csv": 'text,"a;b;c"\n"d;",1\n',
            "d.jsonl": '{"text": NaN}\n{"text": "last"}',
        },
    )
    found, said = read()  # an end that a row brings with it is its end, not one more
    expected = [
        "one\ntwo\n",
        "three\n",
        "four\n",
        "half ?\n",
        "five\n",
        'six, "6"\n7\n',
        "a, b\n",
        "d;\n",
        "last\n",
    ]
    assert found == sorted(expected) and "read 9 documents" in said


COLUMNS = [
    (None, [{"story": "a", "id": 3}], "a\n"), (None, [{"title": "t", "content": "a"}], "a\n"),
    (None, [{"title": "t", "text": None}, {"title": "t", "text": "a"}], "a\n"), ("body", [{"title": "t", "body": "a"}], "a\n"),
    (None, [{"meta": {"lang": {"code": "a"}}, "n": 1}], "a\n"), ("body", [{"text": "a"}], "no text column 'body'; it has text"),
    (None, [{"title": "t", "body": "a"}], "no text column 'content'; it has title, body: choose one with --set"),
    (None, [{"id": "x", "t": {"de": "a", "en": "b"}}], "it has id, t.de, t.en"),
    (None, [{"id": "x", "messages": [{"role": "user", "content": "a"}]}], "it has id, messages: choose"),
    (None, [{"messages": [{"role": "user", "content": "a"}]}], "column 'messages' holds list, expected text"),
    (None, [{f"c{n}": "x" for n in range(99)}], r"it has c0, [^:]*c19 \.\.\.: choose"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column, rows, expected", COLUMNS)
def test_the_column_is_chosen_or_named(place, column, rows, expected, kind):
    if kind == "jsonl":
        write(place / "in", {"rows.jsonl": jsonl(*rows)})
    else:
        datasets.Dataset.from_list(rows).to_parquet(place / "in/rows.parquet")
    if expected.endswith("\n"):
        write(place / "in", {"z.txt": "other"})
        assert read(dataset_column=column)[0] == [expected, "other\n"]
    else:
        with pytest.raises(DataError, match=expected):
            read(dataset_column=column)


def one_row(**more: pyarrow.Array) -> bytes:
    """A Parquet file with the text "a" and more columns."""
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a"], "id": ["i"]} | more), raw := io.BytesIO())
    return raw.getvalue()


def test_a_date_that_python_does_not_know_costs_no_text(place):
    late = pyarrow.array([2**62], pyarrow.timestamp("us"))
    write(place / "in", {"z.txt": "other", "a.parquet": one_row(late=late)})
    assert read()[0] == ["a\n", "other\n"]


NO_TEXT = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
)


def test_a_long_value_is_not_tried_again_with_every_block_of_it():
    class Counted(io.StringIO):
        def read(self, size):
            reads.append(size)
            return super().read(size)

    reads, rows = [], [{"text": "ab" * 2**22}, {"text": "c"}]
    assert [*_json_rows(Counted(jsonl(*rows)))] == rows and len(reads) < 20


def test_columns_that_were_chosen_are_told(place):
    """Beside texts there may be a table of something else, whose only words would be learned in silence."""
    write(place / "in", {"a.jsonl": jsonl({"text": "a"}, {"text": "b"})})
    assert "column" not in read()[1]
    write(place / "in", {"urls.jsonl": jsonl({"url": "https://example.org", "n": 1})})
    assert re.search(r"read 3 documents, \d+ bytes, from the columns 'text', 'url'$", read()[1])


def test_rows_that_cannot_be_looked_at_first_are_not_passed_over_for_want_of_a_column(place, monkeypatch):
    """A connection that breaks once, while the column is chosen."""
    calls, opened = [], rows_module.opened

    def breaks_once(file):
        calls.append(file)
        if file.endswith("b.jsonl") and calls.count(file) == 1:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return opened(file)

    write(place / "in", {"a.jsonl": jsonl({"story": "a"}, {"story": "b"}), "b.jsonl": jsonl({"story": "c"})})
    monkeypatch.setattr(rows_module, "opened", breaks_once)
    with pytest.raises(DataError, match=r"b.jsonl, after row 0: ConnectionResetError"):
        read()
    assert read()[0] == ["a\n", "b\n", "c\n"]


def test_a_column_that_comes_late_or_ends_early_is_told(place):
    late = [{"id": f"x{n}"} for n in range(100)] + [{"id": "y", "text": "a"}]
    write(place / "in", {"a.jsonl": jsonl(*late)})
    with pytest.raises(DataError, match=r"a.jsonl, row 101: a column 'text', but 'id' is the one that was"):
        read()
    assert len(read(dataset_column="id")[0]) == 101
    write(place / "in", {"a.jsonl": jsonl(*[{"text": f"{n}"} for n in range(3)], *[{"body": "b"}] * 300)})
    found, said = read()
    assert found == ["0\n", "1\n", "2\n"]
    assert said.endswith(f"; not read: rows of {place}/in/a.jsonl without 'text'")


PACKED = gzip.compress(jsonl(*({"text": str(random.Random(n).random())} for n in range(20_000))).encode())
BROKEN = [
    ("a.txt", b"x" * 300 + b"caf\xe9", r"row 1: the text: not UTF-8 at byte offset 303 \(byte 0xe9\)"),
    ("a.csv", b"\n\ntext,n\na,1\nb,2\nb,c,d\n", "row 3: 3 cells, but the header has 2"),
    ("a.csv", "text,n\na,1\n".encode("utf-16"), r"after row 0: UnicodeError: .* 0 \(byte 0xff\); .* UTF-16 or"),
    (
        "a.jsonl",
        b'{"text": "a"}\n' * 20_000 + b'{"text": "caf\xe9"}\n',
        r"after row [\d]+: .*not UTF-8 at byte offset 280,013 \(byte 0xe9\); expected plain UTF-8 text: un",
    ),
    ("a.csv", b"n,text\n1,a\nbehind a line break\n", "row 2: 1 cells, but the header has 2"),
    ("a.csv", b"text,n,text\na,1,b\n", "row 1: the header names a column twice: text, n, text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 0}', "row 2: column 'text' holds int, expected text"),
    ("a.jsonl", b'{"text": "a"}\n' * 500 + b'{"text": \n{"text": "b"}', "after row 500: JSONDecodeError"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}', "row 2: column 'text' holds list, expected text"),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', "row 2: str, expected an object"),
    ("a.jsonl.gz", PACKED[: len(PACKED) // 2], r"after row \d\d+: EOFError"),
    ("a.jsonl.gz", b"no gzip", "after row 0: BadGzipFile"),
    ("a.parquet", b"PAR1 and then nothing", "after row 0: ArrowInvalid"),
    ("a.parquet", one_row(broken=NO_TEXT), "after row 0: UnicodeDecodeError"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, words", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_its_row_in_one_line(place, name, content, words):
    write(place / "in", {"0.txt": "fine\n<|endoftext|>\nalso", name: content})
    with pytest.raises(DataError, match=rf"^--dataset .*in/{name}, {words}[^\n]*$"):
        read()


def test_what_is_packed_with_zstd_is_not_read_as_it_is(place, monkeypatch):
    monkeypatch.delitem(compr, "zstd", raising=False)
    write(place / "in", {"a.jsonl.zst": b"\x28\xb5\x2f\xfd"})
    with pytest.raises(DataError, match=r"a.jsonl.zst, row 1: packed with zstd: pip install zstandard$"):
        read()


@pytest.mark.parametrize(
    "spec",
    [
        *("./absent", "/a/b/c", "a/b/c", "in@train", "in/a.pdf", "in/none", "book.txt", "in/b"),
        *("in=70%,o=30%", "in=0,7,o=0,3", "in=-1,o=2"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_is_written(place, spec):
    write(place / "in", {"a.pdf": "%PDF", "none/a.html": "<p>"})
    words = r"no (such file or folder|text in files of \.txt, )"
    with pytest.raises(DataError, match=rf"--dataset {spec}: {words}"):
        read(spec)
    assert not (place / "out").exists()


def test_a_changed_folder_is_read_anew_and_an_unchanged_one_is_not(place):
    write(place / "in", {"a.txt": "one\n", "b.txt": "two\n"})
    assert "read 2 documents" in read()[1] and "read earlier" in read()[1]
    write(place / "in", {"c.txt": "three\n"})
    assert read()[0] == ["one\n", "three\n", "two\n"]  # another file
    write(place / "in", {"b.txt": "six\n"})  # the same size
    os.utime(place / "in/b.txt", (1, 1))
    assert read()[0] == ["one\n", "six\n", "three\n"]
    for name in ("my_ds", "my-ds", "資料", "данные"):  # names that differ only in their signs
        write(place, {f"{name}/a.txt": f"{name}\n<|endoftext|>\nb"})
        assert read(name)[0] == sorted([f"{name}\n", "b\n"])


def stories(count: int, seed: int = 0) -> list[str]:
    """Distinct documents."""
    draw = random.Random(seed)
    words = ["the", "king", "said", "one", "two", "three", "stone", "river", "moon"]
    return [f"{n} {' '.join(draw.choices(words, k=draw.randrange(1, 60)))}" for n in range(count)]


def test_reading_stops_when_there_is_enough_and_says_what_was_not_read(place):
    write(place / "in", {f"f{i}.jsonl": jsonl(*({"text": t} for t in stories(100, i))) for i in range(4)})
    whole = sum(len(t) for t in map(TOKENIZER.encode, stories(100, 0)))
    data = prepare(tokens=whole + 500)
    assert whole + 500 <= len(data.train.tokens) + len(data.val.tokens) < whole + 900
    assert read(tokens=whole + 499)[1].endswith(f"; not read: {place}/in/f2.jsonl, {place}/in/f3.jsonl")


# --- the two parts --------------------------------------------------------------------------------------------


def test_a_document_is_in_one_part_wherever_and_how_often_it_stands(place):
    texts = stories(3000)
    write(place / "in", {"a.jsonl": jsonl(*({"text": t} for t in texts * 2)), "b.txt": texts[7]})
    train, val = parts(prepare(tokens=10**6))
    assert not {*train} & {*val} and len(train) + len(val) == 6001
    assert 0.08 < len(val) / 6001 < 0.12
    texts.reverse()
    write(place / "in", {"a.jsonl": jsonl(*({"text": t} for t in texts))})
    assert len({*parts(prepare(tokens=10**6))[1]} ^ {*val}) <= 4  # of the first two documents alone


def test_the_same_text_in_files_of_other_kinds_and_systems_is_one_document(place):
    """With or without its last line break, with line breaks of Windows or of old Macs."""
    texts = [f"{text}\nend" for text in stories(60)]
    write(place / "in", {f"{n}.txt": text for n, text in enumerate(texts)})
    write(place / "in", {"a.jsonl": jsonl(*({"text": t.replace("\n", "\r\n")} for t in texts))})
    write(place / "in", {"b.csv": "text\r\n" + "".join(f'"{t}"\r\n'.replace("\n", "\r") for t in texts)})
    write(place / "in", {"c.md": "\r\n<|endoftext|>\r\n".join(texts)})
    train, val = parts(prepare(tokens=10**6))
    assert Counter(train + val) == Counter(f"{text}\n" for text in texts * 4) and not {*train} & {*val}


BOOK = " ".join(stories(200))


def test_a_few_words_beside_a_book_are_held_out_and_not_the_book(place):
    write(place / "in", {"README.md": "My books.\n", "book.txt": BOOK})
    assert parts(prepare(tokens=10**6)) == [[f"{BOOK}\n"], ["My books.\n"]]


def test_a_book_that_lies_there_twice_is_not_trained_on_and_held_out(place):
    write(place / "in", {"book.txt": BOOK, "copy of it.txt": BOOK, "z.jsonl": jsonl({"text": BOOK})})
    data = prepare(tokens=10**6)
    train, val = ("".join(part.texts(TOKENIZER, 0)) for part in (data.train, data.val))
    assert train + val == f"{BOOK}\n{END_OF_TEXT}\n"
    write(place / "in", {"copy of it.txt": "another"})
    assert [Counter(part) for part in parts(prepare(tokens=10**6))] == [{f"{BOOK}\n": 2}, {"another\n": 1}]


def test_of_a_book_behind_whose_end_nothing_is_read_the_end_of_that_is_held_out(place, monkeypatch):
    monkeypatch.setattr("smollm2.text.CHUNK_BYTES", 1000)
    write(place / "in", {"1.txt": BOOK, "2.txt": f"second {BOOK}", "3.txt": "third"})
    said: list[str] = []
    data = prepare(tokens=3000, say=said.append)
    train, val = ("".join(part.texts(TOKENIZER, 0)) for part in (data.train, data.val))
    assert BOOK.startswith(train + val) and 0.09 < len(val) / len(train + val) < 0.11
    assert "read 1 documents" in said[-1]


def test_what_is_about_to_be_read_is_told_in_bytes(place):
    said: list[str] = []
    write(place / "in", {"a.jsonl": jsonl(*({"text": f"{n}大江東去" * 3000} for n in range(90)))})
    data = prepare(tokens=10**7, say=said.append)
    size, tokens = (
        sum(of)
        for of in zip(*((part.text_bytes, len(part.tokens)) for part in (data.train, data.val)), strict=True)
    )
    told = re.search(r"up to 10,000,000 tokens, ([\d,]+) MB of text", said[0])
    assert float(told[1]) == pytest.approx(size / tokens * 10, rel=0.1)


def test_a_tokenizer_without_an_end_is_told_so_and_not_that_the_text_has_lines_of_it(place):
    write(place / "in", {"a.jsonl": jsonl({"text": "the king"}, {"text": "said"})})
    dataset = Dataset(DataConfig(dataset="in"), Path("out"), 1000)
    with pytest.raises(
        DataError, match=r"^documents end with <\|endoftext\|>, but the tokenizer has no such"
    ):
        dataset.prepare(metaspace_tokenizer(), None, lambda identity: None, print)


def test_a_run_whose_dataset_has_another_name_is_not_told_of_a_hash(place):
    write(place, {"one.jsonl": jsonl(*({"text": text} for text in stories(100)))})
    train(small_config("", "out", data={"dataset": "one.jsonl"}, max_steps=1))
    os.rename("one.jsonl", "two.jsonl")
    with pytest.raises(DataError, match=r"two.jsonl is not the text .* \(name differs\)"):
        train(small_config("", "out", data={"dataset": "two.jsonl"}, max_steps=2))


def test_a_tokenizer_sees_training_documents_only(place):
    write(place / "in", {"a.jsonl": jsonl(*({"text": t} for t in stories(2000)))})
    dataset = Dataset(DataConfig(dataset="in"), Path("out"), 10**6)
    assert [*dataset.training_texts(10**9)] == parts(prepare(tokens=10**6))[0]
    assert 5000 <= sum(map(len, dataset.training_texts(5000))) < 6000


def test_a_mixture_has_its_shares_of_tokens_and_ends_with_its_first_source(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    write(place, {"a.jsonl": jsonl(*({"text": t} for t in stories(1500)))})
    write(place, {"b.jsonl": jsonl(*({"text": f"B {t} {t} {t}"} for t in stories(1500, 1)))})
    said: list[str] = []
    data = prepare("a.jsonl=0.7,b.jsonl=0.3", 40_000, said.append)
    sizes = Counter()
    for text in chain(*parts(data)):
        sizes[text[0] == "B"] += len(TOKENIZER.encode(text)) + 1
    assert sizes.total() == len(data.train.tokens) + len(data.val.tokens)
    assert abs(sizes[False] / sizes.total() - 0.7) < 0.005
    assert re.search(r"\((69\.[5-9]|70\.[0-5])% a\.jsonl, (29\.[5-9]|30\.[0-5])% b\.jsonl\)$", said[-1])
    assert sizes.total() < 41_000 < len(prepare("~/a.jsonl=7, b.jsonl = 3", 10**9).train.tokens)
    for spec in ("a.jsonl=0.7,a.jsonl=0.3", "a.jsonl=1,b.jsonl=0"):
        with pytest.raises(DataError, match="each name once, each with a share above 0"):
            prepare(spec)
    write(place, {"c/1.txt": "C", "c/2.txt": "CC", "blank.txt": "\n"})
    words = prepare("c=1e-05,b.jsonl=9e-1", 20_000, said.append) and said[-1]
    assert re.search(r"\(100\.0% b\.jsonl, 0\.0% c\); not read: \S*c/2\.txt$", words)
    write(place, {"b/1.jsonl": (place / "b.jsonl").read_text(), "b/2.txt": "B"})
    prepare("b=1,c=1", 10**6, said.append)  # it ends with c
    assert re.search(r"not read: \S*b/2\.txt$", said[-1])
    with pytest.raises(DataError, match=r"^--dataset blank.txt: no text in .*; not read: \S*blank.txt$"):
        prepare("a.jsonl=1,blank.txt=1")


# --- nothing is lost ------------------------------------------------------------------------------------------

CHILD = """
import sys, resource
from pathlib import Path, PurePath
from smollm2 import data, dataset
from smollm2.config import DataConfig
from smollm2.tokenizer import Tokenizer
data.RECORD_SECONDS = 0.02
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
made = dataset.Dataset(DataConfig(dataset=sys.argv[1]), Path("out"), 10**9)
made.prepare(Tokenizer.from_file("tokenizer.json"), None, lambda identity: None, print)
"""


def child(*args: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CHILD, *args], env=environment, **pipes)


SPEC = "in=0.8,e.jsonl.gz=0.2"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Every kind of file, a long document among them, in a folder; and the hashes of their shards."""
    place = tmp_path_factory.mktemp("sources")
    rows = [{"text": text} for text in stories(700, 1)]
    long = {"b.txt": "".join(f"{text}.\n" for text in stories(8000, 5))}
    write(place / "in", long | {"a.jsonl": jsonl(*rows), "c.csv": "text\n" + "\n".join(stories(700, 2))})
    datasets.Dataset.from_list(rows[::-1]).to_parquet(place / "in/d.parquet", batch_size=100)
    write(place, {"e.jsonl.gz": gzip.compress(jsonl(*({"text": t} for t in stories(1500, 3))).encode(), 1)})
    TOKENIZER.save(place, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        prepare(SPEC, 10**9)
        return place, hashes()


@pytest.fixture
def expected(sources, monkeypatch) -> dict[str, str]:
    """The hashes; the folder is current, and nothing has been read."""
    monkeypatch.chdir(sources[0])
    shutil.rmtree("out")
    return sources[1]


def place_of_record() -> dict | None:
    """How far a process that was ended on the way has come."""
    path = next(Path("out").glob("data/*/progress.json"), None)
    try:
        return path and json.loads(path.read_text())["place"]
    except FileNotFoundError:  # it has just ended
        return None


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_shards(expected, kills):
    draw, went_on = random.Random(kills), 0
    for _ in range(kills):
        before, process = place_of_record(), child(SPEC)
        while process.poll() is None and place_of_record() in (None, before):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        went_on += bool(before)
        if hashes() == expected:
            shutil.rmtree("out")
    assert child(SPEC).wait(100) == 0
    assert hashes() == expected and went_on
    # `tidy` takes what begins with a dot, at the start of a run
    assert {path.suffix for path in Path("out").glob("data/*/[!.]*")} == {".bin", ".json"}
    assert not place_of_record()


ALSO = [pytest.param(name, marks=pytest.mark.slow) for name in ("val.bin", "progress.json")]


@pytest.mark.parametrize("damage", [None, "train.bin", *ALSO])
def test_after_a_full_disk_or_a_damaged_record_the_shards_are_the_same(expected, damage, capsys):
    """What was written before the disk was full is gone on from, unless it differs from its record."""
    process = child(SPEC, "300000")
    assert process.communicate()[1].strip().endswith("[Errno 27] File too large") and place_of_record()
    if damage:
        path = next(Path("out").glob(f"data/*/{damage}"))
        raw = bytearray(path.read_bytes())
        raw[min(len(raw) // 2, 1000)] ^= 1
        path.write_bytes(raw)
    prepare(SPEC, 10**9)
    assert hashes() == expected


@pytest.mark.parametrize("name, tokens", [("e.jsonl.gz", 5000), ("one.txt", 5000), ("one.txt", 200)])
def test_killed_when_all_is_read_it_neither_reads_nor_holds_out_more(expected, monkeypatch, name, tokens):
    Path("one.txt").write_text("the king said one. " * 40)
    prepare(name, tokens)
    whole = hashes()
    shutil.rmtree("out")
    replace = data_module.replace_durably
    with monkeypatch.context() as patch:
        fails_at_last = lambda path, raw: 1 / (path.stem != "tokens") and replace(path, raw)  # noqa: E731
        patch.setattr(data_module, "replace_durably", fails_at_last)
        with pytest.raises(ZeroDivisionError):
            prepare(name, tokens)
    prepare(name, tokens)
    assert hashes() == whole


def test_what_a_killed_process_left_goes_when_other_tokens_are_wanted(expected):
    assert child(SPEC, "300000").wait(60)
    prepare("e.jsonl.gz", 1000)
    assert len([*Path("out").glob("data/dataset-*")]) == 1


def test_what_a_killed_process_read_is_there_after_a_forgotten_flag(expected):
    """Without --dataset input.txt is read."""
    assert child(SPEC, "300000").wait(60)
    kept = [*Path("out").glob("data/dataset-*/*")]
    prepare_tokens("in/b.txt", TOKENIZER, Path("out/data"), 0.1)
    Path("f.jsonl").write_text(jsonl({"text": "a"}, {"text": 5}))
    with pytest.raises(DataError, match="holds int"):
        prepare("f.jsonl")
    assert all(path.exists() for path in kept) and any("progress" in path.name for path in kept)


def test_what_was_read_survives_a_mistake_elsewhere(expected, tmp_path):
    """A start that came to nothing is cleared away, but for hours of reading."""
    made = absent_folders(Path("out"))
    prepare("e.jsonl.gz", 1000)
    write(Path("out"), {"data/tokens-1/train.bin": "", "logs/l.txt": ""})
    clear(Path("out"), made)
    assert {path.name for path in Path("out").rglob("*.bin")} == {"train.bin", "val.bin"}
    assert not Path("out/logs").exists() and not Path("out/data/tokens-1").exists()


def test_a_run_that_goes_on_reads_as_much_as_it_began_with(place):
    write(place / "in", {"a.jsonl": jsonl(*({"text": t} for t in stories(2000)))})
    first = prepare(tokens=5000)
    assert prepare(tokens=50_000, pinned=first.sidecar["dataset"]).sha256 == first.sha256
    assert prepare(tokens=50_000).sha256 != first.sha256
    write(place, {"copy/in/a.jsonl": (place / "in/a.jsonl").read_text()})  # on another machine
    assert prepare("copy/in", tokens=1000, pinned=first.sidecar["dataset"]).sha256 == first.sha256


# --- of the Hub -----------------------------------------------------------------------------------------------


def parquet(texts: list[str]) -> bytes:
    raw = io.BytesIO()
    datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).to_parquet(raw, batch_size=200)
    return raw.getvalue()


CARD = b"""---
configs:
- config_name: plain
  data_files: [{split: train, path: "data/train-*"}, {split: validation, path: "data/val-0.parquet"}]
- config_name: other
  data_files: [{split: train, path: "data/val-0.parquet"}]
---
"""


@pytest.fixture
def fake_hub(place, monkeypatch):
    files = {
        "README.md": CARD, "data/val-0.parquet": parquet(["v", "w"]),
        "data/train-0.parquet": parquet(stories(1000)), "data/train-1.parquet": parquet(stories(1000, 1)),
    }  # fmt: skip
    later = files | {"data/train-0.parquet": parquet(stories(1000, 2))}
    hub = FakeHub("owner/set", {FIRST: files, SECOND: later})
    ours, files_at = "huggingface_hub.constants.", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        f"{ours}ENDPOINT": hub.address, f"{ours}HF_HUB_CACHE": str(place / "cache"), f"{ours}HF_HUB_OFFLINE": False,
        f"{ours}HF_HUB_DOWNLOAD_TIMEOUT": 1, f"{ours}HUGGINGFACE_CO_URL_TEMPLATE": files_at,
        "datasets.config.HF_ENDPOINT": hub.address, "datasets.config.HF_HUB_OFFLINE": False,
        "datasets.config.HUB_DATASETS_URL": hub.address + "/datasets/{repo_id}/resolve/{revision}/{path}",
    }.items():  # fmt: skip
        monkeypatch.setattr(name, value)
    yield hub
    hub.close()


def test_a_dataset_of_the_hub_is_streamed_at_the_commit_that_was_read_first(fake_hub):
    said = []
    first = prepare("owner/set:plain", 10**9, said.append)
    assert sorted(chain(*parts(first))) == sorted(f"{t}\n" for t in stories(1000) + stories(1000, 1))
    assert (
        first.sidecar["dataset"]["sources"] == {"owner/set:plain": FIRST}
        and "read 2,000 documents" in said[-1]
    )
    found = hashes()
    fake_hub.newest = SECOND
    fake_hub.behaviour = "500"
    assert prepare("owner/set:plain", 10**9).sha256 == first.sha256  # what is here needs no network
    fake_hub.behaviour = "serve"
    shutil.rmtree("out")
    assert prepare("owner/set:plain", 1000, pinned=first.sidecar["dataset"]).sha256 == first.sha256
    assert hashes() == found
    shutil.rmtree("out")
    assert prepare("owner/set:plain", 10**9).sha256 != first.sha256


def test_configuration_and_split_are_chosen_or_those_that_are_there_named(fake_hub):
    for spec in ("owner/set:plain@validation", "owner/set:other"):
        assert read(spec)[0] == ["v\n", "w\n"]
    with pytest.raises(DataError, match="no split 'dev'; it has train, validation"):
        read("owner/set:plain@dev")
    with pytest.raises(DataError, match=r"'none' not found\. Available: .'plain', 'other'."):
        read("owner/set:none")
    with pytest.raises(UserError, match=r"^owner/absent on .*: check the spelling"):
        read("owner/absent")
    fake_hub.commits[FIRST] = {"set.py": b"import datasets"}
    with pytest.raises(DataError, match=r"^--dataset owner/set: RuntimeError: Dataset scripts are no longer"):
        read("owner/set")


def test_files_of_the_hub_that_hold_no_table_and_no_text_are_named(fake_hub):
    fake_hub.commits[FIRST] = {"train-0.tar": b"x", "train-1.tar": b"x"}
    files = ", ".join(f"hf://datasets/owner/set@{FIRST}/train-{n}.tar" for n in range(2))
    with pytest.raises(DataError, match=rf"^--dataset owner/set: no text in files of .*; not read: {files}$"):
        read("owner/set")


FAULTS = [
    ("stall", "owner/set on .* is out of reach"), ("503", "owner/set on .* is out of reach"),
    ("403", "owner/set on .*: check the spelling, or set HF_TOKEN"),
    ("stall body", "rows-0.jsonl, after row 0: .*Timeout.*; what was read is kept"),
    ("nothing after the first part", r"rows-0.jsonl, after row \d+: JSONDecodeError.*; what was read is kept"),
]  # fmt: skip


@pytest.mark.parametrize("behaviour, words", FAULTS)
def test_a_hub_that_fails_is_named_and_the_next_start_goes_on(fake_hub, monkeypatch, behaviour, words):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", 0.3)
    ask = HfApi.dataset_info
    monkeypatch.setattr(HfApi, "dataset_info", lambda *of, timeout, **more: ask(*of, timeout=0.3, **more))
    rows = [{"text": text, "more": "x" * 10_000} for text in stories(900)]
    fake_hub.commits[FIRST] = {"data/rows-0.jsonl": jsonl(*rows).encode()}
    fake_hub.behaviour = behaviour
    with pytest.raises(UserError, match=words) as caught:
        read("owner/set", 10**9)
    assert "\n" not in str(caught.value)
    fake_hub.behaviour = "serve"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 10)
    assert "read 900 documents" in read("owner/set", 10**9)[1]
