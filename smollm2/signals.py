"""Ctrl-C, SIGTERM, a lost terminal and Colab's stop button: finish the step, save, end in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Inside it Ctrl-C ends this program there and then, with exit code 130: for the seconds in which large modules are
    imported. KeyboardInterrupt would be lost there in one of their callbacks, or end as whatever they make of it."""

    def leave(number, frame):
        os.write(2, b"\nstopped\n")
        os._exit(130)

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not is_ours or "IPython" in sys.modules:  # a notebook's kernel must outlive its stop button
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class StopSignals:
    """Context manager that turns the first SIGINT, SIGTERM or SIGHUP into `received`; a second Ctrl-C interrupts at once.

    Signal handlers belong to the main thread; elsewhere this does nothing. Lightning wraps SIGTERM when it starts to
    fit (and then ends with exit code 0), so the training callback calls `install` again from inside.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            }
            if (
                self._before[signal.SIGHUP] != signal.SIG_DFL
            ):  # nohup: the run is meant to outlive its terminal
                del self._before[signal.SIGHUP]
            self.install()
        return self

    def install(self) -> None:
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        with contextlib.suppress(
            RuntimeError
        ):  # the signal fell into the middle of another print: "reentrant call"
            self.say(f"{signal.Signals(number).name}: finishing this step and saving ...")

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
