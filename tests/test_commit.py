"""The commit protocol, one system call at a time: whatever is the last one, a verified checkpoint is there afterwards.

strace kills a small process before every write, fsync, rename, unlink, mkdir and rmdir of a save and of the sweep that
removes old checkpoints, or lets the call fail. `commit_child.py` has no torch in it: a cycle takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import Heard

from smollm2 import files, saver
from smollm2.checkpoint import Manifest, candidates, newest_usable, prune, step_name, verify
from smollm2.errors import OutputLost
from smollm2.files import remove_leftovers
from smollm2.progress import Reporter
from smollm2.training import train
from tests.commit_child import FINAL, NEW_STEP, SCENARIOS, save
from tests.soak import Blackboard, compare, outcome, reference, small_config, start, wait

CALLS = ("write", "fsync", "rename", "unlink", "unlinkat", "mkdir", "rmdir", "ftruncate")
ROOT = Path(__file__).parents[1]

needs_strace = pytest.mark.skipif(
    not shutil.which("strace"), reason="strace is not installed: no system call can be interrupted"
)


def prepared(folder: Path, scenario: str) -> Path:
    folder.mkdir(parents=True)
    for name, step in SCENARIOS[scenario][1]:
        save(folder, name, step)
    return folder


def run_child(folder: Path, scenario: str, *injection: str) -> int:
    """Exit code of a save and a sweep in a process of its own under strace; its system calls are in `<folder>.strace`."""
    tracer = ["strace", "-qq", "-o", f"{folder}.strace", "-e", f"trace={','.join(CALLS)}", *injection]
    command = [*tracer, sys.executable, "-m", "tests.commit_child", str(folder), scenario]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    ).returncode


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


@needs_strace
@pytest.mark.parametrize(
    "scenario", [pytest.param(s, marks=[pytest.mark.slow] if i else []) for i, s in enumerate(SCENARIOS)]
)
def test_killed_before_any_system_call_a_verified_checkpoint_remains(tmp_path, scenario):
    calls = system_calls(tmp_path / "undisturbed", scenario)
    assert len(calls) > 20 and {"write", "fsync", "rename", "mkdir"} <= {name for name, _ in calls}
    for name, number in calls:
        folder = prepared(tmp_path / f"{name}-{number}", scenario)
        # strace itself ends by the signal that ended its child
        assert (
            run_child(folder, scenario, "-e", f"inject={name}:signal=KILL:when={number}") == -signal.SIGKILL
        ), (name, number)
        expect_intact(folder, scenario)
        save_again(folder, scenario)
        shutil.rmtree(folder)


def save_again(folder: Path, scenario: str) -> None:
    prune(folder, 3, None, save(folder, SCENARIOS[scenario][0], NEW_STEP))
    assert expect_intact(folder, scenario).step == NEW_STEP
    assert [p.name for p in folder.iterdir() if p.name == step_name(10)] == []


@needs_strace
@pytest.mark.parametrize(
    ("error", "every"),
    [
        ("ENOSPC", 4),
        ("EIO", 4),
        *(pytest.param(e, 1, marks=pytest.mark.slow) for e in ("ENOSPC", "EIO", "EROFS", "EDQUOT")),
    ],
)
def test_a_failing_call_leaves_the_last_good_checkpoint(tmp_path, error, every):
    scenario = "a save, and the oldest goes"
    calls = system_calls(tmp_path / "undisturbed", scenario)
    for name, number in calls[::every]:
        folder = prepared(tmp_path / f"{name}-{number}", scenario)
        run_child(folder, scenario, "-e", f"inject={name}:error={error}:when={number}")
        leftovers = [p.name for p in folder.iterdir() if ".old-" in p.name]
        assert leftovers == [], (name, number)
        expect_intact(folder, scenario)
        save_again(folder, scenario)
        shutil.rmtree(folder)


def test_a_rename_that_fails_puts_the_replaced_folder_back(tmp_path, monkeypatch):
    save(tmp_path, FINAL, 40)
    real = os.rename

    def rename(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, FINAL, 40)
    assert [p.name for p in tmp_path.iterdir()] == [FINAL] and verify(tmp_path / FINAL).step == 40


# --- a whole run on a disk that fails ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed") / "output"
    train(short(text, folder), Reporter())
    return outcome(folder)


def short(text: Path, folder: Path):
    return small_config(text, folder, max_steps=40, val_every=20, sample_every=40, save_every=5)


@pytest.mark.parametrize("failing", [(1,), (3, 4), (2, 5, 7)])
def test_a_disk_that_is_full_now_and_then_does_not_stop_training(
    text, tmp_path, monkeypatch, undisturbed, failing
):
    saves = 0

    def full_disk(path, data):
        nonlocal saves
        saves += path.name == "manifest.json"
        if path.name == "manifest.json" and saves in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    write = files.write_durably
    monkeypatch.setattr(files, "write_durably", full_disk)
    assert train(short(text, tmp_path / "output"), heard := Heard()).step == 40
    assert sum(
        "failed (No space left on device); training goes on" in line for line in heard.messages
    ) == len(failing)
    compare(tmp_path / "output", undisturbed)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["full", "failing", "read-only"])
def test_a_disk_that_stays_broken_ends_the_run_with_its_own_exit_code(
    text, tmp_path, monkeypatch, undisturbed, code
):
    real, saves = os.fsync, 0

    def fsync(descriptor):
        nonlocal saves
        saves += 1
        if saves > 60:  # the third save
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


def test_an_output_directory_that_vanishes_ends_the_run_with_exit_code_7(text, tmp_path):
    class Vanishing(Reporter):
        def step(self, step, *rest):
            if step == 12:
                os.rename(tmp_path / "output", tmp_path / "elsewhere")

    with pytest.raises(OutputLost) as stop:
        train(short(text, tmp_path / "output"), Vanishing())
    assert (
        stop.value.exit_code == 7
        and newest_usable(candidates(tmp_path / "elsewhere" / "checkpoints")).step >= 5
    )


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_training(text, tmp_path, monkeypatch):
    def prune(*arguments):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saver, "prune", prune)
    assert train(short(text, tmp_path / "output"), heard := Heard()).step == 40
    assert any(
        "removing older checkpoints after step" in line and "(Permission denied)" in line
        for line in heard.messages
    )


needs_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a small disk"
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@needs_mount
def test_on_a_disk_that_fills_up_the_last_good_checkpoint_loads(text, small_disk, tmp_path, undisturbed):
    output = small_disk / "output"
    (small_disk / "others").write_bytes(bytes(300_000))
    with pytest.raises(OutputLost):
        train(short(text, output), Reporter())
    assert newest_usable(candidates(output / "checkpoints")).step >= 5
    assert not list(output.rglob("*.tmp-*"))
    (small_disk / "others").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert train(short(text, output), Reporter()).step == 40
    compare(output, undisturbed)


@needs_mount
@pytest.mark.slow
def test_a_disk_that_others_fill_during_a_real_run_is_told_in_plain_lines(text, small_disk, tmp_path):
    """`colab_train.py` on a disk that another program fills while it trains, logs and draws curves: never a traceback,
    an exit code of its own, and the last good checkpoint loads."""
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    often = {"save_every": 50, "log_every": 1, "val_every": 10**6, "sample_every": 10**6}
    config = small_config(text, small_disk / "output", max_steps=100_000, **often)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-u", "colab_train.py", "--config", str(tmp_path / "config.yaml")]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
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
    """Of 0.2 MB each, 5 do not fit on a disk of 1 MiB: a warning with figures; with 0.75 MB taken not even two do: an error."""
    train(
        small_config(text, small_disk / "one", max_steps=10, save_every=5), heard := Heard()
    )  # ends before there are so many
    (warning,) = (line for line in heard.messages if "warning" in line)
    assert (
        "one checkpoint takes 0.2 MB" in warning
        and "the 5 that a whole run keeps do not fit; free 0." in warning
    )
    assert heard.messages.index(warning) < heard.messages.index("starting at step 0 of 10")
    shutil.rmtree(small_disk / "one")
    (small_disk / "others").write_bytes(bytes(750_000))
    with pytest.raises(
        OutputLost,
        match=r"MB free for .*, and one checkpoint takes 0\.2 MB: no room for.*; free 0\.\d MB, or",
    ) as stop:
        train(short(text, small_disk / "one"), Reporter())
    assert stop.value.exit_code == 7 and not (small_disk / "one").exists(), "nothing was written"


@pytest.mark.parametrize(
    ("free", "here", "told"),
    [
        (9, 0, ""),
        (5, 0, ""),
        (4.9, 0, "the 5 that"),
        (2, 0, "the 5 that"),
        (1.9, 0, "no room for the next one"),
        (3, 2, ""),
        (2.9, 2, "do not fit; free 0.1 MB or"),
        (1, 4, ""),
        (0.9, 4, "no room for the next one"),
        (0.9, 1, "no room for the next one"),
    ],
)
def test_the_room_that_a_run_needs(tmp_path, monkeypatch, free, here, told):
    for step in range(here):
        (tmp_path / step_name(step)).mkdir()
        (tmp_path / step_name(step) / "model.safetensors").write_bytes(bytes(10**6))
    (tmp_path / "step-00000009.ckpt.tmp-1").mkdir()
    monkeypatch.setattr(
        saver.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**8, 0, int(free * 10**6))
    )
    said = []
    try:
        saver.check_space(tmp_path, 10**6, 5, said.append)
    except OutputLost as error:
        said.append(str(error))
    assert len(said) == bool(told) and told in "".join(said)


@needs_mount
def test_a_read_only_disk_is_named_at_the_start(text, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for folder in (small_disk, small_disk / "output"):
        with pytest.raises(OutputLost, match="Read-only file system") as stop:
            train(short(text, folder), Reporter())
        assert stop.value.exit_code == 7


# --- the same with a real run -----------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "unlinkat", "mkdir", "rmdir"])
def test_a_real_run_killed_at_any_call_of_a_save_ends_in_the_same_bits(text, tmp_path, call):
    """Training stops itself before the fourth save; strace attaches and kills at call 1, 2, ... until one survives the sweep."""
    settings = {"max_steps": 30, "save_every": 5, "val_every": 30, "sample_every": 30}
    undisturbed = reference(
        small_config(text, tmp_path / "undisturbed", **settings), tmp_path / "log", drop_tokens=False
    )

    def stop_before_fourth_save() -> None:
        commit_, prune_ = saver.commit, saver.prune

        def commit(parent, name, *rest):
            if name == step_name(20):
                signal.pthread_kill(
                    threading.get_ident(), signal.SIGSTOP
                )  # this thread, so that it is here that it stops
            return commit_(parent, name, *rest)

        def prune(*arguments):
            removed = prune_(*arguments)
            if arguments[3].step == 20:
                os._exit(99)
            return removed

        saver.commit, saver.prune = commit, prune

    for number in range(1, 100):
        config = small_config(text, tmp_path / f"{call}-{number}", **settings)
        pid = start(
            config, Blackboard(), tmp_path / "log", drop_tokens=False, sabotage=stop_before_fourth_save
        )
        while not os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1]):
            pass
        tracer = subprocess.Popen(
            [
                "strace",
                "-f",
                "-p",
                str(pid),
                "-o",
                "/dev/null",
                "-e",
                f"trace={call}",
                "-e",
                f"inject={call}:signal=KILL:when={number}",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "attached" in tracer.stderr.readline()
        time.sleep(0.05)
        os.kill(pid, signal.SIGCONT)
        code = wait(pid)
        tracer.wait()
        assert code in (99, -signal.SIGKILL)
        assert newest_usable(candidates(tmp_path / f"{call}-{number}" / "checkpoints")).step >= 15
        train_again = start(config, Blackboard(), tmp_path / "log", drop_tokens=False)
        assert wait(train_again) == 0, (tmp_path / "log").read_text()[-2000:]
        compare(tmp_path / f"{call}-{number}", undisturbed.expected)
        if code == 99:
            assert number > 1
            break
