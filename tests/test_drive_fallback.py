"""A notebook's run with a Drive that dies or lies: it says so, goes on, and touches nothing there."""

import pytest

from smollm2.checkpoint import commit
from smollm2.errors import BusyError, ConfigError, NoUsableCheckpoint
from smollm2.notebook.drive_fallback import keep_training, kept
from smollm2.settings import load_config


class Run:
    """Plays `train` through `keep_training`: raises the given errors in turn, then returns its configuration."""

    def __init__(self, drive_dir, *errors):
        self.config = load_config("nano", **({"run.drive_dir": str(drive_dir)} if drive_dir else {}))
        self.errors, self.tried, self.said = list(errors), [], []

    def train(self, config):
        self.tried.append(config.run.drive_dir)
        if self.errors:
            raise self.errors.pop(0)
        return config

    def keep(self):
        return keep_training(self.config, self.train, self.said.append)


def test_training_goes_on_here_when_drive_is_gone(tmp_path):
    gone = tmp_path / "gone" / "nano"
    run = Run(gone, NoUsableCheckpoint("--drive_dir: Transport endpoint is not connected"))
    assert run.keep().run.drive_dir is None and run.tried == [str(gone), None]
    assert "WITHOUT" in run.said[0] and "Transport endpoint" in run.said[1]


@pytest.mark.parametrize("has_drive", [True, False])
@pytest.mark.parametrize("kind", [ConfigError, NoUsableCheckpoint, BusyError])
def test_errors_that_drive_does_not_explain_are_not_hidden(kind, has_drive, tmp_path):
    run = Run(has_drive and tmp_path, kind("output is written by process 7, or holds another run"))
    with pytest.raises(kind):
        run.keep()
    assert len(run.tried) == 1


def test_every_checkpoint_is_listed_and_a_damaged_one_is_called_so(tmp_path):
    for step in (1, 2):
        files = {"config.json": b"{}", "model.safetensors": b"x" * 100}
        commit(tmp_path, f"step-{step:08d}.ckpt", files, "run", step, {})
    (tmp_path / "step-00000002.ckpt" / "model.safetensors").write_bytes(b"y" * 100)
    new, old = kept([("here", tmp_path), ("nowhere", tmp_path / "none")])
    assert (old["step"], old["state"], old["bytes"]) == (1, "whole", 102)
    assert new["step"] == 2 and "sha256 differs" in new["state"]
