"""What a notebook needs to know about the machine under it: packages, GPU, precision, Google Drive, secrets.

Everything here also works outside Colab. Nothing but the standard library is imported before
`install_missing` ran. Colab's own errors share no base class, so `except Exception` here means: whatever it
was, the lesson goes on, and says so.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from .drive_errors import MOUNT_POINT, explain, is_final
from .errors import UserError

KEEP = ("torch", "numpy", "transformers", "ipywidgets", "matplotlib")  # no notebook's install replaces them
PAUSES_SECONDS = (0, 2, 8)  # before each try to mount: a second one, moments later, often succeeds


def is_colab() -> bool:
    """Whether this is a Colab runtime."""
    return "COLAB_RELEASE_TAG" in os.environ


def is_smoke() -> bool:
    """Whether `SMOLLM2_SMOKE=1` asks notebooks to shrink long work to seconds."""
    return os.environ.get("SMOLLM2_SMOKE") == "1"


# --- packages -----------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """Version of an installed package, None for one that is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing_requirements(requirements: str | Path) -> list[str]:
    """Lines of a requirements.txt, for this platform, whose package is absent (whatever its version: nothing
    is upgraded)."""
    text = Path(requirements).read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and (";" not in line or sys.platform in line)]
    return [line for line in lines if not installed(re.match(r"[\w.-]+", line)[0])]


def install_missing(requirements: str | Path) -> list[str]:
    """Install the packages of a requirements.txt that are absent, leaving all others as they are; returns
    their lines.

    Runs before the imports, so no restart is needed. Raises `UserError` with pip's last words when that
    fails.
    """
    missing = missing_requirements(requirements)
    if missing:
        keep = [f"{name}=={installed(name)}" for name in KEEP if installed(name)]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        result = subprocess.run([*pip, *missing, *keep], capture_output=True, text=True)
        names, words = ", ".join(missing), (result.stderr.strip() or result.stdout.strip()).split("\n")[-1]
        if result.returncode:
            raise UserError(f"could not install {names}: {words[:300]}. Is the network there? Run it again")
        importlib.invalidate_caches()
        print(f"installed {names}; everything else was here already")
    return missing


# --- the machine --------------------------------------------------------------------------------------------


def doctor() -> dict[str, str]:
    """Print, and return, what is installed, on what it runs, in which precision and why, where files go."""
    import torch

    from . import __version__
    from .device import choose_device, choose_precision, device_name

    device = choose_device()
    precision, disk = choose_precision("auto", device), shutil.disk_usage(Path.cwd())
    packages = ("torch", "transformers", "pytorch-lightning", "ipywidgets")
    rows = {"Python": platform.python_version()} | {name: installed(name) or "absent" for name in packages}
    rows["device"] = device_name(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        rows["GPU memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    rows["precision"] = f"{precision.name}: {precision.reason}"
    rows["disk"] = f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free"
    rows["Colab"] = f"yes ({os.environ['COLAB_RELEASE_TAG']})" if is_colab() else "no"
    rows["Drive"] = "mounted" if os.path.ismount(MOUNT_POINT) else "not mounted (notebook 04 asks)"
    rows["smollm2"] = __version__ + (", smoke mode: long work is shrunk" if is_smoke() else "")
    for name, value in rows.items():
        print(f"{name:>17}  {value}")
    return rows


# --- where runs are kept ------------------------------------------------------------------------------------


class Storage(NamedTuple):
    """Where a run writes (`output_dir`, always a local disk), and where copies go (`drive_dir`, or None)."""

    output_dir: Path
    drive_dir: Path | None


def mount_drive() -> Path:
    """Mount Drive where it is not and return `MyDrive/smollm2`, made when absent and proven writable."""
    if not os.path.ismount(MOUNT_POINT):  # where it is, `mount` would ask for consent again
        importlib.import_module("google.colab.drive").mount(str(MOUNT_POINT))
    folder = MOUNT_POINT / "MyDrive" / "smollm2"
    folder.mkdir(exist_ok=True)  # and nothing above it: that would be a folder on this machine
    probe = folder / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return folder


def storage(use_drive: bool = True, output_dir: str | Path = "output") -> Storage:
    """Choose where a run is kept and say so. Training always writes to `output_dir` on the local disk; with
    Drive, verified copies go to `MyDrive/smollm2` too. Any Drive failure is told in plain words and the local
    folder stays."""
    folder, reason = None, "you chose not to use Drive"
    if use_drive and not is_colab():
        reason = "this is not Colab, so there is no Drive to mount"
    for pause in PAUSES_SECONDS if use_drive and is_colab() else ():
        time.sleep(pause)
        try:
            folder, reason = mount_drive(), "Drive is mounted and took a test file"
            break
        except Exception as error:
            reason = explain(error)
            print(f"Drive: {reason}.")
            if is_final(error):
                break
    if folder:
        print(f"KEPT ON DRIVE  {folder}\n  why: {reason}")
        print("  Google uploads in the background: a copy counts when drive.google.com shows it.")
    else:
        print(f"KEPT ON THIS MACHINE ONLY  {Path(output_dir).resolve()}\n  why: {reason}")
        gone = "When Colab takes this machine back, the files are gone. This cell asks for Drive again."
        print(f"  {gone if is_colab() else 'It is an ordinary folder: it stays until you delete it.'}")
    return Storage(Path(output_dir), folder)


def secret(name: str) -> str | None:
    """A secret from Colab's key panel, else from the environment; None, with the reason printed, where there
    is none."""
    reason = "it is not in the environment"
    if is_colab():
        try:
            return importlib.import_module("google.colab.userdata").get(name)
        except Exception as error:
            reason = f"{error} (key panel, left edge: the secret, and its switch 'Notebook access')"
    if name not in os.environ:
        print(f"No {name}: {reason}. Everything that does not need it still runs.")
    return os.environ.get(name)


def finish(flush_drive: bool = False, free_machine: bool = False) -> None:
    """The end of a session, only as far as asked: write Drive's cache back, then hand the machine back to
    Google."""
    if not (flush_drive or free_machine) or not is_colab():
        print("Nothing to do: all stays as it is." if is_colab() else "This is not Colab: nothing to do.")
        return
    if flush_drive:
        try:
            importlib.import_module("google.colab.drive").flush_and_unmount()
        except Exception as error:
            print(f"Drive could not be flushed: {explain(error)}. The machine is kept, so nothing is lost.")
            return
        print("Drive is flushed and unmounted: what was copied is on its way to Google or there.")
    if free_machine:
        print("Handing the machine back ...", flush=True)
        importlib.import_module("google.colab.runtime").unassign()
