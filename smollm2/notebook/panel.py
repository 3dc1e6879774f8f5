"""One live display of a training run in a notebook: numbers, loss curve, what is safe where, and samples over
time.

* A single display, updated in place at most once a second, always from the thread that trains: Colab does not
  show what other threads display, and a signal handler must not display at all. So events only note what they
  say, and the next step shows it.
* The chart is SVG: drawing a picture with matplotlib every second would cost a tenth of a small CPU.
* `live_panel` gives plain python a reporter that prints lines instead.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from datetime import timedelta
from html import escape
from pathlib import Path

import psutil
import torch

from .. import plots
from ..logs import SAMPLES, TRAINING, read_log
from ..progress import Reporter, TerminalReporter, safe_words

SECONDS_BETWEEN_UPDATES = 1.0
MAX_POINTS = 340  # of the curve: one for every other pixel
SHOWN_MESSAGES = 7
LATEST_SAMPLES = 4  # shown of each prompt, beside the first
SAMPLE_CHARACTERS = 220
# The panel names its colours and has no table: Jupyter's dark theme would put dark stripes behind the rows of
# one.
FRAME = (
    "background:#fff;color:#111;font:13px/1.45 system-ui,sans-serif;padding:10px 12px;max-width:720px;"
    "border:1px solid #ccc;overflow-wrap:anywhere"
)
GRID = '<div style="display:grid;grid-template-columns:max-content auto;gap:1px 14px;margin-top:8px">'


def live_panel(logs: str | Path) -> Reporter:
    """What to pass as `train(config, reporter=...)`: a `LivePanel` in a notebook, lines elsewhere.

    `logs` is the run's log folder. Call its `end()` once more after `train`: the last copy to Drive lands
    after that.
    """
    return LivePanel(logs) if plots.in_notebook() else TerminalReporter()


def memory_in_use() -> str:
    """Peak memory of the GPU, or what this process holds where there is none."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU (peak)"
    return f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB (this process)"


class LivePanel(Reporter):
    """`logs` is the run's log folder: a resumed run shows its earlier curve and samples too."""

    def __init__(self, logs: str | Path, clock=time.monotonic):
        self.logs, self.clock = logs, clock
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float, float]] = []
        self.samples: dict[str, list[tuple[int, str]]] = {}
        self.messages: deque[str] = deque(maxlen=SHOWN_MESSAGES)
        self.current = self.total = self.first = 0
        self.local_step = self.drive_step = None
        self.learning_rate = self.tokens_per_second = self.began = 0.0
        self.is_training, self.shown_at, self.handle = False, -math.inf, None

    # --- events: noted, and shown by the next step

    def message(self, text: str) -> None:
        self.messages.append(text)
        if not self.is_training:  # else this may be a signal handler or another thread
            self._show()

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        if step and not self.losses:  # continued
            self._read_history()
            self.local_step = self.local_step or step  # the verified checkpoint that it resumed from
        self.current, self.total, self.first, self.began = step, total, step, self.clock()
        self.is_training = True
        self._show()

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        self.current, self.learning_rate, self.tokens_per_second = step, learning_rate, tokens_per_second
        self.losses.append((step, loss))
        self._show()

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.validations.append((step, loss, bits_per_byte))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.samples.setdefault(prompt, []).append((step, text))

    def saved(self, local_step: int, drive_step: int | None) -> None:
        self.local_step, self.drive_step = local_step, drive_step

    def end(self) -> None:
        self.is_training = False
        self._show(at_once=True)

    def _read_history(self) -> None:
        files = [Path(self.logs, name) for name in (TRAINING, SAMPLES)]
        for event in (event for file in files if file.exists() for event in read_log(file)):
            step = int(event["step"])
            if "val_loss" in event:
                self.validation(step, float(event["val_loss"]), float(event["val_bits_per_byte"]))
            elif "train_loss" in event:
                self.losses.append((step, float(event["train_loss"])))
            elif "prompt" in event:
                self.sample(step, event["prompt"], event["text"])

    # --- showing

    def _show(self, at_once: bool = False) -> None:
        """Show the present state, unless that was done a moment ago, or this is not the main thread."""
        is_due = at_once or self.clock() - self.shown_at >= SECONDS_BETWEEN_UPDATES
        if not is_due or threading.current_thread() is not threading.main_thread():
            return
        from IPython.display import display  # not at the top: a plain script has no use for it

        self.shown_at = self.clock()  # first: a signal's message during the next lines must not display, too
        text = "\n".join(
            f"{name}: {value}" for name, value in self.facts().items()
        )  # for those who see no HTML
        bundle = {"text/html": self.html(), "text/plain": text}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    def facts(self) -> dict[str, str]:
        """The numbers of the panel, in words; those of training only when there is something to train."""
        rows = {"step": f"{self.current:,} of {self.total:,}" if self.total else "not training"}
        if self.losses and self.total:
            rows["loss"] = f"{self.losses[-1][1]:.3f} nats per token"
        if self.validations:
            step, loss, bits = self.validations[-1]
            rows["held out"] = f"{loss:.3f} nats per token, {bits:.3f} bits per byte (step {step:,})"
        if self.current > self.first:
            seconds_per_step = (self.clock() - self.began) / (self.current - self.first)
            rows["learning rate"] = f"{self.learning_rate:.2e}"
            rows["speed"] = f"{self.tokens_per_second:,.0f} tokens per second"
            rows["time left"] = str(timedelta(seconds=round(seconds_per_step * (self.total - self.current))))
        rows["memory"] = memory_in_use()
        if self.local_step is not None:
            rows["safe"] = safe_words(self.local_step, self.drive_step).removeprefix("safe ")
        return rows

    def html(self) -> str:
        """A bar, the facts, the chart, samples of each prompt as they changed, and the last messages."""
        share = 100 * self.current / self.total if self.total else 0
        bar = f"linear-gradient(to right,{plots.BLUE} {share:.1f}%,#e6e6e6 0)"
        parts = [f'<div style="background:{bar};height:6px"></div>', _grid(self.facts()), self._chart()]
        for prompt, samples in self.samples.items():
            shown = samples[:1] + samples[1:][-LATEST_SAMPLES:]
            words = {f"step {step:,}": " ".join(text.split())[:SAMPLE_CHARACTERS] for step, text in shown}
            parts.append(_grid({f"{prompt} ...": "", **words}))
        notes = "".join(f"<div>{escape(text)}</div>" for text in list(self.messages))
        return f'<div style="{FRAME}">{"".join(parts)}<small>{notes}</small></div>'

    def _chart(self) -> str:
        """The loss curve as SVG in its own units, as wide as the panel; held-out losses are dots."""
        train = [(step, loss) for step, loss in self.losses if math.isfinite(loss)]
        held_out = [(step, loss) for step, loss, _ in self.validations if math.isfinite(loss)]
        if len(train) < 2:
            return ""
        losses = [loss for _, loss in train + held_out]
        low, high, last = min(losses), max(losses), max(self.total, 1)
        every = len(train) // MAX_POINTS + 1  # a long run is drawn as fast as a short one
        curve = " ".join(f"{step},{high - loss:.4f}" for step, loss in train[::every])
        dots = "".join(f"M{step} {high - loss:.4f}h0" for step, loss in held_out)
        line = 'fill="none" vector-effect="non-scaling-stroke" stroke-linecap="round" stroke'
        alt = f"Loss from {train[0][1]:.2f} to {train[-1][1]:.2f} nats per token over {self.current:,} steps."
        return (
            f'<svg role="img" aria-label="{alt}" viewBox="0 0 {last} {max(high - low, 1e-3):.4f}"'
            ' preserveAspectRatio="none" style="width:100%;height:140px;overflow:visible;margin-top:8px">'
            f'<polyline points="{curve}" {line}="{plots.BLUE}" stroke-width="1.5"/>'
            f'<path d="{dots}" {line}="{plots.ORANGE}" stroke-width="8"/></svg>'
            f"<small>loss, {high:.2f} (top) to"
            f" {low:.2f} nats per token, against steps 0 to {last:,}; dots: held-out text</small>"
        )


def _grid(facts: dict[str, str]) -> str:
    """Names and values as two columns."""
    cells = (f"<div>{escape(name)}</div><div>{escape(value)}</div>" for name, value in facts.items())
    return f"{GRID}{''.join(cells)}</div>"
