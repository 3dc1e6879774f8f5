"""Notebook 4's loop by hand: equal to the package's on the same batches, and its checks notice what is left out."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import smollm2
from smollm2 import SmolLM2, SmolLM2Config, colab, load_config
from smollm2.notebook import lesson

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "notebooks" / "04_train.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}
LOOP = ("accumulate", "clip", "adamw", "adamw-check", "loop", "own-save", "own-resume", "loop-check")
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
SHAPE |= {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32}
# what a learner may leave out -> the check that says so
SLIPS = {
    " * len(part) / len(rows)  # its share": "4 parts make the gradient of the large batch",
    " / (1 - beta1**step)": "three updates by hand are torch.optim.AdamW's",
    "    weight.mul_(1 - rate * decay)  # 4\n": "three updates by hand are torch.optim.AdamW's",
    " if weight.dim() == 2 else 0.0": "the 30 losses of your loop",
    "factor * weight.grad": "the 30 losses of your loop",
    "rate(step - 1)": "the 30 losses of your loop",
    '{"m": m, "v": v}': "updates 4 to 6 from the file",
    'held["done"].item()': "updates 4 to 6 from the file",
}
INSTEAD = {"factor * weight.grad": "weight.grad", "rate(step - 1)": "rate(0)"}
INSTEAD |= {'{"m": m, "v": v}': "new_memory(weight)", 'held["done"].item()': "0"}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the notebook's cells find there: its imports, a small model and batch, and runs that are made once."""
    folder, names, runs = tmp_path_factory.mktemp("loop"), {"os": os, "colab": colab}, []
    exec(CODE["imports"], names)
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    train = {"train.max_steps": 30, "train.batch_size": 8, "train.sample_tokens": 2, "train.warmup_steps": 5}
    train["train.weight_decay"] = 1.0  # large enough to be missed
    data = {"data.input_file": str(folder / "text.txt"), "data.tokenizer_vocab_size": 300}
    data |= {"data.sequence_length": 32, "run.output_dir": str(folder / "plain")}
    shape = {f"model.{name}": value for name, value in SHAPE.items()}

    def drill(name, **more):
        return load_config("nano", **train | data | shape | more)

    def trained_once(config, reporter):
        runs[:] = runs or [smollm2.train(config, reporter)]
        return runs[0]

    names |= {"drill": drill, "DRILL": folder, "device": torch.device("cpu")}
    names["smollm2"] = SimpleNamespace(train=trained_once)
    names["one_batch"] = torch.arange(4 * 17).view(4, 17)
    names["shape"] = SmolLM2Config(**SHAPE)
    names["model"] = SmolLM2(names["shape"])
    return names


def run(names, slip=""):
    names = names.copy()
    for cell in LOOP:
        exec(CODE[cell].replace(slip, INSTEAD.get(slip, "")) if slip else CODE[cell], names)


def test_its_losses_are_those_of_the_package(names, capsys):
    run(names)
    assert capsys.readouterr().out.count("✔") == 5


@pytest.mark.parametrize("slip", SLIPS)
def test_what_is_left_out_is_noticed(names, slip):
    assert any(slip in CODE[cell] for cell in LOOP)
    with pytest.raises(lesson.CheckFailed, match=SLIPS[slip]):
        run(names, slip)
