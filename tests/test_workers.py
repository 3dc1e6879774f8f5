"""Two processes train the same batches in the same order as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from smollm2.data import BatchOrder, BatchStream
from smollm2.logs import read_log

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


@pytest.mark.slow
def test_two_processes_reach_the_same_losses_in_two_phases(tmp_path):
    """The second phase matters: every worker must resume from what the first one committed."""
    config = {
        "preset": "nano",
        "model": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "data": {"sequence_length": 32, "tokenizer_vocab_size": 512},
        "train": {"batch_size": 8, "warmup_steps": 5, "val_every": 50, "sample_every": 50, "sample_tokens": 8, "precision": "fp32", "log_every": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "text.txt").write_text((ROOT / "input.txt").read_text()[:60_000])
    losses = {}
    for devices in (1, 2):
        command = [sys.executable, str(ROOT / "colab_train.py"), "--config", "tiny.yaml", "--input_file", "text.txt"]
        command += ["--output_dir", f"out{devices}", "--max_steps", "12", "--continue_steps", "4", "--devices", str(devices)]
        done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        events = read_log(tmp_path / f"out{devices}" / "logs" / "training_loss.txt")
        losses[devices] = [float(event["train_loss"]) for event in events if "train_loss" in event]
    assert len(losses[1]) == 16
    np.testing.assert_allclose(losses[1], losses[2], atol=2e-4)
