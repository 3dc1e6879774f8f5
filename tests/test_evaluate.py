"""Bits per byte: every token once, every byte counted, one figure for models with different tokenizers."""

import gzip
import json
import lzma
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, transformers_twin
from tiny_models import metaspace_tokenizer, save_folder, tiny_tokenizer

from smollm2 import evaluate
from smollm2.errors import DataError
from smollm2.evaluate import compression_bits_per_byte, main, score_file, score_tokens
from smollm2.pretrained import load_model_and_tokenizer
from smollm2.training import train
from tests.soak import small_config

TEXT = "The cat sat on the mat, and the dog, naïve as ever, did not.\n" * 60


def tokens_of(model, count: int) -> np.ndarray:
    return np.random.default_rng(8).integers(0, model.config.vocab_size, count).astype(np.uint16)


def nats_token_by_token(model, tokens, block: int) -> float:
    """The definition, with transformers: each block afresh, its first token behind the one before it."""
    twin, total = transformers_twin(model), 0.0
    previous = np.concatenate(([model.config.bos_token_id], tokens[:-1]))
    for start in range(0, len(tokens), block):
        inputs = torch.from_numpy(previous[start : start + block].astype(np.int64))[None]
        targets = torch.from_numpy(tokens[start : start + block].astype(np.int64))
        with torch.no_grad():
            total += F.cross_entropy(twin(inputs).logits[0].double(), targets, reduction="sum").item()
    return total


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("per_batch", [32, 96])
@pytest.mark.parametrize("block", [32, None])  # None: the whole context, which is 50 here
def test_the_score_is_the_definition_for_any_length_and_batch(count, per_batch, block, monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS_PER_BATCH", per_batch)
    model = tiny_model(bos_token_id=3, max_position_embeddings=50).eval()
    tokens = tokens_of(model, count)
    score = score_tokens(model, tokens, text_bytes=3 * count, block_length=block)
    nats = nats_token_by_token(model, tokens, block or 50)
    assert score.loss == pytest.approx(nats / count, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * count), rel=1e-5)
    assert (score.tokens, score.bytes) == (count, 3 * count)


def test_rows_are_never_longer_than_the_context():
    model = tiny_model(max_position_embeddings=50).eval()
    tokens = tokens_of(model, 257)
    assert score_tokens(model, tokens, 800, block_length=64) == score_tokens(model, tokens, 800)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file beside a folder with a tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("run") / "text.txt"
    path.write_text(TEXT)
    save_folder(path.with_name("model"), tiny_model(vocab_size=400), tiny_tokenizer())
    return path


@pytest.fixture(scope="module")
def pair(text):
    return load_model_and_tokenizer(text.with_name("model"))


def test_a_file_counts_all_its_bytes_and_the_splits_add_up(text, pair):
    scores = {split: score_file(*pair, text, split) for split in ("all", "train", "val")}
    assert scores["all"].bytes == len(TEXT.encode()) == scores["train"].bytes + scores["val"].bytes
    ids = pair[1].encode(TEXT)
    nats = nats_token_by_token(pair[0], np.array(ids, np.uint16), 160)
    assert scores["all"].tokens == len(ids)
    assert scores["all"].bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_text_that_the_tokenizer_cannot_hold_has_no_bits_per_byte(tmp_path, capsys):
    """Every unknown character is one well-known token: the worse the tokenizer, the better the figure."""
    tokenizer, path = metaspace_tokenizer(), tmp_path / "text.txt"
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    path.write_text("the king said é\n" * 50)
    expected = r"text\.txt: 12 % of the bytes .* \('é'\), expected at most 0\.1%"
    with pytest.raises(DataError, match=expected):
        score_file(model, tokenizer, path)
    path.write_text("the king said: come hither, " * 100 + "é")
    assert score_file(model, tokenizer, path).bytes == 2802
    said = capsys.readouterr()
    assert "note: " in said.err and "0.071 % of the bytes" in said.err and said.out == ""


def test_compression_is_the_compressors_own_size(text):
    raw = TEXT.encode()
    packed = {"gzip -9": gzip.compress(raw, 9, mtime=0), "xz": lzma.compress(raw)}
    sizes = compression_bits_per_byte(text, "all")
    assert sizes == {name: 8 * len(data) / len(raw) for name, data in packed.items()}
    assert compression_bits_per_byte(text, "val") != sizes


def test_the_command_prints_one_json_line_or_words_with_units(text, pair, capsys):
    arguments = ["--checkpoint", str(text.with_name("model")), "--input_file", str(text)]
    assert main([*arguments, "--split", "val", "--json"]) == 0
    result = json.loads(said := capsys.readouterr().out)
    assert said.count("\n") == 1 and set(result) == {"loss", "bits_per_byte", "tokens", "bytes"}
    assert result["loss"] == pytest.approx(score_file(*pair, text, "val").loss, rel=1e-6)
    assert main(arguments) == 0
    assert "bits/byte" in (out := capsys.readouterr().out) and "nats/token" in out and "(all)" in out


def test_where_documents_were_held_out_the_end_of_a_text_is_not_called_so(text, tmp_path, capsys):
    run = train(small_config(text, tmp_path / "out", data={"dataset": str(text)}, max_steps=1))
    arguments = ["--checkpoint", str(run.checkpoint), "--input_file", str(text)]
    for split, notes in {"all": 0, "train": 1, "val": 1}.items():
        assert main([*arguments, "--split", split]) == 0
        assert (
            capsys.readouterr().err.count("note: this run held out documents of text.txt, not the end")
            == notes
        )
