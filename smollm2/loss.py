"""Next-token cross-entropy that never holds all logits at once.

With 49,152 classes the logits, not the network, decide how much memory a step needs: the usual way keeps four
buffers of (tokens, 49152), 0.56 MiB for every token. Here the output projection and the loss are one function
that walks over blocks of rows. The gradients of a block are taken while its logits are at hand, so no product
is computed twice and the peak is one block.

Why it stays exact in half precision: inside, gradients are those of the *sum* (entries of size 1, no
underflow) and accumulate in fp32; the 1/count of the mean and the loss scale of a GradScaler are applied
afterwards, in fp32.
"""

from __future__ import annotations

import math

import torch

IGNORE_INDEX = -100
# Bytes of a block's logits: on a CPU 512 rows of 49,152 in fp32, 1,024 in bf16. Fewer rows read the weights
# more often, and add to their gradient; measured in docs/log.md.
BLOCK_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
# Of the block, the softmax and its gradient are taken over so many bytes at a time: several passes over what
# stays in a core's cache cost less than one over memory.
PASS_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}


def inputs_and_targets(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., T + 1) int64 -> inputs and shifted targets, each (..., T). A negative number is ~id, a token that
    is read but not learned: its target is ignored."""
    inputs, targets = rows[..., :-1], rows[..., 1:]
    return torch.where(inputs < 0, ~inputs, inputs), torch.where(targets < 0, IGNORE_INDEX, targets)


def count_learned(rows: torch.Tensor) -> torch.Tensor:
    """Of (..., T + 1) the targets that count, at least 1."""
    return (rows[..., 1:] >= 0).sum().clamp_min(1).float()


def rows_per_block(rows: int, vocab_size: int, device_type: str, width: int) -> int:
    """Equal blocks, as few as fit: a last one of a few rows would read the weights as often as a full one.
    `width`: bytes of a logit."""
    limit = BLOCK_BYTES.get(device_type, BLOCK_BYTES["cpu"])
    most = max(64, limit // (width * vocab_size))
    blocks = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / blocks))


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype in which a matrix product with `x` runs here: that of autocast where it is on, else its own."""
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
    is_on = has_autocast and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else x.dtype


def _block(hidden, weight, targets, dtype, grad_hidden, grad_weight, is_first) -> torch.Tensor:
    """Summed loss of some rows; gradients (None: unwanted) go into `grad_hidden` and add to `grad_weight`,
    which the first block fills.

    A function of its own: what it makes is gone before the next block is made.
    """
    valid = targets != IGNORE_INDEX
    index = targets.clamp_min(0).unsqueeze(1)  # (rows, 1); -100 is masked out below
    logits = hidden @ weight.T  # (rows, vocab)
    nll = torch.empty_like(targets, dtype=dtype)
    limit = PASS_BYTES.get(logits.device.type, PASS_BYTES["cpu"])
    step = max(1, limit // (4 * len(weight)))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        scores = logits[part].to(dtype)
        largest, of_target = scores.amax(dim=1), scores.gather(1, index[part]).squeeze(1)
        p = torch.softmax(scores, dim=1)
        # log sum exp from what is at hand: the largest p is exp(largest - it), at least 1 / vocab
        nll[part] = largest - p.amax(dim=1).log_() - of_target
        if grad_weight is not None:
            # d(sum)/d(logits) = softmax - one_hot, put where the logits were
            p.scatter_add_(1, index[part], p.new_full((1, 1), -1.0).expand_as(index[part]))
            logits[part] = p
    if grad_weight is not None:
        # ignored rows have no gradient: zeros in the two narrow factors spare a pass over the wide one
        counted = valid.unsqueeze(1).to(hidden.dtype)
        grad_hidden.copy_((logits @ weight) * counted)
        if logits.dtype == grad_weight.dtype:
            grad_weight.addmm_(logits.T, hidden * counted, beta=0 if is_first else 1)
        elif is_first:
            grad_weight.copy_(logits.T @ (hidden * counted))
        else:
            grad_weight.add_(logits.T @ (hidden * counted))
    return torch.where(valid, nll, 0).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, compute_dtype, wants_grad):
        rows, vocab_size = hidden.shape[0], weight.shape[0]
        weight_c, hidden_c = weight.to(compute_dtype), hidden.to(compute_dtype)
        sum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=sum_dtype) if wants_grad else None
        # filled by the first block; without rows there is none
        new = torch.empty_like if rows else torch.zeros_like
        grad_weight = new(weight, dtype=sum_dtype) if wants_grad else None
        step = rows_per_block(rows, vocab_size, hidden.device.type, compute_dtype.itemsize)
        for start in range(0, rows, step):
            block = slice(start, start + step)
            grads = (grad_hidden[block], grad_weight) if wants_grad else (None, None)
            total += _block(hidden_c[block], weight_c, targets[block], sum_dtype, *grads, start == 0)
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        # in place: these buffers were made for this one backward pass
        grads = [grad.mul_(grad_output) for grad in ctx.saved_tensors]
        hidden, weight = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return hidden, weight, None, None, None


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of `hidden @ weight.T` against `targets`.

    Args:
        hidden: (tokens, hidden) activations after the final norm.
        weight: (vocab, hidden) output embedding.
        targets: (tokens,) int64 class indices, already shifted; -100 is ignored.

    Returns:
        A scalar in fp32 (fp64 for fp64 input); 0 when every target is ignored. Under autocast the products
        run in the autocast dtype, the log-sum-exp and all sums in fp32.
    """
    compute_dtype = matmul_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        # asked here: inside a Function gradients are always off, and `needs_input_grad` ignores no_grad and
        # inference_mode
        wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        total = _LinearCrossEntropy.apply(hidden, weight, targets, compute_dtype, wants_grad)
        return total / (targets != IGNORE_INDEX).sum().clamp_min(1)
