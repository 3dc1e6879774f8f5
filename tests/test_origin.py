"""A fine-tuned model says what it was made from: in its state, on its card, through an export of an export."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from smollm2.checkpoint import FINAL_NAMES, step_name, verify
from smollm2.config import DataConfig, RunConfig, SmolLM2Config
from smollm2.errors import ConfigError
from smollm2.export import export
from smollm2.files import origin_name
from smollm2.logs import TRAINING, numbers, read_log
from smollm2.progress import Reporter
from smollm2.state import read_state
from smollm2.training import train
from tests.soak import small_config

BASE = "HuggingFaceTB/SmolLM2-135M"


def configured(text: Path, folder: Path, init_from: str | Path | None = None, steps: int = 4, more: int = 0):
    often = {"val_every": 2, "sample_every": 4, "save_every": 2, "warmup_steps": 1}
    place = {"init_from": str(init_from) if init_from else None}
    return small_config(text, folder, place=place, max_steps=steps, continue_steps=more, **often)


def trained(*args, **steps) -> Path:
    return train(configured(*args, **steps), Reporter()).checkpoint


@pytest.fixture(scope="module")
def scratch(text, tmp_path_factory) -> Path:
    """A finished run from random weights."""
    return trained(text, tmp_path_factory.mktemp("scratch") / "output")


@pytest.fixture
def weights(scratch, tmp_path, monkeypatch) -> Path:
    """A folder of weights of that shape that says nothing of its origin; the Hub holds them, too."""
    ours = shutil.ignore_patterns("state.json", "manifest.json", "optim.safetensors")
    copy = shutil.copytree(scratch, tmp_path / "weights of a friend", ignore=ours)
    files = {path.name: path for path in copy.iterdir()}
    monkeypatch.setattr("smollm2.weights.fetch_files", lambda *_, **__: files)
    return copy


def card(checkpoint: Path, out: Path) -> str:
    return (export(checkpoint, out) / "README.md").read_text()


def origin(checkpoint: Path) -> tuple[str | None, str | None]:
    state = read_state(verify(checkpoint))
    return state.init_from, state.base_model


def test_a_run_from_random_weights_is_its_own(scratch, tmp_path):
    assert origin(scratch) == (None, None) and origin_name(scratch / "." / "") == scratch.name
    written = card(scratch, tmp_path / "out")
    assert "license: mit\n" in written and "base_model" not in written and "started from" not in written
    assert "| preset | nano |" in written and "| text | `text.txt` |" in written


def test_the_card_holds_the_runs_own_figures_up_to_its_step(scratch, weights, tmp_path):
    half = scratch.with_name(step_name(2))  # the log goes on to step 4
    events = [numbers(event) for event in read_log(scratch.parents[1] / "logs" / TRAINING)]
    logged = {key: value for event in events if event["step"] <= 2 for key, value in event.items()}
    out, written = tmp_path / "out", card(half, tmp_path / "out")
    for what, figure in {
        "optimizer steps": "2", "tokens seen": f"{2 * 8 * 16}", "peak learning rate": "0.003",
        "last training loss (nats a token)": f"{logged['train_loss']:.5g}",
        "last held-out bits per byte": f"{logged['val_bits_per_byte']:.5g}",
        "best held-out bits per byte": f"{read_state(verify(half)).best['bits_per_byte']:.5g}",
    }.items():  # fmt: skip
        assert f"| {what} | {figure} |" in written
    assert written.startswith("---\n") and str(tmp_path) not in written
    # what was trained, not what would fit
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 16
    assert 'TEMPLATE """{{ .Prompt }}"""' in (out / "Modelfile").read_text()
    assert "## Training" not in card(weights, tmp_path / "of a folder without a run")


@pytest.mark.parametrize(
    ("said", "ids"),
    [("HuggingFaceFW/fineweb-edu:sample-10BT@train", ["HuggingFaceFW/fineweb-edu"]), ("my.txt", []),
     ("tales, HuggingFaceTB/cosmopedia:stories, a/b", ["HuggingFaceTB/cosmopedia", "a/b"])],
)  # fmt: skip
def test_a_card_names_datasets_as_the_hub_knows_them(weights, tmp_path, said, ids):
    """It refuses a card with any other word there. Nor is the language known."""
    (weights / "state.json").write_text(json.dumps({"text": said}))
    written = card(weights, tmp_path / "out")
    assert ModelCard(written).data.to_dict().get("datasets", []) == ids and f"| text | `{said}` |" in written
    assert "language" not in ModelCard(written).data.to_dict()


def test_a_mixture_is_named_by_its_sources_without_their_paths(text, tmp_path):
    other = shutil.copy(text, tmp_path / "other.txt")
    config = small_config(text, tmp_path / "run", data={"dataset": f"{text}=0.7,{other}=0.3"}, max_steps=1)
    written = card(train(config, Reporter()).checkpoint, tmp_path / "out")
    assert "| text | `other.txt, text.txt` |" in written and "tmp" not in written


def test_a_fine_tune_names_its_base_model_and_licence(weights, scratch, text, tmp_path):
    tuned = trained(text, tmp_path / "a", BASE)
    assert origin(tuned) == (BASE, BASE)
    assert verify(tuned).run_id != verify(scratch).run_id  # same settings, same text, another run
    written = card(tuned, tmp_path / "out")
    assert f"base_model: {BASE}\n" in written and "license: apache-2.0\n" in written
    assert f"| started from | {BASE} |" in written and "Apache licence 2.0" in written
    # a fine-tune of that fine-tune, and of its export, still knows; neither says where the folder lay
    for i, source in enumerate((tuned, tmp_path / "out")):
        again = trained(text, tmp_path / f"again{i}", source)
        assert origin(again) == (source.name, BASE)
        written = card(again, tmp_path / f"out{i}")
        assert f"base_model: {BASE}\n" in written and str(tmp_path) not in written
    assert f"base_model: {BASE}\n" in card(tmp_path / "out", tmp_path / "copy")


def test_the_origin_survives_a_resume_to_the_bit(weights, text, tmp_path):
    whole = trained(text, tmp_path / "whole", BASE, steps=8)
    final = trained(text, tmp_path / "parts", BASE, steps=4, more=4)
    assert final.name == FINAL_NAMES[1]
    for name in ("model.safetensors", "optim.safetensors", "state.json"):
        assert (final / name).read_bytes() == (whole / name).read_bytes(), name
    before = (final / "manifest.json").read_bytes()
    assert trained(text, tmp_path / "parts", steps=4, more=4) == final  # not named again: finished, unchanged
    assert (final / "manifest.json").read_bytes() == before
    with pytest.raises(ConfigError, match=f"run.init_from: {BASE} -> someone/model"):
        trained(text, tmp_path / "parts", "someone/model", steps=4, more=8)


def test_weights_that_do_not_go_with_the_run_are_refused_before_anything_is_written(scratch, text, tmp_path):
    output = shutil.copytree(scratch.parent.parent, tmp_path / "output")
    with pytest.raises(ConfigError, match=r"run\.init_from: random weights -> final_model"):
        trained(text, output, scratch, steps=8)
    config = configured(text, tmp_path / "new", scratch)
    longer = RunConfig(data=DataConfig(input_file=str(text), sequence_length=100), run=config.run)
    with pytest.raises(ConfigError, match=r"run\.init_from=.*data\.sequence_length 100 exceeds"):
        train(longer, Reporter())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["Hub", "folder"])
def test_a_resume_that_does_not_name_its_first_weights_is_told_to(weights, text, tmp_path, source):
    source = BASE if source == "Hub" else weights
    output = tmp_path / "output"
    trained(text, output, source)
    config = configured(text, output, steps=8).model_copy(update={"model": SmolLM2Config()})
    told = rf"\(run.init_from: {origin_name(source)} -> random weights\): put them back, or"
    with pytest.raises(ConfigError, match=told) as error:
        train(config, Reporter())
    assert "hidden_size" not in str(error.value) and f"--output_dir {output} was" in str(error.value)
