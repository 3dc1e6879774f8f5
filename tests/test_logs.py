"""The five text logs and TensorBoard of a real run: each holds what its name says, one parseable line an event."""

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from smollm2 import logs, train
from smollm2.progress import Reporter
from tests.soak import small_config


def configured(text: Path, folder: Path, name: str = "output", **more):
    often = {"max_steps": 130, "log_every": 10, "val_every": 50, "sample_every": 50, "save_every": 50}
    return small_config(text, folder / name, place={"drive_dir": str(folder / "drive")}, **often | more)


@pytest.fixture(scope="module")
def run_dir(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    train(configured(text, folder), Reporter())
    return folder / "output"


def read(run_dir: Path) -> dict[str, list[dict[str, str]]]:
    return {path.stem: logs.read_log(path) for path in (run_dir / "logs").glob("*.txt")}


def test_every_line_is_a_time_a_step_and_key_value_pairs(run_dir):
    names = "training_loss generation_samples checkpoint_events epoch_completion gpu_metrics"
    assert set(read(run_dir)) == set(names.split())
    for path in (run_dir / "logs").glob("*.txt"):
        events = [logs.parse_line(line) for line in path.read_text().splitlines(keepends=True)]
        assert events and all(int(event["step"]) >= 0 for event in events)
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"]) for event in events)


def test_each_log_holds_what_its_name_says(run_dir):
    found = read(run_dir)
    losses = [event for event in found["training_loss"] if "train_loss" in event]
    assert [int(event["step"]) for event in losses] == [1, *range(10, 131, 10)]
    assert all(int(e["tokens"]) == int(e["step"]) * 8 * 16 and float(e["lr"]) >= 0 for e in losses)
    validations = [event for event in found["training_loss"] if "val_loss" in event]
    assert [int(event["step"]) for event in validations] == [50, 100, 130]
    assert all(float(event["val_bits_per_byte"]) > 0 for event in validations)
    samples = found["generation_samples"]
    assert len({e["prompt"] for e in samples}) == 3
    assert len(samples) == 9 and all("text" in e for e in samples)
    assert "saved" in {event["event"] for event in found["checkpoint_events"]}
    epoch = found["epoch_completion"][0]
    assert epoch["epoch"] == "1" and float(epoch["mean_train_loss"]) > 0
    metrics = found["gpu_metrics"]
    assert all(e["device"] == "cpu" and int(e["rss_bytes"]) > 1e7 and "note" in e for e in metrics)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_machine_that_goes_on_from_drive_shows_tensorboard_every_earlier_step_once(text, run_dir):
    train(configured(text, run_dir.parent, "fresh", continue_steps=20), Reporter())
    before, after = curves(run_dir / "logs"), curves(run_dir.with_name("fresh") / "logs")
    tags = {f"train/{name}" for name in ("loss", "lr", "gradient_norm", "tokens_per_second")}
    assert set(after) == set(before) == tags | {"val/loss", "val/bits_per_byte"}
    assert [step for step, _ in before["val/loss"]] == [50, 100, 130]
    for tag, points in before.items():
        steps, values = zip(*after[tag], strict=True)
        new = (140, 150) if tag in tags else (150,)
        assert steps == (*(step for step, _ in points), *new), tag
        rounding = 0.06 if tag == "train/tokens_per_second" else 1e-6
        expected = pytest.approx([value for _, value in points], rel=1e-5, abs=rounding)
        assert list(values[: len(points)]) == expected, tag


def test_a_resume_repeats_and_loses_no_line_and_no_point(tmp_path):
    for start, known in ((1, 0), (3, 2), (3, 2)):  # two kills after step 6, the checkpoint is that of step 2
        text = logs.Logs(tmp_path, {logs.TRAINING: known})
        for step in range(start, 7):
            text.write(logs.TRAINING, step, train_loss=1 / step)
            text.write(logs.CHECKPOINTS, step, event="noted")
        with open(tmp_path / logs.TRAINING, "ab") as file:
            file.write(b"2026-11-23T19:00:00Z step=7 train_lo")  # torn
    logs.Logs(tmp_path, {logs.TRAINING: 4})
    assert [event["step"] for event in logs.read_log(tmp_path / logs.TRAINING)] == ["1", "2", "3", "4"]
    assert curves(tmp_path) == {"train/loss": [(n, pytest.approx(1 / n, abs=1e-6)) for n in range(1, 5)]}
    assert len(logs.read_log(tmp_path / logs.CHECKPOINTS)) == 14, "what happened to checkpoints stays"


def test_words_with_blanks_and_quotes_come_back(tmp_path):
    text = logs.Logs(tmp_path, {})
    said = 'He said "no = yes",\nand left \\ quickly'
    text.write(logs.SAMPLES, 5, prompt="Once upon a time", text=said)
    (event,) = logs.read_log(tmp_path / logs.SAMPLES)
    assert event["text"] == said and event["prompt"] == "Once upon a time"


def test_a_figure_that_the_system_does_not_tell_ends_no_run(monkeypatch):
    """Python's load average raises OSError in some containers; psutil meets closed doors in /proc."""
    closed = Mock(side_effect=OSError("Load averages are unobtainable"))
    monkeypatch.setattr("psutil.getloadavg", closed)
    assert logs.resources(torch.device("cpu"))["load_1min"] == "n/a (OSError)"
    monkeypatch.setattr("psutil.Process", closed)
    assert logs.resources(torch.device("cpu"))["rss_bytes"] == "n/a (OSError)"
