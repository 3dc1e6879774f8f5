"""A notebook's run with a Drive that dies, lies or is claimed: it says so, goes on, and touches nothing there."""

from __future__ import annotations

import sys
import types

import pytest

from smollm2 import colab
from smollm2.checkpoint import commit
from smollm2.errors import BusyError, ConfigError, NoUsableCheckpoint
from smollm2.notebook.steadfast import drive_problem, keep_training, kept
from smollm2.settings import load_config


def with_drive(folder):
    return load_config("nano", **{"run.drive_dir": str(folder)})


class Run:
    """Plays `train`: raises the given errors in turn, then returns the configuration it was called with."""

    def __init__(self, *errors):
        self.errors, self.configs = list(errors), []

    def __call__(self, config):
        self.configs.append(config)
        if self.errors:
            raise self.errors.pop(0)
        return config


def test_a_claim_of_a_dead_runtime_is_waited_for(tmp_path):
    said, slept = [], []
    busy = [BusyError(f"--drive_dir {tmp_path} is being written by another runtime") for _ in range(3)]
    result = keep_training(with_drive(tmp_path), Run(*busy), said.append, slept.append)
    assert result.run.drive_dir == str(tmp_path)
    assert len(slept) == 3 and sum(slept) <= 60 and len(said) == 1 and "5 minutes" in said[0]


def test_a_runtime_that_is_really_there_is_not_overrun(tmp_path):
    run, slept = Run(*[BusyError(f"--drive_dir {tmp_path} is being written") for _ in range(100)]), []
    with pytest.raises(BusyError):
        keep_training(with_drive(tmp_path), run, lambda _: None, slept.append)
    assert 300 <= sum(slept) <= 345


def test_another_process_on_this_machine_is_not_waited_for(tmp_path):
    with pytest.raises(BusyError):
        keep_training(
            with_drive(tmp_path),
            Run(BusyError("output is being written by process 7")),
            print,
            lambda _: pytest.fail("slept"),
        )


def test_training_goes_on_here_when_drive_is_gone(tmp_path):
    said = []
    run = Run(NoUsableCheckpoint("--drive_dir: Transport endpoint is not connected"))
    result = keep_training(with_drive(tmp_path / "gone" / "nano"), run, said.append)
    assert [config.run.drive_dir is None for config in run.configs] == [False, True]
    assert result.run.drive_dir is None and "WITHOUT" in said[0] and "Transport endpoint" in said[1]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("--drive_dir holds checkpoints of another run"),
        NoUsableCheckpoint("2 checkpoints, none usable"),
    ],
)
def test_errors_that_drive_does_not_explain_are_not_hidden(tmp_path, error):
    run = Run(error)
    with pytest.raises(type(error)):
        keep_training(with_drive(tmp_path), run)
    with pytest.raises(ConfigError):
        keep_training(load_config("nano"), Run(ConfigError("a mistake")))
    assert len(run.configs) == 1


def test_a_folder_that_can_still_be_made_is_no_problem(tmp_path):
    assert drive_problem(tmp_path / "nano") is None
    assert drive_problem(tmp_path) is None
    assert "does not exist" in drive_problem(tmp_path / "gone" / "nano")


def test_every_checkpoint_is_listed_and_a_damaged_one_is_called_so(tmp_path):
    for step in (1, 2):
        commit(
            tmp_path,
            f"step-{step:08d}.ckpt",
            {"config.json": b"{}", "model.safetensors": b"x" * 100},
            "run",
            step,
            {},
        )
    (tmp_path / "step-00000002.ckpt" / "model.safetensors").write_bytes(b"y" * 100)
    new, old = kept([("here", tmp_path), ("nowhere", tmp_path / "none")])
    assert (old["step"], old["state"], old["bytes"]) == (1, "whole", 102)
    assert new["step"] == 2 and "sha256 differs" in new["state"]


@pytest.fixture
def fake_colab(monkeypatch):
    calls = []
    drive, runtime = types.ModuleType("google.colab.drive"), types.ModuleType("google.colab.runtime")
    drive.flush_and_unmount = lambda: calls.append("flush")
    runtime.unassign = lambda: calls.append("unassign")
    monkeypatch.setattr(colab, "is_colab", lambda: True)
    monkeypatch.setattr(
        colab.importlib,
        "import_module",
        lambda name: {"google.colab.drive": drive, "google.colab.runtime": runtime}[name],
    )
    return drive, calls


def test_the_machine_is_handed_back_only_when_asked_and_after_the_flush(fake_colab):
    _, calls = fake_colab
    colab.finish()
    assert calls == []
    colab.finish(flush_drive=True, free_machine=True)
    assert calls == ["flush", "unassign"]


def test_the_machine_is_kept_when_drive_cannot_be_flushed(fake_colab, capsys):
    drive, calls = fake_colab

    def fails():
        raise ValueError("flush failed")

    drive.flush_and_unmount = fails
    colab.finish(flush_drive=True, free_machine=True)
    assert calls == [] and "machine is kept" in capsys.readouterr().out


def test_outside_colab_there_is_nothing_to_finish(capsys):
    assert "google.colab" not in sys.modules
    colab.finish(flush_drive=True, free_machine=True)
    assert "not Colab" in capsys.readouterr().out
