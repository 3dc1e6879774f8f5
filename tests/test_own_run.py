"""A notebook finds the reader's own run: whole checkpoints only, one a step, of the run that was saved to last."""

import errno
import json
import os
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from smollm2.checkpoint import commit
from smollm2.notebook.own_run import best_seen, own_checkpoints

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=tiny_tokenizer().vocab_size).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()} | tiny_tokenizer().files(512)


@pytest.fixture
def save(files, tmp_path):
    def save(place: str, step: int, run_id: str = "run-a", age_seconds: float = 0.0, best=None) -> Path:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {} if best is None else {"state.json": json.dumps({"best": best}).encode()}
        folder = commit(path.parent, path.name, files | state, run_id, step, {}).folder
        then = os.stat(folder / "manifest.json").st_mtime - age_seconds
        os.utime(folder / "manifest.json", (then, then))
        return folder

    return save


def test_the_run_saved_to_last_comes_oldest_first_one_a_step_without_what_is_damaged(save, tmp_path):
    output, drive, said = tmp_path / "output", tmp_path / "drive", []
    save("output/checkpoints/step-00000900.ckpt", 900, "old", age_seconds=1000)
    for name, step in (("step-00000010.ckpt", 10), ("step-00000002.ckpt", 2), ("final_model.ckpt", 10)):
        save(f"output/small/checkpoints/{name}", step, "small", age_seconds=10)
    bad = save("output/small/checkpoints/step-00000003.ckpt", 3, "small") / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    save("drive/step-00000050-new-0a1b2c3d.ckpt", 50, "new")
    mine = own_checkpoints([output], said.append)
    assert [(c.run_id, c.step) for c in mine] == [("small", 2), ("small", 10)]
    assert len(said) == 1 and "step-00000003.ckpt: left out" in said[0]
    assert [c.run_id for c in own_checkpoints([output, drive])] == ["new"]
    assert own_checkpoints([tmp_path / "nothing"]) == []


def test_what_this_machine_has_is_not_read_from_drive_and_a_drive_that_is_gone_is_told(
    save, tmp_path, monkeypatch
):
    save("output/checkpoints/final_model.ckpt", 10, age_seconds=5)
    for step in (5, 10):
        save(f"drive/nano/step-{step:08d}.ckpt", step)
    (tmp_path / "drive/nano/step-00000010.ckpt/model.safetensors").write_bytes(b"")  # nobody looks at it
    folders, said = [tmp_path / "output", tmp_path / "drive"], []
    found = [checkpoint.folder.parent.name for checkpoint in own_checkpoints(folders, said.append)]
    assert found == ["nano", "checkpoints"] and said == []
    glob = Path.glob

    def gone(path, pattern):
        if path.name == "drive":
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return glob(path, pattern)

    monkeypatch.setattr(Path, "glob", gone)
    assert [checkpoint.step for checkpoint in own_checkpoints(folders, said.append)] == [10]
    assert len(said) == 1 and "drive: out of reach (Drive is mounted but no longer connected" in said[0]


@pytest.mark.parametrize(("best", "step"), [({"step": 2}, 2), ({"step": 4}, 10), ({}, 10), (None, 10)])
def test_the_best_checkpoint_is_the_one_the_run_noted_where_it_is_kept(save, tmp_path, best, step):
    for name, at in (("step-00000002.ckpt", 2), ("step-00000007.ckpt", 7), ("final_model.ckpt", 10)):
        save(name, at, best=best)
    checkpoints = own_checkpoints([tmp_path])
    assert best_seen(checkpoints).step == step
