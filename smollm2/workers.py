"""Several workers (`--devices`, torchrun, SLURM): which is the first, and how the others wait until it has opened the run.

Only the first worker writes: data, checkpoints, logs. The others read what it wrote.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from .config import PlaceConfig
from .errors import BusyError, ConfigError

SLACK_SECONDS = 5.0  # clocks of file servers differ a little


def _launcher() -> str:
    """Who starts the workers: "torchrun", "srun", or "Lightning" (also in a shell inside a SLURM job, as Lightning sees it)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "srun" if "SLURM_NTASKS" in os.environ and not is_interactive else "Lightning"


def is_first_worker() -> bool:
    names = {"torchrun": ("RANK",), "srun": ("SLURM_PROCID",), "Lightning": ("NODE_RANK", "LOCAL_RANK")}
    return all(int(os.environ.get(name, 0)) == 0 for name in names[_launcher()])


def check_workers(place: PlaceConfig, gpus: int) -> None:
    """Raises `ConfigError` when what was started is not what was asked for: every process would train the whole run.

    `gpus` is the number of this machine, 0 where training runs on the CPU.
    """
    world, launcher = place.devices * place.num_nodes, _launcher()
    started = os.environ.get({"torchrun": "WORLD_SIZE", "srun": "SLURM_NTASKS"}.get(launcher, ""), world)
    if int(started) != world:
        raise ConfigError(
            f"{launcher} started {started} processes, but --devices {place.devices} x --num_nodes {place.num_nodes} = {world}; "
            "give --devices (processes on a machine) and --num_nodes to match"
        )
    if 0 < gpus < place.devices:
        raise ConfigError(
            f"--devices {place.devices}, but this machine has {gpus} GPU{'s' * (gpus > 1)}; expected at most {gpus}"
        )


def announce_open(output_dir: Path) -> None:
    """The first worker: tokens, tokenizer and checkpoint choice are settled."""
    (output_dir / ".opened").write_bytes(b"")


def wait_until_open(output_dir: Path, timeout_seconds: float = 1800) -> None:
    """The other workers: return once the first has opened the run in this very launch; raises `BusyError`."""
    if _launcher() == "Lightning" and os.environ.get("NODE_RANK", "0") == "0":
        return  # it starts the others of this machine when the first has opened the run
    import psutil

    mine, marker = psutil.Process().create_time() - SLACK_SECONDS, output_dir / ".opened"
    deadline = time.monotonic() + timeout_seconds
    while not marker.exists() or marker.stat().st_mtime < mine:
        if time.monotonic() > deadline:
            raise BusyError(
                f"waited {timeout_seconds:.0f} s for the first worker to open {output_dir}: look at its output"
            )
        time.sleep(0.1)
