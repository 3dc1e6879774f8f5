"""One live display of a training run in a notebook: numbers, loss curve, what is safe where, and samples over time.

* A single display, updated in place at most once a second, always from the thread that trains: Colab does not
  show what other threads display, and a signal handler must not display at all. So events only note what they say,
  and the next step shows it.
* The chart is SVG made by hand: drawing a picture with matplotlib every second would cost a tenth of a small CPU.
* Under plain python the same object prints the lines of `TerminalReporter`.
"""

from __future__ import annotations

import html
import math
import threading
import time
from collections import deque
from pathlib import Path

from .. import plots
from ..logs import SAMPLES, TRAINING, read_log
from ..progress import Reporter, TerminalReporter, safe_words

CHART = {"width": 680, "height": 170, "left": 46, "right": 12, "top": 12, "bottom": 24}
MAX_POINTS = 340  # of the curve: one for every other pixel
SHOWN_MESSAGES = 7
SHOWN_SAMPLES = 5  # of each prompt: the first, and the last four
SAMPLE_CHARACTERS = 220


def clock_time(seconds: float) -> str:
    """`1:05` or `2:03:09`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def thinned(points: list[tuple[int, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equal stretches, so that a long run draws as fast as a short one."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def memory_in_use() -> str:
    """Peak memory of the GPU, or of this process where there is none."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.0f} GiB on the GPU (peak)"
    import psutil

    return f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB (this process)"


class LivePanel(Reporter):
    """Pass it to `train(config, reporter=LivePanel())`.

    `logs` is the run's log folder: a resumed run shows its earlier curve and samples too. `panel.refresh()` shows the
    latest state once more: the last copy to Drive ends after training does.
    """

    def __init__(
        self, logs: str | Path | None = None, seconds_between_updates: float = 1.0, clock=time.monotonic
    ):
        self.logs, self.clock = logs and Path(logs), clock
        self.seconds_between_updates = seconds_between_updates
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float, float]] = []
        self.samples: dict[str, list[tuple[int, str]]] = {}
        self.messages: deque[str] = deque(maxlen=SHOWN_MESSAGES)
        self.current, self.total, self.local_step, self.drive_step = 0, 0, None, None
        self.learning_rate, self.tokens_per_second = 0.0, 0.0
        self._first, self._began, self._shown_at = 0, 0.0, None
        self._training, self._showing, self._handle = False, False, None
        self._plain = None if plots.in_notebook() else TerminalReporter()

    # --- events

    def message(self, text: str) -> None:
        if self._plain:
            return self._plain.message(text)
        self.messages.append(text)
        if (
            not self._training
        ):  # while training this may be a signal handler or another thread: the next step shows it
            self._refresh_when_due()

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        if self._plain:
            return self._plain.start(step, total, tokens_per_step)
        if step and not self.losses:
            self._read_history(step)
        self.current, self.total, self._first, self._began = step, total, step, self.clock()
        if (
            step and self.local_step is None
        ):  # a run only ever resumes from a verified checkpoint on this machine
            self.local_step = step
        self._training = True
        self._refresh_when_due()

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        if self._plain:
            return self._plain.step(step, loss, learning_rate, tokens_per_second)
        self.current, self.learning_rate, self.tokens_per_second = step, learning_rate, tokens_per_second
        self.losses.append((step, loss))
        self._refresh_when_due()

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        if self._plain:
            return self._plain.validation(step, loss, bits_per_byte)
        self.validations.append((step, loss, bits_per_byte))

    def sample(self, step: int, prompt: str, text: str) -> None:
        if self._plain:
            return self._plain.sample(step, prompt, text)
        self.samples.setdefault(prompt, []).append((step, text))

    def saved(self, local_step: int, drive_step: int | None) -> None:
        self.local_step, self.drive_step = (
            local_step,
            drive_step,
        )  # called by the thread that writes: shown later

    def end(self) -> None:
        if self._plain:
            return self._plain.end()
        self._training = False
        self.refresh()

    def _read_history(self, step: int) -> None:
        """The curve and samples up to `step`, from the logs of the run that is being continued."""
        training, samples = (self.logs and self.logs / name for name in (TRAINING, SAMPLES))
        for event in read_log(training) if training and training.exists() else []:
            at = int(event["step"])
            if "val_loss" in event and at <= step:
                self.validations.append((at, float(event["val_loss"]), float(event["val_bits_per_byte"])))
            elif "train_loss" in event and at <= step:
                self.losses.append((at, float(event["train_loss"])))
        for event in read_log(samples) if samples and samples.exists() else []:
            if int(event["step"]) <= step:
                self.sample(int(event["step"]), event["prompt"], event["text"])

    # --- showing

    def _refresh_when_due(self) -> None:
        if self._shown_at is None or self.clock() - self._shown_at >= self.seconds_between_updates:
            self.refresh()

    def refresh(self) -> None:
        """Show the present state. Does nothing outside the main thread, outside a notebook, or while it is at work."""
        if self._plain or self._showing or threading.current_thread() is not threading.main_thread():
            return
        from IPython.display import display

        self._showing, self._shown_at = True, self.clock()
        try:
            bundle = {"text/html": self.html(), "text/plain": self.text()}
            if self._handle is None:
                self._handle = display(bundle, raw=True, display_id=True)
            else:
                self._handle.update(bundle, raw=True)
        finally:
            self._showing = False

    def facts(self) -> dict[str, str]:
        """The numbers of the panel, in words; those of training only when there is something to train."""
        done = self.current - self._first
        left = self.total - self.current
        rows = {"step": f"{self.current:,} of {self.total:,}" if self.total else "not training"}
        if self.total:
            rows["loss"] = f"{self.losses[-1][1]:.3f} nats per token" if self.losses else "-"
        if self.validations:
            step, held_out, bits = self.validations[-1]
            rows["held out"] = f"{held_out:.3f} nats per token, {bits:.3f} bits per byte (step {step:,})"
        if self.total:
            rows |= {
                "learning rate": f"{self.learning_rate:.2e}",
                "speed": f"{self.tokens_per_second:,.0f} tokens per second",
            }
            rows["time left"] = (
                clock_time((self.clock() - self._began) / done * left) if done and left else "-"
            )
        rows["memory"] = memory_in_use()
        if self.local_step is not None:
            rows["safe"] = safe_words(self.local_step, self.drive_step).removeprefix("safe ")
        elif self.total:
            rows["safe"] = "nothing yet"
        return rows

    def text(self) -> str:
        """The panel in a few plain lines: what a screen reader or a text-only viewer gets."""
        lines = [f"{name}: {value}" for name, value in self.facts().items()]
        for prompt, samples in self.samples.items():
            step, text = samples[-1]
            lines.append(f"sample at step {step:,}: {' '.join((prompt + text).split())[:100]}")
        return "\n".join(lines[:24])

    def html(self) -> str:
        share = 100 * self.current / self.total if self.total else 0
        bar = f'<div style="background:#e6e6e6;height:6px;margin:4px 0 8px"><div style="background:{plots.BLUE};height:6px;width:{share:.1f}%"></div></div>'
        cells = "".join(  # every row names its colours: Jupyter's dark theme puts dark stripes behind those that do not
            f'<tr style="background:#fff;color:#111"><td style="text-align:left;color:#555;padding:1px 14px 1px 0">{name}</td>'
            f'<td style="text-align:left;color:#111;padding:1px 0;font-variant-numeric:tabular-nums">{html.escape(value)}</td></tr>'
            for name, value in self.facts().items()
        )
        notes = "".join(f"<div>{html.escape(text)}</div>" for text in list(self.messages))
        return (
            '<div style="background:#fff;color:#111;font:13px/1.45 system-ui,sans-serif;padding:10px 12px;max-width:720px;border:1px solid #ccc">'
            f'{bar}<table style="border:0;border-collapse:collapse;background:#fff;color:#111;margin:0;font-size:13px">{cells}</table>{self._chart()}{self._timeline()}'
            f'<div style="color:#555;font-size:12px;margin-top:8px;overflow-wrap:anywhere">{notes}</div></div>'
        )

    def _timeline(self) -> str:
        parts = []
        for prompt, samples in self.samples.items():
            shown = samples if len(samples) <= SHOWN_SAMPLES else [samples[0], *samples[1 - SHOWN_SAMPLES :]]
            rows = "".join(
                f'<div style="display:flex"><div style="flex:0 0 84px;white-space:nowrap;color:#555">step {step:,}</div>'
                f"<div>{html.escape(' '.join(text.split())[:SAMPLE_CHARACTERS])}</div></div>"
                for step, text in shown
            )
            parts.append(f'<div style="margin-top:8px"><b>{html.escape(prompt)} ...</b>{rows}</div>')
        return "".join(parts)

    def _chart(self) -> str:
        """The loss curve as SVG, held-out losses as diamonds."""
        train = thinned([(step, loss) for step, loss in self.losses if math.isfinite(loss)])
        held_out = [(step, loss) for step, loss, _ in self.validations if math.isfinite(loss)]
        values = [loss for _, loss in train + held_out]
        if not train or len(values) < 2:
            return ""
        low, high, last = min(values), max(values), max(self.total, 1)
        left, top = CHART["left"], CHART["top"]
        across, down = CHART["width"] - left - CHART["right"], CHART["height"] - top - CHART["bottom"]

        def place(x: float, y: float) -> tuple[float, float]:
            return left + across * x / last, top + down * (high - y) / max(high - low, 1e-9)

        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in train))
        marks = "".join(
            f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="{plots.ORANGE}"/>'
            for x, y in (place(*p) for p in held_out)
        )
        grid, ticks = "", ""
        for value in (low, (low + high) / 2, high):
            y = place(0, value)[1]
            grid += f'<line x1="{left}" x2="{left + across}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e6e6"/>'
            ticks += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        for step in (0, last):
            ticks += f'<text x="{place(step, low)[0]:.1f}" y="{CHART["height"] - 6}" text-anchor="{"end" if step else "start"}">{step:,}</text>'
        legend = "loss (nats per token) against step" + ("; diamonds: held-out text" if held_out else "")
        ticks += f'<text x="{left + across / 2:.0f}" y="{CHART["height"] - 6}" text-anchor="middle">{legend}</text>'
        alt = f"Loss from {train[0][1]:.2f} to {train[-1][1]:.2f} nats per token over {self.current:,} steps."
        return (
            f'<svg role="img" aria-label="{alt}" viewBox="0 0 {CHART["width"]} {CHART["height"]}" style="background:#fff;width:100%;margin-top:8px" '
            f'font-size="11" fill="#333">{grid}<polyline points="{line}" fill="none" stroke="{plots.BLUE}" stroke-width="1.5"/>{marks}{ticks}</svg>'
        )
