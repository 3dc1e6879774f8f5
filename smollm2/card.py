"""The model card of an export: what the run really did, in its own figures. `card.md` is its text.

Everything is read from the checkpoint's `state.json` and the run's log; what is not there is left out.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from . import logs
from .config import SmolLM2Config
from .origin import recorded

OFFICIAL = "HuggingFaceTB/SmolLM2-"  # all published under Apache-2.0
TEMPLATE = Path(__file__).with_name("card.md")
BESIDE = " on the same text (bits per byte)"
FORMATS = {int: "{:,}", float: "{:.5g}"}


def last_figures(folder: Path, last_step: int | None) -> dict[str, float]:
    """The last value of each number in the run's loss log up to the checkpoint, and the best score; empty
    without a log."""
    place, figures = folder.resolve().parent.parent / "logs", {}
    rows = map(logs.numbers, logs.read_log(place / logs.TRAINING) if last_step is not None else [])
    rows = [row for row in rows if row.get("step", math.inf) <= last_step]
    for row in rows:
        figures |= row
    if best := logs.best_score(rows):
        figures["best"] = best["val_bits_per_byte"]
    others = recorded(place, logs.OTHERS)
    if last_step is not None and others.get("step") == last_step:
        figures |= {name + BESIDE: bits for name, bits in others["bits_per_byte"].items()}
    return figures


def training_table(state: dict[str, Any], figures: dict[str, float]) -> str:
    """The Markdown table of a run, a row for each thing known; empty for a folder that no run made."""
    run = state.get("config") or {}
    data, train = run.get("data") or {}, run.get("train") or {}
    sizes = [state.get("step"), train.get("batch_size"), data.get("sequence_length")]
    is_muon = train.get("optimizer") == "muon"
    rows = {
        "preset": state.get("preset") or None,
        "text": f"`{state['text']}`" if state.get("text") else None,
        "optimizer steps": state.get("step"),
        "tokens seen": math.prod(sizes) if all(sizes) else None,
        "rows of one step": train.get("batch_size"),
        "tokens of a row": data.get("sequence_length"),
        "optimizer": train.get("optimizer"),
        "peak learning rate": train.get("learning_rate"),
        "peak learning rate of Muon": train.get("muon_learning_rate") if is_muon else None,
        "seed": str(train["seed"]) if "seed" in train else None,  # a name, not a quantity: no commas
        "started from": state.get("init_from"),
        "last training loss (nats a token)": figures.get("train_loss"),
        "last held-out loss (nats a token)": figures.get("val_loss"),
        "last held-out bits per byte": figures.get("val_bits_per_byte"),
        "best held-out bits per byte": figures.get("best"),
    }
    rows |= {name: bits for name, bits in figures.items() if name.endswith(BESIDE)}
    lines = [f"| {k} | {FORMATS.get(type(v), '{}').format(v)} |" for k, v in rows.items() if v is not None]
    return "\n".join(["## Training\n\n| | |\n|---|---|", *lines, "\n"]) if lines else ""


def licence(state: dict[str, Any], base: str | None) -> tuple[str | None, str]:
    """(the Hub's word for the licence, a sentence). No word where nothing says which licence holds."""
    if base and base.startswith(OFFICIAL):
        return "apache-2.0", f"Made from the weights of {base}, which are under the Apache licence 2.0."
    if source := base or state.get("init_from"):
        return None, f"Made from the weights of `{source}`: their licence holds for these, too. Look it up."
    if "init_from" not in state:
        return None, "Nothing says where the weights come from: find out which licence holds first."
    kept = "The text it was trained on keeps its own terms: check them before you publish the weights."
    return "mit", f"The training code is under the MIT licence. {kept}"


def model_card(
    title: str, folder: Path, config: SmolLM2Config, size: int, dtype: str, gguf: str | None, base: str | None
) -> str:
    """`README.md` of a checkpoint folder's export, with the Hub's metadata header.

    `config`: as exported. `size`: parameters. `gguf`: name of that file. `base`: Hub id of the weights it was
    made from. Both may be absent.
    """
    from huggingface_hub import ModelCardData

    state = recorded(folder)
    table = training_table(state, last_figures(folder, state.get("step")))
    word, sentence = licence(state, base)
    # of ID:CONFIG@SPLIT the Hub takes the id alone; of a file only its name is kept
    datasets = re.findall(r"(?:^|, )([\w.-]+/[\w.-]+)", str(state.get("text") or ""))
    kind = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["smollm2", "llama"]}
    header = ModelCardData(license=word, datasets=datasets or None, base_model=base, **kind).to_yaml()
    run = f'`llama-completion -m {gguf} -p "Once upon a time"` runs it in llama.cpp'
    use = f"{run}, `ollama create my-model -f Modelfile` imports it into Ollama.\n\n" if gguf else ""
    facts = {"title": title, "config": config, "parameters": size, "dtype": dtype, "licence": sentence}
    return TEMPLATE.read_text("utf-8").format(header=header, training=table, llama_cpp=use, **facts)
