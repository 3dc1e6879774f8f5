"""The stop button of a notebook: an interrupt in mid-training leaves a saved run and a notebook that goes on."""

import os
import re
from pathlib import Path

import pytest

from smollm2.checkpoint import verify

jupyter = pytest.importorskip("jupyter_client.manager", reason="notebook tests need the dev extra")

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import smollm2
from smollm2.notebook.panel import live_panel

tiny = {"model.vocab_size": 300, "data.tokenizer_vocab_size": 300, "model.hidden_size": 48,
        "model.intermediate_size": 96, "model.num_hidden_layers": 2, "data.sequence_length": 32, "train.batch_size": 4,
        "train.val_max_tokens": 512, "train.sample_tokens": 4, "train.warmup_steps": 2, "data.input_file": "text.txt"}

def train(steps):
    config = smollm2.load_config("nano", **tiny, **{"train.max_steps": steps})
    return smollm2.train(config, reporter=live_panel("output/logs"))

result = train(100_000)
print("returned", result.stopped_by, result.step)
"""
GO_ON = "again = train(result.step + 3)\nprint('went on', again.stopped_by, again.step)"


def test_an_interrupted_training_cell_saves_returns_and_the_notebook_goes_on(tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the dog sat on the cat. " * 400)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    manager, client = jupyter.start_new_kernel(kernel_name="python3", cwd=str(tmp_path), env=env)
    printed, shown, pressed = [], [], []

    def on_output(message):
        content = message["content"]
        if message["msg_type"] == "stream":
            printed.append(content["text"])
        if "display_data" in message["msg_type"]:
            shown.append(message)
            step = int(re.search(r"^step: (\d+) of|$", content["data"]["text/plain"])[1] or 0)
            if step >= 3 and not pressed:
                pressed.append(step)
                manager.interrupt_kernel()

    try:
        reply = client.execute_interactive(TRAIN, output_hook=on_output, timeout=240)["content"]
        assert pressed and reply["status"] == "ok", (reply, printed)
        panels = list(shown)
        reply = client.execute_interactive(GO_ON, output_hook=on_output, timeout=240)["content"]
        assert reply["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    said = "".join(printed)
    step = int(re.search(r"returned 2 (\d+)", said)[1])
    assert step >= pressed[0] and f"went on None {step + 3}" in said
    checkpoints = tmp_path / "output" / "checkpoints"
    assert verify(checkpoints / f"step-{step:08d}.ckpt").step == step
    assert verify(checkpoints / "final_model.ckpt").step == step + 3
    assert len({message["content"]["transient"]["display_id"] for message in panels}) == 1
    assert "SIGINT: finishing this step and saving" in panels[-1]["content"]["data"]["text/html"]
