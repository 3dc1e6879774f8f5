"""Text -> tokens -> batches: nothing lost, nothing changed by streaming, and an order that is a pure function."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
import random
import zipfile

import numpy as np
import pytest
from tiny_models import metaspace_tokenizer, save_folder, tiny_model

import smollm2.data as data
import smollm2.text as text_module
from smollm2.data import BatchOrder, BatchStream, check_length, encode_documents, identity_key, prepare_tokens
from smollm2.errors import DataError
from smollm2.files import sha256_file
from smollm2.progress import Reporter
from smollm2.text import documents, read_split, read_text, split_bytes
from smollm2.tokenizer import END_OF_TEXT, Tokenizer
from smollm2.training import train
from tests.soak import small_config

TEXT = "The cat sat on the mat in 2024; didn't it?\n\n1. naïve 日本 😀\n   indented\tby  blanks \n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 400)


@pytest.fixture
def text_file(tmp_path):
    def write(content: str | bytes, name: str = "input.txt"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def set_chunk(patch: pytest.MonkeyPatch, chunk: int) -> None:
    """Read and tokenise in pieces of about `chunk` bytes."""
    for module in (text_module, data):
        patch.setattr(module, "CHUNK_BYTES", chunk)


def awkward_texts(count: int) -> list[str]:
    draw = random.Random(21)
    parts = [
        "a",
        "word",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "1",
        "23",
        "é",
        "漢字",
        "😀",
        ".",
        "'s",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\r\n",
        f"\n{END_OF_TEXT}\n",
    ]
    parts += [END_OF_TEXT, f"{END_OF_TEXT}\n", "<|endof"]
    return ["".join(draw.choices(parts, k=draw.randrange(1, 80))) for _ in range(count)]


# --- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10**6])
def test_reading_in_pieces_changes_nothing(monkeypatch, text_file, chunk):
    set_chunk(monkeypatch, chunk)
    assert "".join(read_text(text_file(TEXT))) == TEXT


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 10**6])
def test_crlf_cr_and_a_byte_order_mark_make_no_difference(monkeypatch, text_file, chunk):
    set_chunk(monkeypatch, chunk)
    lines = "one\ntwo\n\nthree é\n"
    for variant in (
        lines,
        lines.replace("\n", "\r\n"),
        lines.replace("\n", "\r"),
        "\ufeff" + lines.replace("\n", "\r\n"),
    ):
        assert "".join(read_text(text_file(variant))) == lines
    assert "".join(read_text(text_file("end\r"))) == "end\n"
    assert "".join(read_text(text_file("a\r\r\n\n\r"))) == "a\n\n\n\n"


def test_memory_does_not_grow_with_the_file(monkeypatch, text_file):
    set_chunk(monkeypatch, 1000)
    path = text_file(TEXT * 20)
    assert max(len(piece) for piece in read_text(path)) <= 1001


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        for _ in read_text(path):
            pass
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"abc\xffdef", 3, "ff"),
        (b"\xef\xbb\xbfabc\xff", 6, "ff"),
        ("é".encode() * 9 + b"\xc3(", 18, "c3"),
        ("日本".encode()[:-1], 3, "e6"),
        (b"x\xed\xa0\x80", 1, "ed"),
        ("größe\n".encode("latin-1"), 2, "f6"),
    ],
    ids=repr,
)
def test_text_that_is_not_utf8_is_refused_with_its_byte_offset(
    monkeypatch, text_file, chunk, content, offset, byte
):
    set_chunk(monkeypatch, chunk)
    assert f"not UTF-8 at byte offset {offset:,} (byte 0x{byte})" in refusal(text_file(content))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("text".encode("utf-16"), "UTF-16"),
        ("text".encode("utf-16-be"), "NUL"),
        (gzip.compress(b"text"), "a gzip file"),
        (bz2.compress(b"text"), "a bzip2 file"),
        (lzma.compress(b"text"), "an xz file"),
        (b"%PDF-1.7 ...", "a PDF"),
        (b"\x89PNG\r\n", "a picture"),
        (b"good text\0bad", "NUL byte at offset 9"),
        (bytes(range(256)), "looks binary"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_file_that_is_no_text_is_refused_by_its_kind(text_file, content, kind):
    assert kind in refusal(text_file(content))


def test_a_zip_a_folder_a_pipe_and_nothing_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "text")
    assert "a zip file" in refusal(tmp_path / "a.zip")
    assert "a folder, expected a text file" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "absent.txt")
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refusal(tmp_path / "pipe")  # and it does not wait for a writer
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refusal(tmp_path / "loop")


def test_an_unreadable_path_is_one_clear_error(tmp_path):
    assert "File name too long" in refusal(tmp_path / ("x" * 300))


# --- documents and tokens -----------------------------------------------------------------------------------------------


def one_piece(text: str) -> list[str]:
    return [text] if text else []


def tokens_of(tokenizer, texts) -> list[int]:
    arrays = list(encode_documents(tokenizer, texts, None))
    assert all(array.dtype == np.uint16 for array in arrays)
    return [int(i) for array in arrays for i in array]


def test_a_separator_line_becomes_the_end_of_text_token(tokenizer):
    text = f"one\n{END_OF_TEXT}\ntwo\n{END_OF_TEXT}\n"
    assert tokens_of(tokenizer, [text]) == [*tokenizer.encode("one\n"), 0, *tokenizer.encode("two\n"), 0]
    assert tokens_of(tokenizer, [text.removesuffix("\n")]) == tokens_of(
        tokenizer, [text]
    )  # the last line may lack its newline


@pytest.mark.parametrize("chunk", [1, 2, 17, 60])
def test_documents_do_not_depend_on_how_the_text_arrives(monkeypatch, chunk):
    for text in [TEXT, *awkward_texts(60)]:
        whole = list(documents(one_piece(text)))  # CHUNK_BYTES is far away: cut at separators only
        with monkeypatch.context() as patch:
            set_chunk(patch, chunk)
            pieces = list(documents(text[i : i + chunk] for i in range(0, len(text), chunk)))
        joined, rest = [], ""
        for piece, ends in pieces:
            rest += piece
            if ends:
                joined.append((rest, True))
                rest = ""
        assert joined + ([(rest, False)] if rest else []) == whole


@pytest.mark.parametrize("chunk", [1, 5, 33, 200])
def test_streamed_tokens_equal_those_of_the_whole_text(monkeypatch, tokenizer, chunk):
    for text in [TEXT, *awkward_texts(60)]:
        whole = tokens_of(tokenizer, one_piece(text))
        with monkeypatch.context() as patch:
            set_chunk(patch, chunk)
            assert tokens_of(tokenizer, (text[i : i + chunk] for i in range(0, len(text), chunk))) == whole


@pytest.mark.parametrize("chunk", [20, 1000])
def test_streamed_tokens_of_the_real_tokenizer_equal_those_of_the_whole_text(monkeypatch, test_data, chunk):
    real = Tokenizer.from_file(test_data / "tokenizer")
    text = TEXT + "".join(awkward_texts(60)) + (test_data / "tinyshakespeare/input.txt").read_text()[:20000]
    text = text.replace(END_OF_TEXT, "")
    set_chunk(monkeypatch, chunk)
    assert tokens_of(real, (text[i : i + chunk] for i in range(0, len(text), chunk))) == real.encode(text)


def test_a_cut_at_any_place_would_change_tokens(monkeypatch, tokenizer):
    """Cutting where the pieces happen to end must turn the comparison above red."""
    set_chunk(monkeypatch, 33)
    monkeypatch.setattr(text_module, "_cut", len)
    assert tokens_of(tokenizer, (TEXT[i : i + 33] for i in range(0, len(TEXT), 33))) != tokenizer.encode(TEXT)


def test_text_without_a_single_blank_is_cut_all_the_same(monkeypatch, tokenizer):
    set_chunk(monkeypatch, 10)
    monkeypatch.setattr(text_module, "MAX_UNBROKEN_CHARACTERS", 200)
    pieces = list(documents("x" * 10 for _ in range(100)))
    assert len(pieces) > 2 and "".join(text for text, _ in pieces) == "x" * 1000


def test_a_separator_counts_only_as_a_whole_line(monkeypatch):
    text = f"x{END_OF_TEXT}\ny\n{END_OF_TEXT}\nz"
    assert list(documents([text])) == [(f"x{END_OF_TEXT}\ny\n", True), ("z", False)]
    monkeypatch.setattr(text_module, "_cut", lambda part: 1 if part.startswith("x") else 0)
    set_chunk(monkeypatch, 1)  # the second piece begins with a separator, but not at a line's start
    assert list(documents([text[:16], text[16:]])) == [
        ("x", False),
        (f"{END_OF_TEXT}\ny\n", True),
        ("z", False),
    ]


def test_separators_without_an_end_of_text_token_are_an_error(tokenizer):
    stored = json.loads(tokenizer.raw)
    stored["added_tokens"] = []
    stored["model"]["vocab"]["<eot>"] = stored["model"]["vocab"].pop(END_OF_TEXT)
    nameless = Tokenizer(json.dumps(stored).encode())
    assert nameless.end_of_text_id is None
    with pytest.raises(DataError, match="no such token"):
        tokens_of(nameless, [f"one\n{END_OF_TEXT}\ntwo\n"])


def test_a_tokenizer_without_end_of_text_ends_documents_with_the_models_own_token(
    text_file, tokenizer, tmp_path
):
    llama, path = metaspace_tokenizer(), text_file(f"the king said\n{END_OF_TEXT}\n" * 100)
    made = prepare_tokens(path, llama, tmp_path, 0.1, end_id=2)
    assert (made.train.tokens == 2).sum() + (made.val.tokens == 2).sum() == 100
    key = identity_key({}, tokenizer, 0.1)
    assert key == identity_key({}, tokenizer, 0.1, 0)  # token files and runs made before stay what they are
    assert identity_key({}, llama, 0.1, 1) != identity_key({}, llama, 0.1, 2)


def test_a_run_from_a_llama_model_says_how_documents_end_and_what_is_lost(tmp_path):
    tokenizer, said, text = metaspace_tokenizer(), [], tmp_path / "text.txt"
    source = save_folder(
        tmp_path / "base",
        tiny_model(vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2),
        tokenizer,
    )
    text.write_text(f"the king said: come hither é.\n{END_OF_TEXT}\n" * 200)
    config = small_config(text, tmp_path / "out", max_steps=1)
    reporter = Reporter()
    reporter.message = said.append
    train(
        config.model_copy(update={"run": config.run.model_copy(update={"init_from": str(source)})}), reporter
    )
    assert "documents end with <end> (id 2), the model's own: its tokenizer has no <|endoftext|>" in said
    assert [
        line
        for line in said
        if line.startswith("note: ") and "('é.')" in line and "bits per byte of this run are too good" in line
    ]


def test_tiny_shakespeare_gives_the_reference_counts(test_data, tmp_path):
    path = test_data / "tinyshakespeare/input.txt"
    real = Tokenizer.from_file(test_data / "tokenizer")
    assert split_bytes(path) == (1_003_854, 111_540)
    assert sum(len(array) for array in encode_documents(real, read_split(path, "all"), None)) == 341_094
    splits = prepare_tokens(path, real, tmp_path, 0.1)
    assert (splits.train.text_bytes, splits.val.text_bytes) == (1_003_854, 111_540)
    text = path.read_text()
    assert splits.val.tokens.tolist() == real.encode(text[-111_540:])
    assert splits.train.tokens.tolist() == real.encode(text[:1_003_854])


# --- splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 50, 10**6])
@pytest.mark.parametrize("fraction", [0.1, 0.3337, 0.9])
def test_the_splits_join_to_the_text_and_cut_no_character(monkeypatch, text_file, chunk, fraction):
    set_chunk(monkeypatch, chunk)
    for text in ("日本語" * 50, TEXT[:500], "ab", "😀", "x" * 10):
        path = text_file(text)
        train, val = ("".join(read_split(path, split, fraction)) for split in ("train", "val"))
        assert train + val == text == "".join(read_split(path, "all", fraction))
        assert split_bytes(path, fraction) == (len(train.encode()), len(val.encode()))
        assert 0 <= int(len(text.encode()) * (1 - fraction)) - len(train.encode()) < 4


def test_a_tokenizer_trained_on_the_training_split_never_sees_the_held_out_end(text_file):
    path = text_file("common words here. " * 100 + "zyzzyva " * 20)
    seen = "".join(read_split(path, "train"))
    assert "zyzzyva" not in seen and "zyzzyva" in "".join(read_split(path, "val"))


# --- the token cache ----------------------------------------------------------------------------------------------------


def test_line_ends_do_not_change_the_tokens_or_their_identity(text_file, tokenizer, tmp_path):
    one = prepare_tokens(text_file(TEXT, "lf.txt"), tokenizer, tmp_path / "a", 0.1)
    two = prepare_tokens(text_file(TEXT.replace("\n", "\r\n"), "crlf.txt"), tokenizer, tmp_path / "b", 0.1)
    assert one.sha256 == two.sha256 and one.train.tokens.tolist() == two.train.tokens.tolist()


def test_the_sidecar_counts_what_is_there(text_file, tokenizer, tmp_path):
    made = prepare_tokens(text_file(TEXT), tokenizer, tmp_path, 0.1)
    sidecar = json.loads((made.folder / "tokens.json").read_text())
    assert sidecar["dtype"] == "uint16" and sidecar["source"]["bytes"] == len(TEXT.encode())
    for name, split in {"train": made.train, "val": made.val}.items():
        assert sidecar["splits"][name] == {
            "tokens": len(split.tokens),
            "bytes": split.text_bytes,
            "sha256": sha256_file(made.folder / f"{name}.bin"),
        }
        assert (made.folder / f"{name}.bin").stat().st_size == 2 * len(split.tokens)
    assert made.train.text_bytes + made.val.text_bytes == len(TEXT.encode())
    decoded = "".join(tokenizer.decode(split.tokens) for split in (made.train, made.val))
    assert decoded == TEXT


def test_the_cache_is_used_again_and_another_text_tokenizer_or_split_makes_another(
    text_file, tokenizer, tmp_path, monkeypatch
):
    path = text_file(TEXT)
    first = prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    assert prepare_tokens(path, tokenizer, tmp_path / "c", 0.2).folder != first.folder
    assert prepare_tokens(path, Tokenizer.train([TEXT], 300), tmp_path / "c", 0.1).folder != first.folder
    assert (
        prepare_tokens(text_file(TEXT + "more", "b.txt"), tokenizer, tmp_path / "c", 0.1).folder
        != first.folder
    )
    monkeypatch.setattr(data, "_write_split", None)  # tokenising again would now fail
    assert prepare_tokens(path, tokenizer, tmp_path / "c", 0.1).sha256 == first.sha256


@pytest.mark.parametrize(
    "damage",
    ["flip", "flip val", "truncate", "remove", "sidecar", "sidecar number", "sidecar list", "without hashes"],
)
def test_a_damaged_cache_is_noticed_and_rebuilt(text_file, tokenizer, tmp_path, capsys, damage):
    """One flipped bit is enough, in the tokens or in the counts beside them; a cache of before there were hashes goes too."""
    path = text_file(TEXT)
    made = prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    expected = made.train.tokens.tolist(), made.val.tokens.tolist(), made.val.text_bytes
    target, sidecar = (
        made.folder / ("val.bin" if damage == "flip val" else "train.bin"),
        made.folder / "tokens.json",
    )
    facts = json.loads(sidecar.read_text())
    if damage.startswith("flip"):
        raw = bytearray(target.read_bytes())
        raw[len(raw) // 2] ^= 1
        target.write_bytes(raw)
    elif damage == "truncate":
        target.write_bytes(target.read_bytes()[:-2])
    elif damage == "remove":
        target.unlink()
    elif damage == "sidecar number":  # bits per byte would be wrong
        facts["splits"]["val"]["bytes"] += 1
        sidecar.write_text(json.dumps(facts))
    elif damage == "without hashes":
        del facts["sha256_of_this"], facts["splits"]["train"]["sha256"], facts["splits"]["val"]["sha256"]
        sidecar.write_text(json.dumps(facts))
    else:
        sidecar.write_text("[]" if damage == "sidecar list" else "{")
    capsys.readouterr()
    again = prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    assert (again.train.tokens.tolist(), again.val.tokens.tolist(), again.val.text_bytes) == expected
    (line,) = capsys.readouterr().out.splitlines()
    assert ("an earlier version" if damage == "without hashes" else "damaged") in line and line.endswith(
        "tokenising again"
    )
    prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    assert capsys.readouterr().out == "", "the new one is whole"


def test_a_failure_leaves_nothing_behind(text_file, tokenizer, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_durably", fails)
    with pytest.raises(OSError, match="No space"):
        prepare_tokens(text_file(TEXT), tokenizer, tmp_path / "c", 0.1)
    assert list((tmp_path / "c").iterdir()) == []


def test_bad_text_creates_no_cache(text_file, tokenizer, tmp_path):
    for content in (b"", b"\xef\xbb\xbf", b"abc\xff"):
        with pytest.raises(DataError):
            prepare_tokens(text_file(content), tokenizer, tmp_path / "c", 0.1)
    assert not (tmp_path / "c").exists()


def test_an_empty_file_is_called_empty(text_file, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"input\.txt: empty, expected text"):
        prepare_tokens(text_file(""), tokenizer, tmp_path / "c", 0.1)


@pytest.mark.parametrize(
    ("text", "expected"), [("a few words only", "one row needs 65"), ("x", "one row needs 65")]
)
def test_a_text_shorter_than_a_row_is_one_clear_error(text_file, tokenizer, tmp_path, text, expected):
    path = text_file(text)
    with pytest.raises(DataError, match=expected) as caught:
        check_length(prepare_tokens(path, tokenizer, tmp_path / "c", 0.1), 64, path)
    assert str(path) in str(caught.value)


# --- batches ------------------------------------------------------------------------------------------------------------

SHAPES = [(1000, 16, 4), (130, 64, 1), (65, 64, 3), (129, 64, 2), (10_000, 7, 5), (50, 2, 8)]


@pytest.mark.parametrize(("count", "length", "batch"), SHAPES)
def test_every_row_is_used_once_an_epoch_and_none_straddles_the_end(count, length, batch):
    order = BatchOrder(count, length, batch, seed=5)
    for epoch in range(5):
        starts = [order.row_start(epoch * order.rows_per_epoch + i) for i in range(order.rows_per_epoch)]
        assert len(set(starts)) == order.rows_per_epoch
        ordered = sorted(starts)
        assert all(b - a == length for a, b in itertools.pairwise(ordered))  # rows overlap in no target
        assert ordered[0] >= 0 and ordered[-1] + length + 1 <= count


@pytest.mark.parametrize(("count", "length", "batch"), SHAPES)
def test_batch_n_is_a_pure_function_of_seed_and_n(count, length, batch):
    forward = [BatchOrder(count, length, batch, 5).starts(n) for n in range(20)]
    used = BatchOrder(count, length, batch, 5)
    assert [used.starts(n) for n in reversed(range(20))] == forward[
        ::-1
    ]  # in any order, from one object or many
    if count > 500:
        assert [BatchOrder(count, length, batch, 6).starts(n) for n in range(20)] != forward


def test_the_order_is_the_same_on_every_machine():
    """Stored numbers: a changed order would silently break the exact resume of every run made before."""
    assert BatchOrder(1000, 16, 4, seed=1337).starts(0) == [161, 273, 305, 353]
    assert BatchOrder(1000, 16, 4, seed=1337).starts(100) == [244, 628, 68, 228]


def test_every_epoch_has_another_order():
    order = BatchOrder(10_000, 16, 4, seed=5)
    epochs = [
        [order.row_start(e * order.rows_per_epoch + i) for i in range(order.rows_per_epoch)] for e in range(3)
    ]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({min(epoch) % 16 for epoch in epochs}) > 1  # and other row boundaries


def test_a_batch_holds_the_tokens_it_says_and_targets_follow_inputs():
    tokens = np.arange(1000, dtype=np.uint16)
    stream = BatchStream(tokens, BatchOrder(1000, 16, 4, seed=5), position=3)
    batch = next(iter(stream))
    assert batch.shape == (4, 17) and batch.dtype.is_signed
    assert (batch[:, 1:] == batch[:, :-1] + 1).all()
    assert batch[:, 0].tolist() == BatchOrder(1000, 16, 4, seed=5).starts(3)


def test_resuming_at_n_gives_the_batches_of_one_long_run():
    tokens = np.arange(500, dtype=np.uint16)

    def take(position, count):
        stream = iter(BatchStream(tokens, BatchOrder(500, 16, 4, seed=5), position))
        return [next(stream).tolist() for _ in range(count)]

    assert take(0, 5) + take(5, 15) == take(0, 20)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(workers):
    tokens = np.arange(500, dtype=np.uint16)
    order = BatchOrder(500, 16, 4, seed=5)
    parts = [BatchStream(tokens, order, 0, rank, workers).batch(7).tolist() for rank in range(workers)]
    assert sorted(row for part in parts for row in part) == sorted(
        BatchStream(tokens, order, 0).batch(7).tolist()
    )


def test_epoch_of_counts_rows():
    order = BatchOrder(1000, 16, 4, seed=5)
    assert order.epoch_of(0) == 0
    assert order.epoch_of(order.rows_per_epoch) == 4
