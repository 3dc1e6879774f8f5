"""Two processes train the same batches in the same order as one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from smollm2.config import PlaceConfig
from smollm2.data import BatchOrder, BatchStream
from smollm2.errors import ConfigError
from smollm2.logs import read_log
from smollm2.workers import check_workers, is_first_worker

ROOT = Path(__file__).parents[1]


def test_workers_share_the_rows_of_the_same_global_batch():
    tokens = np.arange(5000, dtype=np.uint16)
    order = BatchOrder(len(tokens), 16, 8, seed=3)
    whole = BatchStream(tokens, order, 0).batch(5)
    for world in (2, 4):
        parts = [BatchStream(tokens, order, 0, rank, world).batch(5) for rank in range(world)]
        rows = {tuple(row.tolist()) for part in parts for row in part}
        assert rows == {tuple(row.tolist()) for row in whole}
        assert all(len(part) == 8 // world for part in parts)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "train"}
SHELL_OF_A_JOB = {
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_JOB_NAME": "bash",
}  # Lightning's children inherit it


@pytest.fixture
def launched(monkeypatch):
    def as_if(**variables: str):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", *TORCHRUN, *SRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return as_if


@pytest.mark.parametrize(
    ("variables", "is_first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, True),
        (SRUN, False),
        (SRUN | {"SLURM_PROCID": "0"}, True),
        (SHELL_OF_A_JOB, True),
        (SHELL_OF_A_JOB | {"LOCAL_RANK": "1"}, False),
    ],
    ids=str,
)
def test_one_worker_is_the_first_however_they_were_started(launched, variables, is_first):
    launched(**variables)
    assert is_first_worker() is is_first


@pytest.mark.parametrize(
    ("variables", "place", "gpus", "problem"),
    [
        (TORCHRUN, {}, 0, "torchrun started 4 processes, but --devices 1 x --num_nodes 1 = 1"),
        (TORCHRUN, {"devices": 2, "num_nodes": 2}, 2, None),
        (SRUN, {"devices": 4}, 0, "srun started 2 processes"),
        (SRUN, {"num_nodes": 2}, 1, None),
        (SHELL_OF_A_JOB, {"devices": 2}, 0, None),
        ({}, {"devices": 2}, 1, "this machine has 1 GPU; expected at most 1"),
        ({}, {"devices": 2}, 0, None),
    ],
    ids=str,
)
def test_processes_that_would_each_train_the_whole_run_are_refused(launched, variables, place, gpus, problem):
    launched(**variables)
    with pytest.raises(ConfigError, match=re.escape(problem)) if problem else contextlib.nullcontext():
        check_workers(PlaceConfig(**place), gpus)


@pytest.mark.slow
def test_two_processes_reach_the_same_losses_in_two_phases(tmp_path):
    """The second phase matters: every worker must resume from what the first one committed."""
    config = {
        "preset": "nano",
        "model": {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "data": {"sequence_length": 32, "tokenizer_vocab_size": 512},
        "train": {
            "batch_size": 8,
            "warmup_steps": 5,
            "val_every": 50,
            "sample_every": 50,
            "sample_tokens": 8,
            "precision": "fp32",
            "log_every": 1,
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "text.txt").write_text((ROOT / "input.txt").read_text()[:60_000])
    losses = {}
    for devices in (1, 2):
        command = [
            sys.executable,
            str(ROOT / "colab_train.py"),
            "--config",
            "tiny.yaml",
            "--input_file",
            "text.txt",
        ]
        command += [
            "--set",
            "save_every_seconds=0.01",
            "--output_dir",
            f"out{devices}",
            "--max_steps",
            "12",
            "--continue_steps",
            "4",
            "--devices",
            str(devices),
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        events = read_log(tmp_path / f"out{devices}" / "logs" / "training_loss.txt")
        losses[devices] = [float(event["train_loss"]) for event in events if "train_loss" in event]
        saves = [
            event
            for event in read_log(tmp_path / f"out{devices}" / "logs" / "checkpoint_events.txt")
            if event["event"] == "saved"
        ]
        assert len(saves) >= 14  # by the clock, also with several workers
    assert len(losses[1]) == 16
    np.testing.assert_allclose(losses[1], losses[2], atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_processes_stops_both_in_good_order(tmp_path, rank):
    """A stopped worker that went on to the second phase, or an exit code of 0, would look like a finished run."""
    import psutil

    config = {
        "preset": "nano",
        "model": {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "data": {"sequence_length": 32, "tokenizer_vocab_size": 512},
        "train": {
            "batch_size": 8,
            "warmup_steps": 5,
            "precision": "fp32",
            "max_steps": 100000,
            "continue_steps": 50,
            "val_every": 100000,
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "text.txt").write_text((ROOT / "input.txt").read_text()[:60_000])
    command = [
        sys.executable,
        "-u",
        str(ROOT / "colab_train.py"),
        "--config",
        "tiny.yaml",
        "--input_file",
        "text.txt",
        "--devices",
        "2",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        said = ""
        while "step 1/" not in said:
            said += run.stdout.readline()
            assert run.poll() is None, said
        target = run if rank == 0 else psutil.Process(run.pid).children()[0]
        target.send_signal(signal.SIGTERM)
        said += run.communicate(timeout=120)[0]
    assert run.returncode == 143 and "Traceback" not in said, said[-2000:]
    assert said.count("talk to it") == 1
    (saved,) = [
        event
        for event in read_log(tmp_path / "output/logs/checkpoint_events.txt")
        if event["event"] == "saved"
    ]
    assert 1 <= int(saved["step"]) < 100000
