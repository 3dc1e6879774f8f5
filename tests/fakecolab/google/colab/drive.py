"""`mount` and `flush_and_unmount` on an ordinary folder, with failures on demand (see the package's docstring)."""

import errno
import os
import shutil
import sys
from pathlib import Path

EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.truncate"}
state = {"root": "", "drill": "ok", "left": 0}


class MessageError(Exception):
    """Colab's own, for an error answer of the browser page."""


def _watch(event, arguments):
    root = state["root"]
    if not root or event not in EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    if os.fsdecode(arguments[0]).startswith(root + os.sep):
        state["root"] = ""  # what follows must not watch itself
        try:
            _fail(Path(root), event, arguments)
        finally:
            state["root"] = root


def _fail(root, event, arguments):
    def refuse(number):
        raise OSError(number, os.strerror(number), arguments[0])

    if state["drill"] == "quota":
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if writes and sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) >= state["left"]:
            refuse(errno.EDQUOT)
    elif state["drill"] != "ok":
        state["left"] -= 1
        if state["left"] < 0 and state["drill"] == "errno107":
            refuse(errno.ENOTCONN)
        if state["left"] < 0:
            shutil.rmtree(root / "MyDrive", ignore_errors=True)
            state["drill"] = "ok"


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    drill, _, amount = os.environ.get("FAKECOLAB_DRIVE", "ok").partition(":")
    marker = Path(f"{mountpoint}.mounted")  # plays the kernel's mount table: it outlives the process
    if drill == "enterprise":
        raise NotImplementedError("google.colab.drive is unsupported in this environment.")
    if drill == "refused":
        raise MessageError("Error: credential propagation was unsuccessful")
    if not marker.exists() and Path(mountpoint).is_dir() and os.listdir(mountpoint):
        raise ValueError("Mountpoint must not already contain files")
    if drill == "timeout":
        raise ValueError("mount failed: timeout during initial read of root folder")
    (Path(mountpoint) / "MyDrive").mkdir(parents=True, exist_ok=True)
    marker.touch()
    if drill not in ("ok", state["drill"]):
        sys.addaudithook(_watch)
    state.update(root=os.fspath(mountpoint), drill=drill, left=int(amount or 0))
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    Path(f"{state['root']}.mounted").unlink(missing_ok=True)
    state.update(root="", drill="ok")
