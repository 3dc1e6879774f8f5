"""Where Colab mounts Drive, and what its failures mean in plain words.

Standard library only: a notebook's set-up cell comes here before anything is installed.
"""

from __future__ import annotations

import errno
from pathlib import Path

MOUNT_POINT = Path("/content/drive")

UNSUPPORTED = NotImplementedError  # the type that Colab's own `drive.mount` raises on Colab Enterprise; nothing here is unfinished
FOLDER_IN_THE_WAY = (
    "must not already contain files"  # in what it raises where a plain folder lies at the mount point
)


def is_final(error: BaseException) -> bool:
    """Whether mounting again would end the same way."""
    return isinstance(error, UNSUPPORTED) or FOLDER_IN_THE_WAY in str(error)


def explain(error: BaseException) -> str:
    """A Drive failure in plain words, with what to do."""
    text = str(error)
    if isinstance(error, UNSUPPORTED):
        return "this kind of runtime cannot mount Drive (Colab Enterprise, or no Colab screen behind it)"
    if FOLDER_IN_THE_WAY in text:
        return f"a plain folder lies at {MOUNT_POINT}, made before Drive was mounted; rename it, then run this cell again"
    if "credential propagation" in text or "consent" in text.lower():
        return "Google did not get permission: allow pop-ups, choose the account of this Colab tab and tick every box, then run this cell again"
    if isinstance(error, TimeoutError) or "timeout" in text.lower() or "timed out" in text.lower():
        return (
            "Drive did not answer in time (a root folder with thousands of files does that); try again later"
        )
    words = {
        errno.ENOTCONN: "Drive is mounted but no longer connected (errno 107); Runtime > Restart session, then mount again",
        errno.EDQUOT: "your Drive is full; empty its trash",
        errno.ENOSPC: "your Drive, or this machine's disk behind it, is full; empty its trash",
        errno.EROFS: "Drive is mounted read-only",
        errno.ENOENT: "the Drive folder vanished",
    }
    if isinstance(error, OSError) and error.errno in words:
        return words[error.errno]
    return f"{type(error).__name__}: {' '.join(text.split())[:160] or 'no reason given'}"
