"""What a person sees while a run trains: one bar on a terminal, a line now and then in a log file.

A `Reporter` is told what happens; a notebook passes its own (a live panel), the command line uses
`TerminalReporter`.
"""

from __future__ import annotations

import errno
import sys
import time

SECONDS_BETWEEN_SAFE_LINES = 60.0


def safe_words(local_step: int, drive_step: int | None) -> str:
    """The one or two numbers that matter when a machine dies."""
    words = f"safe on this machine: step {local_step}"
    if drive_step is not None:
        words += f", copied to Drive: {f'step {drive_step}' if drive_step else 'nothing yet'}"
    return words


class Reporter:
    """Receives the events of a run. Every method may be left out by a subclass."""

    is_lost = (
        False  # nobody can read it any more (`| head`, a closed terminal): the run saves its step and stops
    )

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
    """Standard output as it may be: absent, closed, on a full disk, left by its reader, an object with
    `write` alone.

    What cannot be written ends no run. `is_lost` once its reader has left.
    """

    def __init__(self, stream):
        self.stream, self.is_lost = stream, False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"  # tqdm asks for it

    def write(self, text: str) -> None:
        try:
            if self.stream is not None:
                self.stream.write(text)
                self.stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # ValueError: a closed file
            self.stream = None
            self.is_lost = getattr(error, "errno", None) in (errno.EPIPE, errno.EIO)
            if not self.is_lost and sys.stderr is not None:
                print(f"standard output takes no more ({error}); the run goes on without it", file=sys.stderr)

    def flush(self) -> None:
        """Every write is flushed."""

    def isatty(self) -> bool:
        return bool(getattr(self.stream, "isatty", lambda: False)())


class TerminalReporter(Reporter):
    """tqdm with ETA on a terminal; elsewhere a plain line every ten seconds: log files stay readable."""

    def __init__(self, stream=None, seconds_between_lines: float = 10.0):
        self.output = _Output(stream or sys.stdout)
        self.seconds_between_lines = seconds_between_lines
        self._bar = None
        self._last_line = 0.0
        self._safe: tuple[int, int | None] | None = None
        self._last_safe_line = -SECONDS_BETWEEN_SAFE_LINES

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
        if self.output.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=step, unit="step", file=self.output, dynamic_ncols=True, mininterval=0.5
            )

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        if self._bar is not None:
            words = f"loss {loss:.3f}, lr {learning_rate:.1e}, {tokens_per_second:,.0f} tok/s"
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if step in (self._first + 1, self._total) or now - self._last_line >= self.seconds_between_lines:
            self._last_line = now
            eta = (now - self._began) / (step - self._first) * (self._total - step)
            self.message(
                f"step {step}/{self._total}  loss {loss:.3f}  lr {learning_rate:.1e}  "
                f"{tokens_per_second:,.0f} tokens/s  ETA {eta:.0f} s"
            )

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.message(f"step {step}: held-out loss {loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.message(f"step {step} sample: {' '.join((prompt + text).split())[:240]}")

    def saved(self, local_step: int, drive_step: int | None) -> None:
        """A line whenever Drive got a newer step; local saves alone at most once a minute."""
        before, self._safe = self._safe, (local_step, drive_step)
        drive_moved = drive_step and (before is None or before[1] != drive_step)
        is_time = time.monotonic() - self._last_safe_line >= SECONDS_BETWEEN_SAFE_LINES
        if self._safe != before and (drive_moved or is_time):
            self._last_safe_line = time.monotonic()
            self.message(safe_words(local_step, drive_step))

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
