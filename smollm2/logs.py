"""Five text logs and TensorBoard, in `output/logs/`.

One event a line: `2026-11-23T19:00:00Z step=500 train_loss=3.1234 lr=0.0030`. Words with blanks are JSON strings.
A resumed run neither repeats nor loses lines: `rewind` drops what lies behind the checkpoint it resumes from, and draws
TensorBoard's curves anew from the lines that stay: a machine that has its logs from Drive has no events of its own.
A full disk does not stop training here: lines and TensorBoard's points wait in memory until they can be written, and no
checkpoint is saved before.
"""

from __future__ import annotations

import calendar
import contextlib
import errno
import json
import math
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .files import replace_durably

TRAINING = "training_loss.txt"
SAMPLES = "generation_samples.txt"
CHECKPOINTS = "checkpoint_events.txt"
EPOCHS = "epoch_completion.txt"
METRICS = "gpu_metrics.txt"
ALL_LOGS = (TRAINING, SAMPLES, CHECKPOINTS, EPOCHS, METRICS)
CURVES = {  # log -> its numbers that are TensorBoard's, too
    TRAINING: {"train_loss": "train/loss", "lr": "train/lr", "gradient_norm": "train/gradient_norm", "val_loss": "val/loss", "val_bits_per_byte": "val/bits_per_byte"},
    METRICS: {"tokens_per_second": "train/tokens_per_second"},
}  # fmt: skip
REWOUND = (TRAINING, SAMPLES, EPOCHS, METRICS)  # checkpoint events are a journal: they stay


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


class TextLogs:
    """The five files of a run, and TensorBoard's. Each line or point is appended whole, in one system call."""

    def __init__(
        self, folder: str | Path, tensorboard: bool = True, say: Callable[[str], None] = lambda text: None
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, bytes]] = []  # (file, line) that a failing disk did not take yet
        self._say, self._has_said = say, False
        self._wants_tensorboard, self._events_file = tensorboard, None

    def write(self, file: str, step: int, **fields: object) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        words = [stamp, f"step={step}"] + [f"{key}={format_value(value)}" for key, value in fields.items()]
        self._append(file, (" ".join(words) + "\n").encode())

    def _append(self, file: str, data: bytes) -> None:
        with self._lock:
            self._waiting.append((file, data))
            try:
                self._write_waiting()
                self._has_said = False
                return
            except OSError as error:  # tried again with the next line, and raised by `flush`
                is_news, self._has_said = not self._has_said, True
                reason = error.strerror
        if is_news:
            self._say(
                f"logs: {reason} in {self.folder}; training goes on, the lines wait in memory until they can be written"
            )

    def _write_waiting(self) -> None:
        while self._waiting:
            file, line = self._waiting[0]
            with open(self.folder / file, "ab", buffering=0) as handle:
                written = handle.write(line)
                if written != len(line):  # the disk filled up in the middle of the line
                    os.ftruncate(handle.fileno(), handle.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting.pop(0)

    def flush(self) -> None:
        """Write the lines that are still waiting; raises OSError when the disk does not take them."""
        with self._lock:
            self._write_waiting()

    def scalars(self, step: int, **values: float) -> None:
        """Values for TensorBoard, grouped by the part of the name before the first underscore."""
        self._draw(
            [(time.time(), step, {name.replace("_", "/", 1): value for name, value in values.items()})]
        )

    def _draw(self, points: list[tuple[float, int, dict[str, float]]]) -> None:
        if not self._wants_tensorboard or not points:
            return
        from . import tensorboard_events

        data = b"".join(tensorboard_events.scalars(*point) for point in points)
        if self._events_file is None:
            self._events_file = tensorboard_events.new_file_name()
            data = tensorboard_events.opening() + data
        self._append(self._events_file, data)

    def line_counts(self) -> dict[str, int]:
        """Lines of each rewindable log: the log positions that a checkpoint's state records. Raises OSError when lines
        are waiting that the disk does not take."""
        self.flush()
        counts = {}
        for file in REWOUND:
            path = self.folder / file
            counts[file] = path.read_bytes().count(b"\n") if path.exists() else 0
        return counts

    def rewind(self, step: int, pending: list[str], counts: dict[str, int] | None = None) -> None:
        """Drop lines behind `step`, torn lines, lines at `step` beyond the `counts` that were there when it was saved
        (batches skipped after it move no step), and those of events that are `pending` at `step` and will run again."""
        for file in REWOUND:
            path = self.folder / file
            if not path.exists():
                continue
            lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
            limit = len(lines) if counts is None else counts.get(file, 0)
            kept = [
                line
                for index, line in enumerate(lines)
                if self._stays(line, file, step, pending, index < limit)
            ]
            if kept != lines:
                replace_durably(path, "".join(kept).encode())
        self._events_file = None  # a new one, which hides all the points of the older ones
        self._draw([point for file in CURVES for point in self._points(file)])

    def _points(self, file: str) -> Iterator[tuple[float, int, dict[str, float]]]:
        """What TensorBoard was told, as far as the text log knows it: (Unix time, step, values)."""
        for event in read_log(self.folder / file) if (self.folder / file).exists() else []:
            found = numbers(event)
            values = {tag: found[key] for key, tag in CURVES[file].items() if key in found}
            with contextlib.suppress(ValueError):  # a time that somebody has edited
                if values:
                    yield (
                        calendar.timegm(time.strptime(event["time"], "%Y-%m-%dT%H:%M:%SZ")),
                        int(event["step"]),
                        values,
                    )

    @staticmethod
    def _stays(line: str, file: str, step: int, pending: list[str], was_saved: bool) -> bool:
        try:
            fields = parse_line(line)
            at = int(fields["step"])
        except ValueError:
            return False
        runs_again = ("sample" in pending and file == SAMPLES) or ("val" in pending and "val_loss" in fields)
        return at < step or (at == step and was_saved and not runs_again)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whoever needs these lines has called `flush`
            self.flush()


def resources(device) -> dict[str, object]:
    """Memory and load now. On a GPU the whole card is measured, so a shared card shows its neighbours too."""
    import psutil
    import torch

    process = psutil.Process(os.getpid())
    facts: dict[str, object] = {
        "rss_bytes": process.memory_info().rss,
        "load_1min": round(os.getloadavg()[0], 2),
    }
    if device.type != "cuda":
        return {"device": "cpu", "note": "no GPU: process memory and load"} | facts
    free, total = torch.cuda.mem_get_info(device)
    facts |= {
        "device": torch.cuda.get_device_name(device),
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
        "device_used_bytes": total - free,
    }
    for name, read in (
        ("utilization_percent", torch.cuda.utilization),
        ("power_milliwatts", torch.cuda.power_draw),
    ):
        try:
            facts[name] = read(device)
        except (
            Exception
        ) as error:  # NVML raises types of its own; a metric that cannot be read must not end a run
            facts[name] = f"n/a ({type(error).__name__})"
    return facts


def read_log(path: str | Path) -> list[dict[str, str]]:
    """All whole lines of a log as dictionaries of strings."""
    events = []
    for line in Path(path).read_bytes().decode("utf-8", "replace").splitlines(keepends=True):
        try:
            events.append(parse_line(line))
        except ValueError:  # torn by a kill: the trainer drops such a line on resume
            continue
    return events


def numbers(event: dict[str, str]) -> dict[str, float]:
    """Those words of a log line that are finite numbers."""
    found = {}
    for key, word in event.items():
        with contextlib.suppress(ValueError):
            found[key] = float(word)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def shell_word(text: object) -> str:
    """A path as it must be typed in a shell."""
    return shlex.quote(str(text))
