"""Model folders in and out: our checkpoints, any Hugging Face Llama folder, the Hub. Never pickle.

Nothing here knows the network: `SmolLM2.from_pretrained` builds itself from what is read here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import SmolLM2Config
from .errors import CheckpointError, UserError
from .files import dump_json, kind_of, load_tensors, strict_json
from .hub import HubUnreachable, fetch_files

if TYPE_CHECKING:  # a wrong checkpoint is named before torch is imported
    import torch
    from torch import nn

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
OPTIONAL_FILES = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
MAX_TABLE_BYTES = 16 * 2**20


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """Local folder of a checkpoint folder or Hub id, downloaded when needed; raises `CheckpointError`."""
    path, text = Path(source), str(source)
    if os.path.isfile(path / "config.json"):  # unlike Path.is_file it never raises
        return path
    if os.path.isdir(path):
        found = sorted([*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")], key=os.path.getmtime)
        hint = f"; did you mean {found[-1]}?" if found else ""
        raise CheckpointError(f"{path}: no config.json: not a checkpoint folder{hint}")
    looks_local = text.startswith((".", "/", "~")) or os.path.isdir(path.parent)
    if text.count("/") == 1 and not looks_local and path.suffix not in PICKLE_SUFFIXES:
        return fetch_model(text, revision)
    expected = "expected a checkpoint folder with config.json and model.safetensors, or a Hub id OWNER/NAME"
    hint = "; a single file is not enough, and a pickled one is never opened" if os.path.isfile(path) else ""
    raise CheckpointError(f"{source}: {kind_of(path)}; {expected}{hint}")


def fetch_model(repo_id: str, revision: str | None = None) -> Path:
    """Local folder of a Hub model, in one file or in shards; raises as `fetch_files` does."""
    try:
        return fetch_files(repo_id, MODEL_FILES, OPTIONAL_FILES, revision)["config.json"].parent
    except UserError as problem:
        from huggingface_hub import try_to_load_from_cache as look_up

        is_silent = isinstance(problem, HubUnreachable)  # it is asked once
        if is_silent and not isinstance(look_up(repo_id, INDEX, revision=revision), str):
            raise
        try:
            index = fetch_files(repo_id, [INDEX], revision=revision)[INDEX]
        except UserError:
            raise problem from None
    files = ["config.json", "tokenizer.json", *shards(index)]
    return fetch_files(repo_id, files, OPTIONAL_FILES, index.parent.name)["config.json"].parent


def read_table(path: Path, expected: str = "a table", optional: bool = False) -> dict[str, Any]:
    """The table in a JSON file (`optional`: empty where there is none); raises `CheckpointError`."""
    if optional and not os.path.lexists(path):
        return {}
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: {kind_of(path)}, expected {expected}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, expected {expected}")
    table = strict_json(path.read_bytes(), str(path))
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: found {type(table).__name__}, expected {expected}")
    return table


def read_config(folder: Path) -> SmolLM2Config:
    path = folder / "config.json"
    return SmolLM2Config.from_hf_dict(read_table(path, "the config.json of a Llama model"), str(path))


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """All ids that end a text: config.json's first, then those that only generation_config.json names."""
    found = []
    for name in ("config.json", "generation_config.json"):
        ids = read_table(folder / name, optional=True).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    if not all(i is None or type(i) is int for i in found):
        raise CheckpointError(f"{folder}: eos_token_id is {found}; expected a number or a list of them")
    return tuple(dict.fromkeys(i for i in found if i is not None and 0 <= i < 2**63))  # -1 says none


def shards(index: Path) -> list[str]:
    """File names of a model's shards; raises `CheckpointError`."""
    names = read_table(index, "a table 'weight_map'").get("weight_map")
    if not isinstance(names, dict) or any(Path(str(name)).name != name for name in names.values()):
        raise CheckpointError(f"{index}: expected in 'weight_map' the names of files in this folder")
    return sorted(set(names.values()))


def read_weights(folder: Path, config: SmolLM2Config) -> dict[str, torch.Tensor]:
    """Tensors by transformers' names, one file or shards; a tied model may store either of the tied names."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        tensors = load_tensors(single)
    elif index.exists():
        tensors = {}
        for shard in shards(index):
            tensors |= load_tensors(folder / shard)
    else:
        raise CheckpointError(f"{folder}: no model.safetensors (pickled weights are never opened)")
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None and not head.equal(tensors.setdefault("model.embed_tokens.weight", head)):
        raise CheckpointError(f"{folder}: tie_word_embeddings is true, but there are two different matrices")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def check_shapes(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raises `CheckpointError` that lists the first differences in names and shapes."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    names = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if names:
        lines = (f"{n}: file {found.get(n, 'absent')}, model {expected.get(n, 'absent')}" for n in names[:5])
        raise CheckpointError(f"{where}: weights do not fit the configuration ({', '.join(lines)})")


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors into a model; raises `CheckpointError` when they do not fit or are no finite numbers."""
    check_shapes(model, tensors, where)
    for name, parameter in model.named_parameters():
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.itemsize < 2:  # those of 8 bits need scales
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}; expected floats of 16 bits or more")
        # as they are here: what is finite in float64 need not be so in fp32
        if not parameter.detach().copy_(tensor).isfinite().all():
            raise CheckpointError(f"{where}: {name} holds numbers that are not finite")


def halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a (heads * D, in) projection: rows i and i + D/2 of a head become neighbours."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def model_files(config: SmolLM2Config, dtype: str = "float32", end_ids: tuple = ()) -> dict[str, bytes]:
    """`config.json` and `generation_config.json`. `end_ids`: see `read_end_ids`; config's own by default."""
    ends = end_ids or (config.eos_token_id,)
    pad = ends[0] if config.pad_token_id is None else config.pad_token_id  # transformers warns without
    generation = {"bos_token_id": config.bos_token_id, "pad_token_id": pad}
    generation["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    fields = config.to_hf_dict(dtype)
    return {"config.json": dump_json(fields), "generation_config.json": dump_json(generation)}


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of `model.safetensors`: named parameters, so a tied output matrix appears once."""
    return {name: p.detach() for name, p in model.named_parameters()}
