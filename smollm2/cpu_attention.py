"""Causal attention on a CPU: matrix products over blocks of queries, each with only the keys it may see.

PyTorch's fused CPU kernel computes its small products outside oneDNN, slowly in bf16. Forward and backward,
two threads, ms (AMD EPYC with avx512_bf16, torch 2.13; best of six, alternating):

| queries | bf16: fused | whole (T, T) | blocks of 64 | fp32: fused | whole (T, T) | blocks of 64 |
|---|---|---|---|---|---|---|
| 16 x 3 heads x 128 (nano) | 15.8 | 5.7 | 3.2 | 8.6 | 10.0 | 5.1 |
| 2 x 9 heads x 512 (135M) | 32.5 | 38.2 | 12.7 | 35.3 | 72.1 | 19.9 |

Blocks of 32 and 128 are within half, of 256 slower again. The query heads that share a key/value head are
rows of one product, so keys and values are never expanded and their gradients need no sum over heads.
A training block is one function with them inside (cpu_block.py); `causal_attention` reads without gradients.
"""

from __future__ import annotations

import math

import torch

BLOCK = 64  # queries; see above
# Bytes of one query's probabilities up to which they are kept for the backward pass: 512 keys in bf16, 256 in
# fp32; at most 4.5 times the size of q where D is 64. Beyond it they are made again: a fifth more time, but
# memory that grows with T, not its square.
KEPT_BYTES = 1024


def can_attend_in_blocks(q: torch.Tensor) -> bool:
    """Whether `causal_attention` is the fastest way for these queries: on a CPU, but in fp16, which has no
    fast products there."""
    return q.device.type == "cpu" and q.dtype != torch.float16


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, H, T, D); k, v (B, K, T, D), query head h reads key/value head h // (H/K) -> (B, H, T, D)."""
    batch, heads, time, dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    scaled = q.new_empty(batch, kv_heads, time, groups, dim)
    torch.mul(q.unflatten(1, (kv_heads, groups)).transpose(2, 3), dim**-0.5, out=scaled)
    scaled, k, v = scaled.view(-1, time * groups, dim), k.reshape(-1, time, dim), v.reshape(-1, time, dim)
    out = q.new_empty(batch, time, kv_heads, groups, dim)  # the layout that o_proj reads
    with torch.autocast(q.device.type, enabled=False):  # it would make the scores in bf16
        forward_in_blocks(scaled, k, v, out.transpose(1, 2))
    return out.flatten(2, 3).transpose(1, 2)


def _blocks(time: int, groups: int):
    """Of each block: its positions, its rows in (T * groups), and the keys it sees."""
    for start in range(0, time, BLOCK):
        stop = min(start + BLOCK, time)
        yield slice(start, stop), slice(start * groups, stop * groups), slice(0, stop)


def _mask(groups: int, like: torch.Tensor) -> torch.Tensor:
    """(BLOCK * groups, BLOCK), added to the scores of a block's own keys: -inf for a key after its query."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return like.new_full((BLOCK, BLOCK), -math.inf, dtype=wide).triu(1).repeat_interleave(groups, 0)


def _probabilities(q, k, mask) -> torch.Tensor:
    """Of one block: scaled queries q (N, rows, D) of the last positions among keys k (N, S, D), both in fp32:
    scores rounded to bf16 would cost the gradients up to a fifth of their exactness."""
    scores = torch.bmm(q, k.transpose(1, 2))
    rows = q.shape[1]
    own = rows * BLOCK // len(mask)  # keys
    scores[:, :, -own:] += mask[:rows, :own]
    return torch.softmax(scores, dim=-1)


def forward_in_blocks(q, k, v, out) -> list[torch.Tensor]:
    """Fills `out` (B, K, T, G, D) of any layout: q (B*K, T*G, D), already divided by sqrt(D), and k, v
    (B*K, T, D) are contiguous; the rows of q at one position are the heads of a group. Returns what
    `backward_in_blocks` wants of the probabilities."""
    batch, kv_heads, time, groups, dim = out.shape
    kept, mask = [], _mask(groups, q)
    wide_q, wide_k = q.to(mask.dtype), k.to(mask.dtype)
    for block, rows, seen in _blocks(time, groups):
        p = _probabilities(wide_q[:, rows], wide_k[:, seen], mask).to(v.dtype)
        out[:, :, block] = torch.bmm(p, v[:, seen]).view(batch, kv_heads, -1, groups, dim)
        if time * p.itemsize <= KEPT_BYTES:
            kept.append(p)
    return kept


def backward_in_blocks(q, k, v, kept, grad_out) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (before the division is undone), and of k and v in fp32, all in their shapes."""
    groups = q.shape[1] // k.shape[1]
    grad_q = torch.empty_like(q)
    mask = _mask(groups, q)
    wide_q, wide_k = (q, k) if kept else (q.to(mask.dtype), k.to(mask.dtype))
    grad_k, grad_v = (torch.zeros_like(x, dtype=mask.dtype) for x in (k, v))
    for index, (_, rows, seen) in enumerate(_blocks(k.shape[1], groups)):
        p = kept[index] if kept else _probabilities(wide_q[:, rows], wide_k[:, seen], mask).to(q.dtype)
        grad_v[:, seen] += torch.bmm(p.transpose(1, 2), grad_out[:, rows])
        grad_p = torch.bmm(grad_out[:, rows], v[:, seen].transpose(1, 2))
        # p * (grad_p - sum(p * grad_p)), in one pass
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        grad_q[:, rows] = torch.bmm(grad_scores, k[:, seen])
    return grad_q, grad_k, grad_v
