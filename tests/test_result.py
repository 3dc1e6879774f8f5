"""What a run says at its end: the figures, the best checkpoint where it is not the last, and how to go on."""

from __future__ import annotations

import pytest
from conftest import Heard

from smollm2.checkpoint import verify
from smollm2.result import TrainResult
from smollm2.training import train
from tests.soak import small_config, small_text


@pytest.fixture
def finished(tmp_path):
    """The result of a run whose step 40 is still there."""

    def with_score(score: float, best: tuple[int, float] | None) -> TrainResult:
        folder = tmp_path / "out put/checkpoints"
        (folder / "step-00000040.ckpt").mkdir(parents=True, exist_ok=True)
        references = {"gzip -9": 3.1, "xz": 2.9}
        return TrainResult(90, folder / "final_model.ckpt", None, 61.0, 1234.0, score, references, best=best)

    return with_score


def test_the_table_says_what_was_reached_and_how_to_talk_to_it(finished, tmp_path):
    table = finished(1.777, (90, 1.777)).table()
    assert (
        "1.777  (the same bytes: gzip -9 3.100, xz 2.900)" in table and "1,234" in table and "61 s" in table
    )
    assert f"--checkpoint '{tmp_path}/out put/checkpoints/final_model.ckpt'" in table
    assert "best held-out" not in table


@pytest.mark.parametrize(("best", "is_told"), [((40, 1.5), True), ((40, 1.995), False), (None, False)])
def test_a_better_checkpoint_before_the_last_is_named(finished, tmp_path, best, is_told):
    words = f"1.500 at step 40, kept in {tmp_path}/out put/checkpoints/step-00000040.ckpt"
    assert (words in finished(2.0, best).table()) is is_told


def test_a_run_that_learns_its_text_by_heart_says_so_and_keeps_the_best_checkpoint(tmp_path):
    text, seen = small_text(tmp_path / "text.txt", words=150), Heard()
    config = small_config(
        text,
        tmp_path / "output",
        max_steps=300,
        learning_rate=0.02,
        val_every=25,
        save_every=25,
        keep_last=1,
        decay_fraction=0.0,
    )
    result = train(config, seen)
    step, score = result.best
    assert score == min(bits for _, _, bits in result.validations) < result.bits_per_byte and step < 300
    assert verify(tmp_path / "output/checkpoints" / f"step-{step:08d}.ckpt").step == step
    assert f"at step {step}, kept in" in result.table()
    (note,) = [line for line in seen.messages if line.startswith("note: 300 steps read this text")]
    assert "about" in note and "steps do better" in note


def test_a_run_that_reads_little_of_its_text_says_how_many_steps_read_it_once(tmp_path):
    seen = Heard()
    train(small_config(small_text(tmp_path / "text.txt"), tmp_path / "output", max_steps=3), seen)
    (note,) = [line for line in seen.messages if line.startswith("note: 3 steps read ")]
    assert "% of this text; --max_steps" in note


def test_a_run_that_reads_its_text_a_few_times_is_not_warned(tmp_path):
    seen = Heard()
    result = train(small_config(small_text(tmp_path / "text.txt"), tmp_path / "output", max_steps=30), seen)
    assert (
        not [line for line in seen.messages if line.startswith("note:") or "by heart" in line]
        and "best held-out" not in result.table()
    )
