"""The model card of an export: what the run really did, in its own figures, and its loss curve.

Everything is read from the checkpoint's `state.json` and the run's log; what is not there is left out, never guessed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import logs
from .config import SmolLM2Config
from .files import write_durably
from .plots import figure, label, png_bytes

PLOT = "training_loss.png"
OFFICIAL = "HuggingFaceTB/SmolLM2-"  # all published under Apache-2.0


def read_log(folder: Path, last_step: int | None) -> list[dict[str, float]]:
    """Numbers of each line of the run's loss log up to the checkpoint's step; empty where there is no log."""
    path = folder.resolve().parent.parent / "logs" / logs.TRAINING
    if last_step is None or not path.is_file():
        return []
    rows = [logs.numbers(event) for event in logs.read_log(path)]
    return [row for row in rows if row.get("step", math.inf) <= last_step]


def last(rows: list[dict[str, float]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if key in row), None)


def plot(rows: list[dict[str, float]], path: Path) -> bool:
    """Draw training and validation loss against the step; False when there are too few points."""
    curves = {
        name: [(row["step"], row[key]) for row in rows if key in row]
        for key, name in (("train_loss", "training"), ("val_loss", "held out"))
    }
    if len(curves["training"]) < 2:
        return False
    fig, axes = figure(height=3.6)
    for (name, points), style in zip(curves.items(), ("-", "o-"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2)
    label(axes, "Loss against the optimizer step", "optimizer step", "nats a token", legend=True)
    write_durably(path, png_bytes(fig))
    return True


def figures(state: dict[str, Any], rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    """The rows of the card's table "Training": (what, value)."""
    run = state.get("config") or {}
    data, train = run.get("data") or {}, run.get("train") or {}
    sizes = [state.get("step"), train.get("batch_size"), data.get("sequence_length")]
    table = [
        ("preset", state.get("preset") or None),
        ("text", f"`{state['text']}`" if state.get("text") else None),
        ("optimizer steps", state.get("step")),
        ("tokens seen", math.prod(sizes) if all(sizes) else None),
        ("rows of one step", train.get("batch_size")),
        ("tokens of a row", data.get("sequence_length")),
        ("peak learning rate", train.get("learning_rate")),
        ("seed", train.get("seed")),
        ("started from", state.get("init_from")),
        ("last training loss (nats a token)", last(rows, "train_loss")),
        ("last held-out loss (nats a token)", last(rows, "val_loss")),
        ("last held-out bits per byte", last(rows, "val_bits_per_byte")),
        ("best held-out bits per byte", (state.get("best") or {}).get("bits_per_byte")),
    ]
    return [(what, _shown(value)) for what, value in table if value is not None]


def _shown(value: object) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 0.01 else f"{value:.4f}"
    return (
        f"{int(value):,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
    )


def licence(state: dict[str, Any], base: str | None) -> tuple[str | None, str]:
    """(the Hub's word for the licence, a sentence). No word where nothing in the folder says which licence holds."""
    if base and base.startswith(OFFICIAL):
        return "apache-2.0", f"Made from the weights of {base}, which are under the Apache licence 2.0."
    if base:
        return None, f"Made from the weights of {base}: their licence holds for these, too. Look it up there."
    if state.get("init_from"):
        return None, f"Made from weights called `{state['init_from']}`: their licence holds for these, too."
    if "init_from" in state:
        return "mit", _LICENCE
    return (
        None,
        "Nothing in this folder says where the weights come from: find out which licence holds before you publish them.",
    )


def model_card(
    title: str,
    config: SmolLM2Config,
    parameters: int,
    dtype: str,
    state: dict[str, Any],
    rows: list[dict[str, float]],
    has_plot: bool,
    gguf: str | None,
    base: str | None,
) -> str:
    """`README.md` with the Hub's metadata header."""
    dataset = state.get("text") or ""
    word, sentence = licence(state, base)
    head = [f"license: {word}"] if word else []
    head += ["language: en", "library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags:", "- smollm2", "- llama"]
    head += (
        [f"datasets:\n- {dataset}"] if dataset.count("/") == 1 else []
    )  # a Hub id; of a folder or file only its last name is kept
    head += [f"base_model: {base}"] if base else []
    shape = (
        f"{parameters:,} parameters: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads, vocabulary {config.vocab_size:,}, "
        f"context {config.max_position_embeddings:,} tokens, RoPE theta {config.rope_theta:,.0f}, stored in {dtype}."
    )
    parts = [
        "---",
        *head,
        "---",
        f"# {title}",
        f"A language model of the SmolLM2 architecture (`LlamaForCausalLM`). {shape}",
    ]
    table = figures(state, rows)
    if table:
        parts += [
            "## Training",
            "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in table),
        ]
    parts += [f"![Loss against the optimizer step]({PLOT})"] if has_plot else []
    parts += ["## Use", _USAGE]
    parts += [_GGUF_USAGE.format(file=gguf)] if gguf else []
    parts += ["`ollama create my-model -f Modelfile` imports this folder into Ollama.", "## Limits", _LIMITS]
    parts += ["## Licence", sentence]
    header, body = parts[: len(head) + 2], parts[len(head) + 2 :]
    return "\n".join(header) + "\n\n" + "\n\n".join(body) + "\n"


_USAGE = """```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder = "."  # this folder, or its id on the Hub
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, do_sample=True, temperature=0.8)[0]))
```

`config.json` carries RoPE's theta in the form of transformers 4 and in that of transformers 5, so both compute the same."""

_GGUF_USAGE = '`{file}` runs in llama.cpp (`llama-completion -m {file} -p "Once upon a time"`) and is what the Modelfile imports.'

_LIMITS = """A small model trained on little text: it completes text in the manner of what it read. It does not know facts, and what it
writes can be wrong, biased or offensive. Do not use it where that matters."""

_LICENCE = "The training code is under the MIT licence. The text it was trained on keeps its own terms: check them before you publish the weights."
