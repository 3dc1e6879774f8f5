"""Text comes back unchanged, and the real SmolLM2 tokenizer gives the real ids."""

import json
import random
import time

import pytest
import tokenizers as hf
from tiny_models import metaspace_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smollm2 import SmolLM2Config, hub
from smollm2.token_text import piece
from smollm2.tokenizer import Tokenizer, choose_tokenizer
from smollm2.weights import model_files

REFERENCE_IDS = {"\n\n1.": [1116, 33, 30], "How's it going?": [2020, 506, 357, 2045, 47]}
AWKWARD = [
    "", " ", "\n\n1.", "   12\t\n\r 3", "naïve café – “quoted” …", "日本語とemoji 👩‍👩‍👧‍👦🏳️‍🌈", "trailing  \n\n  ", "a" * 3000,
    "e\u0301 is not \u00e9", "\x00\x01\x7f\u200b\ufeff\ufffd\u2028", "𐀀\U0010ffff\ue000",
]  # fmt: skip
# The published vocabulary has no entry for these bytes: six control characters and the first byte of U+40000 to
# U+BFFFF. (0xc0, 0xc1 and 0xf5 to 0xff are missing too, but never occur in UTF-8.) Every loader drops them.
MISSING_IN_REAL = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.fixture(scope="module")
def real(test_data):
    return Tokenizer.from_file(test_data / "tokenizer")


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(["The cat sat on the mat in 2024, didn't it?\n" * 50], 400)


@pytest.fixture(scope="module")
def gpt2_like():
    """`<|endoftext|>` is its last entry, not its first."""
    made = hf.Tokenizer(hf.models.BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(made.to_str().encode())


def random_texts(count: int = 200) -> list[str]:
    draw = random.Random(11)
    signs = "äßéñ漢字😀🧡\u0301\u200d \u00a0\u3000\n\r\t"
    alphabet = [*map(chr, range(128)), *signs, "<|endoftext|", "12", "  "]
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(count)]
    anything = [*range(0xD800), *range(0xE000, 0x110000)]
    return texts + ["".join(map(chr, draw.choices(anything, k=40))) for _ in range(50)]


def test_the_real_tokenizer_gives_the_reference_ids(real):
    assert {text: real.encode(text) for text in REFERENCE_IDS} == REFERENCE_IDS
    assert (real.vocab_size, real.token(0), real.token_id("<|im_start|>")) == (49152, "<|endoftext|>", 1)
    texts = random_texts(20)
    assert real.encode_batch(texts) == [real.encode(text) for text in texts]


def test_a_saved_folder_gives_the_same_ids_through_transformers(real, trained, gpt2_like, tmp_path):
    """`AutoTokenizer` of transformers 5 drops the digit split for SmolLM2's own files; for ours it must not."""
    for name, tokenizer in {"real": real, "trained": trained, "gpt2": gpt2_like}.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder, 2048)
        assert Tokenizer.from_file(folder).raw == tokenizer.raw
        (folder / "config.json").write_bytes(model_files(SmolLM2Config())["config.json"])
        for cls in (PreTrainedTokenizerFast, AutoTokenizer):
            theirs = cls.from_pretrained(folder)
            for text in [*REFERENCE_IDS, *AWKWARD, *random_texts(30)]:
                assert theirs(text)["input_ids"] == tokenizer.encode(text), (name, cls.__name__, text)
                assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
            ids = (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length)
            assert ids == (tokenizer.end_of_text_id, tokenizer.begin_ids[0], 2048)


def test_any_text_comes_back_unchanged(trained, real):
    for text in [*AWKWARD, *random_texts()]:
        assert trained.decode(trained.encode(text)) == text
        text = "".join(c for c in text if not MISSING_IN_REAL & set(c.encode()))
        assert real.decode(real.encode(text)) == text
    assert real.decode(real.encode("a\x04b")) == "ab"


def test_a_trained_tokenizer_knows_all_256_bytes_and_splits_digits(trained):
    assert all(trained.token_id(character) is not None for character in ByteLevel.alphabet())
    assert trained.end_of_text_id == 0 and trained.vocab_size <= 400
    assert len(trained.encode("2024")) == 4 and 0 < len(trained.encode("the cat")) < len("the cat")
    texts = ["one two three two three three\n" * 20, "more of the same\n"]
    assert Tokenizer.train(texts, 300).raw == Tokenizer.train(texts, 300).raw


@pytest.mark.parametrize("run", ["\n" * 400_000, "_-" * 200_000], ids=lambda run: repr(run[:2]))
def test_a_long_run_of_one_character_does_not_stop_the_training(run):
    began = time.monotonic()
    tokenizer = Tokenizer.train(["some words before. ", run, " and behind"], 300)
    assert time.monotonic() - began < 20  # uncut more than a minute, and four times that for twice the length
    assert tokenizer.decode(tokenizer.encode("x" + run[:5000])) == "x" + run[:5000]


def test_special_tokens_are_hidden_unless_asked_for(trained):
    ids, llama = [0, *trained.encode("cat"), 0], metaspace_tokenizer()
    assert trained.decode(ids, skip_special_tokens=True) == "cat"
    assert trained.decode(ids) == "<|endoftext|>cat<|endoftext|>"
    assert llama.decode([1, *llama.encode("the king"), 2], skip_special_tokens=True) == "the king"
    assert [llama.token(i) for i in range(3)] == ["<unk>", "<begin>", "<end>"] and llama.token(10**6) is None


def test_documents_begin_and_end_as_the_tokenizer_says_and_its_files_name_the_same(real, trained, gpt2_like):
    """One source: `<|endoftext|>` wherever it stands in the vocabulary, or the model's own special token."""
    llama, last = metaspace_tokenizer(), gpt2_like.vocab_size - 1
    assert [tokenizer.begin_ids for tokenizer in (real, trained, gpt2_like, llama)] == [[0], [0], [last], [1]]
    assert [tokenizer.end_id() for tokenizer in (real, trained, gpt2_like, llama)] == [0, 0, last, None]
    assert (trained.end_id(7), gpt2_like.end_id(0), real.end_id(2), llama.end_id(2)) == (0, last, 2, 2)
    assert [llama.end_id(i) for i in (0, 5, None)] == [None] * 3  # the unknown token, a common one, none
    for files, expected in (
        (gpt2_like.files(64), ("<|endoftext|>", "<|endoftext|>")),
        (llama.files(64), ("<begin>", None)),
        (llama.files(64, bos_id=1, eos_id=2), ("<begin>", "<end>")),
        (real.files(64, bos_id=1, eos_id=2, pad_id=0), ("<|im_start|>", "<|im_end|>")),
    ):
        config = json.loads(files["tokenizer_config.json"])
        assert (config.get("bos_token"), config.get("eos_token")) == expected
    assert config["pad_token"] == "<|endoftext|>"


def test_ids_that_begin_at_1_need_a_row_more():
    words = hf.models.WordLevel({"<unk>": 1, "a": 2, "b": 5}, unk_token="<unk>")
    assert Tokenizer(hf.Tokenizer(words).to_str().encode()).vocab_size == 6


def test_a_letter_is_shown_as_one_and_a_byte_as_a_byte(trained):
    """The name of one token: for SentencePiece it is that letter, in a byte-level vocabulary the byte 0xe9."""
    entries = {name: i for i, name in enumerate(["<unk>", "\u2581", "é", "\u2581é", "<0xE9>"])}
    model = hf.models.BPE(entries, [("\u2581", "é")], unk_token="<unk>")
    llama = Tokenizer(hf.Tokenizer(model).to_str().encode())
    assert [piece(llama, i) for i in range(5)] == ["<unk>", "·", "é", "·é", "e9"]
    assert piece(trained, trained.token_id("é")) == "e9" and piece(trained, trained.token_id("Ġ")) == "·"


def test_auto_trains_where_the_preset_asks_for_it_or_the_hub_is_out_of_reach(monkeypatch, capsys):
    def out_of_reach(*args, **kwargs):
        raise hub.HubUnreachable("Hub out of reach")

    monkeypatch.setattr(hub, "fetch", out_of_reach)
    for size, train_size, why in (
        (2048, 300, "trained on the training split (the preset's choice)"),
        (320, None, "cannot be fetched (Hub out of reach); pass --tokenizer PATH"),
    ):
        tokenizer, reason = choose_tokenizer("auto", size, train_size, lambda: iter(["some text " * 100]))
        assert tokenizer.vocab_size <= min(size, 320) and why in reason
        assert capsys.readouterr().out == f"training a tokenizer of {train_size or size} entries ...\n"
