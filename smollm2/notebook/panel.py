"""One live display of a training run: numbers, loss curve, what is safe where, samples over time.

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

from .. import plots
from ..logs import SAMPLES, TRAINING, read_log
from ..progress import Reporter, TerminalReporter, safe_words

SECONDS_BETWEEN_UPDATES = 1.0
MAX_POINTS = 340  # of the curve: one for every other pixel
# The panel names its colours and has no table: Jupyter's dark theme would put dark stripes behind its rows
FRAME = "background:#fff;color:#111;font:13px/1.45 system-ui,sans-serif;padding:10px 12px;max-width:720px"
GRID = "display:grid;grid-template-columns:max-content auto;gap:0 14px;overflow-wrap:anywhere;margin:8px 0"


def live_panel(logs: str | Path) -> Reporter:
    """What to pass as `train(config, reporter=...)`: a `LivePanel` in a notebook, lines elsewhere.

    `logs` is the run's log folder. Call its `end()` once more after `train`: the last copy to Drive lands
    after that.
    """
    return LivePanel(logs) if plots.in_notebook() else TerminalReporter()


class LivePanel(Reporter):
    """`logs` is the run's log folder: a resumed run shows its earlier curve and samples too."""

    def __init__(self, logs: str | Path, clock=time.monotonic):
        self.logs, self.clock, self.total = logs, clock, 0
        self.facts = {"step": "not training"}  # the numbers of the panel, in words
        self.losses: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.samples: dict[str, dict[str, str]] = {}  # prompt -> step -> text
        self.messages: deque[str] = deque(maxlen=7)
        self.is_training, self.shown_at, self.display = False, -math.inf, None

    # --- events: noted, and shown by the next step

    def message(self, text: str) -> None:
        self.messages.append(text)
        if not self.is_training:  # else this may be a signal handler or another thread
            self._show()

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        if step and not self.losses:  # continued, from a checkpoint that was verified
            self._read_history()
            self.facts.setdefault("safe", safe_words(step, None).removeprefix("safe "))
        self.total, self.first, self.began, self.is_training = total, step, self.clock(), True
        self.facts["step"] = f"{step:,} of {total:,}"
        self._show()

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        self.losses.append((step, loss))
        seconds = (self.clock() - self.began) / (step - self.first) * (self.total - step)
        self.facts["step"] = f"{step:,} of {self.total:,}"
        self.facts["loss"] = f"{loss:.3f} nats per token"
        self.facts["learning rate"] = f"{learning_rate:.2e}"
        self.facts["speed"] = f"{tokens_per_second:,.0f} tokens per second"
        self.facts["time left"] = str(timedelta(seconds=round(seconds)))
        self._show()

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.held_out.append((step, loss))
        words = f"{loss:.3f} nats per token, {bits_per_byte:.3f} bits per byte (step {step:,})"
        self.facts["held out"] = words

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.samples.setdefault(f"{prompt} ...", {})[f"step {step:,}"] = " ".join(text.split())[:220]

    def saved(self, local_step: int, drive_step: int | None) -> None:
        self.facts["safe"] = safe_words(local_step, drive_step).removeprefix("safe ")

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
        facts = dict(self.facts)  # a copy: the thread that saves may add to it
        bundle = {"text/html": self._html(facts), "text/plain": "\n".join(map(": ".join, facts.items()))}
        if self.display is None:
            self.display = display(bundle, raw=True, display_id=True)
        else:
            self.display.update(bundle, raw=True)

    def _html(self, facts: dict[str, str]) -> str:
        """A bar, the facts, the chart, the first and last samples of each prompt, the last messages."""
        share = 100 * self.losses[-1][0] / self.total if self.losses and self.total else 0
        bar = f"height:6px;background:linear-gradient(to right,{plots.BLUE} {share:.1f}%,#e6e6e6 0)"
        parts = [f'<div style="{bar}"></div>', _grid(facts.items()), self._chart()]
        for prompt, samples in self.samples.items():
            rows = list(samples.items())
            parts.append(_grid([(prompt, ""), *rows[:1], *rows[1:][-4:]]))
        notes = "".join(f"<div>{escape(text)}</div>" for text in list(self.messages))
        return f'<div style="{FRAME}">{"".join(parts)}<small>{notes}</small></div>'

    def _chart(self) -> str:
        """The loss curve as SVG in its own units, as wide as the panel; held-out losses are dots."""
        train, dots = ([p for p in line if math.isfinite(p[1])] for line in (self.losses, self.held_out))
        if len(train) < 2:
            return ""
        losses = [loss for _, loss in train + dots]
        low, high = min(losses), max(losses)
        every = len(train) // MAX_POINTS + 1  # a long run is drawn as fast as a short one
        curve = " ".join(f"{step},{high - loss:.4f}" for step, loss in train[::every])
        marks = "".join(f"M{step} {high - loss:.4f}h.01" for step, loss in dots)
        line = 'fill="none" vector-effect="non-scaling-stroke" stroke-linecap="round" stroke'
        alt = f"Loss from {train[0][1]:.2f} to {train[-1][1]:.2f} nats per token over {train[-1][0]:,} steps."
        box = f'viewBox="0 0 {max(self.total, 1)} {max(high - low, 1e-3):.4f}" preserveAspectRatio="none"'
        axes = f"{high:.2f} (top) to {low:.2f} nats per token, against steps 0 to {self.total:,}"
        return (
            f'<svg role="img" aria-label="{alt}" {box} style="width:100%;height:140px;overflow:visible">'
            f'<polyline points="{curve}" {line}="{plots.BLUE}" stroke-width="1.5"/>'
            f'<path d="{marks}" {line}="{plots.ORANGE}" stroke-width="8"/></svg>'
            f"<small>loss, {axes}; dots: held-out text</small>"
        )


def _grid(rows) -> str:
    """(name, value) pairs as two columns; a name without a value is a heading over both."""
    pair, heading = "<div>{}</div><div>{}</div>", '<b style="grid-column:1/-1;width:0;min-width:100%">{}</b>'
    cells = ((pair if value else heading).format(escape(name), escape(value)) for name, value in rows)
    return f'<div style="{GRID}">{"".join(cells)}</div>'
