"""Look inside a model: attention probabilities, the vector after every block, what it would say there.

Hooks listen while the model itself runs, so the logits are the model's own, bit for bit; only the attention
probabilities, which the fused kernel never shows, are computed again beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model import Attention, SmolLM2, apply_rope


@dataclass(frozen=True)
class Inside:
    """One forward pass, seen from inside. L layers, H query heads.

    `hidden`: L + 1 tensors (B, T, C), the embedding and then the running vector after each block, before the
    final norm. `attention`: L tensors (B, H, T, T); row t of a head is how it spreads over positions 0..t,
    and sums to 1. `logits`: (B, T, V), exactly those of `model(input_ids)`.
    """

    hidden: list[torch.Tensor]
    attention: list[torch.Tensor]
    logits: torch.Tensor


def attention_probabilities(attention: Attention, x: torch.Tensor, cos, sin) -> torch.Tensor:
    """How much each position (row) reads from each earlier one: x (B, T, C), already normed -> (B, H, T, T),
    fp32."""
    heads = (p(x).unflatten(-1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj))
    q, k = (apply_rope(vectors.transpose(1, 2), cos, sin).float() for vectors in heads)  # (B, heads, T, D)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT / attention.head_dim**0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@torch.inference_mode()
def look_inside(model: SmolLM2, input_ids: torch.Tensor) -> Inside:
    """Run (B, T) ids through the model and keep what passes by. Raises ValueError beyond its context."""
    hidden, attention, decoder = [], [], model.model

    def keep_input(_module, arguments):
        hidden.append(arguments[0])

    def keep_attention(module, arguments):
        attention.append(attention_probabilities(module, *arguments[:3]))

    hooks = [part.register_forward_pre_hook(keep_input) for part in (*decoder.layers, decoder.norm)]
    hooks += [layer.self_attn.register_forward_pre_hook(keep_attention) for layer in decoder.layers]
    try:
        logits = model(input_ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return Inside(hidden, attention, logits)


@torch.inference_mode()
def logit_lens(model: SmolLM2, hidden: list[torch.Tensor]) -> torch.Tensor:
    """What the model would predict if it stopped after each block (nostalgebraist 2020): final norm and
    output matrix applied to every hidden state. L + 1 tensors (B, T, C) -> probabilities (L + 1, B, T, V),
    fp32."""
    return torch.stack([model.lm_head(model.model.norm(x)).float().softmax(-1) for x in hidden])


@torch.inference_mode()
def token_probabilities(model: SmolLM2, input_ids: torch.Tensor) -> torch.Tensor:
    """The probability that the model gave each token, having read those before it: (B, T) -> (B, T - 1),
    fp32."""
    ids = input_ids.to(model.device)
    return model(ids[:, :-1]).float().softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
