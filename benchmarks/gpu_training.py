"""Whole runs of `train`: a T4 rehearsed, kills and resumes compared bit for bit, the default run, a long run.

Faults are planted from outside: a `Reporter` that kills its own process, `SmolLM2.loss` that runs out of
memory, a loss scale that is far too high. Only the package's public names are used.
"""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import time
from collections import Counter
from pathlib import Path

import torch

from smollm2 import SmolLM2, load_config, train
from smollm2.device import choose_device
from smollm2.plan import plan
from smollm2.progress import Reporter

from .contenders import OURS, train_step
from .gpu_bench import Bench, ChildDied
from .gpu_network import EAGER, contender, job_of
from .measure import seconds_of

T4_BYTES = 14.5 * 2**30
NEVER = 10**6
RESUME_STEPS, SAVE_EVERY, KILL_AT = 25, 10, 17


class Watcher(Reporter):
    """Notes what happens and when; kills its process at a step, or some seconds after the first one."""

    def __init__(self, kill_at: int | None = None, kill_after: float | None = None):
        self.kill_at, self.kill_after = kill_at, kill_after
        self.steps: list[tuple[int, float, float]] = []  # step, loss, when
        self.saves: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []  # step, bits per byte
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        self.steps.append((step, loss, now))
        running = now - self.steps[0][2]
        if step == self.kill_at or (self.kill_after is not None and running > self.kill_after):
            os.kill(os.getpid(), signal.SIGKILL)

    def saved(self, local_step: int, drive_step: int | None) -> None:
        self.saves.append((local_step, time.monotonic()))

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.scores.append((step, bits_per_byte))


def plant_out_of_memory(at_call: int | None = None, above_rows: int | None = None) -> Counter:
    """`SmolLM2.loss` runs out of memory once, or with many rows. Returns {rows: calls}, as they come."""
    original, calls = SmolLM2.loss, Counter()

    def loss(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # not the validation's
            calls[len(input_ids)] += 1
            if calls.total() == at_call or len(input_ids) > (above_rows or NEVER):
                raise torch.OutOfMemoryError("out of memory: planted")
        return original(self, input_ids, targets)

    SmolLM2.loss = loss
    return calls


def plant_scale(scale: float) -> list[torch.amp.GradScaler]:
    made, original = [], torch.amp.GradScaler

    class Planted(original):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"init_scale": scale})
            made.append(self)

    torch.amp.GradScaler = Planted
    return made


def become_a_t4() -> None:
    """Its memory, its kernels, and its compute capability as the package asks for it."""
    if choose_device().type != "cuda":
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(T4_BYTES / total)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)  # a T4 has it, but what needs it is far too slow there: fail
    torch.cuda.get_device_capability = lambda device=None: (7, 5)


def config_of(bench: Bench, folder: Path, shape: tuple[int, int], steps: int, **train_settings):
    """A run that validates, samples and saves only where `train_settings` say so, and at its end."""
    rows, length = shape
    settings = {
        "run.output_dir": str(folder),
        "data.input_file": bench.text,
        "data.tokenizer": bench.tokenizer,
        "data.sequence_length": length,
    }
    defaults = {"max_steps": steps, "batch_size": rows, "micro_batch_size": rows, "warmup_steps": 5}
    defaults |= dict.fromkeys(("val_every", "sample_every", "save_every"), NEVER) | {"sample_tokens": 4}
    settings |= {f"train.{key}": value for key, value in (defaults | train_settings).items()}
    return load_config(bench.scale.preset, **bench.scale.settings | settings)


def hashes(folder: Path) -> dict[str, str]:
    final = folder / "checkpoints" / "final_model.ckpt"
    names = ("model.safetensors", "optim.safetensors")
    return {name: hashlib.sha256((final / name).read_bytes()).hexdigest()[:16] for name in names}


# --- 4: a T4, rehearsed


def t4(bench: Bench) -> None:
    half = {}
    for precision in ("fp16", "bf16"):
        facts = bench.case("t4", f"{precision}, 40 steps", bench.child, t4_run, precision, needs=12)
        half[precision] = facts and facts["last_losses_mean"]
    if all(half.values()):
        difference = half["fp16"] - half["bf16"]
        bench.record("t4", "fp16 beside bf16", difference=difference, within_0_02=abs(difference) < 0.02)
    bench.case("t4", "fp16, Muon", bench.child, t4_run, "fp16", "muon", needs=12)
    bench.case("t4", "a scale of 2^30", bench.child, scale_run, needs=10)
    bench.case("t4", "more rows than fit", bench.child, halving_run, needs=10)


def t4_run(bench: Bench, precision: str, optimizer: str = "adamw") -> dict:
    if precision == "fp16":  # bf16 is the measure: it runs as this card would run it
        become_a_t4()
    watcher = Watcher()
    folder = bench.folder / f"t4-{precision}-{optimizer}"
    settings = {"precision": precision, "optimizer": optimizer, "learning_rate": 1e-3}
    train(config_of(bench, folder, bench.scale.run, 40, **settings), watcher)
    losses = [loss for _, loss, _ in watcher.steps]
    facts = {"first_loss": losses[0], "last_losses_mean": statistics.fmean(losses[-10:])}
    if torch.cuda.is_initialized():
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    return facts | {"bits_per_byte": watcher.scores[-1][1]}


def scale_run(bench: Bench) -> dict:
    """Gradients overflow, updates are skipped, the scale halves until they do not."""
    become_a_t4()
    scalers, calls, watcher = plant_scale(2.0**30), plant_out_of_memory(), Watcher()
    result = train(config_of(bench, bench.folder / "scale", bench.scale.run, 8, precision="fp16"), watcher)
    skips = calls.total() - result.step
    if not skips:
        raise RuntimeError("a scale of 2^30 skipped no update")
    return {"steps": result.step, "skips": skips, "scale_at_the_end": scalers[-1].get_scale()}


def halving_run(bench: Bench) -> dict:
    """16 rows of 2,048 tokens do not fit a T4: the micro-batch halves until they do."""
    become_a_t4()
    is_gpu = choose_device().type == "cuda"
    rows, length = (16, 2048) if is_gpu else bench.scale.run
    calls, watcher = plant_out_of_memory(above_rows=None if is_gpu else rows // 2), Watcher()
    result = train(config_of(bench, bench.folder / "halving", (rows, length), 3, precision="fp16"), watcher)
    if len(calls) < 2:
        raise RuntimeError(f"{rows} rows of {length} tokens did not run out of memory")
    return {"steps": result.step, "calls_by_rows": dict(calls)}


# --- 5: killed and resumed, bit for bit


def resume(bench: Bench) -> None:
    for case, settings, halves, needs in (  # each is three processes
        ("eager", {}, False, 20),
        ("compiled", {"compile": True}, False, 35),
        ("compiled, after a halving", {"compile": True}, True, 35),
    ):
        bench.case("resume", case, kill_and_resume, bench, case, settings, halves, needs=needs)


def kill_and_resume(bench: Bench, case: str, settings: dict, halves: bool) -> dict:
    name = case.replace(", ", "-").replace(" ", "-")
    alone, killed = bench.folder / f"{name}-alone", bench.folder / f"{name}-killed"
    bench.child(resume_run, alone, settings, halves, None)
    try:
        bench.child(resume_run, killed, settings, halves, KILL_AT)
    except ChildDied as death:
        if death.exit_code != -signal.SIGKILL:
            raise
    resumed_at = bench.child(resume_run, killed, settings, False, None)
    first, second = hashes(alone), hashes(killed)
    if first != second:
        raise RuntimeError(f"resumed at step {resumed_at}: {second}, left alone: {first}")
    return {"equal": True, "killed_at": KILL_AT, "resumed_at": resumed_at} | first


def resume_run(bench: Bench, folder: Path, settings: dict, halves: bool, kill_at: int | None) -> int:
    """Returns the step at which it began."""
    rows, length = bench.scale.run
    if halves:
        plant_out_of_memory(at_call=5)
    config = config_of(
        bench, folder, (rows, length), RESUME_STEPS, save_every=SAVE_EVERY, deterministic=True, **settings
    )
    layers = config.model.model_copy(update={"num_hidden_layers": bench.scale.layers})
    watcher = Watcher(kill_at)
    train(config.model_copy(update={"model": layers}), watcher)
    return watcher.steps[0][0] - 1


# --- 7: the default run, the loop around it, saves


def run(bench: Bench) -> None:
    bench.case("run", "default", bench.child, default_run, needs=15)
    bench.case("run", "plan", bench.child, plan_run, needs=10)
    bench.case("run", "loop and saves", bench.child, loop_run, needs=25)


def default_run(bench: Bench) -> dict:
    """What `python colab_train.py` does with a GPU: the preset as it is."""
    settings = {"data.input_file": bench.text, "data.tokenizer": bench.tokenizer}
    settings["run.output_dir"] = str(bench.folder / "default")
    if bench.scale.settings:
        settings |= bench.scale.settings | {"train.max_steps": 10, "data.sequence_length": 32}
    watcher = Watcher()
    result = train(load_config(bench.scale.preset, **settings), watcher)
    return {
        "steps": result.step,
        "bits_per_byte": result.bits_per_byte,
        "references": result.references,
        "tokens_per_second": result.tokens_per_second,
        "run_seconds": result.seconds,
        "scores": watcher.scores,
        "messages": watcher.messages,
    }


def plan_run(bench: Bench) -> dict:
    """What `python -m smollm2.plan` foretells, and what its trial takes."""
    return plan(load_config(bench.scale.preset, **bench.scale.settings, **{"data.input_file": bench.text}))


def loop_run(bench: Bench) -> dict:
    """Lightning's loop and ours around it beside the bare loop, at the shape where launches, not work, take
    the time; how long a save holds up training; how fast it is while one is written."""
    rows, length = bench.scale.run[0] // 2, bench.scale.run[1]
    job = job_of(bench, "train", (rows, length), "bf16")
    step = train_step(OURS, contender(EAGER, job), job)
    bare = statistics.median([seconds_of(step, job.device) for _ in range(25)][5:])
    # between two saves time for writing one: a save that comes sooner waits for the last
    every = max(20, round(5 * bench.scale.seconds / bare))
    watcher, settings = Watcher(), {"save_every": every, "precision": "bf16", "log_every": NEVER}
    train(config_of(bench, bench.folder / "loop", (rows, length), 3 * every, **settings), watcher)
    times = {number: when for number, _, when in watcher.steps}
    gaps = {number: times[number] - times[number - 1] for number in times if number - 1 in times}
    written, saves = dict(watcher.saves), (every, 2 * every)
    during = [
        gaps[number]
        for saved in saves
        for number in range(saved + 2, saved + every)
        if saved in written and times[number] < written[saved]
    ]
    quiet = statistics.median([gap for number, gap in gaps.items() if 5 < number <= every])
    return {
        "bare_step_seconds": bare,
        "step_seconds": quiet,
        "loop_over_bare": quiet / bare,
        # the save of a step takes place between its report and that of the next one; the first makes room
        "save_blocks_seconds": [gaps[saved + 1] - quiet for saved in saves],
        "save_takes_seconds": [written[saved] - times[saved] for saved in saves if saved in written],
        "step_seconds_while_saving": statistics.median(during) if during else None,
    }


# --- 8: a long run on a larger text


def long(bench: Bench) -> None:
    bench.case("long", "whole run", long_run, bench)


def long_run(bench: Bench) -> dict:
    """Compiled, killed two fifths of the way, resumed to the end of its schedule."""
    seconds = min(bench.scale.long_seconds, 0.75 * bench.left())
    step_seconds = bench.child(time_long_steps)
    steps = max(20, round(seconds / step_seconds))
    try:
        bench.child(long_part, steps, 0.4 * seconds)
    except ChildDied as death:
        if death.exit_code != -signal.SIGKILL:
            raise
    return {"planned_steps": steps, "step_seconds_before": step_seconds} | bench.child(long_part, steps, None)


def time_long_steps(bench: Bench) -> float:
    watcher = Watcher()
    train(config_of(bench, bench.folder / "long-trial", bench.scale.long_run, 12, compile=True), watcher)
    when = [at for _, _, at in watcher.steps][-8:]
    return (when[-1] - when[0]) / (len(when) - 1)


def long_part(bench: Bench, steps: int, kill_after: float | None) -> dict:
    every = max(1, steps // 10)
    settings = {
        "val_every": every,
        "val_max_tokens": 100_000,
        "save_every": every,
        "warmup_steps": steps // 20,
    }
    settings |= {"learning_rate": 2e-3, "decay_fraction": 0.5, "compile": True}
    config = config_of(bench, bench.folder / "long", bench.scale.long_run, steps, **settings)
    data = config.data.model_copy(update={"input_file": bench.long_text})
    config = config.model_copy(update={"data": data})
    watcher = Watcher(kill_after=kill_after)
    result = train(config, watcher)
    return {
        "steps": result.step,
        "resumed_at": watcher.steps[0][0] - 1,
        "bits_per_byte": result.bits_per_byte,
        "references": result.references,
        "tokens_per_second": result.tokens_per_second,
        "scores": watcher.scores,
        "losses": [(step, loss) for step, loss, _ in watcher.steps[:: max(1, len(watcher.steps) // 40)]],
    }
