"""What a run needs and what its minutes buy: `python -m smollm2.plan`, and the steps of `--minutes`.

Memory is a sum whose parts are told: tensors by their number, activations by what a block keeps for the
backward pass (tests/test_plan.py counts it). Speed is measured with a few steps of the real model on this
device; for a GPU that is not here (`--gpu t4`) it is an estimate, and says so.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from .config import RunConfig, SmolLM2Config
from .cpu_attention import BLOCK, KEPT_BYTES
from .dataset import open_text
from .device import (
    Precision,
    autocast,
    choose_device,
    choose_precision,
    choose_preset,
    device_name,
    free_unused_memory,
    kept_memory,
    memory_bytes,
    sharing_cores,
)
from .errors import ArgumentParser, ConfigError, is_out_of_memory, run_command
from .evaluate import score_tokens
from .loss import PASS_BYTES, rows_per_block
from .model import SmolLM2
from .optim import make_optimizer
from .parameters import flops_per_token, parameter_count, training_bytes
from .sampling import stream
from .settings import load_config
from .text import read_text

PROBE_SECONDS = 4.0  # of measured steps, after two that warm up; four times as many where they differ
MINUTES = (10, 20, 60, 480)
SHARE_PLANNED = 0.95  # of free memory
# of the time that is left: two CPU cores sustain up to a sixth less than they give at first (docs/log.md)
SHARE_OF_TIME = 0.85
TOKENS_PER_PARAMETER = 1.5  # the presets of 10M and 30M parameters read 1.5 and 1.7
# a quarter of an hour of a T4, a minute of an H100
COMPILING_PAYS_FLOPS, COMPILING_PAYS_MINUTES = 1e16, 5
# share of what comes and goes on a CPU's heap: glibc fits no aligned block into a hole of just its size
GAPS = 0.33  # measured: docs/log.md
KERNEL_BYTES = 32 * 2**20  # that a CPU's products are compiled to, and what libraries keep
DISK_BYTES_PER_SECOND = 150e6
LAUNCH_SECONDS = 1e-5
PACKED_BYTES_PER_SECOND = 0.7e6  # gzip -9 and xz together, on one core


class Gpu(NamedTuple):
    """A card that is not here: GiB that a process can use, its half precision, and the TFLOP/s that this
    network is estimated to reach on it, uncompiled (nobody has measured them yet)."""

    gib: float
    precision: str
    tflops: float


GPUS = {
    "t4": Gpu(14.5, "fp16", 10.6), "l4": Gpu(22, "bf16", 19),
    "a100": Gpu(39, "bf16", 87), "h100": Gpu(79, "bf16", 194),
}  # fmt: skip


# --- memory -------------------------------------------------------------------------------------------------


def activation_bytes(config: SmolLM2Config, length: int, is_half: bool, device_type: str) -> tuple[int, int]:
    """Bytes of one row of `length` tokens: (kept of each layer, of a block's backward pass)."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, 2 if is_half else 4
    heads = config.num_attention_heads
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    if device_type == "cpu":  # what `cpu_block` saves, and what lives at the end of its backward pass
        layer = 8 * hidden + 2 * width * (q + kv + inner)
        if length * width <= KEPT_BYTES:  # of the probabilities the lower half, in blocks
            layer += width * heads * (length + BLOCK) // 2
        backward = (20 + 2 * width) * hidden + width * (4 * inner + 3 * q) + (8 + 2 * width) * kv
    else:  # autograd's; keys and values may be expanded to every head
        layer = (16 + 2 * width) * hidden + 4 * width * (q + inner)
        backward = 8 * inner
    return length * layer, length * backward


def memory_parts(config: RunConfig, rows: int, is_half: bool, device_type: str) -> dict[str, int]:
    """Bytes that training holds at its peak with micro-batches of `rows`, by what they are for."""
    model, length = config.model, config.data.sequence_length
    count, tokens = parameter_count(model), rows * length
    layer, backward = activation_bytes(model, length, is_half, device_type)
    width = 2 if is_half else 4
    block = rows_per_block(tokens, model.vocab_size, device_type, width) * model.vocab_size
    around = (8 + width) * model.hidden_size * tokens  # the final norm: what it reads, scaled, and gives
    activations = rows * layer * model.num_hidden_layers + around
    # a block's logits, in half as its products pack them, too; of a pass over them scores and softmax in
    # fp32; gradients of both factors in fp32; in half the wide factor and its gradient as well
    wide = model.hidden_size * model.vocab_size
    in_pass = (1 + is_half) * min(4 * block, PASS_BYTES.get(device_type, PASS_BYTES["cpu"]))
    loss = 4 * block + in_pass + 4 * is_half * wide + 4 * (wide + model.hidden_size * tokens)
    # those of the micro-batches before; else activations go as gradients come, the embedding's first
    is_first = rows * config.run.devices * config.run.num_nodes >= config.train.batch_size
    gradients = 0 if is_first else 4 * count
    coming = max(4 * count - gradients - activations, 4 * model.vocab_size * model.hidden_size)
    of_a_block = 4 * (count - wide) // model.num_hidden_layers  # gradients
    working = max(loss, coming + rows * backward + of_a_block)
    is_cpu = device_type == "cpu"
    return {
        "weights, moments": training_bytes(model, config.train.optimizer),
        "gradients": gradients,
        "half-precision weights": 0 if is_cpu or not is_half else 2 * count,
        "activations": activations,
        "loss, or a block's backward pass": working,
        "gaps, kernels": int(GAPS * (activations + working)) + KERNEL_BYTES if is_cpu else 0,
    }


def check_memory(config: RunConfig, device: torch.device, is_half: bool) -> None:
    """Raises `ConfigError` for a run that this machine's memory cannot hold. A GPU's own is not looked at:
    there the micro-batch is halved when it does not suffice."""
    train, length, count = config.train, config.data.sequence_length, parameter_count(config.model)
    rows, total = train.batch_size // config.run.num_nodes, memory_bytes()
    needed = 4 * count + rows * length * 10  # weights; token numbers of a step, as uint16 and as int64
    if device.type == "cpu":
        micro = min(train.micro_batch_size or rows, rows // config.run.devices)
        needed += sum(memory_parts(config, micro, is_half, "cpu").values()) - 4 * count
    if needed > total:
        asked = f"{count:,} parameters and a train.batch_size of {rows:,} x {length:,} tokens"
        needed, total = needed / 2**30, total / 2**30
        sizes = f"{needed:,.1f} GiB of memory; this machine, or its container, has {total:,.1f}"
        advice = "choose a smaller train.micro_batch_size, train.batch_size, data.sequence_length, or model"
        raise ConfigError(f"{asked} need {sizes} GiB: {advice}")


def micro_batch_that_fits(config: RunConfig, is_half: bool, device_type: str, limit: float) -> int:
    """The largest divisor of this device's rows whose micro-batch fits `limit` bytes; 0 when none does."""
    rows = config.train.batch_size // (config.run.devices * config.run.num_nodes)
    parts = [part for part in range(rows, 0, -1) if rows % part == 0]
    fits = (p for p in parts if sum(memory_parts(config, p, is_half, device_type).values()) <= limit)
    return next(fits, 0)


def rows_in_free_memory(config: RunConfig, device: torch.device, precision: Precision) -> int:
    """Micro-batch of a run on this GPU; one row where even that seems too much: it is tried."""
    free_unused_memory()  # what an earlier run of this process keeps for the next
    free, is_half = torch.cuda.mem_get_info(device)[0], precision.autocast_dtype is not None
    return micro_batch_that_fits(config, is_half, device.type, SHARE_PLANNED * free) or 1


# --- speed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step, of scoring a held-out token, of sampling a token; bytes at the peak."""

    step: float
    scored_token: float
    sampled_token: float
    peak_bytes: int = 0


def _seconds(action) -> float:
    """Of one `action()`: the median of three."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        action()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def _peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU, or of this process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, TypeError):  # no such file, or (gVisor) no such line
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024
    return 0


def is_known(times: np.ndarray) -> bool:
    """Whether the mean of these times is known within 3 %: after a few where nobody else uses the machine."""
    return len(times) > 2 and times.std() < 0.03 * times.mean() * math.sqrt(len(times))


def measure(config: RunConfig, device: torch.device, precision: Precision, seconds=PROBE_SECONDS) -> Speed:
    """From some steps of the real model on random tokens, all thrown away; random states stay as they are. As
    in training, a micro-batch that does not fit is halved."""
    train = config.train
    micro = train.micro_batch_size or train.batch_size // (config.run.devices * config.run.num_nodes)
    while True:
        asked, speed = train.model_copy(update={"micro_batch_size": micro}), None
        try:
            speed = _measure(config.model_copy(update={"train": asked}), device, precision, seconds)
        except RuntimeError as error:
            if not is_out_of_memory(error) or micro == 1:
                raise
        free_unused_memory()  # behind the handler: inside it the traceback still holds the trial's tensors
        if speed:
            return speed
        micro //= 2


def _measure(config: RunConfig, device: torch.device, precision: Precision, seconds: float) -> Speed:
    train, length = config.train, config.data.sequence_length
    rows = train.batch_size // (config.run.devices * config.run.num_nodes)
    micro = min(train.micro_batch_size or rows, rows)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # else the largest of all trials so far would be told
        before = torch.cuda.memory_allocated(device)
    else:
        before = psutil.Process().memory_info().rss
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = SmolLM2(config.model).to(device)
        ids = torch.randint(config.model.vocab_size, (micro, length + 1), device=device)
    if train.compile is True:
        model.compile_blocks()
    optimizer = make_optimizer(model, train, precision.autocast_dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def trial() -> tuple[float, float]:
        """Seconds of a micro-batch, and of the update."""
        times = [time.perf_counter()]
        with autocast(precision, device):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        wait()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.gradient_clip_norm)
        optimizer.step()
        if micro == rows:  # else a micro-batch adds to what those before it left
            optimizer.zero_grad(set_to_none=True)
        wait()
        return times[1] - times[0], time.perf_counter() - times[1]

    def score() -> None:
        tokens = ids.flatten().cpu().numpy()
        score_tokens(model, tokens, len(tokens), length, autocast=lambda: autocast(precision, device))

    def sample() -> None:
        with autocast(precision, device):
            for tokens, _ in stream(model, ids[:1, :4], 8):
                tokens.cpu()

    for _ in range(2):
        trial()
    trials = np.array([trial()])
    while (spent := trials.sum()) < seconds or (spent < 4 * seconds and not is_known(trials.sum(axis=1))):
        trials = np.vstack([trials, trial()])
    # no median: where others use the machine, some steps take twice as long, and they count, too
    of_micro_batch, of_update = trials.mean(axis=0)
    took = float(rows / micro * of_micro_batch + of_update)
    peak = max(_peak_bytes(device) - before, 0)
    with torch.compiler.set_stance("force_eager"):
        return Speed(took, _seconds(score) / ids.numel(), _seconds(sample) / 8, peak)


def compiling_pays(config: RunConfig) -> bool:
    """Whether the run is long enough to win back the half minute or so that compiling takes."""
    train, length = config.train, config.data.sequence_length
    if train.minutes:
        return train.minutes >= COMPILING_PAYS_MINUTES
    tokens = (train.max_steps + train.continue_steps) * train.batch_size * length
    return tokens * flops_per_token(config.model, length) >= COMPILING_PAYS_FLOPS


def why_not_compiled(config: RunConfig, rows: int, device: torch.device, precision: Precision) -> str | None:
    """Why torch.compile cannot make a block, forward and backward (slim images have no compiler), in a line;
    None when it can. A trial with micro-batches of `rows`: what it makes serves the run."""
    ids = torch.zeros(rows, config.data.sequence_length, dtype=torch.int64, device=device)
    shape = {"vocab_size": 64, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 0}
    model = SmolLM2(config.model.model_copy(update=shape)).to(device)
    try:
        # graphs of this process's earlier runs count against torch's eight of a function: with the ninth a
        # run would go on uncompiled, to other bits, and nothing would say so
        torch.compiler.reset()
        model.compile_blocks()
        with autocast(precision, device):
            loss = model.loss(ids, ids)
        loss.backward()
    except Exception as error:  # each backend has errors of its own
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def save_seconds(config: RunConfig) -> float:
    """Of writing a checkpoint, on a slow disk."""
    return 0.5 + training_bytes(config.model, config.train.optimizer) / DISK_BYTES_PER_SECOND


def steps_within(
    config: RunConfig, speed: Speed, held_out_tokens: int, held_out_bytes: int, seconds: float
) -> int:
    """Optimizer steps that end, with their validations, samples and saves, within `seconds`; at least one."""
    train = config.train
    scored = min(train.val_max_tokens or held_out_tokens, held_out_tokens)
    validation, sampling = speed.scored_token * scored, speed.sampled_token * train.sample_tokens
    # at the end: the whole held-out part, the last save, gzip and xz of that part
    fixed = 2 * save_seconds(config) + held_out_bytes / PACKED_BYTES_PER_SECOND
    fixed += speed.scored_token * held_out_tokens
    each = speed.step + validation / train.val_every + sampling * len(train.prompts) / train.sample_every
    return max(1, int((seconds - fixed) * SHARE_OF_TIME / each))


def estimate(config: RunConfig, gpu: Gpu) -> Speed:
    """Speed on a card that is not here: arithmetic, no measurement. A small model waits for its kernels to be
    launched: about 40 a layer forward, 65 backward, at 10 microseconds each on the CPU of a Colab machine."""
    train, length, layers = config.train, config.data.sequence_length, config.model.num_hidden_layers
    rows = train.batch_size // (config.run.devices * config.run.num_nodes)
    tokens, parts = rows * length, rows // (train.micro_batch_size or rows)
    computing = tokens * flops_per_token(config.model, length) / (gpu.tflops * 1e12)
    step = max(computing, parts * (105 * layers + 150) * LAUNCH_SECONDS)
    return Speed(step, step / tokens / 3, (40 * layers + 50) * LAUNCH_SECONDS)  # a forward pass is a third


# --- the command --------------------------------------------------------------------------------------------


def plan(config: RunConfig, gpu: str | None = None, minutes=MINUTES, seconds=PROBE_SECONDS) -> dict:
    """What the command tells, as JSON values. Raises `ConfigError` where not even one row at a time fits."""
    train, length = config.train, config.data.sequence_length
    if gpu:
        card, device_type, is_half = GPUS[gpu], "cuda", True
        if train.precision not in ("auto", card.precision):
            known = f"the speed of --gpu {gpu} is known in {card.precision} only"
            raise ConfigError(f"train.precision {train.precision}: {known}; leave it out")
        precision, room, name = card.precision, card.gib * 2**30, f"{gpu.upper()} (not here: estimated)"
    else:
        device = choose_device()
        chosen = choose_precision(train.precision, device)
        precision, is_half = chosen.name, chosen.autocast_dtype is not None
        device_type, name = device.type, device_name(device)
        room = torch.cuda.mem_get_info(device)[0] if device_type == "cuda" else memory_bytes()
    limit = SHARE_PLANNED * room
    micro = micro_batch_that_fits(config, is_half, device_type, limit)
    if not micro:
        least = sum(memory_parts(config, 1, is_half, device_type).values()) / 2**30
        raise ConfigError(
            f"{config.preset} needs {least:.1f} GiB with one row of {length:,} tokens at a time; {name} has "
            f"{room / 2**30:.1f} GiB: choose a smaller preset or data.sequence_length"
        )
    micro = min(micro, train.micro_batch_size or micro)
    config = config.model_copy(update={"train": train.model_copy(update={"micro_batch_size": micro})})
    with kept_memory(), sharing_cores():  # as in training
        speed = estimate(config, card) if gpu else measure(config, device, chosen, seconds)
    per_step, text = train.batch_size * length, Path(config.data.chat_file or config.data.input_file)
    in_text = text.stat().st_size / bytes_per_token(config.model.vocab_size) if text.is_file() else 0
    if config.data.dataset:
        in_text = open_text(config, None).tokens
    held_out = int(in_text * config.data.held_out_fraction)
    steps = {m: steps_within(config, speed, held_out, 0, 60 * m) for m in minutes}
    buys = [{"minutes": m, "steps": n, "tokens": n * per_step} for m, n in steps.items()]
    return {
        "preset": config.preset, "parameters": parameter_count(config.model), "device": name,
        "precision": precision, "micro_batch_size": micro, "tokens_per_step": per_step,
        "memory_bytes": memory_parts(config, micro, is_half, device_type), "room_bytes": int(room),
        "tokens_per_second": per_step / speed.step, "is_measured": gpu is None,
        "measured_peak_bytes": speed.peak_bytes or None, "text_tokens": int(in_text),
        "training_tokens": int(in_text) - held_out, "buys": buys,
    }  # fmt: skip


def preset_that_fits(minutes: float) -> tuple[str, str]:
    """The largest preset to which these minutes on this device give the tokens it needs, and why."""
    chosen, needed = "nano", f"{TOKENS_PER_PARAMETER} tokens a parameter"
    for preset in ("smollm2-10m", "smollm2-30m", "smollm2-135m"):
        facts = plan(load_config(preset), minutes=(minutes,))
        share = facts["buys"][0]["tokens"] / (TOKENS_PER_PARAMETER * facts["parameters"])
        if share < 1:
            return chosen, f"{minutes:g} minutes give {preset} {share:.0%} of its {needed}"
        chosen = preset
    return chosen, f"{minutes:g} minutes give it its {needed}"


def bytes_per_token(vocab_size: int) -> float:
    """Of English text under a byte-level BPE of this size, about: 2.6 at 1,024 entries, 4.3 at 49,152."""
    return 0.3 * math.log2(vocab_size) - 0.4


def table(facts: dict) -> str:
    """`plan`'s facts as a person reads them."""
    gib, parts = 2**30, facts["memory_bytes"]
    memory = ", ".join(f"{name} {size / gib:.2f}" for name, size in parts.items() if size)
    measured = facts["measured_peak_bytes"]
    how = "measured with a few steps" if facts["is_measured"] else "an estimate, not measured"
    lines = [
        f"{facts['preset']}: {facts['parameters']:,} parameters on {facts['device']}, {facts['precision']}",
        f"memory   {sum(parts.values()) / gib:.2f} of {facts['room_bytes'] / gib:.1f} GiB ({memory})"
        + (f"; the trial took {measured / gib:.2f}" if measured else ""),
        f"step     {facts['tokens_per_step']:,} tokens, in micro-batches of {facts['micro_batch_size']} rows",
        f"speed    {facts['tokens_per_second']:,.0f} tokens/s, {how}",
        f"{'minutes':>9}{'steps':>10}{'tokens':>16}   passes over the text",
    ]
    for row in facts["buys"]:
        passes = f"{row['tokens'] / facts['training_tokens']:.1f}" if facts["training_tokens"] else "-"
        lines.append(f"{row['minutes']:>9g}{row['steps']:>10,}{row['tokens']:>16,}   {passes}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser("python -m smollm2.plan", description="What a run needs and what its minutes buy")
    parser.add_argument("--preset", default="auto", help="as in colab_train.py")
    parser.add_argument("--minutes", type=float, help="this many, instead of 10, 20, 60 and 480")
    parser.add_argument("--input_file", help="text to count passes over (default input.txt)")
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), help="a card that is not here: estimated, not measured"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    asked = "smollm2-135m" if args.gpu and args.preset == "auto" else args.preset
    flags = {"data.input_file": args.input_file, "train.minutes": args.minutes}
    config = load_config(choose_preset(asked)[0], None, args.overrides, **flags)
    if "input_file" in config.data.model_fields_set:
        next(read_text(config.data.input_file), None)
    facts = plan(config, args.gpu, (config.train.minutes,) if config.train.minutes else MINUTES)
    print(json.dumps(facts) if args.json else table(facts))
    return 0


if __name__ == "__main__":
    run_command(main)
