"""The branches that ask for a GPU, walked on tensors that only pretend to be on one (`pretend_gpu.py`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smollm2.training import train
from tests.soak import small_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    # loss, norm and signal come back in one transfer; a scaler asks for its two numbers, and before an update
    # that is not one fused kernel whether there was an overflow
    ("card", "optimizer", "waits"),
    [("t4", "adamw", 3), ("t4", "muon", 4), ("h100", "muon", 1)],
)
def test_a_run_on_a_pretended_gpu_learns_what_one_on_a_cpu_does(text, tmp_path, card, optimizer, waits):
    command = [sys.executable, "-m", "tests.pretend_gpu", card, str(tmp_path / "gpu"), str(text), optimizer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    settings = {"optimizer": optimizer, "val_every": 4, "sample_every": 4, "save_every": 3}
    for steps in (6, 9):
        here = train(small_config(text, tmp_path / "cpu", 2, max_steps=steps, **settings))
    assert [step for step, _ in found["losses"]] == [7, 8, 9]
    assert [loss for _, loss in found["losses"]] == pytest.approx([loss for _, loss in here.losses], abs=0.01)
    assert found["bits"] == pytest.approx(here.bits_per_byte, abs=0.01)
    assert found["written"] == [[2, 9], [2, 9]]
    assert found["cublas"] == ":4096:8"  # else a deterministic run, later in this process, is refused
    assert found["pinned"] > 0  # what a save is copied to
    assert found["peak_bytes"] == 2 * 2**30  # of the trial, above what this process holds
    assert min(found["waits"]) == waits  # of a step that neither validates, samples nor saves


def test_the_pretended_gpu_refuses_tensors_of_two_devices():
    code = "from tests.pretend_gpu import *; pretend('t4'); Pretending().__enter__(); "
    code += (
        "torch.zeros(2, device='cuda') + 1 + torch.tensor(1); torch.zeros(2, device='cuda') + torch.zeros(2)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "expected all tensors on one device, found (2,) on cuda, (2,) on cpu" in done.stderr
