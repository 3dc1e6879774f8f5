"""Bits per byte: every token once, every byte counted, and one figure for models with different tokenizers."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, transformers_twin
from tiny_models import metaspace_tokenizer

from smollm2.errors import CheckpointError, DataError
from smollm2.evaluate import compression_bits_per_byte, main, score_file, score_tokens
from smollm2.model import SmolLM2
from smollm2.tokenizer import Tokenizer

TEXT = "The cat sat on the mat, and the dog, naïve as ever, did not.\n" * 60


def tokens_of(model, count: int) -> np.ndarray:
    return np.random.default_rng(8).integers(0, model.config.vocab_size, count).astype(np.uint16)


def nats_token_by_token(model, tokens, block: int) -> float:
    """The definition, written out with transformers: each block afresh, its first token behind the one before it."""
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
def test_the_score_is_the_definition_for_any_length_and_batch(count, per_batch):
    model = tiny_model(bos_token_id=3).eval()
    tokens = tokens_of(model, count)
    score = score_tokens(model, tokens, text_bytes=3 * count, block_length=32, tokens_per_batch=per_batch)
    nats = nats_token_by_token(model, tokens, 32)
    assert score.loss == pytest.approx(nats / count, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * count), rel=1e-5)
    assert (score.tokens, score.bytes) == (count, 3 * count)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_a_token():
    model = tiny_model(vocab_size=64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = score_tokens(model, tokens_of(model, 500), text_bytes=1000)
    assert score.loss == pytest.approx(math.log(64)) and score.bits_per_byte == pytest.approx(6 * 500 / 1000)


def test_the_default_block_is_the_whole_context():
    model = tiny_model(max_position_embeddings=50).eval()
    tokens = tokens_of(model, 120)
    assert score_tokens(model, tokens, 120).loss == pytest.approx(
        nats_token_by_token(model, tokens, 50) / 120, rel=1e-5
    )


def test_a_part_can_be_scored_and_its_bytes_are_in_proportion():
    model = tiny_model().eval()
    tokens = tokens_of(model, 300)
    part = score_tokens(model, tokens, text_bytes=900, max_tokens=100)
    assert (part.tokens, part.bytes) == (100, 300)
    assert part.loss == pytest.approx(score_tokens(model, tokens[:100], text_bytes=300).loss, rel=1e-6)


def test_scoring_leaves_the_model_as_it_was():
    model = tiny_model()
    for mode in (True, False):
        model.train(mode)
        score_tokens(model, tokens_of(model, 50), 50)
        assert model.training is mode and all(p.grad is None for p in model.parameters())


def test_autocast_is_used_when_given():
    model, entered = tiny_model(), []

    def context():
        entered.append(1)
        return torch.autocast("cpu", dtype=torch.bfloat16)

    exact = score_tokens(model, tokens_of(model, 100), 100).loss
    half = score_tokens(model, tokens_of(model, 100), 100, autocast=context).loss
    assert entered and half != exact and half == pytest.approx(exact, abs=0.02)


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError, match="no tokens"):
        score_tokens(tiny_model(), np.zeros(0, np.uint16), 0)


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train([TEXT], 300)
    tiny_model(vocab_size=tokenizer.vocab_size).save_pretrained(folder / "checkpoint")
    tokenizer.save(folder / "checkpoint", 160)
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_a_file_counts_all_its_bytes_and_the_splits_add_up(checkpoint):
    model = SmolLM2.from_pretrained(checkpoint / "checkpoint")
    tokenizer = Tokenizer.from_file(checkpoint / "checkpoint")
    path = checkpoint / "text.txt"
    scores = {split: score_file(model, tokenizer, path, split) for split in ("all", "train", "val")}
    assert scores["all"].bytes == len(TEXT.encode()) == scores["train"].bytes + scores["val"].bytes
    ids = tokenizer.encode(TEXT)
    assert scores["all"].tokens == len(ids)
    nats = nats_token_by_token(model, np.array(ids, np.uint16), 160)
    assert scores["all"].bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_text_that_the_tokenizer_cannot_hold_has_no_bits_per_byte(tmp_path, capsys):
    """Every unknown character is one well-known token: the worse the tokenizer, the better the figure."""
    tokenizer, path = metaspace_tokenizer(), tmp_path / "text.txt"
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    path.write_text("the king said é\n" * 50)
    with pytest.raises(
        DataError, match=r"text\.txt: 12 % of the bytes .* \('é'\), expected at most 0\.1%: .*byte-level"
    ):
        score_file(model, tokenizer, path)
    path.write_text("the king said: come hither, " * 100 + "é")
    assert score_file(model, tokenizer, path).bytes == 2802
    assert (
        "note: " in (said := capsys.readouterr()).err
        and "0.071 % of the bytes" in said.err
        and said.out == ""
    )


def test_a_saved_model_scores_the_same_after_loading_and_in_transformers(checkpoint):
    from transformers import AutoModelForCausalLM

    model = SmolLM2.from_pretrained(checkpoint / "checkpoint")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint / "checkpoint")
    ids = torch.arange(0, 100).reshape(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_compression_is_the_compressors_own_size(checkpoint):
    path = checkpoint / "text.txt"
    sizes = compression_bits_per_byte(path, "all")
    raw = TEXT.encode()
    assert sizes == {
        "gzip -9": 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw),
        "xz": 8 * len(lzma.compress(raw)) / len(raw),
    }
    assert compression_bits_per_byte(path, "val") != sizes


def test_the_command_prints_one_json_line(checkpoint):
    command = [
        sys.executable,
        "-m",
        "smollm2.evaluate",
        "--checkpoint",
        checkpoint / "checkpoint",
        "--input_file",
        checkpoint / "text.txt",
    ]
    done = subprocess.run(
        [*map(str, command), "--split", "val", "--json"], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and set(result) == {"loss", "bits_per_byte", "tokens", "bytes"}
    model, tokenizer = (
        SmolLM2.from_pretrained(checkpoint / "checkpoint"),
        Tokenizer.from_file(checkpoint / "checkpoint"),
    )
    assert result["loss"] == pytest.approx(
        score_file(model, tokenizer, checkpoint / "text.txt", "val").loss, rel=1e-6
    )


def test_the_command_in_words_names_split_and_units(checkpoint, capsys):
    assert (
        main(["--checkpoint", str(checkpoint / "checkpoint"), "--input_file", str(checkpoint / "text.txt")])
        == 0
    )
    assert "bits/byte" in (out := capsys.readouterr().out) and "nats/token" in out and "(all)" in out


def test_bad_input_is_one_line_and_an_exit_code(checkpoint, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    for model, text, expected in [
        (checkpoint / "checkpoint", tmp_path / "absent.txt", "no such file"),
        (checkpoint / "checkpoint", empty, "nothing to evaluate"),
        (tmp_path / "absent", checkpoint / "text.txt", "expected a checkpoint folder"),
        (checkpoint, checkpoint / "text.txt", "not a checkpoint folder"),
    ]:
        with pytest.raises((DataError, CheckpointError), match=expected) as caught:
            main(["--checkpoint", str(model), "--input_file", str(text)])
        assert "\n" not in str(caught.value)
    command = [
        sys.executable,
        "-m",
        "smollm2.evaluate",
        "--checkpoint",
        str(tmp_path),
        "--input_file",
        str(empty),
        "--splitt",
        "all",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean '--split'" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "source",
    ["x" * 5000, "a/b/c", "./absent", "output/final.pt", "~/model", "tests/absent", ""],
    ids=lambda s: s[:12],
)
def test_a_source_that_cannot_be_a_checkpoint_is_one_clear_line(source):
    with pytest.raises(CheckpointError) as caught:
        SmolLM2.from_pretrained(source)
    assert "\n" not in str(caught.value)
