"""`--minutes` and `--stop_after`: time as a knob, and not one bit less exact."""

import io
import signal
import time
from unittest.mock import Mock

import pytest
from conftest import Heard
from test_resume import CONTINUED, FINAL, same_result

from smollm2 import run as run_module
from smollm2.checkpoint import verify
from smollm2.errors import OutputLost
from smollm2.plan import SHARE_OF_TIME, Speed
from smollm2.progress import TerminalReporter
from smollm2.signals import OUT_OF_TIME
from smollm2.state import read_state
from smollm2.training import train
from tests.soak import small_config


class StopAt(Heard):
    def __init__(self, stop_at: int):
        super().__init__()
        self.stop_at = stop_at

    def step(self, step, loss, learning_rate, tokens_per_second):
        if step == self.stop_at:
            signal.raise_signal(signal.SIGINT)


def words(heard: Heard) -> str:
    return "\n".join(heard.messages)


RARELY = {"val_every": 1000, "sample_every": 1000, "save_every": None}


def test_a_run_of_minutes_ends_in_time_with_as_many_steps_as_it_says(text, tmp_path):
    began, heard = time.monotonic(), Heard()
    result = train(small_config(text, tmp_path / "a", minutes=0.15, max_steps=9, **RARELY), heard)
    # a loose bound: a test machine also does other things; docs/log.md has whole processes
    assert 0.5 * 9 < time.monotonic() - began < 2 * 9
    assert result.step > 9 and f"{result.step:,} steps of" in words(heard)
    state = read_state(verify(tmp_path / "a" / "checkpoints" / FINAL))
    assert state.schedule_total == result.step


def test_a_resumed_run_keeps_its_number_of_steps_and_ends_with_their_bits(text, tmp_path, monkeypatch):
    """However fast the second machine is; and before a first checkpoint it is measured again."""
    speeds, measure = iter([Speed(1.0, 0, 0), Speed(0.001, 0, 0)]), run_module.measure
    monkeypatch.setattr(run_module, "measure", lambda *place: measure(*place, seconds=0.1) and next(speeds))
    config = small_config(text, tmp_path / "a", minutes=0.5, **RARELY)
    first = train(config, StopAt(5))
    assert first.stopped_by and first.step == 5
    heard = Heard()
    result = train(config, heard)
    planned = int(SHARE_OF_TIME * 30)  # start-up and saves take some of it
    assert planned - 3 <= result.step <= planned and "keeps them" in words(heard)
    train(small_config(text, tmp_path / "b", max_steps=result.step, **RARELY))
    same_result(tmp_path / "a", FINAL, tmp_path / "b", FINAL)


def test_a_run_of_minutes_that_has_ended_can_be_continued(text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "measure", lambda *_: Speed(1.0, 0.0, 0.0))
    monkeypatch.setattr(run_module, "steps_within", lambda *_: 6)
    minutes = RARELY | {"minutes": 1.0}
    assert train(small_config(text, tmp_path / "a", **minutes)).step == 6
    for _ in range(2):  # the second one finds it finished
        more = train(small_config(text, tmp_path / "a", continue_steps=4, **minutes))
        assert (more.step, more.checkpoint.name) == (10, CONTINUED)


def test_stop_after_leaves_in_good_order_and_the_same_command_goes_on(text, tmp_path):
    config = small_config(text, tmp_path / "a", max_steps=20000, stop_after=0.05, **RARELY)
    began = time.monotonic()
    first = train(config, heard := Heard())
    assert first.stopped_by == OUT_OF_TIME and time.monotonic() - began < 8
    assert verify(first.checkpoint).step == first.step > 0 and "--stop_after" in words(heard)
    assert train(config).step > first.step


def test_nothing_is_called_saved_that_is_not(text, tmp_path, monkeypatch):
    monkeypatch.setattr("smollm2.saver.commit", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OutputLost, match="step 1 could not be saved"):
        train(small_config(text, tmp_path / "a", stop_after=1e-6), TerminalReporter(said := io.StringIO()))
    assert "safe on this machine: nothing yet" in said.getvalue() and "Saved" not in said.getvalue()
