"""Several processes train the same batches in the same order as one, and stop together; one alone is always the first."""

import contextlib
import os
import re
import signal

import numpy as np
import pytest
import torch

from smollm2 import run
from smollm2.config import PlaceConfig
from smollm2.distributed import LAUNCHED_BY, check_workers, is_first_worker
from smollm2.errors import ConfigError
from smollm2.logs import CHECKPOINTS, TRAINING, read_log
from smollm2.progress import Reporter
from tests.soak import command_line, small_config

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"}
SHELL_OF_A_JOB = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_JOB_NAME": "bash"}
STRAY = [
    {"LOCAL_RANK": "1"},
    {"NODE_RANK": "2"},
    {"RANK": "-1"},
    {"OMPI_COMM_WORLD_RANK": "3"},
    SHELL_OF_A_JOB,
    {"RANK": "", "LOCAL_RANK": "", "SLURM_PROCID": "", "NODE_RANK": "", "JSM_NAMESPACE_RANK": "x"},
    {"PL_TRAINER_FAST_DEV_RUN": "1", "PL_TRAINER_OVERFIT_BATCHES": "1"},
]
LIGHTNINGS_CHILD = {"LOCAL_RANK": "1", "NODE_RANK": "0", LAUNCHED_BY: str(os.getppid())}


@pytest.fixture
def launched(monkeypatch):
    def as_if(variables: dict[str, str]) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", LAUNCHED_BY, *TORCHRUN, *SRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return as_if


@pytest.mark.parametrize(
    ("variables", "place", "is_first"),
    [
        ({}, {"devices": 2}, True),
        (LIGHTNINGS_CHILD, {"devices": 2}, False),
        ({"NODE_RANK": "1"}, {"num_nodes": 2}, False),
        (TORCHRUN, {"devices": 4}, False),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, {"devices": 4}, True),
        (SRUN, {"devices": 2}, False),
        (SRUN | {"SLURM_PROCID": "0"}, {"devices": 2}, True),
        (SHELL_OF_A_JOB, {"devices": 2}, True),
        ({"NODE_RANK": "2", "GROUP_RANK": "1"}, {"devices": 2}, True),  # which no other machine can mean
    ],
    ids=str,
)
def test_one_worker_is_the_first_however_they_were_started(launched, variables, place, is_first):
    launched(variables)
    check_workers(PlaceConfig(**place), 0)
    assert is_first_worker(PlaceConfig(**place)) is is_first


@pytest.mark.parametrize(
    ("variables", "place", "gpus", "problem"),
    [
        (TORCHRUN, {}, 0, "torchrun started 4 processes, but --devices 1 x --num_nodes 1 = 1"),
        (SRUN, {"devices": 4}, 0, "srun started 2 processes"),
        ({}, {"devices": 2}, 1, "this machine has 1 GPU(s); expected no more"),
        (STRAY[0], {"devices": 2}, 0, "LOCAL_RANK='1' was left behind by another launcher: unset it"),
        ({"NODE_RANK": "-1"}, {"num_nodes": 2}, 0, "NODE_RANK='-1': expected a whole number"),
        ({"NODE_RANK": "2"}, {"num_nodes": 2}, 0, "NODE_RANK='2': expected a number below --num_nodes 2"),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"devices": 2}, 0, "torchrun started 1 processes"),
    ],
    ids=str,
)
def test_processes_that_would_each_train_alone_or_wait_are_refused(launched, variables, place, gpus, problem):
    launched(variables)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        check_workers(PlaceConfig(**place), gpus)
        is_first_worker(PlaceConfig(**place))


class Chosen(Exception):
    pass


@pytest.mark.parametrize(
    ("variables", "devices", "gpu"),
    [
        ({}, 2, 0),
        (LIGHTNINGS_CHILD, 2, 1),
        (TORCHRUN | {"LOCAL_RANK": "3"}, 4, 3),
        (SRUN | {"SLURM_LOCALID": "1"}, 2, 1),
    ],
    ids=str,
)
def test_a_process_measures_and_tries_its_own_gpu(
    launched, monkeypatch, text, tmp_path, variables, devices, gpu
):
    def choose(number):
        raise Chosen(number)

    monkeypatch.setattr(run.hardware, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.delattr(run, "is_first_worker")  # by then it must be chosen
    launched(variables)
    config = small_config(text, tmp_path / "out", place={"devices": devices})
    with pytest.raises(Chosen, match=f"^{gpu}$"), run.open_run(config, Reporter(), 0.0):
        pass


def test_processes_of_one_machine_meet_at_no_address_that_was_left_behind(launched):
    stray = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "none", "GROUP_RANK": "1"}
    launched(stray)
    check_workers(PlaceConfig(devices=2), 0)
    assert not stray.keys() & os.environ.keys()
    launched(stray)
    check_workers(PlaceConfig(devices=2, num_nodes=2), 0)
    assert os.environ["MASTER_ADDR"] == "192.0.2.1"  # where the first machine is


@pytest.mark.parametrize("variables", STRAY, ids=str)
def test_a_process_alone_trains_whatever_a_launcher_left_behind(text, tmp_path, launched, variables):
    from lightning_fabric.utilities.rank_zero import _get_rank

    from smollm2.training import train

    launched(variables)
    assert train(small_config(text, tmp_path, max_steps=3)).checkpoint.is_dir()
    _get_rank()  # what Lightning calls when it is imported: no error


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_reach_the_same_losses_in_two_phases(text, tmp_path, optimizer):
    """The second phase matters: every worker must resume from what the first one committed."""
    losses, settings = {}, {"max_steps": 12, "continue_steps": 4, "log_every": 1, "save_every_seconds": 0.01}
    settings["optimizer"] = optimizer
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        process = command_line(small_config(text, folder / "output", **settings), "--devices", str(devices))
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]
        events = read_log(folder / "output/logs" / TRAINING)
        losses[devices] = [float(event["train_loss"]) for event in events if "train_loss" in event]
        saves = [e for e in read_log(folder / "output/logs" / CHECKPOINTS) if e["event"] == "saved"]
        assert len(saves) >= 14  # by the clock, also with several workers
    assert len(losses[1]) == 16
    np.testing.assert_allclose(losses[1], losses[2], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_processes_stops_both_in_good_order(text, tmp_path, rank):
    """A stopped worker that went on to the second phase, or an exit code of 0, would look like a finished run."""
    import psutil

    long = {"max_steps": 100_000, "continue_steps": 50, "val_every": 100_000, "sample_every": 100_000}
    config = small_config(text, tmp_path / "output", save_every=None, **long)
    with command_line(config, "--devices", "2") as run:
        said = ""
        while "step 1/" not in said:
            said += run.stdout.readline()
            assert run.poll() is None, said
        target = run if rank == 0 else psutil.Process(run.pid).children()[0]
        with contextlib.suppress(psutil.NoSuchProcess):
            target.send_signal(signal.SIGTERM)
        said += run.communicate(timeout=120)[0]
    assert run.returncode == 143 and "Traceback" not in said, said[-2000:]
    assert said.count("talk to it") == 1
    (saved,) = [e for e in read_log(tmp_path / "output/logs" / CHECKPOINTS) if e["event"] == "saved"]
    assert 1 <= int(saved["step"]) < 100000
