"""Model folders in and out: our checkpoints, any Hugging Face Llama folder, or the Hub. Safetensors only, never pickle.

Nothing here knows the network: `SmolLM2.from_pretrained` builds itself from what is read here.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from .config import SmolLM2Config
from .errors import CheckpointError
from .files import (
    dump_json,
    kind_of,
    load_tensors,
    strict_json,
)

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """Local folder of a checkpoint folder or Hub id, its weights downloaded when needed; raises `CheckpointError`."""
    path = Path(source)
    if os.path.isfile(path):  # unlike Path.is_file it never raises
        hint = "a pickled file is never opened" if path.suffix in PICKLE_SUFFIXES else "that is a single file"
        raise CheckpointError(
            f"{path}: expected a checkpoint folder with config.json and model.safetensors, and {hint}; "
            "convert it with transformers' save_pretrained"
        )
    if os.path.isdir(path):
        if not (path / "config.json").exists():
            inside = (
                sorted(p.name for p in path.glob("*.ckpt"))[-3:]
                or sorted(p.name for p in path.glob("checkpoints/*.ckpt"))[-3:]
            )
            hint = f"; did you mean one of {', '.join(inside)} in it?" if inside else ""
            raise CheckpointError(f"{path}: no config.json: not a checkpoint folder{hint}")
        return path
    text = str(source)
    looks_local = (
        text.startswith((".", "/", "~")) or path.suffix in PICKLE_SUFFIXES or os.path.isdir(path.parent)
    )
    if text.count("/") != 1 or looks_local:
        raise CheckpointError(
            f"{source}: {kind_of(path)}; expected a checkpoint folder or a Hub id such as HuggingFaceTB/SmolLM2-135M"
        )
    from .hub import fetch_files

    files = fetch_files(
        text, MODEL_FILES, optional=("tokenizer_config.json", "chat_template.jinja"), revision=revision
    )
    return files["config.json"].parent


def read_config(folder: Path) -> SmolLM2Config:
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: {kind_of(path)}, expected the config.json of a Llama model")
    if path.stat().st_size > 2**20:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes is no config.json")
    fields = strict_json(path.read_bytes(), str(path))
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: found {type(fields).__name__}, expected the config.json of a Llama model"
        )
    return SmolLM2Config.from_hf_dict(fields, str(path))


def read_weights(folder: Path, config: SmolLM2Config) -> dict[str, torch.Tensor]:
    """Tensors by transformers' names, one file or sharded; a tied model may store only either of the tied names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        tensors = load_tensors(single)
    elif index.exists():
        table = strict_json(index.read_bytes(), str(index))
        names = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index}: expected a table 'weight_map' of tensor names and file names")
        shards = set(names.values())
        if any("/" in name or ".." in name for name in shards):
            raise CheckpointError(f"{index}: a shard name leaves the folder")
        tensors = {
            name: tensor for shard in sorted(shards) for name, tensor in load_tensors(folder / shard).items()
        }
    else:
        pickled = [p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES and p.is_file()]
        found = f"only {', '.join(pickled)}, and pickled files are never opened" if pickled else "no weights"
        raise CheckpointError(f"{folder}: {found}; expected model.safetensors")
    if config.tie_word_embeddings:
        head = tensors.pop("lm_head.weight", None)
        if head is not None:
            embedding = tensors.setdefault("model.embed_tokens.weight", head)
            if embedding is not head and not torch.equal(embedding, head):
                raise CheckpointError(
                    f"{folder}: tie_word_embeddings is true, but the file holds two different matrices"
                )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def check_shapes(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raises `CheckpointError` that lists the first differences in names and shapes."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        names = sorted(set(expected.items()) ^ set(found.items()))[:5]
        lines = ", ".join(
            f"{n}: file {found.get(n, 'absent')}, model {expected.get(n, 'absent')}" for n in dict(names)
        )
        raise CheckpointError(f"{where}: weights do not fit the configuration ({lines})")


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors into a model; raises `CheckpointError` when they do not fit or are no finite numbers."""
    check_shapes(model, tensors, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not tensors[name].is_floating_point():
                raise CheckpointError(f"{where}: {name} is {tensors[name].dtype}, expected floating point")
            if not torch.isfinite(tensors[name]).all():
                raise CheckpointError(f"{where}: {name} holds numbers that are not finite")
            parameter.copy_(tensors[name])


def model_files(config: SmolLM2Config, dtype: str = "float32") -> dict[str, bytes]:
    """`config.json` and `generation_config.json`."""
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    generation["pad_token_id"] = (
        config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    )
    return {
        "config.json": dump_json(config.to_hf_dict(dtype)),
        "generation_config.json": dump_json(generation),
    }


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of `model.safetensors`: named parameters, so a tied output matrix appears once."""
    return {name: p.detach() for name, p in model.named_parameters()}
