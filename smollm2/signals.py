"""Ctrl-C, SIGTERM and Colab's stop button: finish the step, save, end in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable


class StopSignals:
    """Context manager that turns the first SIGINT or SIGTERM into `received`; a second Ctrl-C interrupts at once.

    Signal handlers belong to the main thread; elsewhere this does nothing. Lightning wraps SIGTERM when it starts to
    fit (and then ends with exit code 0), so the training callback calls `install` again from inside.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self.install()
        return self

    def install(self) -> None:
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(RuntimeError):  # the signal fell into the middle of another print: "reentrant call"
            self.say(f"{signal.Signals(number).name}: finishing this step and saving ...")

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
