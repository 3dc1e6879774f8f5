"""Errors that a user can cause, and how the command line reports them.

Every message says what was found, where, what was expected and what to do, in one or two lines. A command
ends with the error's `exit_code` and never with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A problem the user can mend: wrong flag, configuration, input file, checkpoint or environment."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration, preset or command line that does not validate."""


class DataError(UserError):
    """An input text that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint folder that is missing, damaged, foreign or made for another model."""


class BusyError(UserError):
    """Another process is writing the same output directory."""

    exit_code = 3


class NoUsableCheckpoint(UserError):
    """Checkpoints exist, but none of them verifies: starting from zero would hide a loss."""

    exit_code = 4


class NumericStop(UserError):
    """Training was stopped because losses or gradients stayed non-finite."""

    exit_code = 5


class MemoryStop(UserError):
    """Out of memory at micro-batch 1."""

    exit_code = 6


class OutputLost(UserError):
    """The output directory is read-only, full or gone."""

    exit_code = 7


DISK_TROUBLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE, errno.ENOTCONN,
)  # fmt: skip


@contextlib.contextmanager
def disk_failures_named(folder: str | os.PathLike):
    """Inside it, a full, failing, read-only or vanished disk raises a `UserError` that says where:
    `OutputLost` for the folder that a run writes to, and what failed elsewhere is named itself."""
    try:
        yield
    except OSError as error:
        is_gone = error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.isdir(folder)
        if not is_gone and error.errno not in DISK_TROUBLE:
            raise
        reason = error.strerror or error
        if error.filename and not os.path.abspath(str(error.filename)).startswith(os.path.abspath(folder)):
            raise UserError(f"{error.filename}: {reason}") from None
        advice = "what is saved in it stays as it is: free or repair the disk and run the same command again"
        raise OutputLost(f"{folder}: {reason}; {advice}") from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations and with one-line errors that suggest the nearest flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_path(self, name: str, **options) -> None:
        """A path that must be given, or a Hub id: `~` means what it means in a shell, also behind `=`."""
        self.add_argument(name, type=os.path.expanduser, required=True, **options)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            word = (message.split(": ", 1)[1].split() or [""])[0]
            hint = did_you_mean(word.split("=")[0], self._option_string_actions)
            message = f"unknown argument {word!r}{hint}"
        message = message if len(message) <= 300 else f"{message[:280]} ... ({len(message):,} characters)"
        raise ConfigError(f"{message} (--help lists the flags)")


def is_terminal(stream) -> bool:
    """Of standard output or error, which may also be None, closed, or any object with `write` and `flush`."""
    try:
        return getattr(stream, "isatty", bool)()
    except ValueError:  # closed
        return False


def tell(words: object) -> None:
    """A line on standard error, where that takes one."""
    try:
        if sys.stderr is not None:
            print(words, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a full disk, a closed stream
        _discard("stderr")


def _discard(name: str) -> None:
    """Nothing more goes to a standard stream that failed: flushing it at exit would change the exit code."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, name).fileno())
    except (AttributeError, OSError, ValueError):  # it is no file
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it lives as long as the process


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended: this machine's, a GPU's, or what cuBLAS asks a full GPU for by itself."""
    words = "out of memory|can't allocate memory|STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(words, str(error), re.I) is not None


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` as a program: user errors become one line on standard error and an exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us: a print must not end the program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it lives as long as the process
        elif hasattr(stream, "reconfigure"):  # a terminal without UTF-8 shows \xe9 and the program goes on
            stream.reconfigure(errors="backslashreplace")
    words = None
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code, words = error.exit_code, f"error: {error}"
    except KeyboardInterrupt:
        code, words = 130, "\nstopped"
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when this machine's memory ends
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160]
        advice = "choose a smaller model, batch or sequence length"
        code, words = MemoryStop.exit_code, f"error: out of memory ({reason}); {advice}"
    except OSError as error:
        if error.filename:  # of a model, a text, a cache: it may not be read, or its disk fails
            code, words = UserError.exit_code, f"error: {error.filename}: {error.strerror}"
        elif error.errno == errno.ENOSPC:
            code, words = OutputLost.exit_code, "error: standard output goes to a disk that is full"
        elif error.errno == errno.EBADF:  # as nohup leaves the input of a terminal
            advice = "pass the text with --prompt, and let the output go to a terminal, a file or a pipe"
            code, words = UserError.exit_code, f"error: a standard stream cannot be read or written: {advice}"
        elif error.errno in (errno.EPIPE, errno.EIO):  # its reader left, or the terminal is gone: no error
            code = 141
        else:
            raise
        if not error.filename:  # and none at exit, when Python flushes it
            _discard("stdout")
    if words:
        tell(words)
    sys.exit(code)
