"""What a run says at its end: the figures, the best checkpoint where it is not the last, and how to go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from smollm2.checkpoint import verify
from smollm2.progress import Reporter
from smollm2.result import TrainResult
from smollm2.training import train
from tests.soak import small_config, small_text


class Lines(Reporter):
    def __init__(self):
        self.lines = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def finished(score: float, best: tuple[int, float] | None) -> TrainResult:
    return TrainResult(
        90,
        Path("out put/checkpoints/final_model.ckpt"),
        None,
        61.0,
        1234.0,
        score,
        {"gzip -9": 3.1, "xz": 2.9},
        best=best,
    )


def test_the_table_says_what_was_reached_and_how_to_talk_to_it():
    table = finished(1.777, (90, 1.777)).table()
    assert (
        "1.777  (the same bytes: gzip -9 3.100, xz 2.900)" in table and "1,234" in table and "61 s" in table
    )
    assert "--checkpoint 'out put/checkpoints/final_model.ckpt'" in table
    assert "best held-out" not in table


@pytest.mark.parametrize(("best", "is_told"), [((40, 1.5), True), ((40, 1.995), False), (None, False)])
def test_a_better_checkpoint_before_the_last_is_named(best, is_told):
    assert (
        "best held-out           1.500 at step 40, kept in out put/checkpoints/step-00000040.ckpt"
        in finished(2.0, best).table()
    ) is is_told


def test_a_run_that_learns_its_text_by_heart_says_so_and_keeps_the_best_checkpoint(tmp_path):
    text, seen = small_text(tmp_path / "text.txt", words=150), Lines()
    config = small_config(
        text,
        tmp_path / "output",
        max_steps=300,
        learning_rate=0.02,
        val_every=25,
        save_every=1000,
        keep_last=1,
        decay_fraction=0.0,
    )
    result = train(config, seen)
    step, score = result.best
    assert score == min(bits for _, _, bits in result.validations) < result.bits_per_byte and step < 300
    assert verify(tmp_path / "output/checkpoints" / f"step-{step:08d}.ckpt").step == step
    assert f"at step {step}, kept in" in result.table()
    assert sum("learned by heart; the best checkpoint is kept" in line for line in seen.lines) == 1
    (note,) = [line for line in seen.lines if line.startswith("note: 300 steps read this text")]
    assert "about" in note and "steps do better" in note


def test_a_run_that_reads_little_of_its_text_says_how_many_steps_read_it_once(tmp_path):
    seen = Lines()
    train(small_config(small_text(tmp_path / "text.txt"), tmp_path / "output", max_steps=3), seen)
    (note,) = [line for line in seen.lines if line.startswith("note: 3 steps read ")]
    assert "% of this text; --max_steps" in note


def test_a_run_that_reads_its_text_a_few_times_is_not_warned(tmp_path):
    seen = Lines()
    result = train(small_config(small_text(tmp_path / "text.txt"), tmp_path / "output", max_steps=30), seen)
    assert (
        not [line for line in seen.lines if line.startswith("note:") or "by heart" in line]
        and "best held-out" not in result.table()
    )
