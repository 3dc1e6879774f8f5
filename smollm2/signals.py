"""Ctrl-C, SIGTERM, a lost terminal and Colab's stop button: finish the step, save, end in good order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from .errors import is_terminal, tell

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPPING = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number]
OUT_OF_TIME = 14  # SIGALRM, which nobody sends: train.stop_after has passed
LOST_READER = 13  # SIGPIPE, also where the system has none: exit code 141


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # the one that signal handlers belong to


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Inside it Ctrl-C ends this program there and then, with exit code 130: for the seconds in which large
    modules are imported. KeyboardInterrupt would be lost there in one of their callbacks, or end as what they
    make of it."""

    def leave(number, frame):
        os.write(2, b"\nstopped\n")
        os._exit(130)

    is_ours = _is_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or "IPython" in sys.modules:  # a notebook's kernel must outlive its stop button
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around a command's import of PyTorch, which takes seconds: a terminal is told, Ctrl-C ends it."""
    if "torch" not in sys.modules and is_terminal(sys.stderr):
        tell("loading PyTorch ...")
    with leaving_at_once():
        yield


class StopSignals:
    """Context manager that turns the first stopping signal into `received`; a second Ctrl-C, or one when
    nothing is left to save, interrupts at once.

    Lightning wraps SIGTERM when it starts to fit (and then ends with exit code 0), so the loop calls
    `install` again from inside. On another thread than the main one this does nothing.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.received: int | None = None
        self.is_over = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if _is_main_thread():
            handlers = {number: signal.getsignal(number) for number in STOPPING}
            if handlers.get(HANGUP) == signal.SIG_IGN:  # nohup: the run outlives its terminal
                del handlers[HANGUP]
            self._before = handlers
            self.install()
        return self

    def install(self) -> None:
        for number in self._before:
            signal.signal(number, self._handle)

    def stop(self, number: int) -> None:
        """Note a reason to stop that reached this process in another way."""
        if number == OUT_OF_TIME and self.received is None:
            self.say("--stop_after: the time is up, saving ...; the same command goes on from here")
        self.received = number

    def over(self) -> int | None:
        """Training has ended and all is saved. Returns what was received until then."""
        self.is_over = True
        return self.received

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and (self.is_over or self.received is not None):
            raise KeyboardInterrupt
        self.received = number
        words = "all is saved" if self.is_over else "finishing this step and saving ..."
        with contextlib.suppress(RuntimeError):  # it fell into the middle of another print: "reentrant call"
            self.say(f"{signal.Signals(number).name}: {words}")

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
