"""A fine-tuned model says what it was made from: in its state, on its card, and through an export of an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from smollm2 import evaluate
from smollm2.checkpoint import FINAL_NAMES, commit, verify
from smollm2.config import DataConfig, PlaceConfig, RunConfig, SmolLM2Config
from smollm2.errors import ConfigError
from smollm2.export import export
from smollm2.files import dump_json, strict_json
from smollm2.origin import origin_name
from smollm2.progress import Reporter
from smollm2.state import read_state
from smollm2.training import train
from tests.soak import compare, outcome, small_config, small_text

BASE = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return small_text(tmp_path_factory.mktemp("text") / "text.txt")


def configured(text: Path, folder: Path, init_from: str | Path | None = None, steps: int = 4, more: int = 0):
    config = small_config(
        text,
        folder,
        max_steps=steps,
        continue_steps=more,
        val_every=2,
        sample_every=4,
        save_every=2,
        warmup_steps=1,
    )
    return config.model_copy(
        update={"run": config.run.model_copy(update={"init_from": str(init_from) if init_from else None})}
    )


@pytest.fixture(scope="module")
def scratch(text, tmp_path_factory) -> Path:
    """A finished run from random weights."""
    return train(configured(text, tmp_path_factory.mktemp("scratch") / "output"), Reporter()).checkpoint


@pytest.fixture
def hub(scratch, tmp_path, monkeypatch):
    """The Hub holds a model of that shape."""
    copy = shutil.copytree(
        scratch,
        tmp_path / "snapshot",
        ignore=shutil.ignore_patterns("state.json", "manifest.json", "optim.safetensors"),
    )
    files = {path.name: path for path in copy.iterdir()}
    monkeypatch.setattr("smollm2.hub.fetch_files", lambda *_, **__: files)


def card(checkpoint: Path, out: Path) -> str:
    return (export(checkpoint, out) / "README.md").read_text()


def test_a_run_from_random_weights_is_its_own(scratch, tmp_path):
    state = read_state(verify(scratch))
    assert state.init_from is None and state.base_model is None
    written = card(scratch, tmp_path / "out")
    assert "license: mit\n" in written and "base_model" not in written and "started from" not in written


def test_a_fine_tune_names_its_base_model_and_licence(hub, scratch, text, tmp_path):
    tuned = train(configured(text, tmp_path / "a", BASE), Reporter()).checkpoint
    state = read_state(verify(tuned))
    assert (state.init_from, state.base_model) == (BASE, BASE)
    written = card(tuned, tmp_path / "out")
    header = written.split("---")[1]
    assert verify(tuned).run_id != verify(scratch).run_id  # same settings, same text, another run
    assert f"base_model: {BASE}\n" in header and "license: apache-2.0\n" in header
    assert f"| started from | {BASE} |" in written and "Apache licence 2.0" in written
    # a fine-tune of that fine-tune, and of its export, still knows; neither says where the folder lay
    for i, source in enumerate((tuned, tmp_path / "out")):
        again = train(configured(text, tmp_path / f"again{i}", source), Reporter()).checkpoint
        state = read_state(verify(again))
        assert (state.init_from, state.base_model) == (source.name, BASE)
        written = card(again, tmp_path / f"out{i}")
        assert f"base_model: {BASE}\n" in written and str(tmp_path) not in written
    assert f"base_model: {BASE}\n" in card(tmp_path / "out", tmp_path / "copy")


def test_a_licence_that_is_not_known_is_not_named(hub, scratch, text, tmp_path):
    tuned = train(configured(text, tmp_path / "a", "someone/model"), Reporter()).checkpoint
    written = card(tuned, tmp_path / "out")
    assert (
        "base_model: someone/model\n" in written
        and "license:" not in written
        and "their licence holds for these, too" in written
    )
    nameless = shutil.copytree(tmp_path / "snapshot", tmp_path / "weights of a friend")
    tuned = train(configured(text, tmp_path / "b", nameless), Reporter()).checkpoint
    written = card(tuned, tmp_path / "out2")
    assert (
        "license:" not in written
        and "base_model" not in written
        and "`weights of a friend`" in written
        and str(tmp_path) not in written
    )
    assert "license:" not in card(nameless, tmp_path / "out3")


def test_the_origin_survives_a_resume_to_the_bit(hub, text, tmp_path):
    train(configured(text, tmp_path / "whole", BASE, steps=8), Reporter())
    config = configured(text, tmp_path / "parts", BASE, steps=4, more=4)
    final = train(config, Reporter()).checkpoint
    assert final.name == FINAL_NAMES[1]
    for name in ("model.safetensors", "optim.safetensors", "state.json"):
        assert (final / name).read_bytes() == (
            tmp_path / "whole" / "checkpoints" / FINAL_NAMES[0] / name
        ).read_bytes(), name
    expected = outcome(tmp_path / "parts")
    train(
        configured(text, tmp_path / "parts", steps=4, more=4), Reporter()
    )  # without naming it again: finished, and unchanged
    compare(tmp_path / "parts", expected)
    with pytest.raises(ConfigError, match=f"run.init_from=someone/model: .* began with {BASE}"):
        train(configured(text, tmp_path / "parts", "someone/model", steps=4, more=8), Reporter())


def test_a_run_from_random_weights_does_not_take_others_silently(scratch, text, tmp_path):
    output = shutil.copytree(scratch.parent.parent, tmp_path / "output")
    with pytest.raises(ConfigError, match="began with random weights; leave it out"):
        train(configured(text, output, scratch, steps=8), Reporter())


def test_a_resume_that_does_not_name_the_weights_it_has_its_shape_from_is_told_what_to_pass(
    hub, scratch, text, tmp_path
):
    for source, said in ((BASE, BASE), (scratch, f"FOLDER, the one called {scratch.name}")):
        output = tmp_path / Path(source).name
        config = configured(text, output, source, steps=8)
        train(configured(text, output, source), Reporter())
        other = config.model_copy(
            update={"model": SmolLM2Config(), "run": config.run.model_copy(update={"init_from": None})}
        )
        with pytest.raises(
            ConfigError,
            match=f"began with the weights of {origin_name(source)} and has their shape: pass --set run.init_from={said}, again; or choose",
        ) as error:
            train(other, Reporter())
        assert "hidden_size" not in str(error.value) and f"--output_dir {output} began" in str(error.value)
        assert train(config.model_copy(update={"model": other.model}), Reporter()).step == 8


def test_rows_longer_than_the_context_it_starts_from_are_refused_before_anything_is_written(
    scratch, text, tmp_path
):
    config = RunConfig(
        data=DataConfig(input_file=str(text), sequence_length=100),
        run=PlaceConfig(output_dir=str(tmp_path / "o"), init_from=str(scratch)),
    )
    with pytest.raises(ConfigError, match=r"run\.init_from=.*data\.sequence_length 100 exceeds"):
        train(config, Reporter())
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_from_before_the_origin_was_recorded_goes_on(scratch, text, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(scratch.parent.parent, output)
    checkpoints, old = output / "checkpoints", verify(scratch)
    fields = strict_json((scratch / "state.json").read_bytes(), "state.json")
    del fields["init_from"], fields["base_model"]
    files = {path.name: path.read_bytes() for path in scratch.iterdir() if path.name != "manifest.json"} | {
        "state.json": dump_json(fields)
    }
    for folder in checkpoints.iterdir():
        shutil.rmtree(folder)
    made = commit(checkpoints, FINAL_NAMES[0], files, old.run_id, old.step, old.facts)
    assert "license:" not in card(made.folder, tmp_path / "out")  # it does not say
    train(configured(text, output, steps=8), Reporter())
    train(configured(text, tmp_path / "whole", steps=4, more=4), Reporter())
    later, whole = (
        json.loads((folder / "state.json").read_text())
        for folder in (checkpoints / FINAL_NAMES[0], tmp_path / "whole/checkpoints" / FINAL_NAMES[1])
    )
    assert later["step"] == 8 and set(later) == set(whole) and later["init_from"] is None


def test_only_a_name_is_kept_of_a_folder(tmp_path):
    assert origin_name(tmp_path / "." / "") == tmp_path.name
    assert origin_name(BASE) == BASE


def test_the_command_scores_a_checkpoint_as_its_run_did(text, tmp_path, capsys):
    """Rows as long as in training, and the part that this run held out: else half of it might have been trained on."""
    config = small_config(text, tmp_path / "output", max_steps=6, warmup_steps=1)
    config = config.model_copy(update={"data": config.data.model_copy(update={"held_out_fraction": 0.3})})
    result = train(config, Reporter())
    capsys.readouterr()
    evaluate.main(
        ["--checkpoint", str(result.checkpoint), "--input_file", str(text), "--split", "val", "--json"]
    )
    score = json.loads(capsys.readouterr().out)
    assert score["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-6)
    assert score["bytes"] == pytest.approx(0.3 * text.stat().st_size, abs=2)


def test_the_card_names_preset_text_and_all_tokens(scratch, text, tmp_path):
    written = card(scratch, tmp_path / "out")
    assert "| preset | nano |" in written and "| text | `text.txt` |" in written
    assert f"| tokens seen | {4 * 8 * 16:,} |" in written and "datasets:" not in written
