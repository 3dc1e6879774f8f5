"""The commit protocol, one system call at a time: whatever is the last one, a verified checkpoint is there afterwards.

strace kills a small process (`commit_child.py`) before every call of a save and of the sweep behind it, or lets it fail.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Heard

from smollm2 import files, saver
from smollm2.checkpoint import Manifest, candidates, commit, newest_usable, prune, step_name, verify
from smollm2.errors import OutputLost
from smollm2.files import remove_leftovers
from smollm2.folder import tidy
from smollm2.progress import Reporter
from smollm2.training import train
from tests.commit_child import FINAL, NEW_STEP, SCENARIOS, contents, save
from tests.soak import command_line, compare, outcome, small_config

CALLS = ("write", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir", "ftruncate")
ROOT = Path(__file__).parents[1]

QUICK = {("ENOSPC", 0), ("EIO", 4)}  # the others are slow

needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


def prepared(folder: Path, scenario: str) -> Path:
    folder.mkdir(parents=True)
    for name, step in SCENARIOS[scenario][1]:
        save(folder, name, step)
    return folder


def run_child(folder: Path, scenario: str, *injection: str) -> int:
    """Exit code of a save and a sweep in a process of its own under strace; its system calls are in `<folder>.strace`."""
    tracer = ["strace", "-qq", "-o", f"{folder}.strace", "-e", f"trace={','.join(CALLS)}", *injection]
    command = [*tracer, sys.executable, "-m", "tests.commit_child", str(folder), scenario]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode


def system_calls(folder: Path, scenario: str) -> list[tuple[str, int]]:
    """(name, number) of every call of an undisturbed save and sweep: (write, 1), (write, 2), (fsync, 1), ..."""
    assert run_child(prepared(folder, scenario), scenario) == 0
    seen: Counter[str] = Counter()
    calls = []
    for name in re.findall(r"^(\w+)\(", Path(f"{folder}.strace").read_text(), re.MULTILINE):
        seen[name] += 1
        calls.append((name, seen[name]))
    return calls


def expect_intact(folder: Path, scenario: str) -> Manifest:
    """What the next start finds: a verified checkpoint as new as before or newer, nothing half, nothing left over."""
    remove_leftovers(folder)
    newest = newest_usable(candidates(folder), say=lambda line: pytest.fail(line))
    assert newest.step >= max(step for _, step in SCENARIOS[scenario][1])
    for path in folder.iterdir():
        manifest = verify(path)
        assert (path / "state.json").read_text() == f"state.json of step {manifest.step}"
        assert (path / "model.safetensors").read_bytes()[0] == manifest.step
    return newest


FIRST, *OTHERS = SCENARIOS


@needs_strace
@pytest.mark.parametrize("scenario", [FIRST, *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)])
def test_killed_before_any_system_call_a_verified_checkpoint_remains(tmp_path, scenario):
    calls = system_calls(tmp_path / "undisturbed", scenario)
    assert len(calls) > 20 and {"write", "fsync", "rename", "mkdir"} <= {name for name, _ in calls}
    for name, number in calls:
        folder = prepared(tmp_path / f"{name}-{number}", scenario)
        # strace itself ends by the signal that ended its child
        code = run_child(folder, scenario, "-e", f"inject={name}:signal=KILL:when={number}")
        assert code == -signal.SIGKILL, (name, number)
        expect_intact(folder, scenario)
        save_again(folder, scenario)
        shutil.rmtree(folder)


def save_again(folder: Path, scenario: str) -> None:
    prune(folder, 3, None, save(folder, SCENARIOS[scenario][0], NEW_STEP))
    assert expect_intact(folder, scenario).step == NEW_STEP
    assert [p.name for p in folder.iterdir() if p.name == step_name(10)] == []


@needs_strace
@pytest.mark.parametrize(
    ("error", "scenario"),
    [
        pytest.param(error, scenario, marks=[pytest.mark.slow] if (error, i) not in QUICK else [])
        for error in ("ENOSPC", "EIO", "EROFS", "EDQUOT")
        for i, scenario in enumerate(SCENARIOS)
    ],
)
def test_a_failing_call_leaves_the_last_good_checkpoint(tmp_path, error, scenario):
    calls = system_calls(tmp_path / "undisturbed", scenario)
    some = calls[:: 4 if error in ("ENOSPC", "EIO") else 1]
    for name, number in dict.fromkeys([*some, *(call for call in calls if call[0] == "rename")]):
        folder = prepared(tmp_path / f"{name}-{number}", scenario)
        run_child(folder, scenario, "-e", f"inject={name}:error={error}:when={number}")
        aside = [path.name.partition(".old-")[0] for path in folder.glob("*.old-*")]
        assert all((folder / replaced).exists() for replaced in aside), (name, number)
        expect_intact(folder, scenario)
        save_again(folder, scenario)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed") / "output"
    train(short(text, folder), Reporter())
    return outcome(folder)


def short(text: Path, folder: Path):
    return small_config(text, folder, max_steps=40, val_every=20, sample_every=40, save_every=5)


@pytest.mark.parametrize("failing", [(1,), (3, 4), (2, 5, 7)])
def test_a_disk_that_is_full_now_and_then_is_survived(text, tmp_path, monkeypatch, undisturbed, failing):
    saves, write = 0, files.write_durably

    def full_disk(path, data):
        nonlocal saves
        saves += path.name == "manifest.json"
        if path.name == "manifest.json" and saves in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files, "write_durably", full_disk)
    heard = Heard()
    assert train(short(text, tmp_path / "output"), heard).step == 40
    said = [line for line in heard.messages if "failed (No space left on device); training goes on" in line]
    assert len(said) == len(failing)
    compare(tmp_path / "output", undisturbed)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_stays_broken_ends_the_run_with_code_7(text, tmp_path, monkeypatch, undisturbed, code):
    real, calls = os.fsync, itertools.count()

    def fsync(descriptor):
        if next(calls) >= 60:  # in the third save
            raise OSError(code, os.strerror(code))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(OutputLost, match=r"3 saves in a row failed|could not be saved") as stop:
            train(short(text, tmp_path / "output"), Reporter())
    assert stop.value.exit_code == 7
    assert newest_usable(candidates(tmp_path / "output" / "checkpoints")).step >= 5
    assert train(short(text, tmp_path / "output"), Reporter()).step == 40  # the disk works again
    compare(tmp_path / "output", undisturbed)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_syncs_nothing_can_hold_a_run(text, tmp_path, monkeypatch, undisturbed, code):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    assert train(short(text, tmp_path / "output"), Reporter()).step == 40
    compare(tmp_path / "output", undisturbed)


def test_a_last_save_that_fails_is_not_called_a_finished_run(text, tmp_path, monkeypatch, undisturbed):
    real = saver.commit

    def commit(parent, name, *rest):
        if name == FINAL:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(parent, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "commit", commit)
        with pytest.raises(OutputLost, match="step 40 could not be saved"):
            train(short(text, tmp_path / "output"), Reporter())
    train(short(text, tmp_path / "output"), Reporter())
    compare(tmp_path / "output", undisturbed)


def test_a_save_leaves_no_threads_behind_that_slow_down_the_next_steps(tmp_path):
    """More OpenMP threads than cores, and OpenMP's waiting threads sleep instead of spinning."""
    weights, threads = torch.ones(2**20), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weights.add_(1)  # torch's own threads are there
        before = psutil.Process().num_threads()
        keeper = saver.Saver(tmp_path, "run", 3)
        keeper.save(step_name(1), 1, {}, {"model.safetensors": {"weights": weights}}, {}, None)
        keeper.wait(for_step=1)
        assert psutil.Process().num_threads() <= before + 1  # the one that saves
    finally:
        torch.set_num_threads(threads)


def test_an_output_directory_that_vanishes_ends_the_run_with_exit_code_7(text, tmp_path):
    class Vanishing(Reporter):
        def step(self, step, *rest):
            if step == 12:
                os.rename(tmp_path / "output", tmp_path / "elsewhere")

    with pytest.raises(OutputLost) as stop:
        train(short(text, tmp_path / "output"), Vanishing())
    assert stop.value.exit_code == 7
    assert newest_usable(candidates(tmp_path / "elsewhere" / "checkpoints")).step >= 5


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_training(text, tmp_path, monkeypatch):
    def prune(*arguments):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saver, "prune", prune)
    heard = Heard()
    assert train(short(text, tmp_path / "output"), heard).step == 40
    said = " ".join(heard.messages)
    assert re.search(r"removing older checkpoints after step \d+ .*\(Permission denied\)", said)


needs_mount = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@needs_mount
@pytest.mark.slow
def test_a_disk_that_others_fill_during_a_real_run_is_told_in_plain_lines(text, small_disk, tmp_path):
    """`colab_train.py` on a disk that another program fills while it trains, logs and draws curves: never a traceback,
    an exit code of its own, and the last good checkpoint loads."""
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    often = {"save_every": 50, "log_every": 1, "val_every": 10**6, "sample_every": 10**6}
    process = command_line(small_config(text, small_disk / "output", max_steps=100_000, **often))
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("safe on this machine"):
            with contextlib.suppress(OSError), open(small_disk / "others", "wb", buffering=0) as others:
                while True:
                    others.write(bytes(1000))
    output = "".join(said)
    assert process.wait() == 7, output
    assert "Traceback" not in output and "Exception" not in output
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert "No space left on device" in said[-1]
    assert newest_usable(candidates(small_disk / "output/checkpoints")).step >= 50


@needs_mount
def test_a_disk_that_cannot_hold_the_checkpoints_is_told_before_training(text, small_disk, tmp_path):
    """Of 0.2 MB each, 5 do not fit on a disk of 1 MiB: a warning; with 0.75 MB taken not even two do: an error."""
    output = small_disk / "output"
    train(small_config(text, output, max_steps=10, save_every=5), heard := Heard())  # it does not keep 5
    (warning,) = (line for line in heard.messages if "warning" in line)
    assert re.search("one checkpoint takes 0.2 MB.*the 5 that a whole run keeps do not fit; free 0.", warning)
    assert heard.messages.index(warning) < heard.messages.index("starting at step 0 of 10")
    shutil.rmtree(output)
    (small_disk / "others").write_bytes(bytes(750_000))
    words = r"one checkpoint takes 0\.2 MB: no room for.*; free 0\.\d MB, or"
    with pytest.raises(OutputLost, match=words) as stop:
        train(short(text, output), Reporter())
    assert stop.value.exit_code == 7 and not output.exists(), "nothing was written"


def test_a_final_checkpoint_that_is_the_best_outlives_the_one_that_replaces_it(tmp_path):
    """Steps 1 to 20, and then as many as to 40: the text was known by heart by then."""
    writer = saver.Saver(tmp_path, "run", keep_last=1, newest=save(tmp_path, FINAL, 20))
    writer.save(FINAL, 40, contents(40), {}, {}, best_step=20)
    writer.wait(for_step=40)
    found = {path.name: verify(path).step for path in tmp_path.iterdir()}
    assert found == {FINAL: 40, step_name(20): 20}


def test_the_best_outlives_a_copy_of_the_newest_as_well(tmp_path):
    for name, step in ((FINAL, 20), (step_name(40), 40)):
        facts = {"state.json": json.dumps({"best": {"step": 20}}).encode()}
        newest = commit(tmp_path, name, contents(step) | facts, "run", step, {})
    saver.Saver(tmp_path, "run", keep_last=1, newest=newest).copy_newest(FINAL)
    found = {path.name: verify(path).step for path in tmp_path.iterdir()}
    assert found == {FINAL: 40, step_name(20): 20, step_name(40): 40}


def test_what_a_kill_left_half_written_goes_at_the_next_start(tmp_path):
    for place in (".", "checkpoints", "logs", "data", "data/tokens-1"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / ".x.tmp-1").touch()
    tidy(tmp_path)
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_what_a_person_has_in_that_folder_stays(tmp_path):
    """`--output_dir .`: names that end almost as those which a kill leaves."""
    places = ["", "checkpoints", "logs", "data", "data/tokens-1"]
    names = ["notes", "notes.old-2025", "notes.old-20251127", "notes.tmp-1", "a.ckpt", "a.ckpt.old-good"]
    theirs = {tmp_path / place / name / "page" for place in places for name in names}
    theirs |= {tmp_path / place / name for place in places for name in ("a.old-1", "a.tmp-12345678")}
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tidy(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == theirs
