"""Every command answers at once: flags, mistakes and Ctrl-C do not wait for PyTorch."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import save_folder, tiny_model

from smollm2.errors import run_command

ROOT = Path(__file__).parent.parent
COMMANDS = [f"smollm2.{name}" for name in ("generate", "evaluate", "export", "app")] + [
    "colab_train",
    "benchmarks",
]
NO_TORCH = "raise AssertionError('PyTorch is imported')"
SIGINT_THEN_WAIT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)"


def run(folder: Path, torch: str, *words: str) -> subprocess.CompletedProcess:
    """A Python whose `torch` is this text."""
    (folder / "torch.py").write_text(torch)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([sys.executable, *words], **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_and_mistakes_are_answered_without_torch(command, tmp_path):
    shown = run(tmp_path, NO_TORCH, "-m", command, "--help")
    assert shown.returncode == 0 and "--help" in shown.stdout and not shown.stderr
    needed = {"benchmarks": ["decode"], "smollm2.evaluate": ["--input_file=x"], "smollm2.export": ["--out=x"]}
    words = needed.get(command, []) + ["--checkpoint=x"] * command.startswith("smollm2.") + ["--dtpye=x"]
    wrong = run(tmp_path, NO_TORCH, "-m", command, *words)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: unknown argument '--dtpye=x'")
    assert wrong.stderr.count("\n") == 1 and not wrong.stdout


def test_a_value_out_of_range_and_a_missing_checkpoint_are_named_without_torch(tmp_path):
    for command, words, message in [
        ("smollm2.generate", ["--checkpoint", "x", "--temperature", "-1"], "error: --temperature: "),
        ("smollm2.generate", ["--checkpoint", "./x", "--prompt", "a"], "error: ./x: "),
        ("smollm2.app", ["--checkpoint", "./x"], "error: ./x: "),
        ("smollm2.export", ["--checkpoint", "./x", "--out", "y"], "error: ./x: "),
        ("colab_train", ["--set", "train.learning_rat=1"], "error: "),
        ("benchmarks", ["decode", "--peers", "lama"], "error: --peers 'lama': expected some of "),
        ("benchmarks", ["train", "--dtype", "int8"], "error: --dtype int8: "),
    ]:
        done = run(tmp_path, NO_TORCH, "-m", command, *words)
        assert done.returncode == 2 and done.stderr.startswith(message), done.stderr


def test_a_path_means_what_it_means_in_a_shell_in_every_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for file in ("model/config.json", "taken"):
        (tmp_path / file).touch()
    for command, words, message in [
        ("smollm2.generate", ["--checkpoint=~/x", "--prompt=a"], f"error: {tmp_path}/x: "),
        ("smollm2.app", ["--checkpoint=~/x"], f"error: {tmp_path}/x: "),
        ("smollm2.evaluate", ["--checkpoint=x", "--input_file=~/y"], f"error: --input_file {tmp_path}/y: "),
        ("smollm2.export", ["--checkpoint=~/model", "--out=~/taken"], f"error: --out {tmp_path}/taken: "),
    ]:
        done = run(tmp_path, NO_TORCH, "-m", command, *words)
        assert done.returncode == 2 and done.stderr.startswith(message), done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_behind_standard_error_changes_no_exit_code(tmp_path):
    for words, code in [("--max_step=3", 2), ("--max_steps=3 >/dev/full", 7)]:
        command = f"exec {sys.executable} {ROOT}/colab_train.py {words} 2>/dev/full"
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode == code


@pytest.mark.parametrize("stream", ["0>out", "</dev/null 1<text"])
def test_a_stream_that_is_open_the_wrong_way_is_one_line(stream, tmp_path):
    """As nohup leaves the input of a terminal."""
    (tmp_path / "text").touch()
    code = "from smollm2.errors import run_command; run_command(lambda: print(input()) if STREAM else print('a'))"
    code = code.replace("STREAM", str(stream[0] == "0"))
    command = f'exec {sys.executable} -c "{code}" {stream}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: a standard stream cannot be read or written"
    )
    assert done.stderr.count("\n") == 1


def test_output_that_fails_and_is_no_file_is_an_exit_code(monkeypatch):
    def fail(text: str = "") -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=fail, flush=fail))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: print("a"))
    assert left.value.code == 141


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_torch_is_imported_ends_the_command(command, tmp_path):
    model = f"--checkpoint={save_folder(tmp_path / 'model', tiny_model())}"
    (tmp_path / "text").write_text("Once upon a time.\n" * 99)
    words = {
        "smollm2.generate": [model, "--prompt=a"], "smollm2.evaluate": [model, f"--input_file={tmp_path / 'text'}"],
        "smollm2.export": [model, f"--out={tmp_path / 'out'}"], "smollm2.app": [model],
        "benchmarks": ["decode"], "colab_train": [f"--output_dir={tmp_path / 'run'}"],
    }  # fmt: skip
    done = run(tmp_path, SIGINT_THEN_WAIT, "-m", command, *words[command])
    assert done.returncode == 130 and done.stderr == "\nstopped\n"


def test_the_package_alone_is_imported_in_an_instant(tmp_path):
    code = "import time; began = time.perf_counter(); import smollm2; print(time.perf_counter() - began)"
    assert float(run(tmp_path, NO_TORCH, "-c", code).stdout) < 0.2


def test_a_skip_is_a_failure_where_every_test_is_meant_to_run(tmp_path):
    begin = "import pytest\n\ndef test_that_runs():\n    pass\n\n"
    for name, code in {
        "file": "pytest.importorskip('not_installed')",
        "one": "def test_x():\n    pytest.skip('no strace')",
        "data": "def test_x():\n    pytest.skip('SMOLLM2_TEST_DATA is not set')",
    }.items():
        (tmp_path / f"test_{name}.py").write_text(f"{begin}{code}\n")
    words = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-q", "--continue-on-collection-errors"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "SMOLLM2_NO_SKIPS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("1 failed, 2 passed, 1 skipped, 1 error"), done.stdout
