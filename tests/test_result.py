"""What a run says at its end: the figures, the best checkpoint where it is not the last, and how to go on."""

import pytest
from conftest import Heard

from smollm2.checkpoint import verify
from smollm2.result import TrainResult
from smollm2.training import train
from tests.soak import small_config, small_text


@pytest.mark.parametrize(
    ("best", "is_told"), [((90, 2.0), False), ((40, 1.5), True), ((40, 1.995), False), (None, False)]
)
def test_the_table_says_what_was_reached_how_to_talk_to_it_and_what_was_better(tmp_path, best, is_told):
    folder = tmp_path / "out put/checkpoints"
    (folder / "step-00000040.ckpt").mkdir(parents=True)
    references = {"gzip -9": 3.1, "xz": 2.9}
    result = TrainResult(90, folder / "final_model.ckpt", None, 61.0, 1234.0, 2.0, references, best=best)
    table = result.table()
    for words in ("2.000  (the same bytes: gzip -9 3.100, xz 2.900)", "1,234", "61 s"):
        assert words in table
    assert f"--checkpoint '{folder}/final_model.ckpt'" in table
    assert (f"1.500 at step 40, kept in {folder}/step-00000040.ckpt" in table) is is_told


def test_a_run_that_learns_its_text_by_heart_says_so_and_keeps_the_best_checkpoint(tmp_path):
    text, seen = small_text(tmp_path / "text.txt", words=150), Heard()
    often = {"val_every": 25, "save_every": 25, "keep_last": 1}
    config = small_config(
        text, tmp_path / "output", max_steps=300, learning_rate=0.02, decay_fraction=0.0, **often
    )
    result = train(config, seen)
    step, score = result.best
    assert score == min(bits for _, _, bits in result.validations) < result.bits_per_byte and step < 300
    assert verify(tmp_path / "output/checkpoints" / f"step-{step:08d}.ckpt").step == step
    assert f"at step {step}, kept in" in result.table()
    (note,) = [line for line in seen.messages if line.startswith("note: 300 steps read this text")]
    assert "about" in note and "steps do better" in note
