"""Text comes back unchanged, and the real SmolLM2 tokenizer gives the real ids."""

from __future__ import annotations

import json
import random
import time

import pytest
from tiny_models import metaspace_tokenizer

from smollm2.errors import DataError
from smollm2.tokenizer import END_OF_TEXT, Tokenizer, choose_tokenizer, load_tokenizer

REFERENCE_IDS = {"\n\n1.": [1116, 33, 30], "How's it going?": [2020, 506, 357, 2045, 47]}
AWKWARD = [
    "",
    " ",
    "\n\n1.",
    "   12\t\n\r 3",
    "naïve café – “quoted” …",
    "日本語とemoji 👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 is not \u00e9",  # no normalisation
    "\x00\x01\x7f\u200b\ufeff\ufffd\u2028",
    "trailing  \n\n  ",
    "𐀀\U0010ffff\ue000",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def real(test_data):
    return Tokenizer.from_file(test_data / "tokenizer")


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(["The cat sat on the mat in 2024, didn't it?\n" * 50], 400)


# The published vocabulary has no entry for these bytes: six control characters and the first byte of U+40000 to U+BFFFF.
# (0xc0, 0xc1 and 0xf5 to 0xff are missing too, but never occur in UTF-8.) They are dropped, as they are by every loader.
MISSING_IN_REAL = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


def without_missing(text: str) -> str:
    return "".join(c for c in text if not MISSING_IN_REAL & set(c.encode()))


def random_texts(count: int = 200) -> list[str]:
    draw = random.Random(11)
    alphabet = (
        [chr(c) for c in range(128)]
        + list("äßéñ漢字😀🧡\u0301\u200d \u00a0\u3000\n\r\t")
        + ["<|endoftext|", "12", "  "]
    )
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(count)]
    return texts + [
        "".join(
            chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(40)
        )
        for _ in range(50)
    ]


@pytest.mark.parametrize("text", list(REFERENCE_IDS), ids=repr)
def test_the_real_tokenizer_gives_the_reference_ids(real, text):
    assert real.encode(text) == REFERENCE_IDS[text]


def test_the_real_tokenizer_has_49152_entries_and_its_end_of_text(real):
    assert (real.vocab_size, real.end_of_text_id, real.token(0), real.token_id("<|im_start|>")) == (
        49152,
        0,
        END_OF_TEXT,
        1,
    )


def test_a_saved_folder_gives_the_same_ids_through_transformers(real, trained, tmp_path):
    """`AutoTokenizer` of transformers 5 drops the digit split for SmolLM2's own files; for ours it must not."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from smollm2.config import SmolLM2Config
    from smollm2.weights import model_files

    for name, tokenizer in {"real": real, "trained": trained}.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder, 2048)
        (folder / "config.json").write_bytes(model_files(SmolLM2Config())["config.json"])
        for cls in (PreTrainedTokenizerFast, AutoTokenizer):
            theirs = cls.from_pretrained(folder)
            for text in [*REFERENCE_IDS, *AWKWARD, *random_texts(30)]:
                assert theirs(text)["input_ids"] == tokenizer.encode(text), (name, cls.__name__, text)
                assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
            assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (
                tokenizer.end_of_text_id,
                0,
                2048,
            )


def test_a_saved_tokenizer_is_byte_for_byte_the_original(real, tmp_path, test_data):
    real.save(tmp_path, 2048)
    assert (tmp_path / "tokenizer.json").read_bytes() == (test_data / "tokenizer/tokenizer.json").read_bytes()
    assert Tokenizer.from_file(tmp_path).sha256 == real.sha256


def test_the_trap_would_be_seen(real, tmp_path):
    """Without the digit split the ids differ: the comparison above can fail."""
    broken = json.loads(real.raw)
    assert broken["pre_tokenizer"]["type"] == "Sequence"
    broken["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    assert Tokenizer(json.dumps(broken).encode()).encode("\n\n1.") != REFERENCE_IDS["\n\n1."]


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: repr(text)[:25])
def test_awkward_text_comes_back_unchanged_from_a_trained_tokenizer(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_any_text_comes_back_unchanged_from_a_trained_tokenizer(trained):
    for text in random_texts():
        assert trained.decode(trained.encode(text)) == text


def test_any_text_of_characters_it_knows_comes_back_unchanged_from_the_real_tokenizer(real):
    for text in [*AWKWARD, *map(without_missing, random_texts())]:
        assert real.decode(real.encode(text)) == text
    assert real.decode(real.encode("a\x04b")) == "ab"


def test_a_trained_tokenizer_knows_all_256_bytes_and_splits_digits(trained):
    from tokenizers.pre_tokenizers import ByteLevel

    assert all(trained.token_id(character) is not None for character in ByteLevel.alphabet())
    assert trained.end_of_text_id == 0 and trained.vocab_size <= 400
    assert len(trained.encode("2024")) == 4
    assert trained.encode("the cat") and len(trained.encode("the cat")) < len("the cat")


def test_training_is_reproducible():
    texts = ["one two three two three three\n" * 20, "more of the same\n"]
    assert Tokenizer.train(texts, 300).raw == Tokenizer.train(texts, 300).raw


@pytest.mark.parametrize(
    "run", ["\n" * 400_000, "a" * 400_000, "_-" * 200_000], ids=lambda run: repr(run[:2])
)
def test_a_long_run_of_one_character_does_not_stop_the_training(run):
    began = time.monotonic()
    tokenizer = Tokenizer.train(["some words before. ", run, " and behind"], 300)
    assert time.monotonic() - began < 20  # uncut more than a minute, and four times that for twice the length
    assert tokenizer.decode(tokenizer.encode("x" + run[:5000])) == "x" + run[:5000]


def test_only_long_runs_are_cut_for_training_and_no_text_is_lost():
    from smollm2.tokenizer import LONGEST_WORD, _without_long_runs

    texts = [*random_texts(50), "word " * 1000, "ab" * 256 + "." * 512 + " \n" * 256, "1" * 5000]
    assert list(_without_long_runs(texts)) == texts
    for run in ("\n\t " * 700, "aé漢" * 700, "_.😀" * 700):
        pieces = list(_without_long_runs([f"1{run}1"]))
        assert "".join(pieces) == f"1{run}1" and max(map(len, pieces)) == LONGEST_WORD + 1


def test_batches_are_encoded_as_single_texts(real):
    texts = random_texts(20)
    assert real.encode_batch(texts) == [real.encode(text) for text in texts]


def test_padding_and_truncation_stored_in_a_file_are_switched_off(trained):
    stored = json.loads(trained.raw)
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    text = "the cat sat on the mat"
    assert Tokenizer(json.dumps(stored).encode()).encode(text) == trained.encode(text)


def test_special_tokens_are_hidden_unless_asked_for(trained):
    ids = [0, *trained.encode("cat"), 0]
    assert trained.decode(ids, skip_special_tokens=True) == "cat"
    assert trained.decode(ids) == f"{END_OF_TEXT}cat{END_OF_TEXT}"
    llama = metaspace_tokenizer()
    assert llama.decode([1, *llama.encode("the king"), 2], skip_special_tokens=True) == "the king"


def test_a_document_begins_as_the_tokenizers_own_file_says(real):
    llama = metaspace_tokenizer()
    assert (
        llama.begin_ids == [1]
        and llama.encode("The king") == metaspace_tokenizer().encode("The king")
        and 1 not in llama.encode("a")
    )
    assert real.begin_ids == [0] and real.encode("\n\n1.") == REFERENCE_IDS["\n\n1."]


def test_a_document_ends_with_end_of_text_or_the_models_own_special_token(trained):
    llama = metaspace_tokenizer()
    assert (trained.end_id(7), llama.end_id(2)) == (0, 2)
    assert [llama.end_id(i) for i in (0, 5, None)] == [
        None
    ] * 3  # the unknown token, a common one, none: no end at all


def test_what_a_tokenizer_cannot_hold_is_counted_in_bytes(trained, real):
    assert (
        trained.not_kept(["any 漢字 \x00 ", "text\n"]) == (0.0, "") == real.not_kept([" 1\n\n2 ", "\ufffd"])
    )
    share, words = metaspace_tokenizer().not_kept(["the king é", "the sun é漢"])
    assert (
        share == 7 / 24
        and words == "29 % of the bytes are characters that do not come back from the tokenizer ('é漢')"
    )
    assert real.not_kept(["a\x04bc"])[0] == 1 / 4  # dropped without a token


def test_an_added_token_is_named_by_its_exact_content():
    llama = metaspace_tokenizer()
    assert [llama.token(i) for i in range(3)] == ["<unk>", "<begin>", "<end>"] and llama.token(10**6) is None


# --- files and choices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0"}', b"[1]", b"null"], ids=repr
)
def test_a_file_that_is_no_tokenizer_is_one_clear_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a tokenizer\.json") as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        load_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path))  # a folder without one


def test_auto_trains_the_size_the_preset_asks_for_and_says_so():
    tokenizer, reason = choose_tokenizer("auto", 2048, 300, lambda: iter(["some text " * 100]))
    assert tokenizer.vocab_size <= 300 and "trained on the training split (the preset's choice)" in reason


def test_training_is_announced_with_its_size(capsys):
    choose_tokenizer("auto", 2048, 300, lambda: iter(["some text " * 100]))
    assert capsys.readouterr().out == "training a tokenizer of 300 entries ...\n"


def test_auto_without_the_hub_trains_one_and_says_why(monkeypatch):
    from smollm2 import hub

    def out_of_reach(*args, **kwargs):
        raise hub.HubUnreachable("Hub out of reach")

    monkeypatch.setattr(hub, "fetch", out_of_reach)
    tokenizer, reason = choose_tokenizer("auto", 320, None, lambda: iter(["some text " * 100]))
    assert (
        tokenizer.vocab_size <= 320
        and "cannot be fetched (Hub out of reach)" in reason
        and "--tokenizer PATH" in reason
    )


def test_a_path_is_taken_as_asked(trained, tmp_path):
    trained.save(tmp_path, 64)
    tokenizer, reason = choose_tokenizer(str(tmp_path), 400, None, None)
    assert tokenizer.sha256 == trained.sha256 and "as asked" in reason


def test_a_tokenizer_larger_than_the_model_is_refused(trained, tmp_path):
    trained.save(tmp_path, 64)
    with pytest.raises(DataError, match=r"but model\.vocab_size is 256"):
        choose_tokenizer(str(tmp_path), 256, None, None)
