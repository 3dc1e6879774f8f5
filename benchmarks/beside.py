"""Ours beside its peers, in one run: speed in alternating windows, memory, and what the rows are held against."""

from __future__ import annotations

import contextlib
import platform
import time
from dataclasses import replace
from importlib.metadata import version

import torch

from smollm2.config import SmolLM2Config
from smollm2.device import device_name, kept_memory
from smollm2.parameters import flops_per_token, parameter_count

from . import LLAMA_CPP, NANOGPT, OURS
from .contenders import BYTES, Job, build, decode, own_job, plain_model, synchronize, train_step
from .measure import PeakMemory, alternating, in_fresh_process, roofs, seconds_of, spread
from .nanogpt import NanoGPT


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
    # warm-up, which takes a compiled one minutes, and proof of equal work
    proofs, warm_up = {}, {}
    for name, work in works.items():
        began = time.monotonic()
        proofs[name] = [float(value) for value in work()]
        work()
        warm_up[name] = time.monotonic() - began
    # before the update: Adam's first step is the sign of each gradient, so that rounding decides the small ones
    tolerance = 1e-5 if job.dtype == "fp32" else 5e-3
    allowed = tolerance, tolerance * proofs[OURS][1]  # of the loss in nats, of the gradient's norm relative
    for name, values in proofs.items():
        each = zip(values, proofs[OURS], allowed, strict=True)
        if name != NANOGPT and any(abs(a - b) > most for a, b, most in each):
            raise RuntimeError(
                f"{name} computes something else: loss, gradient {values}, ours {proofs[OURS]}"
            )
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in alternating(names, windows):
        own, count = own_job(name, job), steps * (20 if name == NANOGPT else 1)  # its steps are short
        # ours as `train` runs it, the peers with the C library's own habits; the first step after the change
        # is not timed
        with kept_memory() if name == OURS else contextlib.nullcontext():
            works[name]()
            seconds = seconds_of(lambda work=works[name], n=count: [work() for _ in range(n)], job.device)
        rates[name].append(own.batch * own.length * count / seconds)
    return {
        name: {"speed": spread(rates[name]), "warm_up_seconds": warm_up[name]}
        | dict(zip(("first_loss", "first_gradient_norm"), proofs[name], strict=True))
        for name in names
    }


def measure_decode(contenders: list[tuple[str, str]], job: Job, windows: int) -> dict[tuple, dict]:
    """`contenders`: (name, number format of its weights)."""
    state = plain_model(job).state_dict()
    works = {}
    for name, dtype in contenders:
        own = replace(job, dtype=dtype)
        works[name, dtype] = decode(name, build(name, own, state), own)
    tokens = {key: work()[0] for key, work in works.items()}  # warm-up, and proof of equal work
    exact = [ids for (_, dtype), ids in tokens.items() if dtype == "fp32"]
    if any(ids.shape != (job.batch, job.length + job.new_tokens) for ids in tokens.values()) or not all(
        torch.equal(ids, exact[0]) for ids in exact
    ):
        raise RuntimeError("the contenders decode other tokens than each other")
    rates: dict[tuple, list[float]] = {key: [] for key in works}
    prefill: dict[tuple, list[float]] = {key: [] for key in works}
    for key in alternating(list(works), windows):
        between = []
        whole = seconds_of(lambda work=works[key], kept=between: kept.append(work()[1]), job.device)
        rates[key].append(job.batch * (job.new_tokens - 1) / between[0])
        prefill[key].append(whole - between[0])
    first = tokens[contenders[0]]
    return {
        key: {
            "speed": spread(rates[key]),
            "first_token_seconds": spread(prefill[key])["median"],
            "same_tokens_as_ours": bool(torch.equal(tokens[key], first)),
        }
        for key in works
    }


def report(args, job: Job, contenders: list[tuple[str, str]]) -> dict:
    """Rows, ours first, with the device's roofs and what each row reaches of them."""
    setting = {key: getattr(job, key) for key in ("task", "batch", "length")} | {"preset": args.preset}
    setting |= {"steps": args.steps} if job.task == "train" else {"new_tokens": job.new_tokens}
    passed_on = [f"--{key}={value}" for key, value in setting.items() if key != "task"]
    memories = {
        (name, dtype): in_fresh_process([job.task, *passed_on, f"--dtype={dtype}", f"--memory_of={name}"])
        for name, dtype in contenders
        # llama.cpp maps its file: resident is what was read last
        if name not in (LLAMA_CPP, NANOGPT)
    }
    limits = roofs(job)
    if job.task == "train":
        by_name = measure_train([name for name, _ in contenders], job, args.steps, args.windows)
        measured = {key: by_name[key[0]] for key in contenders}
    else:
        measured = measure_decode(contenders, job, args.windows)
    synchronize(job.device)
    rows = []
    for name, dtype in contenders:
        facts = measured[name, dtype]
        speed = facts.pop("speed")
        row = {"name": name, "dtype": dtype, "tokens_per_second": speed["median"]}
        row |= {"tokens_per_second_range": [speed["lowest"], speed["highest"]]}
        row |= memories.get((name, dtype), {}) | facts
        if job.task == "train":
            by_token = flops_per_token(job.config, job.length)
            flops = speed["median"] * (NanoGPT().flops_per_token() if name == NANOGPT else by_token)
            row["model_flops_per_second"] = flops
            row["share_of_gemm_roof"] = flops / limits[f"gemm_{dtype}_flops_per_second"]
        else:
            read = parameter_count(job.config) * BYTES[dtype] * speed["median"] / job.batch
            row["share_of_bandwidth_roof"] = read / limits["memory_bytes_per_second"]
        if rows:
            unit = "model_flops_per_second" if name == NANOGPT else "tokens_per_second"  # its work is another
            row["ours_is_faster_by"] = rows[0][unit] / row[unit]
            if "peak_memory_bytes" in row:
                row["ours_needs_memory"] = rows[0]["peak_memory_bytes"] / row["peak_memory_bytes"]
        rows.append(row)
    machine = {
        "device": device_name(job.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    packages = {"transformers": "transformers", LLAMA_CPP: "xllamacpp"}
    peers = dict.fromkeys(packages[name] for name, _ in contenders if name in packages)
    machine |= {package: version(package) for package in peers}
    return {"rows": rows, "roofs": limits, "setting": setting | {"windows": args.windows}, "machine": machine}


def show(result: dict) -> None:
    setting = " ".join(f"{key}={value}" for key, value in result["setting"].items())
    print(f"{setting}\n{result['machine']}")
    print("roofs: " + ", ".join(f"{key} {value / 1e9:,.1f}e9" for key, value in result["roofs"].items()))
    for row in result["rows"]:
        low, high = row["tokens_per_second_range"]
        share = row.get("share_of_gemm_roof", row.get("share_of_bandwidth_roof"))
        peak = f", peak {row['peak_memory_bytes'] / 2**30:.2f} GiB" if "peak_memory_bytes" in row else ""
        ratio = (
            f", the first is {row['ours_is_faster_by']:.2f}x as fast" if "ours_is_faster_by" in row else ""
        )
        print(
            f"{row['name']:13s} {row['dtype']:5s} {row['tokens_per_second']:9,.1f} tokens/s "
            f"({low:,.1f} to {high:,.1f}), {share:.0%} of the roof{peak}{ratio}"
        )
