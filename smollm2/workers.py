"""Several workers (`--devices`, torchrun, SLURM): which is the first, and how the others wait until it has opened the run.

Only the first worker writes: data, checkpoints, logs. The others read what it wrote.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from .errors import BusyError

SLACK_SECONDS = 5.0  # clocks of file servers differ a little


def is_first_worker() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0)))) == 0


def _started_together() -> bool:
    """torchrun and SLURM start all workers at once; Lightning starts the others when the first has opened the run."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ


def announce_open(output_dir: Path) -> None:
    """The first worker: tokens, tokenizer and checkpoint choice are settled."""
    (output_dir / ".opened").write_bytes(b"")


def wait_until_open(output_dir: Path, timeout_seconds: float = 1800) -> None:
    """The other workers: return once the first has opened the run in this very launch; raises `BusyError`."""
    if not _started_together():
        return
    import psutil

    mine, marker = psutil.Process().create_time() - SLACK_SECONDS, output_dir / ".opened"
    deadline = time.monotonic() + timeout_seconds
    while not marker.exists() or marker.stat().st_mtime < mine:
        if time.monotonic() > deadline:
            raise BusyError(f"waited {timeout_seconds:.0f} s for the first worker to open {output_dir}: look at its output")
        time.sleep(0.1)
