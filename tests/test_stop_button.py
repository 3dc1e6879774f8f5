"""The stop button of a notebook: an interrupt in mid-training leaves a saved run and a notebook that goes on."""

from __future__ import annotations

import os
import queue
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from smollm2.checkpoint import verify

pytest.importorskip("jupyter_client", reason="notebook tests need the dev extra")

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import smollm2
from smollm2.settings import load_config
from smollm2.notebook.panel import LivePanel

tiny = {"model.vocab_size": 300, "data.tokenizer_vocab_size": 300, "model.hidden_size": 48, "model.intermediate_size": 96, "model.num_hidden_layers": 2,
        "data.sequence_length": 32, "train.batch_size": 4, "train.val_max_tokens": 512, "train.sample_tokens": 4, "data.input_file": "text.txt"}

def config(steps):
    return load_config("nano", **tiny, **{"train.max_steps": steps, "train.warmup_steps": 2})

result = smollm2.train(config(100_000), reporter=LivePanel())
print("returned", result.stopped_by, result.step)
"""
GO_ON = """
again = smollm2.train(config(result.step + 3), reporter=LivePanel(logs="output/logs"))
print("went on", again.stopped_by, again.step, again.checkpoint)
"""


class Kernel:
    def __init__(self, folder):
        from jupyter_client.manager import start_new_kernel

        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", cwd=str(folder), env=env, startup_timeout=120
        )

    def run(self, code, on_message=lambda message: None, timeout=240):
        """Execute and return (reply, printed text, messages)."""
        request = self.client.execute(code)
        messages, deadline = [], time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            messages.append(message)
            on_message(message)
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        reply = self.client.get_shell_msg(timeout=60)["content"]
        printed = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
        return reply, printed, messages

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path):
    (tmp_path / "text.txt").write_text(
        "The cat sat on the mat, and the dog sat on the cat. " * 400, encoding="utf-8"
    )
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


def test_an_interrupted_training_cell_saves_returns_and_the_notebook_goes_on(kernel, tmp_path):
    pressed = []

    def press_stop(message):
        shown = (
            message["content"].get("data", {}).get("text/plain", "")
            if "display_data" in message["msg_type"]
            else ""
        )
        step = re.search(r"^step: (\d+) of", shown)
        if step and int(step[1]) >= 3 and not pressed:
            pressed.append(int(step[1]))
            kernel.manager.interrupt_kernel()

    reply, printed, messages = kernel.run(TRAIN, press_stop)
    assert pressed, (printed, reply)
    assert reply["status"] == "ok", reply.get("evalue")
    step = int(re.search(r"returned 2 (\d+)", printed)[1])
    assert step >= pressed[0]
    assert verify(tmp_path / "output" / "checkpoints" / f"step-{step:08d}.ckpt").step == step

    shown = [m for m in messages if "display_data" in m["msg_type"]]
    assert [m["msg_type"] for m in shown] == ["display_data"] + ["update_display_data"] * (len(shown) - 1)
    assert len({m["content"]["transient"]["display_id"] for m in shown}) == 1, "one display, updated"
    times = [m["header"]["date"].timestamp() for m in shown[:-1]]  # the last one, at the end, may come sooner
    assert all(later - earlier > 0.9 for earlier, later in pairwise(times))
    assert "SIGINT: finishing this step and saving" in shown[-1]["content"]["data"]["text/html"]

    reply, printed, _ = kernel.run(GO_ON)
    assert reply["status"] == "ok", reply.get("evalue")
    assert f"went on None {step + 3}" in printed
    assert verify(tmp_path / "output" / "checkpoints" / "final_model.ckpt").step == step + 3
