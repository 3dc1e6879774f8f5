"""What a person sees while a run trains: one bar on a terminal, a line now and then in a log file.

A `Reporter` is told what happens; a notebook passes its own (a live panel), the command line uses
`TerminalReporter`.
"""

from __future__ import annotations

import errno
import sys
import time

from .errors import is_terminal, tell

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_SAFE_LINES = 10.0, 60.0


def safe_words(local_step: int, drive_step: int | None) -> str:
    """The one or two numbers that matter when a machine dies."""
    safe = [f"step {step}" if step else "nothing yet" for step in (local_step, drive_step)]
    words = f"safe on this machine: {safe[0]}"
    if drive_step is not None:
        words += f", copied to Drive: {safe[1]}"
    return words


class Reporter:
    """Receives the events of a run. Every method may be left out by a subclass."""

    # nobody can read it any more (`| head`, a closed terminal): the run saves its step and stops
    is_lost = False

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
        """Newest step that is safe on this machine, and on Drive (None: there is no Drive tier; 0: nothing
        yet)."""

    def end(self) -> None:
        """Training has ended."""


class _Output:
    """Standard output that ends no run: closed, on a full disk, or left by its reader (`is_lost`)."""

    def __init__(self, stream):
        self.stream, self.is_lost = stream, False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"  # tqdm asks for it

    def write(self, text: str) -> None:
        if self.stream is None:
            return
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self.stream, self.is_lost = None, getattr(error, "errno", None) in (errno.EPIPE, errno.EIO)
            if not self.is_lost:
                tell(f"standard output takes no more ({error}); the run goes on without it")

    def flush(self) -> None:
        """Every write is flushed."""


class TerminalReporter(Reporter):
    """tqdm with ETA on a terminal; elsewhere a plain line every ten seconds: log files stay readable."""

    def __init__(self, stream=None):
        self.output = _Output(stream or sys.stdout)
        self._bar, self._drive_step = None, 0
        self._last_line = self._last_safe_line = float("-inf")

    @property
    def is_lost(self) -> bool:
        return self.output.is_lost

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self.output)
        else:
            self.output.write(text + "\n")

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        self._first, self._total, self._began = step, total, time.monotonic()
        if is_terminal(self.output.stream):
            from tqdm import tqdm

            shape = {"total": total, "initial": step, "unit": "step", "dynamic_ncols": True}
            self._bar = tqdm(file=self.output, mininterval=0.5, **shape)

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        if self._bar is not None:
            words = f"loss {loss:.3f}, lr {learning_rate:.1e}, {tokens_per_second:,.0f} tok/s"
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if step in (self._first + 1, self._total) or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            eta = (now - self._began) / (step - self._first) * (self._total - step)
            words = f"loss {loss:.3f}  lr {learning_rate:.1e}  {tokens_per_second:,.0f} tokens/s"
            self.message(f"step {step}/{self._total}  {words}  ETA {eta:.0f} s")

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.message(f"step {step}: held-out loss {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.message(f"step {step} sample: {' '.join((prompt + text).split())[:240]}")

    def saved(self, local_step: int, drive_step: int | None) -> None:
        """A line whenever Drive got a newer step; local saves alone at most once a minute."""
        drive_moved, self._drive_step = (drive_step or 0) != self._drive_step, drive_step or 0
        if drive_moved or time.monotonic() - self._last_safe_line >= SECONDS_BETWEEN_SAFE_LINES:
            self._last_safe_line = time.monotonic()
            self.message(safe_words(local_step, drive_step))

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
