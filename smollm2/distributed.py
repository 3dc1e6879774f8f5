"""Several workers (`--devices`, torchrun, SLURM): which is the first, and how the others wait for it.

Only the first worker writes: data, checkpoints, logs. The others read what it wrote. What launchers leave
behind in an environment is believed only where it belongs to this very start: one process alone is always the
first.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

from .config import PlaceConfig
from .errors import BusyError, ConfigError

SLACK_SECONDS = 5.0  # clocks of file servers differ a little
OPENED = ".opened"  # file in the output folder
LAUNCHED_BY = "SMOLLM2_LAUNCHED_BY"  # the process that Lightning started the others of this machine from


def launcher() -> str:
    """Who started this process: "torchrun", "srun", or "Lightning", which starts the others of a machine
    itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    is_srun = "SLURM_STEP_NUM_TASKS" in os.environ  # which a shell inside a SLURM job does not have
    return "srun" if is_srun else "Lightning"


def _number(name: str, default: int = 0) -> int:
    word = os.environ.get(name, str(default))
    if not word.isdecimal():
        raise ConfigError(f"environment variable {name}={word!r}: expected a whole number; unset it")
    return int(word)


def is_first_worker(place: PlaceConfig) -> bool:
    """Whether this process is the one that writes."""
    if place.devices * place.num_nodes == 1:
        return True
    names = {"torchrun": ["RANK"], "srun": ["SLURM_PROCID"], "Lightning": ["NODE_RANK", "LOCAL_RANK"]}
    return all(_number(name) == 0 for name in names[launcher()])


def check_workers(place: PlaceConfig, gpus: int) -> None:
    """Raises `ConfigError` when what was started is not what was asked for: every process would train the
    whole run, or wait for others that never come. `gpus` is the number of this machine, 0 where training runs
    on the CPU."""
    world, by = place.devices * place.num_nodes, launcher()
    names = {"torchrun": "WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}
    if by in names and (started := _number(names[by], 1)) != world:
        asked = f"--devices {place.devices} x --num_nodes {place.num_nodes} = {world}"
        raise ConfigError(f"{by} started {started} processes, but {asked}: processes on a machine x machines")
    # Lightning tells the processes that it starts their rank in this way, too
    if by == "Lightning" and world > 1:
        if "LOCAL_RANK" not in os.environ:
            os.environ[LAUNCHED_BY] = str(os.getpid())
            if place.num_nodes == 1:  # it would believe these, and wait for another machine
                for name in ("NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
                    os.environ.pop(name, None)
        elif os.environ.get(LAUNCHED_BY) not in (str(os.getpid()), str(os.getppid())):
            left = f"environment variable LOCAL_RANK={os.environ['LOCAL_RANK']!r}"
            raise ConfigError(f"{left} was left behind by another launcher: unset it")
        if (node := _number("NODE_RANK")) >= place.num_nodes:
            asked = f"a number below --num_nodes {place.num_nodes}"
            raise ConfigError(f"environment variable NODE_RANK='{node}': expected {asked}")
    if 0 < gpus < place.devices:
        raise ConfigError(f"--devices {place.devices}: this machine has {gpus} GPU(s); expected no more")


def use_own_gpu(place: PlaceConfig, device) -> None:
    """From here on "cuda" is this process's own GPU. Lightning says so only when training begins: until then
    every process of a machine would measure, try and fill its first GPU."""
    if device.type == "cuda" and place.devices > 1:
        import torch

        torch.cuda.set_device(_number("SLURM_LOCALID" if launcher() == "srun" else "LOCAL_RANK"))


def announce_open(output_dir: Path) -> None:
    """The first worker: tokens, tokenizer and checkpoint choice are settled."""
    (output_dir / OPENED).write_bytes(b"")


def wait_until_open(output_dir: Path, timeout_seconds: float = 1800) -> None:
    """The other workers: return once the first has opened the run in this very launch; raises `BusyError`."""
    if launcher() == "Lightning" and _number("NODE_RANK") == 0:
        return  # it starts the others of this machine when the first has opened the run
    import psutil

    mine, marker = psutil.Process().create_time() - SLACK_SECONDS, output_dir / OPENED
    deadline = time.monotonic() + timeout_seconds
    while not marker.exists() or marker.stat().st_mtime < mine:
        if time.monotonic() > deadline:
            waited = f"waited {timeout_seconds:.0f} s for the first worker to open {output_dir}"
            raise BusyError(f"{waited}: look at its output")
        time.sleep(0.1)


def import_lightning():
    """PyTorch Lightning. Settings of its trainer come from here alone, and a rank that is no number, which it
    would read while it is imported, from nobody."""
    for name, value in list(os.environ.items()):
        is_rank = name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
        if name.startswith("PL_TRAINER_") or (is_rank and not value.isdecimal()):
            del os.environ[name]
    import pytorch_lightning

    return pytorch_lightning


def make_trainer(place: PlaceConfig, device):
    """A bare Lightning trainer: what happens at a step is the loop's business alone."""
    pl = import_lightning()
    from pytorch_lightning.plugins import environments
    from pytorch_lightning.strategies import DDPStrategy

    for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # start-up tips
    warnings.filterwarnings("ignore", module="pytorch_lightning.*|lightning_fabric.*|torchmetrics.*")
    for words in ("does not have many workers", "isinstance.treespec", "GPU available but not used"):
        warnings.filterwarnings("ignore", f".*{words}.*")
    started_by = {
        "torchrun": environments.TorchElasticEnvironment,
        "srun": lambda: environments.SLURMEnvironment(auto_requeue=False),  # signals are ours
        "Lightning": environments.LightningEnvironment,
    }
    is_alone = place.devices * place.num_nodes == 1
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=place.devices,
        num_nodes=place.num_nodes,
        # a worker that died is noticed after ten minutes, not thirty; validations and samples are shorter
        strategy="auto" if is_alone else DDPStrategy(timeout=timedelta(minutes=10)),
        plugins=[started_by["Lightning" if is_alone else launcher()]()],
        precision="32-true",  # autocast and scaler are set in the step: see device.py for the choice
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=place.output_dir,
    )
