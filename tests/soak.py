"""Kill training anywhere, again and again, and compare the end with a run that was never disturbed.

    python -m tests.soak --kills 200 --fresh 20 --multi 50

A fork server: the libraries are imported once, every cycle is a fork (0.2-0.5 s instead of 8 s). SIGKILL
comes at a time uniform over the start-up (a quarter of them) or over what is left of the run's life. The
same run is started again until it is done: weights, moments, state and logs must be the bytes of the
undisturbed run, and no kill may cost a checkpoint that verified before. In the forked runs every batch
loses some tokens at random, so that the generators' states decide the result, too. At the end it must find
what is broken on purpose.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from smollm2 import run, saver, training
from smollm2.checkpoint import FINAL_NAMES, candidates, verify
from smollm2.config import DataConfig, PlaceConfig, RunConfig, SmolLM2Config, TrainConfig
from smollm2.errors import CheckpointError
from smollm2.files import sha256_file
from smollm2.logs import EPOCHS, SAMPLES, TRAINING, parse_line
from smollm2.progress import Reporter

PHASES = ("start-up", "training", "saving", "validation", "exit")
STEPS = 120
BEYOND = 1.15  # kill times reach beyond the expected end, so that the very end is hit and a run can finish
KILLS_A_RUN = 8
IMPORT_SECONDS = 8
STATE_FILES = ("model.safetensors", "optim.safetensors", "state.json")


class Difference(AssertionError):
    """A disturbed run did not end, or not as the undisturbed one."""


def small_text(path: Path, words: int = 1000) -> Path:
    rng = random.Random(7)
    vocabulary = ["".join(rng.choice("aeiounrstlm") for _ in range(rng.randint(2, 7))) for _ in range(150)]
    path.write_text("".join(rng.choice(vocabulary) + rng.choice([" "] * 9 + [".\n"]) for _ in range(words)))
    return path


def small_config(text: Path, output_dir: Path, accumulation=1, place=(), data=(), **train) -> RunConfig:
    """Several micro-batches go with Muon, so that both optimizers are killed; `train` overrules it.
    `place` and `data` are further settings of those sections."""
    settings = {
        "optimizer": "muon" if accumulation > 1 else "adamw",
        "max_steps": STEPS, "batch_size": 8, "micro_batch_size": 8 // accumulation, "warmup_steps": 5, "log_every": 5, "val_every": 15,
        "val_max_tokens": None, "sample_every": 30, "sample_tokens": 3, "save_every": 10, "save_every_seconds": None, "precision": "fp32",
    }  # fmt: skip
    shape = {
        "vocab_size": 300, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    return RunConfig(
        preset="nano",
        model=SmolLM2Config(**shape),
        data=DataConfig(input_file=str(text), sequence_length=16, tokenizer_vocab_size=300, **dict(data)),
        train=TrainConfig(**(settings | train)),
        run=PlaceConfig(output_dir=str(output_dir), **dict(place)),
    )


def log_events(path: Path) -> list[dict[str, str]]:
    """The lines of a log without their timestamps; torn lines are an error."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [{key: value for key, value in parse_line(line).items() if key != "time"} for line in lines]


def outcome(output_dir: Path) -> dict[str, object]:
    """Hashes of the final folders and the logs, as they are: neither repeated nor lost lines are forgiven."""
    found: dict = {name: log_events(output_dir / "logs" / name) for name in (TRAINING, SAMPLES, EPOCHS)}
    for folder in (output_dir / "checkpoints" / name for name in FINAL_NAMES):
        if folder.exists():
            verify(folder)
            found |= {f"{folder.name}/{file}": sha256_file(folder / file) for file in STATE_FILES}
    return found


def compare(output_dir: Path, expected: dict[str, object]) -> None:
    found = outcome(output_dir)
    differing = sorted(key for key in expected if found.get(key) != expected[key])
    leftovers = [p.name for p in output_dir.rglob("*") if ".tmp-" in p.name or ".old-" in p.name]
    if differing or leftovers:
        raise Difference(f"{output_dir.name}: different: {differing}, leftovers: {leftovers}")


def newest_verified_step(output_dir: Path) -> int:
    for folder in candidates(output_dir / "checkpoints"):
        try:
            return verify(folder).step
        except (CheckpointError, OSError):
            continue
    return 0


class Blackboard:
    """A few numbers in memory shared with the child: which phase it is in, how many steps it has begun, where it stands."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 24)

    def write(self, phase: int | None = None, begun: int | None = None, step: int | None = None) -> None:
        for index, value in enumerate((phase, begun, step)):
            if value is not None:
                struct.pack_into("q", self.memory, 8 * index, value)

    def read(self) -> tuple[int, int, int]:
        return struct.unpack("qqq", self.memory[:])


def _instrument(board: Blackboard, drop_tokens: bool) -> None:
    """In the child: note phases on the blackboard, and drop tokens of every batch at random."""

    def noted(owner, name: str, phase: int) -> None:
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            before = board.read()[0]
            board.write(phase=phase)
            result = original(*args, **kwargs)
            board.write(phase=before if name != "on_train_end" else phase)
            return result

        setattr(owner, name, wrapper)

    noted(saver, "commit", 2)
    noted(saver, "prune", 2)
    noted(training.TrainingLoop, "validate", 3)
    noted(training.TrainingLoop, "sample", 3)
    noted(training.TrainingLoop, "on_train_end", 4)
    original_step, begun = training.TrainingLoop.training_step, 0

    def step(self, batch, batch_idx):
        nonlocal begun
        begun += 1
        board.write(phase=1, begun=begun, step=self.state.step)
        if drop_tokens:
            batch = batch.masked_fill(torch.rand(batch.shape) < 0.05 * (1 + random.random()), 0)
        return original_step(self, batch, batch_idx)

    training.TrainingLoop.training_step = step


def start(config: RunConfig, board: Blackboard, log: Path, drop_tokens=True, sabotage=lambda: None) -> int:
    """Fork a child that trains as `config` says; returns its pid. Its exit code is that of the command line."""
    sys.stdout.flush()
    board.write(0, 0, 0)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        _instrument(board, drop_tokens)
        sabotage()
        result = training.train(config, Reporter())
        code = 128 + result.stopped_by if result.stopped_by else 0
    except BaseException as error:  # the child must never return into the parent's code
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        os._exit(code)


def wait(pid: int, seconds: float = 120.0, until: Callable[[], bool] = lambda: False) -> int | None:
    """Exit code of a child, or None when the time is over (or `until` holds) first."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline or until():
            return None
        time.sleep(0.0005)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@dataclass
class Reference:
    expected: dict[str, object]
    startup_seconds: float
    seconds: float


def reference(config: RunConfig, log: Path, drop_tokens: bool = True) -> Reference:
    board, began = Blackboard(), time.monotonic()
    pid = start(config, board, log, drop_tokens)
    wait(pid, until=lambda: board.read()[1] > 0)
    startup = time.monotonic() - began
    if (code := wait(pid)) != 0:
        raise Difference(f"the undisturbed run ended with {code}:\n{log.read_text()[-2000:]}")
    return Reference(outcome(Path(config.run.output_dir)), startup, time.monotonic() - began)


class Soak:
    def __init__(self, folder: Path, seed: int = 0, sabotage=lambda: None):
        self.folder, self.rng, self.sabotage = folder, random.Random(seed), sabotage
        self.kills: Counter[str] = Counter()
        self.runs = self.multi = 0
        self.board = Blackboard()

    def start(self, config: RunConfig, log: Path) -> int:
        return start(config, self.board, log, sabotage=self.sabotage)

    def disturbed_run(self, config: RunConfig, undisturbed: Reference, max_kills: int, multi=False) -> int:
        """One run, killed up to `max_kills` times, then compared; returns the number of kills."""
        output_dir = Path(config.run.output_dir)
        log, killed, step = self.folder / f"{output_dir.name}.log", 0, 0
        while True:
            pid = self.start(config, log)
            if killed >= max_kills:
                code = wait(pid)
            elif self.rng.random() < 0.25:
                code = wait(pid, self.rng.uniform(0, undisturbed.startup_seconds))
            else:  # the start-up is longer than the training here: count from its end
                code = wait(pid, until=lambda: self.board.read()[1] > 0)
                left = (undisturbed.seconds - undisturbed.startup_seconds) * (1 - step / STEPS)
                code = wait(pid, self.rng.uniform(0, BEYOND * left)) if code is None else code
            if code is None and killed < max_kills:
                killed += self._kill_and_check(pid, output_dir)
                if multi:
                    killed += self._kill_in_first_step(config, log)
                step = newest_verified_step(output_dir)
                continue
            if code != 0:
                if code is None:
                    kill(pid)
                said = log.read_text()[-1500:]
                raise Difference(f"{output_dir.name}: ended with {code} after {killed} kills:\n{said}")
            compare(output_dir, undisturbed.expected)
            self.runs += 1
            shutil.rmtree(output_dir)
            return killed

    def _kill_and_check(self, pid: int, output_dir: Path) -> int:
        before = newest_verified_step(output_dir)
        kill(pid)
        self.kills[PHASES[self.board.read()[0]]] += 1
        after = newest_verified_step(output_dir)
        if after < before:
            raise Difference(f"{output_dir.name}: step {before} was safe before the kill, then only {after}")
        return 1

    def _kill_in_first_step(self, config: RunConfig, log: Path) -> int:
        """Two or three kills in a row, each within the first step after the resume."""
        times, killed = self.rng.choice((2, 3)), 0
        for _ in range(times):
            pid = self.start(config, log)
            code = wait(pid, until=lambda: self.board.read()[1] > 0)
            if code is not None:
                return killed  # there was no step left to take
            time.sleep(self.rng.uniform(0, 0.004))
            killed += self._kill_and_check(pid, Path(config.run.output_dir))
        self.multi += 1
        return killed


def command_line(config: RunConfig, *flags: str, stderr: int = subprocess.STDOUT) -> subprocess.Popen:
    """`colab_train.py` in an interpreter of its own, with this configuration; its lines come through a pipe."""
    path = Path(f"{config.run.output_dir}.yaml")
    path.write_text(config.to_yaml())
    command = [sys.executable, "-u", "colab_train.py", "--config", str(path), *flags]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment, **pipes)


def fresh_run(config: RunConfig, undisturbed: Reference, rng: random.Random, max_kills: int) -> int:
    """As `Soak.disturbed_run`, with a new interpreter and the real command line for every start."""
    killed, output_dir, most = 0, Path(config.run.output_dir), BEYOND * (undisturbed.seconds + IMPORT_SECONDS)
    while True:
        process = command_line(config)
        try:
            said, _ = process.communicate(timeout=rng.uniform(0, most) if killed < max_kills else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            continue
        if process.returncode:
            raise Difference(f"colab_train.py ended with {process.returncode}:\n{said[-1500:]}")
        compare(output_dir, undisturbed.expected)
        shutil.rmtree(output_dir)
        return killed


def spoil_what_is_loaded(spoil: Callable) -> None:
    original = training.load

    def load(opened):
        loaded = original(opened)
        spoil(*loaded)
        return loaded

    training.load = load


def break_position() -> None:
    spoil_what_is_loaded(lambda model, state, moments: setattr(state, "position", 0))


def break_random_state() -> None:
    run.restore_rng = lambda tensors, device: None


def break_optimizer_state() -> None:
    spoil_what_is_loaded(lambda model, state, moments: [tensor.zero_() for tensor in moments.values()])


def break_commit() -> None:
    """Make room first, then write into the folder itself: what many trainers do."""
    original = saver.commit

    def commit(parent, name, files, run_id, step, facts):
        for folder in candidates(parent):
            shutil.rmtree(folder)
        (parent / name).mkdir()
        time.sleep(0.03)
        os.rmdir(parent / name)
        return original(parent, name, files, run_id, step, facts)

    saver.commit = commit


SABOTAGES = {
    "data position": break_position,
    "random state": break_random_state,
    "optimizer state": break_optimizer_state,
    "commit protocol": break_commit,
}


def caught(name: str, text: Path, folder: Path, undisturbed: Reference, kills: int = 40) -> str | None:
    """What the harness found with something broken on purpose; None when it noticed nothing (then it is worthless)."""
    soak = Soak(folder, seed=1, sabotage=SABOTAGES[name])
    try:
        while soak.kills.total() < kills:
            soak.disturbed_run(small_config(text, folder / "sabotaged"), undisturbed, KILLS_A_RUN)
    except Difference as difference:
        shutil.rmtree(folder / "sabotaged", ignore_errors=True)
        return str(difference).splitlines()[0]
    return None


def soak_all(folder: Path, text: Path, kills: int, multi: int, fresh: int, seed=0) -> dict[int, Reference]:
    """So many kills of each kind, over one micro-batch and over four a step; returns the undisturbed runs."""
    began, soak, number = time.monotonic(), Soak(folder, seed), 0
    undisturbed, log = {}, folder / "undisturbed.log"
    for micro in (1, 4):
        undisturbed[micro] = reference(small_config(text, folder / f"undisturbed-{micro}", micro), log)

    def tell(what: str) -> None:
        print(f"{what}: 0 differences ({time.monotonic() - began:.0f} s)", flush=True)

    while soak.kills.total() < kills or soak.multi < multi:
        micro, doubled = (1, 4)[number % 2], soak.kills.total() >= kills
        config = small_config(text, folder / f"run-{number}", micro)
        soak.disturbed_run(config, undisturbed[micro], KILLS_A_RUN, doubled)
        number += 1
    phases = dict(soak.kills)
    tell(f"{soak.kills.total()} kills {phases}, of them {soak.multi} double or triple, in {soak.runs} runs")
    if fresh:
        rng, killed = random.Random(seed), 0
        plain = reference(small_config(text, folder / "plain"), folder / "plain.log", drop_tokens=False)
        while killed < fresh:
            killed += fresh_run(small_config(text, folder / "fresh"), plain, rng, fresh - killed)
        tell(f"{killed} kills of fresh interpreters")
    return undisturbed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in forked runs")
    parser.add_argument("--fresh", type=int, default=0, help="of whole interpreters running colab_train.py")
    parser.add_argument("--multi", type=int, default=0, help="double and triple ones, right after a resume")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # and no parallel region before a fork: a child of a threaded parent may hang
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        text = small_text(Path(name, "text.txt"))
        undisturbed = soak_all(Path(name), text, args.kills, args.multi, args.fresh, args.seed)
        found = {broken: caught(broken, text, Path(name), undisturbed[1]) for broken in SABOTAGES}
    for what, difference in found.items():
        print(f"broken on purpose, {what}: {f'caught: {difference[:120]}' if difference else 'NOT CAUGHT'}")
    return int(not all(found.values()))


if __name__ == "__main__":
    sys.exit(main())
