"""`python -m benchmarks train|decode`: ours and its peers; `gpu`: what a borrowed GPU must show."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace

import torch

from smollm2.config import SmolLM2Config
from smollm2.device import choose_device, device_name
from smollm2.errors import ArgumentParser, ConfigError, run_command
from smollm2.parameters import flops_per_token, parameter_count
from smollm2.settings import load_config

from .contenders import DTYPES, OURS, Job, build, contender_names, decode, synchronize, train_step
from .measure import PeakMemory, alternating, in_fresh_process, roofs, seconds_of, spread


def parse(argv: list[str] | None):
    parser = ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory beside transformers, in one run."
    )
    parser.add_argument("task", choices=("train", "decode"))
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=None, help="rows (default: train 2, decode 1)")
    parser.add_argument(
        "--length",
        type=int,
        default=None,
        help="tokens of a row, or of the prompt (default: train 512, decode 32)",
    )
    parser.add_argument(
        "--new_tokens", type=int, default=64, help="decode: tokens generated behind the prompt"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="train: of autocast; decode: of the weights"
    )
    parser.add_argument("--peers", default="transformers", help="comma-separated; empty for ours alone")
    parser.add_argument(
        "--steps", type=int, default=None, help="train: optimizer steps of a window (default 1, on a GPU 10)"
    )
    parser.add_argument(
        "--windows", type=int, default=6, help="windows of each contender, alternating A B B A"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line on standard output")
    parser.add_argument(
        "--memory_of", default=None, help="only measure this contender's peak memory, in this process"
    )
    args = parser.parse_args(argv)
    training = args.task == "train"
    args.batch = args.batch if args.batch is not None else (2 if training else 1)
    args.length = args.length if args.length is not None else (512 if training else 32)
    device = choose_device()
    args.steps = args.steps if args.steps is not None else (10 if device.type == "cuda" else 1)
    if args.memory_of:
        args.peers = "" if args.memory_of == OURS else args.memory_of
    config = load_config(args.preset).model
    needed = args.length + (0 if training else args.new_tokens)
    for name, value, least in [
        ("batch", args.batch, 1),
        ("length", args.length, 2),
        ("steps", args.steps, 1),
        ("windows", args.windows, 1),
    ]:
        if value < least:
            raise ConfigError(f"--{name} is {value}; expected at least {least}")
    if args.new_tokens < 2:
        raise ConfigError(
            f"--new_tokens is {args.new_tokens}; expected at least 2: speed is taken between two tokens"
        )
    if needed > config.max_position_embeddings:
        raise ConfigError(
            f"{needed} tokens exceed the context of {args.preset}, {config.max_position_embeddings}"
        )
    if args.dtype == "fp16" and training and device.type == "cpu":
        raise ConfigError("--dtype fp16: a CPU trains in fp32 or bf16")
    return args, Job(args.task, config, args.batch, args.length, args.new_tokens, args.dtype, device)


def memory(name: str, job: Job) -> dict:
    """Peak memory of two units of work in this fresh process, above what it holds after the same work on a
    tiny model: libraries that load themselves at first use are no part of it."""
    tiny = SmolLM2Config(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    work_of = train_step if job.task == "train" else decode
    rehearsal = replace(job, config=tiny, batch=1, length=16, new_tokens=4)
    work_of(name, build(name, rehearsal), rehearsal)()
    peak = PeakMemory(job.device)
    work = work_of(name, build(name, job), job)
    for _ in range(2):
        work()
    return {"peak_memory_bytes": peak.read()}


def measure_train(names: list[str], job: Job, steps: int, windows: int) -> dict[str, dict]:
    first = build(OURS, job)
    state = {key: value.cpu().clone() for key, value in first.state_dict().items()}
    models = {OURS: first} | {name: build(name, job, state) for name in names if name != OURS}
    works = {name: train_step(name, model, job) for name, model in models.items()}
    losses = {
        name: [float(work()), float(work())] for name, work in works.items()
    }  # warm-up, and proof of equal work
    tolerance = 1e-4 if job.dtype == "fp32" else 0.05
    for name, values in losses.items():
        if max(abs(a - b) for a, b in zip(values, losses[OURS], strict=True)) > tolerance:
            raise RuntimeError(f"{name} computes something else: losses {values}, ours {losses[OURS]}")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in alternating(names, windows):
        seconds = seconds_of(lambda work=works[name]: [work() for _ in range(steps)], job.device)
        rates[name].append(job.batch * job.length * steps / seconds)
    return {name: {"speed": spread(rates[name]), "first_losses": losses[name]} for name in names}


def measure_decode(names: list[str], job: Job, windows: int) -> dict[str, dict]:
    first = build(OURS, job)
    state = {key: value.cpu().clone() for key, value in first.state_dict().items()}
    models = {OURS: first} | {name: build(name, job, state) for name in names if name != OURS}
    works = {name: decode(name, model, job) for name, model in models.items()}
    tokens = {name: work()[0] for name, work in works.items()}  # warm-up, and proof of equal work
    for name, ids in tokens.items():
        if ids.shape != tokens[OURS].shape or (job.dtype == "fp32" and not torch.equal(ids, tokens[OURS])):
            raise RuntimeError(f"{name} decodes other tokens than ours")
    rates: dict[str, list[float]] = {name: [] for name in names}
    prefill: dict[str, list[float]] = {name: [] for name in names}
    for name in alternating(names, windows):
        between = []
        whole = seconds_of(lambda work=works[name], kept=between: kept.append(work()[1]), job.device)
        rates[name].append(job.batch * (job.new_tokens - 1) / between[0])
        prefill[name].append(whole - between[0])
    equal = {name: bool(torch.equal(ids, tokens[OURS])) for name, ids in tokens.items()}
    return {
        name: {
            "speed": spread(rates[name]),
            "first_token_seconds": spread(prefill[name])["median"],
            "same_tokens_as_ours": equal[name],
        }
        for name in names
    }


def report(args, job: Job, names: list[str]) -> dict:
    """Rows, ours first, with the device's roofs and what each row reaches of them."""
    passed_on = [
        "--preset",
        args.preset,
        "--batch",
        job.batch,
        "--length",
        job.length,
        "--new_tokens",
        job.new_tokens,
        "--dtype",
        job.dtype,
    ]
    memories = {
        name: in_fresh_process([job.task, *map(str, passed_on), "--memory_of", name]) for name in names
    }
    limits = roofs(job)
    training = job.task == "train"
    measured = (
        measure_train(names, job, args.steps, args.windows)
        if training
        else measure_decode(names, job, args.windows)
    )
    synchronize(job.device)
    rows = []
    for name in names:
        facts = measured[name]
        speed = facts.pop("speed")
        row = {
            "name": name,
            "tokens_per_second": speed["median"],
            "tokens_per_second_range": [speed["lowest"], speed["highest"]],
        }
        row |= memories[name] | facts
        if training:
            flops = speed["median"] * flops_per_token(job.config, job.length)
            row |= {
                "model_flops_per_second": flops,
                "share_of_gemm_roof": flops / limits[f"gemm_{job.dtype}_flops_per_second"],
            }
        else:
            read = parameter_count(job.config) * DTYPES[job.dtype].itemsize * speed["median"] / job.batch
            row["share_of_bandwidth_roof"] = read / limits["memory_bytes_per_second"]
        if name != OURS:
            row["ours_is_faster_by"] = rows[0]["tokens_per_second"] / row["tokens_per_second"]
            row["ours_needs_memory"] = rows[0]["peak_memory_bytes"] / row["peak_memory_bytes"]
        rows.append(row)
    setting = {key: getattr(job, key) for key in ("task", "batch", "length", "dtype")} | {
        "preset": args.preset,
        "windows": args.windows,
    }
    setting |= {"steps": args.steps} if training else {"new_tokens": job.new_tokens}
    machine = {
        "device": device_name(job.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if len(names) > 1:
        import transformers

        machine["transformers"] = transformers.__version__
    return {"rows": rows, "roofs": limits, "setting": setting, "machine": machine}


def show(result: dict) -> None:
    setting = " ".join(f"{key}={value}" for key, value in result["setting"].items())
    print(f"{setting}\n{result['machine']}")
    print("roofs: " + ", ".join(f"{key} {value / 1e9:,.1f}e9" for key, value in result["roofs"].items()))
    for row in result["rows"]:
        low, high = row["tokens_per_second_range"]
        share = row.get("share_of_gemm_roof", row.get("share_of_bandwidth_roof"))
        ratio = (
            f", ours {row['ours_is_faster_by']:.2f}x its speed at {row['ours_needs_memory']:.2f}x its memory"
            if "ours_needs_memory" in row
            else ""
        )
        print(
            f"{row['name']:14s} {row['tokens_per_second']:9,.1f} tokens/s ({low:,.1f} to {high:,.1f}), "
            f"{share:.0%} of the roof, peak {row['peak_memory_bytes'] / 2**30:.2f} GiB{ratio}"
        )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        from .gpu import main as gpu  # loads every library of a run

        return gpu(argv[1:])
    args, job = parse(argv)
    names = contender_names(args.peers)
    if args.memory_of:
        print(json.dumps(memory(args.memory_of, job)))
        return 0
    result = report(args, job, names)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    run_command(main)
