"""Every parameter accounted for, row by row, and what training costs. No torch needed."""

from __future__ import annotations

import math
from typing import NamedTuple

from .config import SmolLM2Config


class Row(NamedTuple):
    """One tensor: transformers' name, shape, number of parameters, and the formula that gives it."""

    name: str
    shape: tuple[int, ...]
    count: int
    formula: str


def _row(name: str, *dims: tuple[str, int]) -> Row:
    shape = tuple(size for _, size in dims)
    formula = " x ".join(f"({text})" if " " in text and len(dims) > 1 else text for text, _ in dims)
    return Row(f"{name}.weight", shape, math.prod(shape), formula)


def _rows(config: SmolLM2Config) -> list[Row]:
    d, f = ("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)
    q = ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim)
    kv = ("num_key_value_heads * head_dim", config.num_key_value_heads * config.head_dim)
    vocab = ("vocab_size", config.vocab_size)
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    rows = [_row("model.embed_tokens", vocab, d)]
    for i in range(config.num_hidden_layers):
        rows += [_row(f"model.layers.{i}.{name}", *dims) for name, dims in layer.items()]
    rows.append(_row("model.norm", d))
    return rows if config.tie_word_embeddings else [*rows, _row("lm_head", vocab, d)]


def parameter_table(model_or_config) -> list[Row]:
    """Rows (name, shape, count, formula) whose counts sum to the total.

    Takes a `SmolLM2` or a `SmolLM2Config` (default `SmolLM2Config()` sums to 134,515,008). The tied output
    matrix is the embedding, so it has no row. With a model each row is also checked against its tensor;
    ValueError on mismatch.
    """
    rows = _rows(getattr(model_or_config, "config", model_or_config))
    if hasattr(model_or_config, "named_parameters"):
        tensors = {(name, tuple(p.shape)) for name, p in model_or_config.named_parameters()}
        differences = tensors ^ {(row.name, row.shape) for row in rows}
        if differences:
            raise ValueError(f"table and tensors differ: {sorted(differences)[:4]}")
    return rows


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """What Muon trains: the matrices of the blocks, not the embedding, the output or the norms' gains."""
    return ".layers." in name and len(shape) == 2


def training_bytes(config: SmolLM2Config, optimizer: str) -> int:
    """Of the weights and the optimizer's moments, in fp32: a checkpoint's. AdamW keeps two, Muon one."""
    rows = parameter_table(config)
    return 4 * sum(
        row.count * (2 if optimizer == "muon" and is_block_matrix(row.name, row.shape) else 3) for row in rows
    )


def group_totals(rows: list[Row]) -> dict[str, int]:
    """Counts by kind: embedding, attention, MLP, norms, output head."""
    kinds = {"embed_tokens": "embedding", "self_attn": "attention", ".mlp.": "MLP", "lm_head": "output head"}
    totals: dict[str, int] = {}
    for row in rows:
        kind = next((kind for part, kind in kinds.items() if part in row.name), "norms")
        totals[kind] = totals.get(kind, 0) + row.count
    return totals


def parameter_count(config: SmolLM2Config) -> int:
    return sum(row.count for row in parameter_table(config))


def flops_per_token(config: SmolLM2Config, time: int) -> float:
    """Training FLOPs of one token: 6 a matrix parameter, and causal attention over `time` tokens."""
    rows = parameter_table(config)
    matrices = sum(row.count for row in rows if len(row.shape) == 2)
    if not config.tie_word_embeddings:  # tied, the embedding is the output matrix as well
        matrices -= rows[0].count  # a look-up costs nothing
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * time
    return 6.0 * (matrices + attention)
