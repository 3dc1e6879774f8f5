"""What a run says at its end: the figures, the best checkpoint where it is not the last, and how to go on."""

import re

import pytest
from conftest import Heard

from smollm2 import result as results
from smollm2.checkpoint import verify
from smollm2.evaluate import score_file
from smollm2.export import export
from smollm2.pretrained import load_model_and_tokenizer
from smollm2.result import TrainResult
from smollm2.text import read_split
from smollm2.training import train
from tests.soak import small_config, small_text
from tests.tiny_models import save_folder, tiny_model


def train_beside(other, text, output_dir, heard=None, **settings) -> TrainResult:
    config = small_config(text, output_dir, max_steps=5, **settings)
    place = config.run.model_copy(update={"compare_with": str(other)})
    return train(config.model_copy(update={"run": place}), heard or Heard())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("other") / "published", tiny_model(vocab_size=400))


def test_another_model_is_scored_on_the_same_held_out_bytes_and_told_everywhere(text, other, tmp_path):
    result = train_beside(other, text, tmp_path / "output")
    context = {"block_length": tiny_model().config.max_position_embeddings}
    score = score_file(*load_model_and_tokenizer(other), text, "val", **context)
    assert (
        result.compared.theirs == result.references["published"] == pytest.approx(score.bits_per_byte, 1e-6)
    )
    told = f"{score.bits_per_byte:.3f} on the same {score.bytes:,} bytes, where this run has {result.bits_per_byte:.3f}"
    table = result.table()
    assert f"published               {told}" in table and "kept in" not in table, "the last is the best"
    compressed = ", ".join(f"{name} {bits:.3f}" for name, bits in [*result.references.items()][:2])
    assert f"{result.bits_per_byte:.3f}  (the same bytes: {compressed}" in table
    card = (export(result.checkpoint, tmp_path / "export") / "README.md").read_text()
    for name, bits in result.references.items():
        assert f"| {name} on the same text (bits per byte) | {bits:.5g} |" in card
    assert list(result.references) == ["gzip -9", "xz", "counting", "published"]


def test_of_a_long_text_both_are_scored_on_its_beginning_alone(text, other, tmp_path, monkeypatch):
    monkeypatch.setitem(results.COMPARED_BYTES, "cpu", 200)
    result = train_beside(other, text, tmp_path / "output")
    beginning = tmp_path / "beginning.txt"
    with_all = "".join(read_split(text, "val"))
    beginning.write_bytes(with_all.encode()[:200])
    run = load_model_and_tokenizer(result.checkpoint)
    assert result.compared.ours == pytest.approx(score_file(*run, beginning, block_length=16).bits_per_byte)
    assert "published" not in result.references and "on the first 200 bytes" in result.table()


@pytest.mark.parametrize("name, settings, why", [
    ("owner/model", {}, ".* is out of reach"), ("damaged", {}, ""),
    ("published", {"minutes": 0.02}, "no time is left for it"), ("published", {"stop_after": 0.9}, "no time is left for it"),
])  # fmt: skip
def test_what_cannot_be_compared_costs_a_line_alone(text, other, tmp_path, monkeypatch, name, settings, why):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    damaged = save_folder(tmp_path / "damaged", tiny_model())
    (damaged / "model.safetensors").write_bytes(b"torn")
    source = {"published": other, "damaged": damaged}.get(name, name)
    heard = Heard()
    result = train_beside(source, text, tmp_path / "output", heard, **settings)
    assert result.compared is None and result.report.is_file() and list(result.references)[-1] == "counting"
    assert re.search(f"not compared with {name}: {why}", heard.messages[-1])
    assert verify(result.checkpoint).step == result.step


def test_a_run_that_learns_its_text_by_heart_says_so_and_keeps_the_best_checkpoint(tmp_path):
    text, seen = small_text(tmp_path / "text.txt", words=150), Heard()
    often = {"val_every": 25, "save_every": 25, "keep_last": 1}
    often |= {"max_steps": 300, "learning_rate": 0.02, "decay_fraction": 0.0}
    config = small_config(text, tmp_path / "out put", **often)
    result = train(config, seen)
    step, score = result.best
    assert score == min(bits for _, _, bits in result.validations) < result.bits_per_byte and step < 300
    folder = tmp_path / "out put/checkpoints"
    assert verify(folder / f"step-{step:08d}.ckpt").step == step
    assert f"{score:.3f} at step {step}, kept in {folder}/step-{step:08d}.ckpt" in result.table()
    assert f"--checkpoint '{folder}/final_model.ckpt'" in result.table()
    (note,) = [line for line in seen.messages if line.startswith("note: 300 steps read this text")]
    assert "about" in note and "steps do better" in note
