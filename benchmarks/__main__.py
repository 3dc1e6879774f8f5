"""`python -m benchmarks train|decode`: ours and its peers; `gpu`: what a borrowed GPU must show."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

from smollm2.errors import ArgumentParser, ConfigError, run_command
from smollm2.settings import load_config
from smollm2.signals import loading

from . import OF_ONE_TASK, OURS, PEERS


def parse(argv: list[str] | None):
    """(flags, the network's configuration)."""
    parser = ArgumentParser(
        prog="python -m benchmarks", description="Speed and memory beside peers, in one run."
    )
    parser.add_argument("task", choices=("train", "decode"))
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--batch", type=int, help="rows (default: train 2, decode 1)")
    parser.add_argument(
        "--length", type=int, help="of a row, or of the prompt (default: train 512, decode 32)"
    )
    parser.add_argument("--new_tokens", type=int, default=64, help="decode: tokens behind the prompt")
    dtypes = "train: of autocast; decode: of the weights, several with commas (auto: what a user gets)"
    parser.add_argument("--dtype", default="auto", help=f"auto, fp32, bf16, fp16 or int8; {dtypes}")
    parser.add_argument("--peers", default="transformers", help=f"some of {', '.join(PEERS)}; empty: none")
    parser.add_argument("--steps", type=int, help="train: steps of a window (default 1, on a GPU 10)")
    parser.add_argument("--windows", type=int, default=6, help="of each contender, alternating A B B A")
    parser.add_argument("--name", help="train: write results/NAME.json, NAME.png (bars) and README's table")
    parser.add_argument("--json", action="store_true", help="one JSON line on standard output")
    parser.add_argument("--memory_of", choices=(OURS, *PEERS), help="only its peak memory, in this process")
    args = parser.parse_args(argv)
    training = args.task == "train"
    args.batch = args.batch if args.batch is not None else (2 if training else 1)
    args.length = args.length if args.length is not None else (512 if training else 32)
    config = load_config(args.preset).model
    counts = {
        "batch": 1,
        "length": 2,
        "steps": 1,
        "windows": 1,
        "new_tokens": 2,
    }  # a speed is between two tokens
    for name, least in counts.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; expected at least {least}")
    needed, context = args.length + (0 if training else args.new_tokens), config.max_position_embeddings
    if needed > context:
        raise ConfigError(f"{needed} tokens exceed the context of {args.preset}, {context}")
    args.dtype = args.dtype.split(",")
    known = ("auto", "fp32", "bf16", "fp16") + (() if training else ("int8",))
    for dtype in args.dtype:
        if dtype not in known or (training and len(args.dtype) > 1):
            expected = f"{'one' if training else 'some'} of {', '.join(known)}"
            raise ConfigError(f"--dtype {','.join(args.dtype)}: expected {expected}")
    args.peers = [name for name in args.peers.split(",") if name]
    for name in args.peers:
        peers = [peer for peer in PEERS if OF_ONE_TASK.get(peer, args.task) == args.task]
        if name not in peers:
            raise ConfigError(f"--peers {name!r}: expected some of {', '.join(peers)}")
        if not find_spec(PEERS[name]):
            raise ConfigError(f"--peers {name}: needs the package {PEERS[name]}")
    return args, config


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        from .gpu import main as gpu  # loads every library of a run

        return gpu(argv[1:])
    args, config = parse(argv)
    with loading():
        from smollm2.device import choose_device

        from . import beside
        from .contenders import Job, contenders, own_dtypes
    device = choose_device()
    dtypes = own_dtypes(args.task, args.dtype, device)
    job = Job(args.task, config, args.batch, args.length, args.new_tokens, dtypes[0], device)
    args.steps = args.steps if args.steps is not None else (10 if device.type == "cuda" else 1)
    if args.memory_of:
        print(json.dumps(beside.memory(args.memory_of, job)))
        return 0
    result = beside.report(args, job, contenders(args.task, dtypes, args.peers))
    if args.name:
        from .publish import publish

        publish(args.name, result)
    if args.json:
        print(json.dumps(result))
    else:
        beside.show(result)
    return 0


if __name__ == "__main__":
    run_command(main)
