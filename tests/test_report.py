"""The picture of a run: drawn at its end, from its logs alone, and never in the way."""

import pytest

from smollm2 import report
from smollm2.card import last_figures
from smollm2.config import PlaceConfig
from smollm2.logs import METRICS, TRAINING, numbers, read_log
from smollm2.ngram import NGram
from smollm2.progress import Reporter
from smollm2.report import draw_report, training_seconds
from smollm2.text import read_split
from smollm2.training import train
from tests.soak import small_config


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """(configuration, result) of a run of two phases."""
    config = small_config(text, tmp_path_factory.mktemp("report") / "output", max_steps=20, continue_steps=10)
    return config, train(config, Reporter())


def test_a_run_ends_with_its_picture(run):
    result = run[1]
    assert result.report.read_bytes().startswith(b"\x89PNG") and str(result.report) in result.table()


def test_the_picture_shows_the_run_and_its_rivals_on_both_scales(run, text):
    config, result = run
    figure, alt = draw_report(config, result.references)
    axis, logged = figure.axes[0], [numbers(e) for e in read_log(result.report.parent / "logs" / TRAINING)]
    lines = {line.get_label().split(":")[0]: line for line in axis.lines}
    losses = [e["train_loss"] for e in logged if "train_loss" in e]
    assert list(lines["training"].get_ydata()) == losses
    held_out = [e["val_loss"] for e in logged if "val_loss" in e]
    assert list(lines["held out"].get_ydata()) == held_out
    to_bits = axis.child_axes[0]._functions[0]
    assert to_bits(held_out[-1]) == pytest.approx(result.bits_per_byte, rel=1e-5)
    train_text, val_text = ("".join(read_split(str(text), part)).encode() for part in ("train", "val"))
    rivals = result.references | {"counting": NGram(train_text, 6).bits(val_text).mean()}
    for name, bits in rivals.items():
        assert to_bits(lines[name].get_ydata()[0]) == pytest.approx(bits) and f"{name} {bits:.2f}" in alt


def test_the_last_score_is_in_the_picture_where_no_loss_was_due_with_it(text, tmp_path):
    config = small_config(text, tmp_path / "output", max_steps=7)  # a loss is logged every 5
    figure, _ = draw_report(config, train(config, Reporter()).references)
    assert figure.axes[0].get_xlim()[1] == 7


def test_the_best_score_is_one_of_those_that_read_as_much_as_the_last(text, tmp_path):
    """An easy beginning of the held-out text, which `train.val_max_tokens` asks for, is no better checkpoint."""
    config = small_config(text, tmp_path / "output")
    (tmp_path / "output" / "logs").mkdir(parents=True)
    scores = [(5, 3.2, 100), (10, 1.1, 100), (15, 2.7, 1000), (20, 2.8, 1000)]
    lines = [f"x step={s} train_loss=3\nx step={s} val_loss={b} val_bits_per_byte={b} val_tokens={n}\n" for s, b, n in scores]  # fmt: skip
    (tmp_path / "output" / "logs" / TRAINING).write_text("".join(lines))
    figure, alt = draw_report(config, {})
    assert "(lowest 2.70 at step 15)" in alt
    assert "lowest, at step 15: the one to publish" in [line.get_label() for line in figure.axes[0].lines]
    folder = tmp_path / "output" / "checkpoints" / "x.ckpt"
    assert [last_figures(folder, step)["best"] for step in (5, 10, 15, 20)] == [3.2, 1.1, 2.7, 2.7]


def test_a_picture_names_the_conversations_that_were_learned(run, text):
    config = run[0].model_copy(update={"data": run[0].data.model_copy(update={"chat_file": "a/talk.jsonl"})})
    assert draw_report(config, run[1].references)[0].axes[0].get_title("left") == "nano on talk.jsonl"


def test_seconds_are_those_of_the_steps_and_a_pause_does_not_count(run):
    result = run[1]
    seconds = training_seconds(result.report.parent, 8 * 16)
    speeds = {
        e["step"]: e["tokens_per_second"]
        for e in map(numbers, read_log(result.report.parent / "logs" / METRICS))
    }
    assert list(seconds) == [0, *speeds] and list(speeds)[-1] == 30
    assert seconds[30] - seconds[25] == pytest.approx(5 * 8 * 16 / speeds[30])


def test_a_disk_that_does_not_take_the_picture_costs_only_the_picture(text, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "replace_durably", full)
    result = train(small_config(text, tmp_path / "output", max_steps=5), Reporter())
    assert result.checkpoint.is_dir() and result.report is None and "curves" not in result.table()


def test_the_lowest_score_is_in_the_picture_of_a_run_that_diverged(run, tmp_path):
    """A mark outside pushed the axis out of its own picture."""
    config, logs = run[0].model_copy(update={"run": PlaceConfig(output_dir=str(tmp_path))}), tmp_path / "logs"
    logs.mkdir()
    rows = [
        (step, f"train_loss={loss} val_loss={loss} val_bits_per_byte={loss}")
        for step, loss in ((1, 6), (2, 2), (3, 9))
    ]
    (logs / TRAINING).write_text("".join(f"now step={step} {words}\n" for step, words in rows))
    (logs / METRICS).write_text("".join(f"now step={step} tokens_per_second=1000\n" for step, _ in rows))
    figure, _ = draw_report(config, {})
    assert figure.axes[0].get_ylim()[0] < 2


def test_a_tick_is_a_step_also_in_a_short_run(text, tmp_path):
    config = small_config(text, tmp_path / "output", max_steps=3, log_every=1)
    figure, _ = draw_report(config, train(config, Reporter()).references)
    assert [tick.get_text().split("\n")[0] for tick in figure.axes[0].get_xticklabels()] == [
        "0",
        "1",
        "2",
        "3",
    ]
