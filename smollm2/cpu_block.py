"""One block on a CPU, for training: the arithmetic of `model.Block`, with a backward pass by hand.

What it spares, beside autograd over the plain form: gate's and up's products, the normed inputs and the
attention's probabilities are not kept but made again where a pass over them costs less than the memory;
RMSNorm, RoPE and SwiGLU pass over their numbers half as often; the three gradients of a normed input are one
product, its sum in fp32. Weights and gradients keep their names: the fused matrices live for one product.

Equal to the plain form within rounding (tests/test_cpu_block.py); figures in docs/log.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .cpu_attention import backward_in_blocks, can_attend_in_blocks, forward_in_blocks
from .loss import matmul_dtype


def trains_in_one_function(block: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether `cpu_block` is the way through `block` for x: training on a CPU, not compiled."""
    is_plain = torch.compiler.is_compiling() or not (block.training and torch.is_grad_enabled())
    return not is_plain and can_attend_in_blocks(x)


def cpu_block(block: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`block` (a `model.Block`) on x (B, T, C), with RoPE tables (T, D/2)."""
    attention, mlp = block.self_attn, block.mlp
    shape = (matmul_dtype(x), attention.head_dim, block.input_layernorm.eps)
    matrices = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    matrices += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    gains = block.input_layernorm.weight, block.post_attention_layernorm.weight
    with torch.autocast("cpu", enabled=False):
        return _Block.apply(x, cos, sin, shape, *gains, *(matrix.weight for matrix in matrices))


def _fused(dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:
    """The matrices one above the other, in `dtype`."""
    fused = weights[0].new_empty(sum(len(w) for w in weights), weights[0].shape[1], dtype=dtype)
    for part, weight in zip(fused.split([len(w) for w in weights]), weights, strict=True):
        part.copy_(weight)
    return fused


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """`model.apply_rope` of x (..., D) into `out`, in the wider of the dtypes."""
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    half = first.shape[-1]
    out[..., :half] = torch.mul(first, cos).addcmul_(second, sin, value=-1)
    out[..., half:] = torch.mul(second, cos).addcmul_(first, sin)


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(grad, x_hat, scale, gain, grad_x) -> torch.Tensor:
    """Adds to `grad_x` the gradient of x in h = x_hat * gain, x_hat = x * scale; returns that of the gain."""
    grad = grad.to(x_hat.dtype)
    by_x = grad * x_hat
    along = (by_x @ gain).div_(x_hat.shape[-1]).unsqueeze_(-1)
    grad_x.addcmul_((grad.mul_(gain)).addcmul_(x_hat, along, value=-1), scale)
    return by_x.sum(0)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, shape, gain_1, gain_2, q, k, v, o, gate, up, down):
        dtype, dim, eps = shape
        batch, time, width = x.shape
        heads, kv_heads = len(q) // dim, len(k) // dim
        groups = heads // kv_heads
        flat = x.view(-1, width)
        scale_1 = _inverse_rms(flat, eps)
        normed = (flat * scale_1).mul_(gain_1).to(dtype)
        qkv = (normed @ _fused(dtype, q, k, v).T).view(batch, time, -1, dim)  # (B, T, H + 2K, D)
        # where they go, the heads of a group are the rows of one product (cpu_attention.py)
        queries = qkv.new_empty(batch, kv_heads, time, groups, dim)
        keys, values = qkv.new_empty(2, batch, kv_heads, time, dim)
        cos, sin = cos.view(time, 1, 1, -1), sin.view(time, 1, 1, -1)
        of_queries = qkv[:, :, :heads].unflatten(2, (kv_heads, groups))
        root = dim**-0.5
        _rotate(of_queries, cos * root, sin * root, queries.transpose(1, 2))
        of_keys, of_values = qkv[:, :, heads:].chunk(2, dim=2)
        _rotate(of_keys, cos[:, 0], sin[:, 0], keys.transpose(1, 2))
        values.transpose(1, 2).copy_(of_values)
        queries, keys, values = queries.view(-1, time * groups, dim), keys.flatten(0, 1), values.flatten(0, 1)
        mixed = qkv.new_empty(batch, time, kv_heads, groups, dim)
        kept = forward_in_blocks(queries, keys, values, mixed.transpose(1, 2))
        mixed = mixed.view(-1, heads * dim)
        middle = flat + mixed @ o.to(dtype).T
        scale_2 = _inverse_rms(middle, eps)
        normed = (middle * scale_2).mul_(gain_2).to(dtype)
        gate_up = normed @ _fused(dtype, gate, up).T
        g, u = gate_up.chunk(2, dim=1)
        out = middle + F.silu(g).mul_(u) @ down.to(dtype).T
        ctx.save_for_backward(
            x, cos, sin, gain_1, gain_2, q, k, v, o, gate, up, down, scale_1, queries, keys, values, mixed,
            middle, scale_2, gate_up, *kept,
        )  # fmt: skip
        ctx.shape = shape
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (
            x, cos, sin, gain_1, gain_2, q, k, v, o, gate, up, down, scale_1, queries, keys, values, mixed,
            middle, scale_2, gate_up, *kept,
        ) = ctx.saved_tensors  # fmt: skip
        dtype, dim, _ = ctx.shape
        batch, time, width = x.shape
        heads, kv_heads = len(q) // dim, len(k) // dim
        groups = heads // kv_heads

        def of_weights(grad_out, inputs, *weights):
            whole = (grad_out.T @ inputs).to(weights[0].dtype)
            return whole.split([len(w) for w in weights])

        # the MLP
        grad = grad.reshape(-1, width)
        grad_out = grad.to(dtype)
        g, u = gate_up.chunk(2, dim=1)
        activated = F.silu(g)
        grad_inner = grad_out @ down.to(dtype)
        grad_gate_up = torch.empty_like(gate_up)
        grad_g, grad_u = grad_gate_up.chunk(2, dim=1)
        torch.mul(grad_inner, activated, out=grad_u)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(u), g, grad_input=grad_g)
        (grad_down,) = of_weights(grad_out, activated.mul_(u), down)
        x_hat = middle * scale_2
        grad_gate, grad_up = of_weights(grad_gate_up, (x_hat * gain_2).to(dtype), gate, up)
        grad_middle = grad.clone()
        grad_normed = grad_gate_up @ _fused(dtype, gate, up)
        grad_gain_2 = _norm_backward(grad_normed, x_hat, scale_2, gain_2, grad_middle)
        # attention
        grad_out = grad_middle.to(dtype)
        (grad_o,) = of_weights(grad_out, mixed, o)
        grad_mixed = (grad_out @ o.to(dtype)).view(batch, time, kv_heads, groups, dim)
        grad_mixed = grad_mixed.transpose(1, 2).reshape(queries.shape)
        grad_q, grad_k, grad_v = backward_in_blocks(queries, keys, values, kept, grad_mixed)
        grad_qkv = grad_q.new_empty(batch, time, heads + 2 * kv_heads, dim)
        grad_q = grad_q.view(batch, kv_heads, time, groups, dim).transpose(1, 2)
        root = dim**-0.5
        _rotate(grad_q, cos * root, -sin * root, grad_qkv[:, :, :heads].unflatten(2, (kv_heads, groups)))
        grad_k, grad_v = (y.view(batch, kv_heads, time, dim).transpose(1, 2) for y in (grad_k, grad_v))
        of_keys, of_values = grad_qkv[:, :, heads:].chunk(2, dim=2)
        _rotate(grad_k, cos[:, 0], -sin[:, 0], of_keys)
        of_values.copy_(grad_v)
        grad_qkv = grad_qkv.view(batch * time, -1)
        x_hat = x.view(-1, width) * scale_1
        grad_q, grad_k, grad_v = of_weights(grad_qkv, (x_hat * gain_1).to(dtype), q, k, v)
        grad_normed = grad_qkv @ _fused(dtype, q, k, v)
        grad_gain_1 = _norm_backward(grad_normed, x_hat, scale_1, gain_1, grad_middle)
        matrices = (grad_q, grad_k, grad_v, grad_o, grad_gate, grad_up, grad_down)
        return grad_middle.view(x.shape), None, None, None, grad_gain_1, grad_gain_2, *matrices
