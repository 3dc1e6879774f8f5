"""`python -m benchmarks gpu --out FILE.jsonl`: all a borrowed GPU must show, in one call of bounded length.

* Every item is a process of its own, forked from one that has loaded the libraries and opened no GPU: what
  runs out of memory, crashes or hangs takes nothing with it, and is killed when its seconds are over.
* Every result is one JSON line, flushed and fsynced at once; what failed or was skipped is a line, too.
* `--tiny` runs all of it on a CPU with tiny shapes: so the tests keep this script alive between two loans.

`gpu_network.py` measures one network, `gpu_training.py` whole runs of `train`.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from smollm2 import Tokenizer
from smollm2.device import choose_device, device_name
from smollm2.errors import ArgumentParser, ConfigError

from . import gpu_network, gpu_training
from .gpu_bench import FULL, TINY, Bench, Scale, in_child

ROOT = Path(__file__).parent.parent
TINY_TEXT_BYTES = 30_000
TOKENIZER_ENTRIES = 4096  # where no tokenizer was given; the network keeps its 49,152
MARGIN_SECONDS = 3.0  # for the last lines and for tidying


class Item(NamedTuple):
    work: object  # function of a `Bench`
    cap: float  # seconds after which it is killed
    least: float  # seconds without which it is not begun


ITEMS = {  # what a loan that ends early must have shown comes first; all caps together are more than a call
    "machine": Item(gpu_network.machine, 25, 5),
    "run": Item(gpu_training.run, 90, 25),
    "speed": Item(gpu_network.speed, 190, 30),
    "decoding": Item(gpu_network.decoding, 60, 15),
    "exactness": Item(gpu_network.exactness, 45, 15),
    "resume": Item(gpu_training.resume, 120, 30),
    "t4": Item(gpu_training.t4, 80, 25),
    "update": Item(gpu_network.update, 20, 10),
    "profile": Item(gpu_network.profile, 30, 15),
    "long": Item(gpu_training.long, 210, 120),
}


def parse(argv: list[str] | None):
    parser = ArgumentParser(
        prog="python -m benchmarks gpu", description="Everything a borrowed GPU must show, in one call."
    )
    parser.add_argument("--out", required=True, help="JSON lines are appended to this file")
    parser.add_argument("--seconds", type=float, default=470.0, help="the whole call ends within this time")
    parser.add_argument("--items", default=",".join(ITEMS), help=f"some of {', '.join(ITEMS)}")
    parser.add_argument(
        "--tokenizer", default=None, help="tokenizer.json; default: a small one, trained here"
    )
    parser.add_argument(
        "--text", default=None, help="larger text of the item 'long', which is skipped without"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
    args = parser.parse_args(argv)
    args.items = args.items.split(",")
    unknown = [name for name in args.items if name not in ITEMS]
    if unknown:
        raise ConfigError(f"--items {unknown[0]!r}: expected some of {', '.join(ITEMS)}")
    for name in ("tokenizer", "text"):
        path = getattr(args, name)
        if path is not None and not os.path.exists(path):
            raise ConfigError(f"--{name} {path}: no such file")
    if not Path(args.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: its folder does not exist")
    return args


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def look_at_machine() -> dict[str, str]:
    """Facts for every line; opens the GPU, so it must run in a child."""
    device = choose_device()
    torch.zeros(1, device=device)
    facts = {"device": device_name(device), "device_type": device.type, "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return facts | {name: installed(name) for name in ("transformers", "pytorch_lightning", "triton")}


def open_machine(is_tiny: bool) -> tuple[str, dict[str, str]]:
    """How processes start here, and facts of the machine. Raises `ConfigError` for a missing GPU."""
    if is_tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # asks the driver library whether there is a GPU: asking CUDA itself would make it useless in every fork
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    start = "fork"
    try:
        facts = in_child(start, look_at_machine, timeout=60)
    except RuntimeError as error:
        if "forked subprocess" not in str(error):
            raise
        start = "spawn"  # imports everything again for each process: slower, but it works
        facts = in_child(start, look_at_machine, timeout=120)
    if not is_tiny and facts["device_type"] != "cuda":
        raise ConfigError("no GPU here: this needs one; --tiny runs the same items on a CPU, in tiny shapes")
    return start, facts


def make_tokenizer(text: Path, entries: int, folder: str) -> None:
    os.makedirs(folder)
    Tokenizer.train([text.read_text()], entries).save(folder, max_length=entries)


def run_item(name: str, bench: Bench) -> None:
    if not bench.scale.compiles:
        torch.nn.Module.compile = lambda module, **options: None
    ITEMS[name].work(bench)


def prepare(args, scale: Scale, folder: Path) -> Bench:
    start, facts = open_machine(args.tiny)
    text = ROOT / "input.txt"
    if args.tiny:
        small = text.read_bytes()[:TINY_TEXT_BYTES]
        text = folder / "small.txt"
        text.write_bytes(small)
    long_text = Path(args.text) if args.text else text
    if long_text.suffix == ".xz":
        packed, long_text = long_text, folder / "long.txt"
        long_text.write_bytes(lzma.decompress(packed.read_bytes()))
    tokenizer = args.tokenizer
    if not tokenizer:
        tokenizer = str(folder / "tokenizer")
        entries = min(TOKENIZER_ENTRIES, scale.model.vocab_size)
        # in a child as well: the tokenizers library starts threads, which a fork would lose
        in_child(start, make_tokenizer, text, entries, tokenizer, timeout=60)
    facts["tokenizer"] = args.tokenizer or "trained here"
    return Bench(
        scale, Path(args.out), folder, str(text), str(long_text), tokenizer, start, facts, deadline=0.0
    )


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    args = parse(argv)
    end = began + args.seconds - MARGIN_SECONDS
    with tempfile.TemporaryDirectory(prefix="smollm2-gpu-", ignore_cleanup_errors=True) as folder:
        bench = prepare(args, TINY if args.tiny else FULL, Path(folder))
        first_line = len(lines_of(bench.out))
        for name in args.items:
            item, left = ITEMS[name], end - time.monotonic()
            if left < item.least:
                bench.record(
                    name, "whole", skipped=f"needs {item.least:.0f} s, {max(left, 0):.0f} s are left"
                )
                continue
            if name == "long" and not (args.text or args.tiny):
                bench.record(name, "whole", skipped="needs --text FILE")
                continue
            seconds, at = min(item.cap * bench.scale.patience, left), time.monotonic()
            timed = replace(bench, deadline=at + seconds)
            outcome = {}
            try:
                in_child(bench.start, run_item, name, timed, timeout=seconds, is_leader=True)
            except RuntimeError as error:
                outcome["error"] = str(error)[:600]
            bench.record(name, "whole", **outcome, seconds=round(time.monotonic() - at, 2))
    wrong = [
        f"{line['item']}: {line['case']}" for line in lines_of(bench.out)[first_line:] if "error" in line
    ]
    print(f"{time.monotonic() - began:.0f} s; errors: {'; '.join(wrong) or 'none'}")
    return 0


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
