"""Causal attention on a CPU: matrix products over blocks of queries, each with only the keys it may see.

PyTorch's fused CPU kernel computes its small products outside oneDNN, slowly in bf16. Forward and backward,
two threads, ms (AMD EPYC with avx512_bf16, torch 2.13; best of six, alternating):

| queries | bf16: fused | whole (T, T) | blocks of 64 | fp32: fused | whole (T, T) | blocks of 64 |
|---|---|---|---|---|---|---|
| 16 x 3 heads x 128 (nano) | 15.8 | 5.7 | 3.2 | 8.6 | 10.0 | 5.1 |
| 2 x 9 heads x 512 (135M) | 32.5 | 38.2 | 12.7 | 35.3 | 72.1 | 19.9 |

Blocks of 32 and 128 are within half, of 256 slower again. The query heads that share a key/value head are
rows of one product, so keys and values are never expanded and their gradients need no sum over heads.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries; see above
# Up to this length the probabilities are kept for the backward pass, at most twice the size of q where D is
# 64; beyond it they are computed again: a fifth more time, but memory that grows with T, not its square.
KEPT_LENGTH = 256


def can_attend_in_blocks(q: torch.Tensor) -> bool:
    """Whether `causal_attention` is the fastest way for these queries: on a CPU, but in fp16, which has no
    fast products there."""
    return q.device.type == "cpu" and q.dtype != torch.float16


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, H, T, D); k, v (B, K, T, D), query head h reads key/value head h // (H/K) -> (B, H, T, D)."""
    return _CausalAttention.apply(q, k, v)


def _blocks(time: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, time)) for start in range(0, time, BLOCK)]


def _mask(groups: int, like: torch.Tensor) -> torch.Tensor:
    """(BLOCK * groups, BLOCK): -inf where a key comes after the query, 0 elsewhere."""
    return like.new_full((BLOCK, BLOCK), -math.inf).triu(1).repeat_interleave(groups, 0)


def _probabilities(q, k, mask) -> torch.Tensor:
    """Of one block: scaled queries q (B*K, rows, D) of the last positions among keys k (B*K, S, D)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    rows, new = q.shape[1], q.shape[1] * BLOCK // mask.shape[0]
    scores[:, :, -new:] += mask[:rows, :new]
    return torch.softmax(scores, dim=-1)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, time, dim = q.shape
        kv_heads = k.shape[1]
        groups = heads // kv_heads
        # (B, K, T, G, D), contiguous: the rows of a block of positions are those of all heads of its group
        scaled = q.new_empty(batch, kv_heads, time, groups, dim)
        torch.mul(q.unflatten(1, (kv_heads, groups)).transpose(2, 3), dim**-0.5, out=scaled)
        scaled, k, v = scaled.view(-1, time * groups, dim), k.reshape(-1, time, dim), v.reshape(-1, time, dim)
        mask, kept = _mask(groups, q), []
        out = q.new_empty(batch, time, kv_heads, groups, dim)  # the layout that o_proj reads
        for block in _blocks(time):
            rows, seen = slice(block.start * groups, block.stop * groups), slice(0, block.stop)
            p = _probabilities(scaled[:, rows], k[:, seen], mask)
            y = torch.bmm(p, v[:, seen]).view(batch, kv_heads, -1, groups, dim)
            out[:, block] = y.transpose(1, 2)
            if time <= KEPT_LENGTH:
                kept.append(p)
        ctx.save_for_backward(scaled, k, v, mask, *kept)
        return out.flatten(2, 3).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, mask, *kept = ctx.saved_tensors
        batch, heads, time, dim = grad_out.shape
        groups = q.shape[1] // time
        kv_heads = heads // groups
        grad_out = grad_out.unflatten(1, (kv_heads, groups)).transpose(2, 3).reshape(q.shape)
        grad_q = q.new_empty(batch, time, kv_heads, groups, dim)
        sum_dtype = torch.promote_types(q.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(x, dtype=sum_dtype) for x in (k, v))
        for index, block in enumerate(_blocks(time)):
            rows, seen = slice(block.start * groups, block.stop * groups), slice(0, block.stop)
            p = kept[index] if kept else _probabilities(q[:, rows], k[:, seen], mask)
            grad_y = grad_out[:, rows]
            grad_v[:, seen] += torch.bmm(p.transpose(1, 2), grad_y)
            grad_p = torch.bmm(grad_y, v[:, seen].transpose(1, 2))
            # p * (grad_p - sum(p * grad_p)), in one pass
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
            y = torch.bmm(grad_scores, k[:, seen]).view(batch, kv_heads, -1, groups, dim)
            grad_q[:, block] = y.transpose(1, 2)
        grad_q = grad_q.mul_(dim**-0.5).flatten(2, 3).transpose(1, 2)
        grad_k, grad_v = (x.to(q.dtype).view(batch, kv_heads, time, dim) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v
