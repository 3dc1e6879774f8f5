"""Five text logs and TensorBoard, in `output/logs/`.

One event a line: `2026-11-23T19:00:00Z step=500 train_loss=3.1234 lr=0.0030`. Words with blanks are JSON
strings. A checkpoint's state counts the lines that were there; a resume drops those behind it, so none is
repeated or lost, and draws TensorBoard's curves anew from what stays: a machine that has its logs from Drive
has no events of its own. A line that the disk does not take ends the run: a checkpoint is never ahead of its
logs.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import math
import os
import re
import socket
import time
from pathlib import Path

from .files import replace_durably

TRAINING = "training_loss.txt"
SAMPLES = "generation_samples.txt"
CHECKPOINTS = "checkpoint_events.txt"
EPOCHS = "epoch_completion.txt"
METRICS = "gpu_metrics.txt"
OTHERS = "others.json"  # what the held-out text costs other ways to predict it; told at the end
COUNTED = (TRAINING, SAMPLES, EPOCHS, METRICS)  # checkpoint events are a journal: they stay
CURVES = {  # words of a line that are TensorBoard's, too
    "train_loss": "train/loss", "lr": "train/lr", "gradient_norm": "train/gradient_norm",
    "tokens_per_second": "train/tokens_per_second",
    "val_loss": "val/loss", "val_bits_per_byte": "val/bits_per_byte",
}  # fmt: skip
STAMP = "%Y-%m-%dT%H:%M:%SZ"


def format_value(value: object) -> str:
    if isinstance(value, float):
        return repr(round(value, 6)) if abs(value) >= 1e-3 or value == 0 else f"{value:.6g}"
    text = str(value)
    return text if re.fullmatch(r"[^\s\"'=]+", text) else json.dumps(text)


def parse_line(line: str) -> dict[str, str]:
    """`{"time": ..., "step": ..., ...}` of a log line; raises ValueError for a torn one."""
    stamp, _, rest = line.strip().partition(" ")
    fields = {"time": stamp}
    for key, quoted, plain in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|(\S*))', rest):
        fields[key] = json.loads(quoted) if quoted.startswith('"') else plain
    if "step" not in fields or not line.endswith("\n"):
        raise ValueError(f"not a log line: {line[:80]!r}")
    return fields


def read_log(path: str | Path) -> list[dict[str, str]]:
    """All whole lines of a log as dictionaries of strings; none where there is no log."""
    if not Path(path).is_file():
        return []
    events = []
    for line in Path(path).read_bytes().decode("utf-8", "replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # torn by a kill: the trainer drops such a line on resume
            events.append(parse_line(line))
    return events


def numbers(event: dict[str, str]) -> dict[str, float]:
    """Those words of a log line that are finite numbers."""
    found = {}
    for key, word in event.items():
        with contextlib.suppress(ValueError):
            found[key] = float(word)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def best_score(events: list[dict[str, float]]) -> dict[str, float]:
    """Of the validations that read as many tokens as the last one (`train.val_max_tokens` bounds the others)
    the best; empty without any."""
    scored = [event for event in events if "val_bits_per_byte" in event]
    alike = [event for event in scored if event.get("val_tokens") == scored[-1].get("val_tokens")]
    return min(alike, key=lambda event: event["val_bits_per_byte"], default={})


class Logs:
    """The five files of a run, and TensorBoard's. Each line is appended whole, in one system call, by one
    thread; OSError where the disk does not take it.

    `counts` are the lines that the checkpoint knew of which is resumed: what lies behind them goes. A run
    that begins has none.
    """

    def __init__(self, folder: str | Path, counts: dict[str, int]):
        self.folder, self.counts = Path(folder), dict.fromkeys(COUNTED, 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (*COUNTED, CHECKPOINTS):
            path = self.folder / name
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            keep = [line for line in lines if line.endswith(b"\n")]  # the last may be torn by a kill
            if name in COUNTED:
                keep = keep[: counts.get(name, 0)]
                self.counts[name] = len(keep)
            if len(keep) < len(lines):
                replace_durably(path, b"".join(keep))
        self._draw_curves()

    def write(self, file: str, step: int, **fields: object) -> None:
        now = time.time()
        words = [time.strftime(STAMP, time.gmtime(now)), f"step={step}"]
        words += [f"{key}={format_value(value)}" for key, value in fields.items()]
        with open(self.folder / file, "ab") as log:
            log.write((" ".join(words) + "\n").encode())
        if file in COUNTED:
            self.counts[file] += 1
        self._add_to_curves(now, step, fields)

    def _draw_curves(self) -> None:
        """A new events file with the points of the text logs; its first records hide earlier files.

        TensorBoard's own SummaryWriter keeps values in memory, where a kill loses them, and writes on a
        thread, whose errors on a full disk nobody can catch: only its encoding is used.
        """
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()  # later names sort behind earlier ones
        name = f"events.out.tfevents.{int(1e6 * now):016d}.{socket.gethostname()}.{os.getpid()}"
        file = open(self.folder / name, "wb", buffering=0)  # noqa: SIM115 - until `close`
        self._events = RecordWriter(file)
        self._record(wall_time=now, file_version="brain.Event:2")
        self._record(wall_time=now, session_log=SessionLog(status=SessionLog.START))
        for event in (event for name in COUNTED for event in read_log(self.folder / name)):
            with contextlib.suppress(ValueError):  # a time that somebody has edited
                when = calendar.timegm(time.strptime(event["time"], STAMP))
                self._add_to_curves(when, int(event["step"]), numbers(event))

    def _add_to_curves(self, when: float, step: int, fields: dict[str, object]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        tags = {CURVES[key]: float(value) for key, value in fields.items() if key in CURVES}
        if tags:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
            self._record(wall_time=when, step=step, summary=Summary(value=values))

    def _record(self, **fields) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._events.write(Event(**fields).SerializeToString())

    def close(self) -> None:
        self._events.close()


def resources(device) -> dict[str, object]:
    """Memory and load now. On a GPU the whole card is measured, so a shared card shows its neighbours too."""
    import psutil
    import torch

    metrics = {
        "rss_bytes": lambda: psutil.Process().memory_info().rss,
        "load_1min": lambda: round(psutil.getloadavg()[0], 2),
    }
    facts = {"device": "cpu", "note": "no GPU: process memory and load"}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts = {
            "device": torch.cuda.get_device_name(device),
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "device_used_bytes": total - free,
        }
        metrics["utilization_percent"] = lambda: torch.cuda.utilization(device)
        metrics["power_milliwatts"] = lambda: torch.cuda.power_draw(device)
    for name, read in metrics.items():
        try:
            facts[name] = read()
        except Exception as error:  # NVML has types of its own; what cannot be read must not end a run
            facts[name] = f"n/a ({type(error).__name__})"
    return facts
