"""What a notebook needs to know about the machine under it: packages, GPU, precision, Google Drive, secrets.

Everything here also works outside Colab. Nothing but the standard library is imported before `install_missing` ran.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .drive_errors import MOUNT_POINT, explain, is_final
from .errors import UserError

DRIVE_NAMES = ("MyDrive", "My Drive")  # Colab shows both; older mounts only the second
DRIVE_FOLDER = "smollm2"
MODULES = {"pyyaml": "yaml", "nvidia-ml-py": "pynvml"}  # where a package's module has another name
GPU_ONLY = ("nvidia-ml-py",)
KEEP = (
    "torch",
    "numpy",
    "transformers",
    "ipywidgets",
    "matplotlib",
)  # never replaced by an install from a notebook
RETRY_SECONDS = (2.0, 8.0)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # find_spec("google.colab") without any google package
        return False


def is_colab() -> bool:
    """Whether this is a Colab runtime: its release tag and its package must both be there."""
    return bool(os.environ.get("COLAB_RELEASE_TAG")) and _has("google.colab")


def is_smoke() -> bool:
    """Whether `SMOLLM2_SMOKE=1` asks notebooks to shrink long work to seconds."""
    return os.environ.get("SMOLLM2_SMOKE") == "1"


# --- packages ------------------------------------------------------------------------------------------------------


def missing_requirements(requirements: Path) -> list[str]:
    """Lines of a requirements.txt whose module cannot be found (whatever its version: nothing here is upgraded)."""
    lines = [line.split("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    named = [(line, re.match(r"[A-Za-z0-9._-]+", line)[0].lower()) for line in lines if line]
    wanted = [(line, name) for line, name in named if name not in GPU_ONLY or shutil.which("nvidia-smi")]
    return [line for line, name in wanted if not _has(MODULES.get(name, name.replace("-", "_")))]


def install_missing(requirements: str | Path) -> list[str]:
    """Install the packages of a requirements.txt that are absent, leaving all others as they are; returns their lines.

    Runs before the imports, so no restart is needed. Raises `UserError` with pip's last words when that fails.
    """
    missing = missing_requirements(Path(requirements))
    if not missing:
        return []
    present = [name for name in KEEP if _has(name)]
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "keep.txt"
        pins.write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in present))
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "-q",
            "-c",
            str(pins),
            *missing,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        words = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise UserError(
            f"could not install {', '.join(missing)}: {' '.join(words)[:300]}. Check the network, then run this cell again"
        )
    importlib.invalidate_caches()
    print(f"installed {', '.join(missing)}; everything else was here already")
    return missing


# --- the machine ---------------------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def is_mount(folder: Path) -> bool:
    """Whether a file system is mounted there: a plain folder made before mounting is not Drive, whatever its name."""
    return os.path.ismount(folder)


def drive_root() -> Path | None:
    """`/content/drive/MyDrive` when Drive answers there, else None."""
    for name in DRIVE_NAMES if is_mount(MOUNT_POINT) else ():
        folder = MOUNT_POINT / name
        try:
            os.listdir(folder)
        except OSError:  # absent, or mounted and gone (errno 107)
            continue
        return folder
    return None


def doctor_rows() -> dict[str, str]:
    """The facts of `doctor()`: what is installed, on what it runs, in which precision and why, where files go."""
    import torch

    import smollm2

    from .device import choose_device, choose_precision, device_name

    device = choose_device()
    precision = choose_precision("auto", device)
    rows = {"Python": platform.python_version()}
    rows |= {name: _version(name) for name in ("torch", "transformers", "pytorch-lightning", "ipywidgets")}
    rows["device"] = device_name(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        rows["GPU memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    rows["memory"] = memory_text()
    rows["precision"] = f"{precision.name}: {precision.reason}"
    usage = shutil.disk_usage(Path.cwd())
    rows["disk"] = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    rows["Colab"] = f"yes ({os.environ['COLAB_RELEASE_TAG']})" if is_colab() else "no"
    rows["Drive"] = (
        f"mounted at {MOUNT_POINT}"
        if drive_root()
        else "not mounted (notebook 04 asks; nothing else needs it)"
    )
    rows["smollm2"] = smollm2.__version__ + (", smoke mode: long work is shrunk" if is_smoke() else "")
    return rows


def memory_text() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def doctor() -> dict[str, str]:
    """Print one table of `doctor_rows()` and return it."""
    rows = doctor_rows()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:>{width}}  {value}")
    return rows


# --- where runs are kept -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """Where a run writes (`output_dir`, always a local disk), where copies go (`drive_dir`, or None), and why."""

    output_dir: Path
    drive_dir: Path | None
    reason: str

    @property
    def folder(self) -> Path:
        """The place that outlives the others."""
        return self.drive_dir or self.output_dir


def _prove_writable(folder: Path) -> None:
    """Write, read back and remove a small file; raises OSError when Drive only seems to be there."""
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"smollm2")
    if probe.read_bytes() != b"smollm2":
        raise OSError(errno.EIO, "what was written did not come back")
    probe.write_bytes(b"")  # Drive's trash keeps deleted files: an empty one costs nothing
    probe.unlink()


def _drive_folder(name: str) -> Path:
    """`MyDrive/<name>`, made when absent, proven writable. Never makes anything above it."""
    root = drive_root()
    if root is None:
        raise OSError(errno.ENOENT, "no MyDrive under the mount point")
    folder = root / name
    folder.mkdir(exist_ok=True)
    _prove_writable(folder)
    return folder


def mount_drive(name: str = DRIVE_FOLDER, sleep=time.sleep) -> Path:
    """Mount Drive (one try and two more) and return `MyDrive/<name>`; raises whatever the last try raised."""
    drive = importlib.import_module("google.colab.drive")
    for pause in (*RETRY_SECONDS, None):
        try:
            if not drive_root():
                drive.mount(str(MOUNT_POINT))
            return _drive_folder(name)
        except (
            Exception
        ) as error:  # Colab's own errors share no base class; every one of them means "no Drive now"
            if pause is None or is_final(error):
                raise
            print(f"Drive: {explain(error)}. Trying again in {pause:g} s.")
            sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def storage(
    use_drive: bool = True, output_dir: str | Path = "output", name: str = DRIVE_FOLDER, sleep=time.sleep
) -> Storage:
    """Choose where a run is kept and say so. Training always writes to `output_dir` on the local disk; with Drive,
    verified copies go to `MyDrive/<name>` too. Any Drive failure is told in plain words and the local folder stays."""
    drive_dir, reason = None, "you chose not to use Drive"
    if use_drive and not is_colab():
        reason = "this is not Colab, so there is no Drive to mount"
    elif use_drive:
        try:
            drive_dir, reason = mount_drive(name, sleep), "Drive is mounted and took a test file"
        except Exception as error:  # see mount_drive: a lesson must go on without Drive
            reason = explain(error)
    chosen = Storage(Path(output_dir), drive_dir, reason)
    print(banner(chosen))
    return chosen


def banner(chosen: Storage) -> str:
    """What is safe and what is not, in three lines."""
    lines = [
        f"KEPT ON DRIVE  {chosen.drive_dir}"
        if chosen.drive_dir
        else f"KEPT ON THIS MACHINE ONLY  {chosen.output_dir.resolve()}"
    ]
    lines.append(f"  why: {chosen.reason}")
    if chosen.drive_dir:
        lines.append(
            "  Training writes locally, then copies. Google uploads in the background: a copy counts when drive.google.com shows it."
        )
    elif is_colab():
        lines.append(
            "  When Colab takes this machine back, the files are gone: download them, or run this cell again to use Drive."
        )
    else:
        lines.append("  It is an ordinary folder: it stays until you delete it.")
    return "\n".join(lines)


def secret(name: str) -> str | None:
    """A secret from Colab's key panel, else from the environment; None, with the reason printed, where there is none."""
    reason = "it is not in the environment"
    if is_colab():
        try:
            return importlib.import_module("google.colab.userdata").get(name) or None
        except Exception as error:  # three unrelated classes, and a timeout where no Colab screen answers
            reason = {
                "SecretNotFoundError": "Colab's key panel (left edge) has no such secret",
                "NotebookAccessError": "the secret exists, but its switch 'Notebook access' is off (key panel, left edge)",
                "TimeoutException": "no Colab screen answered (secrets need the browser page)",
            }.get(type(error).__name__, explain(error))
    value = os.environ.get(name)
    if not value:
        print(f"No {name}: {reason}. Everything that does not need it still runs.")
    return value or None


def finish(flush_drive: bool = False, free_machine: bool = False) -> None:
    """The end of a session, only as far as asked: write Drive's cache back, then hand the machine back to Google."""
    if not (flush_drive or free_machine):
        print("Nothing asked: everything stays as it is.")
        return
    if not is_colab():
        print("This is not Colab: there is no Drive to flush and no machine to hand back.")
        return
    if flush_drive:
        try:
            importlib.import_module("google.colab.drive").flush_and_unmount()
        except Exception as error:  # see mount_drive: Colab's errors share no base class
            print(
                f"Drive could not be flushed: {explain(error)}. The machine is kept, so that nothing is lost."
            )
            return
        print("Drive is flushed and unmounted: what was copied is on its way to Google or there.")
    if free_machine:
        print("Handing the machine back ...", flush=True)
        importlib.import_module("google.colab.runtime").unassign()
