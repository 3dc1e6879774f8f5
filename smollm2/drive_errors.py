"""Where Colab mounts Drive, and what its failures mean in plain words.

Standard library only: a notebook's set-up cell comes here before anything is installed.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from .errors import CheckpointError

MOUNT_POINT = Path("/content/drive")

# What the type, error number or text of a failure holds -> what it means, and what to do. FINAL do not pass.
FINAL = {
    "NotImplementedError": "this kind of runtime cannot mount Drive (Colab Enterprise, or no Colab screen)",
    "must not already contain files": f"a plain folder lies at {MOUNT_POINT}: rename it, run this cell again",
}
WORDS = FINAL | {
    "credential propagation|consent": (
        "Google did not get permission: allow pop-ups, choose this Colab tab's account, tick every box, "
        "then run this cell again"
    ),
    "timeout|timed out": "Drive did not answer in time (thousands of files in its root?); try again later",
    "ENOTCONN": "Drive is mounted but no longer connected (errno 107); Runtime > Restart session, then mount",
    "EDQUOT": "your Drive is full; empty its trash",
    "ENOSPC": "your Drive, or this machine's disk behind it, is full; empty its trash",
    "EROFS": "Drive is mounted read-only",
    "ENOENT": "the Drive folder vanished",
}


class NotThere(OSError):
    """The place for a folder does not exist: Drive is not mounted, or the folder above it is missing."""


def is_final(error: BaseException) -> bool:
    """Whether mounting again would end the same way."""
    return explain(error) in FINAL.values()


def explain(error: BaseException) -> str:
    """A Drive failure in plain words, with what to do."""
    if isinstance(error, NotThere | CheckpointError):  # our own words
        return str(error)
    number = errno.errorcode.get(getattr(error, "errno", None), "")
    facts = f"{type(error).__name__} {number} {error}"
    for pattern, words in WORDS.items():
        if re.search(pattern, facts, re.IGNORECASE):
            return words
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160] or 'no reason given'}"
