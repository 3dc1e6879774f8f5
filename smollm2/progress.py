"""What a person sees while a run trains: one bar on a terminal, a line now and then in a log file.

A `Reporter` is told what happens; a notebook passes its own (a live panel), the command line uses `TerminalReporter`.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable

SECONDS_BETWEEN_SAFE_LINES = 60.0


def safe_words(local_step: int, drive_step: int | None) -> str:
    """The one or two numbers that matter when a machine dies."""
    if drive_step is None:
        return f"safe on this machine: step {local_step}"
    return f"safe on this machine: step {local_step}, copied to Drive: {f'step {drive_step}' if drive_step else 'nothing yet'}"


class Reporter:
    """Receives the events of a run. Every method may be left out by a subclass."""

    def message(self, text: str) -> None:
        """One line for the person."""

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        """Training begins at `step` of `total`."""

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """One update was applied (loss in nats a token)."""

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """The held-out part was scored."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model continued one of the fixed prompts."""

    def saved(self, local_step: int, drive_step: int | None) -> None:
        """Newest step that is safe on this machine, and on Drive (None: there is no Drive tier; 0: nothing yet).

        Comes from the threads that write, perhaps after `end`."""

    def end(self) -> None:
        """Training has ended."""


class Outlet:
    """Passes events on to a reporter. When nobody can read them any more (`| head`, a lost terminal), it falls silent and
    calls `on_lost`: what is being trained is saved, instead of ending in the middle of a print."""

    def __init__(self, reporter: Reporter, on_lost: Callable[[], None]):
        self._reporter, self._on_lost = reporter, on_lost

    def __getattr__(self, event: str):
        def pass_on(*arguments) -> None:
            try:
                getattr(self._reporter, event)(*arguments)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    raise
                self._reporter = Reporter()
                self._on_lost()

        return pass_on


class TerminalReporter(Reporter):
    """tqdm with ETA on a terminal; elsewhere a plain line every ten seconds, so that log files stay readable."""

    def __init__(self, stream=None, seconds_between_lines: float = 10.0):
        self.stream = stream or sys.stdout
        self.seconds_between_lines = seconds_between_lines
        self._bar = None
        self._last_line = 0.0
        self._safe: tuple[int, int | None] | None = None
        self._last_safe_line = -SECONDS_BETWEEN_SAFE_LINES

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        self._first, self._total, self._began = step, total, time.monotonic()
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=step,
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                mininterval=0.5,
                smoothing=0.05,
            )

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {loss:.3f}, lr {learning_rate:.1e}, {tokens_per_second:,.0f} tok/s", refresh=False
            )
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if (
            step == self._first + 1
            or step == self._total
            or now - self._last_line >= self.seconds_between_lines
        ):
            self._last_line = now
            eta = (now - self._began) / (step - self._first) * (self._total - step)
            self.message(
                f"step {step}/{self._total}  loss {loss:.3f}  lr {learning_rate:.1e}  {tokens_per_second:,.0f} tokens/s  ETA {eta:.0f} s"
            )

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.message(f"step {step}: held-out loss {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")

    def sample(self, step: int, prompt: str, text: str) -> None:
        shown = " ".join((prompt + text).split())
        self.message(f"step {step} sample: {shown[:240]}")

    def saved(self, local_step: int, drive_step: int | None) -> None:
        """A line whenever Drive got a newer step; local saves alone at most once a minute."""
        before, self._safe = self._safe, (local_step, drive_step)
        drive_moved = drive_step and (before is None or before[1] != drive_step)
        if self._safe != before and (
            drive_moved or time.monotonic() - self._last_safe_line >= SECONDS_BETWEEN_SAFE_LINES
        ):
            self._last_safe_line = time.monotonic()
            self.message(safe_words(local_step, drive_step))

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
