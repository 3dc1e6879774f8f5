"""Every parameter accounted for: formula, number and tensor, row by row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .config import SmolLM2Config


class Row(NamedTuple):
    """One tensor of the model: transformers' name, shape, number of parameters, and the formula that gives it."""

    name: str
    shape: tuple[int, ...]
    count: int
    formula: str


def _rows(config: SmolLM2Config) -> list[tuple[str, tuple[tuple[str, int], ...]]]:
    d, f = ("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)
    q = ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim)
    kv = ("num_key_value_heads * head_dim", config.num_key_value_heads * config.head_dim)
    vocab = ("vocab_size", config.vocab_size)
    rows = [("model.embed_tokens.weight", (vocab, d))]
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
    for i in range(config.num_hidden_layers):
        rows += [(f"model.layers.{i}.{name}.weight", dims) for name, dims in layer.items()]
    rows.append(("model.norm.weight", (d,)))
    if not config.tie_word_embeddings:
        rows.append(("lm_head.weight", (vocab, d)))
    return rows


def parameter_table(model_or_config) -> list[Row]:
    """Rows (name, shape, count, formula) whose counts sum to the total.

    Takes a `SmolLM2` or a `SmolLM2Config` (default `SmolLM2Config()` sums to 134,515,008). The tied output matrix is
    the embedding, so it has no row. With a model each row is also checked against its tensor; ValueError on mismatch.
    """
    config = getattr(model_or_config, "config", model_or_config)
    rows = []
    for name, dims in _rows(config):
        shape = tuple(size for _, size in dims)
        formula = " x ".join(f"({text})" if " " in text and len(dims) > 1 else text for text, _ in dims)
        rows.append(Row(name, shape, torch.Size(shape).numel(), formula))
    if hasattr(model_or_config, "named_parameters"):
        tensors = {name: tuple(p.shape) for name, p in model_or_config.named_parameters()}
        table = {row.name: row.shape for row in rows}
        if tensors != table:
            raise ValueError(f"table and tensors differ: {sorted(set(tensors.items()) ^ set(table.items()))[:4]}")
    return rows


def group_totals(rows: list[Row]) -> dict[str, int]:
    """Counts by kind: embedding, attention, MLP, norms, output head."""
    totals: dict[str, int] = {}
    for row in rows:
        kind = (
            "embedding"
            if "embed_tokens" in row.name
            else "attention"
            if "self_attn" in row.name
            else "MLP"
            if ".mlp." in row.name
            else "output head"
            if row.name.startswith("lm_head")
            else "norms"
        )
        totals[kind] = totals.get(kind, 0) + row.count
    return totals
