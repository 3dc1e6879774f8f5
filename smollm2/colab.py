"""What a notebook needs to know about the machine under it: packages, GPU, precision, Google Drive.

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


def install_missing(requirements: str | Path) -> list[str]:
    """Install the packages of a requirements.txt that are absent and return their lines; whatever is there
    stays as it is, in whatever version, so no restart is needed. Raises `UserError` with pip's last words."""
    lines = [line.partition("#")[0].strip() for line in Path(requirements).read_text("utf-8").splitlines()]
    here = [line for line in lines if line and (";" not in line or sys.platform in line)]
    missing = [line for line in here if not installed(re.match(r"[\w.-]+", line)[0])]
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

    device, disk = choose_device(), shutil.disk_usage(Path.cwd())
    precision, memory = choose_precision("auto", device), ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory = f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    packages = ("torch", "transformers", "pytorch-lightning", "ipywidgets")
    rows = {"Python": platform.python_version()} | {name: installed(name) or "absent" for name in packages}
    rows |= {
        "device": device_name(device) + memory,
        "precision": f"{precision.name}: {precision.reason}",
        "disk": f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free",
        "Colab": f"yes ({os.environ['COLAB_RELEASE_TAG']})" if is_colab() else "no",
        "Drive": "mounted"
        if os.path.ismount(MOUNT_POINT)
        else "not mounted (a cell below asks, where it is of use)",
        "smollm2": __version__ + (", smoke mode: long work is shrunk" if is_smoke() else ""),
    }
    print("\n".join(f"{name:>17}  {value}" for name, value in rows.items()))
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


def _drive_folder(use_drive: bool) -> tuple[Path | None, str]:
    """`MyDrive/smollm2`, or None, and why. A failure of Drive is told in plain words."""
    folder, reason = None, "this is not Colab, so there is no Drive to mount"
    if not use_drive:
        reason = "you chose not to use Drive"
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
    return folder, reason


def storage(use_drive: bool = True, output_dir: str | Path = "output") -> Storage:
    """Choose where a run is kept and say so: always on the local disk, with Drive as verified copies in
    `MyDrive/smollm2`, too. Where Drive fails, the local folder stays."""
    folder, reason = _drive_folder(use_drive)
    place, kept = f"ON THIS MACHINE ONLY  {Path(output_dir).resolve()}", "it stays until you delete it"
    if folder:
        place, kept = f"ON DRIVE  {folder}", "a copy counts when drive.google.com shows it, minutes later"
    elif is_colab():
        kept = "when Colab takes this machine back, the files are gone; this cell asks for Drive again"
    print(f"KEPT {place}\n  why: {reason}\n  how long: {kept}")
    return Storage(Path(output_dir), folder)


def run_places(use_drive: bool = True, output_dir: str | Path = "output") -> Storage:
    """Where to look for runs, said in a line: on this machine, and on Drive where it can be had."""
    folder, reason = _drive_folder(use_drive)
    drive = f"and on Drive ({folder})" if folder else f"and not on Drive ({reason})"
    print(f"looking for your run in the folder {output_dir} {drive}")
    return Storage(Path(output_dir), folder)
