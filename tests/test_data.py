"""Text -> tokens -> batches: nothing lost, nothing changed by streaming, and an order that is a pure function."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from conftest import Heard
from tiny_models import metaspace_tokenizer, save_folder, tiny_model

import smollm2.text as text_module
from smollm2.data import BatchOrder, BatchStream, encode_documents, identity_key, open_tokens, prepare_tokens
from smollm2.errors import DataError
from smollm2.files import sha256_file
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
    """Read and cut in pieces of about `chunk` characters."""
    patch.setattr(text_module, "CHUNK_BYTES", chunk)


def awkward_texts(count: int) -> list[str]:
    draw = random.Random(21)
    parts = ["a", "word", *" \n\t1é.\v\x1c\x85", "  ", "\n\n", "\r\n", "23", "漢字", "😀", "'s"]
    parts += ["\u00a0", "\u200b", "\u2028", "\u3000", "\n\n\u3000\u3000"]
    parts += [f"\n{END_OF_TEXT}\n", END_OF_TEXT, f"{END_OF_TEXT}\n", "<|endof"]
    return ["".join(draw.choices(parts, k=draw.randrange(1, 80))) for _ in range(count)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 10**6])
def test_pieces_crlf_cr_and_a_byte_order_mark_make_no_difference(monkeypatch, text_file, chunk):
    set_chunk(monkeypatch, chunk)
    crlf, cr = TEXT.replace("\n", "\r\n"), TEXT.replace("\n", "\r")
    for variant in (TEXT, crlf, cr, "\ufeff" + crlf):
        pieces = list(read_text(text_file(variant)))
        assert "".join(pieces) == TEXT and max(map(len, pieces)) <= chunk
    assert "".join(read_text(text_file("end\r"))) == "end\n"
    assert "".join(read_text(text_file("a\r\r\n\n\r"))) == "a\n\n\n\n"


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"0123456789\r\n" * 5000], ids=len)
@pytest.mark.parametrize("content, offset", [
    (b"abc\xffdef", 3), ("é".encode() * 9 + b"\xc3(", 18), ("日本".encode()[:-1], 3), (b"x\xed\xa0\x80", 1),
    ("größe\n".encode("latin-1"), 2),
])  # fmt: skip
def test_a_byte_that_is_not_utf8_is_refused_by_place(monkeypatch, text_file, chunk, before, content, offset):
    set_chunk(monkeypatch, chunk)
    place = f"not UTF-8 at byte offset {len(before) + offset:,} (byte 0x{content[offset]:02x})"
    with pytest.raises(DataError, match=re.escape(place)):
        list(read_text(text_file(before + content)))


@pytest.mark.parametrize(
    "text",
    ["The end.\n\x1a", "a\x08" * 8, "BZh is funny", "PK met PK", "%PDF begins a PDF", "\x1b[1mbold\x1b[0m\n"],
)
def test_text_may_begin_with_the_letters_of_another_kind(text_file, text):
    assert "".join(read_text(text_file(text))) == text


def test_markup_is_learned_but_not_without_a_word(text_file, tokenizer, tmp_path, capsys):
    for name, lines in {"a.jsonl": 1, "a.CSV": 1, "a.html": 1, "a.txt": 0}.items():
        prepare_tokens(text_file(TEXT, name), tokenizer, tmp_path / "c", 0.1)
        said = capsys.readouterr().out
        assert said.count("\n") == said.count("markup is learned with the text; --dataset reads") == lines


def tokens_of(tokenizer, texts) -> list[int]:
    arrays = list(encode_documents(tokenizer, texts))
    assert all(array.dtype == np.uint16 for array in arrays)
    return [int(i) for array in arrays for i in array]


def in_pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def test_a_separator_line_becomes_the_end_of_text_token(tokenizer):
    text = f"one\n{END_OF_TEXT}\ntwo\n{END_OF_TEXT}\n"
    expected = [*tokenizer.encode("one\n"), 0, *tokenizer.encode("two\n"), 0]
    assert tokens_of(tokenizer, [text]) == expected
    assert tokens_of(tokenizer, [text.removesuffix("\n")]) == expected  # the last line may lack its newline
    text = f"x{END_OF_TEXT}\ny\n{END_OF_TEXT}\nz"  # only a whole line counts
    assert list(documents([text])) == [(f"x{END_OF_TEXT}\ny\n", True), ("z", False)]


@pytest.mark.parametrize("chunk", [1, 5, 33, 200])
def test_documents_and_tokens_do_not_depend_on_how_the_text_arrives(monkeypatch, tokenizer, chunk):
    for text in [TEXT, *awkward_texts(60)]:
        whole, tokens = list(documents([text])), tokens_of(tokenizer, [text])  # cut at separators only
        with monkeypatch.context() as patch:
            set_chunk(patch, chunk)
            joined, rest = [], ""
            for piece, ends in documents(in_pieces(text, chunk)):
                rest += piece
                if ends:
                    joined.append((rest, True))
                    rest = ""
            assert joined + ([(rest, False)] if rest else []) == whole
            assert tokens_of(tokenizer, in_pieces(text, chunk)) == tokens


def test_paragraphs_of_a_chinese_novel_are_cut_into_pieces(monkeypatch, tokenizer):
    """Two ideographic blanks, a blank line between: no blank and no line break there stands alone."""
    novel = "\u3000\u3000大江東去浪淘盡千古風流人物\n\n" * 200
    set_chunk(monkeypatch, 200)
    pieces = list(documents(in_pieces(novel, 200)))
    assert max(len(text) for text, _ in pieces) <= 400
    assert tokens_of(tokenizer, in_pieces(novel, 200)) == tokenizer.encode(novel)


def test_text_without_a_single_blank_is_cut_all_the_same(monkeypatch):
    set_chunk(monkeypatch, 10)
    monkeypatch.setattr(text_module, "MAX_UNBROKEN_CHARACTERS", 200)
    pieces = list(documents("x" * 10 for _ in range(100)))
    assert len(pieces) > 2 and "".join(text for text, _ in pieces) == "x" * 1000


def test_documents_without_an_end_of_text_token_end_with_the_models_own(text_file, tokenizer, tmp_path):
    llama, path = metaspace_tokenizer(), text_file(f"the king said\n{END_OF_TEXT}\n" * 100)
    made = prepare_tokens(path, llama, tmp_path, 0.1, own_end=2)
    assert (made.train.tokens == 2).sum() + (made.val.tokens == 2).sum() == 100
    with pytest.raises(DataError, match="no such token"):
        prepare_tokens(path, llama, tmp_path, 0.1)
    # earlier runs stay what they are
    assert identity_key({}, tokenizer, 0.1) == identity_key({}, tokenizer, 0.1, 0)
    assert identity_key({}, llama, 0.1, 1) != identity_key({}, llama, 0.1, 2)


def test_a_run_from_a_llama_model_says_how_documents_end_and_what_is_lost(tmp_path):
    tokenizer, text = metaspace_tokenizer(), tmp_path / "text.txt"
    model = tiny_model(vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2)
    source = save_folder(tmp_path / "base", model, tokenizer)
    text.write_text(f"the king said: come hither é.\n{END_OF_TEXT}\n" * 200)
    config = small_config(text, tmp_path / "out", place={"init_from": str(source)}, max_steps=1)
    train(config, heard := Heard())
    said = "\n".join(heard.messages)
    assert "documents end with <end> (id 2), the model's own" in said
    assert re.search(r"\('é\.'\).*bits per byte of this run are too good", said)


def test_the_text_comes_back_from_its_tokens_wherever_ends_stand_in_it(text_file, tokenizer, tmp_path):
    """gzip and counting are told of the same bytes; an end within a line, as GPT-2's files have, is no line."""
    lines, within = f"The cat.\n{END_OF_TEXT}\n" * 99, f"On the mat.{END_OF_TEXT}" * 99
    for text in (lines, within, f"\n{lines}{within}\n{lines}"):
        made = prepare_tokens(text_file(text), tokenizer, tmp_path / "c", 0.1)
        parts = [*made.train.texts(tokenizer, 0)], [*made.val.texts(tokenizer, 0)]
        assert "".join(itertools.chain(*parts)) == text
        assert [len("".join(part)) for part in parts] == [made.train.text_bytes, made.val.text_bytes]


def test_tiny_shakespeare_gives_the_reference_counts(test_data, tmp_path):
    path = test_data / "tinyshakespeare/input.txt"
    real = Tokenizer.from_file(test_data / "tokenizer")
    assert split_bytes(path) == (1_003_854, 111_540)
    assert sum(len(array) for array in encode_documents(real, read_split(path, "all"))) == 341_094
    splits = prepare_tokens(path, real, tmp_path, 0.1)
    assert (splits.train.text_bytes, splits.val.text_bytes) == (1_003_854, 111_540)
    text = path.read_text()
    assert splits.val.tokens.tolist() == real.encode(text[-111_540:])
    assert splits.train.tokens.tolist() == real.encode(text[:1_003_854])


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


def test_the_sidecar_counts_what_is_there(text_file, tokenizer, tmp_path):
    made = prepare_tokens(text_file(TEXT.replace("\n", "\r\n")), tokenizer, tmp_path, 0.1)
    sidecar = json.loads((made.folder / "tokens.json").read_text())
    assert sidecar["dtype"] == "uint16" and sidecar["source"]["bytes"] == len(TEXT.encode())
    for name, split in {"train": made.train, "val": made.val}.items():
        file = made.folder / f"{name}.bin"
        facts = {"tokens": len(split.tokens), "bytes": split.text_bytes, "sha256": sha256_file(file)}
        assert sidecar["splits"][name] == facts and file.stat().st_size == 2 * len(split.tokens)
    assert made.train.text_bytes + made.val.text_bytes == len(TEXT.encode())
    assert "".join(tokenizer.decode(split.tokens) for split in (made.train, made.val)) == TEXT


def test_the_cache_is_used_again_and_by_nothing_else(text_file, tokenizer, tmp_path):
    path, other, cache = text_file(TEXT), Tokenizer.train([TEXT], 300), tmp_path / "c"
    first = prepare_tokens(path, tokenizer, cache, 0.1)
    before = (first.folder / "train.bin").stat().st_ino
    more = text_file(TEXT + "more", "b.txt")
    for changed in ((path, tokenizer, cache, 0.2), (path, other, cache, 0.1), (more, tokenizer, cache, 0.1)):
        assert prepare_tokens(*changed).folder != first.folder
    text_file(TEXT.replace("cat", "dog"))  # the same size
    assert prepare_tokens(path, tokenizer, cache, 0.1).folder != first.folder
    text_file(TEXT.replace("\n", "\r\n"))
    assert prepare_tokens(path, tokenizer, cache, 0.1).folder == first.folder
    assert (first.folder / "train.bin").stat().st_ino == before


DAMAGE = ["flip train", "flip val", "truncate", "remove", "{", "[]", "count", "without hashes"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_noticed_and_rebuilt(text_file, tokenizer, tmp_path, capsys, damage):
    """One flipped bit is enough, in the tokens or in the counts beside them."""
    path = text_file(TEXT)
    made = prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    expected = made.train.tokens.tolist(), made.val.tokens.tolist(), made.val.text_bytes
    target = made.folder / ("val.bin" if damage == "flip val" else "train.bin")
    sidecar, raw = made.folder / "tokens.json", bytearray(target.read_bytes())
    facts = json.loads(sidecar.read_text())
    if damage == "count":  # bits per byte would be wrong
        facts["splits"]["val"]["bytes"] += 1
    elif damage == "without hashes":
        del facts["sha256_of_this"]
    sidecar.write_text(damage if damage in ("{", "[]") else json.dumps(facts))
    if damage.startswith("flip"):
        raw[len(raw) // 2] ^= 1
    target.write_bytes(raw[:-2] if damage == "truncate" else raw)
    if damage == "remove":
        target.unlink()
    again = prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    assert (again.train.tokens.tolist(), again.val.tokens.tolist(), again.val.text_bytes) == expected
    assert capsys.readouterr().out == f"data: {made.folder.name} is damaged; tokenising again\n"
    prepare_tokens(path, tokenizer, tmp_path / "c", 0.1)
    assert capsys.readouterr().out == "", "the new one is whole"


def test_a_damaged_cache_whose_name_is_all_that_is_known_is_noticed_too(text_file, tokenizer, tmp_path):
    """As a dataset's: its identity stands in the damaged file."""
    folder = prepare_tokens(text_file(TEXT), tokenizer, tmp_path / "c", 0.1).folder
    assert open_tokens(folder).folder == folder
    sidecar = folder / "tokens.json"
    sidecar.write_text(sidecar.read_text().replace('"tokenizer"', '"tokeniser"'))
    assert open_tokens(folder) is None


def test_what_a_failure_leaves_the_next_start_completes(text_file, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("smollm2.files.write_durably", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_tokens(text_file(TEXT), tokenizer, tmp_path / "c", 0.1)
    made = prepare_tokens(text_file(TEXT), tokenizer, tmp_path / "c", 0.1)
    assert list((tmp_path / "c").iterdir()) == [made.folder]
    assert {path.name for path in made.folder.iterdir()} == {"train.bin", "val.bin", "tokens.json"}


SHAPES = [(1000, 16, 4), (130, 64, 1), (65, 64, 3), (129, 64, 2), (10_000, 7, 5), (50, 2, 8)]


def test_a_folder_of_a_person_beside_the_tokens_stays(text_file, tokenizer, tmp_path):
    theirs = tmp_path / "data/experiment/progress.json"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    prepare_tokens(text_file(TEXT), tokenizer, tmp_path / "data", 0.1)
    assert theirs.exists()


@pytest.mark.parametrize(("count", "length", "batch"), SHAPES)
def test_every_row_is_used_once_an_epoch_and_none_straddles_the_end(count, length, batch):
    order = BatchOrder(count, length, batch, seed=5)
    for epoch in range(5):
        starts = [order.row_start(epoch * order.rows_per_epoch + i) for i in range(order.rows_per_epoch)]
        assert len(set(starts)) == order.rows_per_epoch
        ordered = sorted(starts)
        assert all(b - a == length for a, b in itertools.pairwise(ordered))  # rows overlap in no target
        assert ordered[0] >= 0 and ordered[-1] + length + 1 <= count


def test_the_order_is_the_same_on_every_machine():
    """Stored numbers: a changed order would silently break the exact resume of every run made before."""
    order = BatchOrder(1000, 16, 4, seed=1337)
    assert order.starts(100) == [244, 628, 68, 228] and order.starts(0) == [161, 273, 305, 353]
    assert BatchOrder(1000, 16, 4, seed=1338).starts(0) != order.starts(0)


def test_a_batch_holds_the_tokens_it_says_and_a_resumed_stream_those_of_one_long_run():
    tokens = np.arange(1000, dtype=np.uint16)
    stream = [next(iter(BatchStream(tokens, BatchOrder(1000, 16, 4, seed=5), n))) for n in range(20)]
    assert all(batch.shape == (4, 17) and batch.dtype.is_signed for batch in stream)
    assert all((batch[:, 1:] == batch[:, :-1] + 1).all() for batch in stream)  # targets follow inputs
    starts = [BatchOrder(1000, 16, 4, 5).starts(n) for n in range(20)]
    assert [batch[:, 0].tolist() for batch in stream] == starts
    whole = itertools.islice(BatchStream(tokens, BatchOrder(1000, 16, 4, seed=5), 0), 20)
    assert [batch.tolist() for batch in whole] == [batch.tolist() for batch in stream]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(workers):
    tokens = np.arange(500, dtype=np.uint16)
    order = BatchOrder(500, 16, 4, seed=5)
    parts = [BatchStream(tokens, order, 0, rank, workers).batch(7).tolist() for rank in range(workers)]
    assert all(len(part) == 4 // workers for part in parts)
    alone = BatchStream(tokens, order, 0).batch(7).tolist()
    assert sorted(row for part in parts for row in part) == sorted(alone)
