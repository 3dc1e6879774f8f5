"""`mount` and `flush_and_unmount` on an ordinary folder, with failures on demand (see the package's docstring)."""

import errno
import os
import shutil
import sys
from pathlib import Path

from google.colab import _message

_ops = {"left": None, "kind": "", "root": "", "quota": None}
_EVENTS = {
    "open",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.truncate",
}
_hooked = False


def _marker(mountpoint):
    """Plays the kernel's mount table: it outlives the process, as a mount does."""
    return Path(f"{mountpoint}.mounted")


def is_fake_mount(folder):
    return _marker(folder).exists()


def _size(folder):
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def _watch(event, arguments):
    if (
        not _ops["root"]
        or event not in _EVENTS
        or not arguments
        or not isinstance(arguments[0], str | bytes | os.PathLike)
    ):
        return
    if not os.fsdecode(arguments[0]).startswith(_ops["root"] + os.sep):
        return
    if _ops["quota"] is not None:
        root, _ops["root"] = _ops["root"], ""  # measuring must not watch itself
        full = (
            event == "open"
            and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            and _size(root) >= _ops["quota"]
        )
        _ops["root"] = root
        if full:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), arguments[0])
    if _ops["left"] is None:
        return
    _ops["left"] -= 1
    if _ops["left"] >= 0:
        return
    if _ops["kind"] == "errno107":
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), arguments[0])
    root, _ops["root"] = _ops["root"], ""
    shutil.rmtree(Path(root) / "MyDrive", ignore_errors=True)
    _ops["root"], _ops["left"] = root, None


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    """Mount your Google Drive at the specified mountpoint path."""
    global _hooked
    drill, _, amount = os.environ.get("FAKECOLAB_DRIVE", "ok").partition(":")
    if drill == "enterprise":
        raise NotImplementedError(
            "google.colab.drive is unsupported in this environment."
        )  # what the real one does on Colab Enterprise
    if drill == "refused":
        raise _message.MessageError("Error: credential propagation was unsuccessful")
    if (Path(mountpoint) / "My Drive").is_dir() and not force_remount:
        print(
            f'Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount("{mountpoint}", force_remount=True).'
        )
        return
    marker = _marker(mountpoint)
    if not marker.exists() and Path(mountpoint).is_dir() and os.listdir(mountpoint):
        raise ValueError("Mountpoint must not already contain files")
    if drill == "timeout":
        raise ValueError("mount failed: timeout during initial read of root folder")
    (Path(mountpoint) / "MyDrive").mkdir(parents=True, exist_ok=True)
    marker.touch()
    _ops.update(root=os.fspath(mountpoint), kind=drill, left=None, quota=None)
    if drill in ("errno107", "vanish"):
        _ops["left"] = int(amount)
    if drill == "quota":
        _ops["quota"] = int(amount)
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked = True
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    """Unmount Google Drive and flush any outstanding writes to it."""
    marker = _marker(_ops["root"]) if _ops["root"] else None
    if marker is None or not marker.exists():
        print("Drive not mounted, so nothing to flush and unmount.")
        return
    marker.unlink()
    _ops.update(root="", left=None, quota=None)
