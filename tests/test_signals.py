"""Ctrl-C, SIGTERM, a second process, and the lock after kill -9: the command line as a person uses it."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Heard

from smollm2.checkpoint import candidates, newest_usable
from smollm2.errors import BusyError, is_terminal
from smollm2.folder import locked_folder
from smollm2.logs import CHECKPOINTS, read_log
from smollm2.progress import Reporter, TerminalReporter
from smollm2.signals import StopSignals
from smollm2.training import train
from tests.soak import Blackboard, command_line, compare, kill, reference, small_config, start, wait


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return reference(small_config(text, folder / "output"), folder / "log", drop_tokens=False)


def read_until(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"the command ended with {process.wait()} before it said {word!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves_and_the_rerun_is_exact(text, undisturbed, tmp_path, number):
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("under nohup a lost terminal is ignored, as asked")
    config, board = small_config(text, tmp_path / "output", save_every=1000), Blackboard()
    for after in (7, 30):  # steps of this process
        pid = start(config, board, tmp_path / "log", drop_tokens=False)
        assert wait(pid, until=lambda after=after: board.read()[1] >= after) is None
        os.kill(pid, number)
        assert wait(pid) == 128 + number, (tmp_path / "log").read_text()
        newest = newest_usable(candidates(tmp_path / "output/checkpoints"))
        # the step that was under way is the one that is saved
        assert board.read()[2] <= newest.step <= board.read()[2] + 1
    assert wait(start(config, board, tmp_path / "log", drop_tokens=False)) == 0
    compare(tmp_path / "output", undisturbed.expected)


def test_a_signal_before_the_first_step_or_during_validation_loses_nothing(text, undisturbed, tmp_path):
    config, board = small_config(text, tmp_path / "output"), Blackboard()
    for phase in (0, 3, 2):  # start-up, validation, saving
        pid = start(config, board, tmp_path / "log", drop_tokens=False)
        wait(pid, until=lambda phase=phase: board.read()[0] == phase and (tmp_path / "output/logs").exists())
        os.kill(pid, signal.SIGTERM)
        # the latter: before the run has begun there is nothing to save
        assert wait(pid) in (143, -signal.SIGTERM)
    assert wait(start(config, board, tmp_path / "log", drop_tokens=False)) == 0
    compare(tmp_path / "output", undisturbed.expected)


def test_the_command_line_says_that_it_saves_and_exits_with_143(text, tmp_path):
    process = command_line(small_config(text, tmp_path / "output", max_steps=100_000, save_every=10))
    read_until(process, "step 1/")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said
    assert "SIGTERM: finishing this step and saving ..." in said
    assert read_log(tmp_path / "output/logs" / CHECKPOINTS)[-1]["event"] in ("saved", "removed")


def test_ctrl_c_twice_stops_at_once_and_leaves_the_last_checkpoint(text, tmp_path):
    long_round = {"max_steps": 100_000, "val_every": 20, "sample_every": 20, "sample_tokens": 40}
    process = command_line(small_config(text, tmp_path / "output", prompts=["a"] * 500, **long_round))
    read_until(process, "step 20: held-out")  # a long round of samples begins
    process.send_signal(signal.SIGINT)
    read_until(process, "SIGINT: finishing this step")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert newest_usable(candidates(tmp_path / "output/checkpoints")).step == 10


def test_ctrl_c_when_all_is_saved_leaves_at_once(text, tmp_path, monkeypatch):
    """While the end is compared with others, which may take minutes, or waits for Drive."""
    monkeypatch.setattr("smollm2.result.counted", lambda *_: os.kill(os.getpid(), signal.SIGINT) or {})
    with pytest.raises(KeyboardInterrupt):
        train(small_config(text, tmp_path / "output", max_steps=3), heard := Heard())
    assert not any("SIGINT" in line for line in heard.messages)
    assert newest_usable(candidates(tmp_path / "output/checkpoints")).step == 3


def test_when_the_reader_of_its_lines_leaves_the_step_is_saved(text, undisturbed, tmp_path):
    config = small_config(text, tmp_path / "output", save_every=1000, val_every=15)
    process = command_line(config)
    read_until(process, "step 1/")
    process.stdout.close()  # as `| head -12` does
    assert process.wait(60) == 128 + signal.SIGPIPE
    step = newest_usable(candidates(tmp_path / "output/checkpoints")).step
    assert 1 < step < config.train.max_steps, "a line could not be written, and that step was saved"
    assert wait(start(config, Blackboard(), tmp_path / "log", drop_tokens=False)) == 0
    compare(tmp_path / "output", undisturbed.expected)


def test_standard_streams_may_be_objects_with_write_and_flush_alone_none_or_closed(monkeypatch):
    closed, lines = io.StringIO(), []
    closed.close()
    for stream in (SimpleNamespace(write=lines.append, flush=lambda: None), closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        reporter = TerminalReporter()
        reporter.start(0, 9, 64)
        reporter.step(1, 2.5, 1e-3, 100.0)
        reporter.end()
        assert not reporter.is_lost and not is_terminal(stream)
    assert lines == ["step 1/9  loss 2.500  lr 1.0e-03  100 tokens/s  ETA 0 s\n"]


def test_under_nohup_a_lost_terminal_is_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(print) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_of_many_processes_that_start_at_once_one_runs_and_kill_9_frees_the_folder(text, tmp_path):
    config = small_config(text, tmp_path / "output", max_steps=10_000)
    boards = [Blackboard() for _ in range(4)]
    pids = [start(config, board, tmp_path / f"log-{i}", drop_tokens=False) for i, board in enumerate(boards)]
    deadline = time.monotonic() + 60
    codes: dict[int, int | None] = {}
    while len(codes) < 3 and time.monotonic() < deadline:
        codes |= {pid: code for pid in pids if pid not in codes and (code := wait(pid, 0.01)) is not None}
    (winner,) = set(pids) - set(codes)
    assert list(codes.values()) == [3, 3, 3]
    assert wait(winner, 30, until=lambda: boards[pids.index(winner)].read()[1] > 2) is None
    with pytest.raises(BusyError, match=f"process {winner} on "), locked_folder(tmp_path / "output"):
        pass
    kill(winner)
    with locked_folder(tmp_path / "output"):
        pass


def test_a_locked_file_may_be_one_that_nobody_reads_or_writes(tmp_path, monkeypatch):
    """As on Windows, where its owner may not either."""

    def forbidden(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    monkeypatch.setattr(Path, "write_text", forbidden)
    busy = pytest.raises(BusyError, match="written by another process")
    with locked_folder(tmp_path), busy, locked_folder(tmp_path):
        pass


def test_training_on_another_thread_works_without_signal_handlers(text, tmp_path):
    with ThreadPoolExecutor() as pool:
        training = pool.submit(train, small_config(text, tmp_path / "output", max_steps=10), Reporter())
        assert training.result(120).step == 10
