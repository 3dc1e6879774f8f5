"""Causal attention by blocks equals attention by its definition: values, gradients, every shape."""

import pytest
import torch
from tiny_models import tiny_model

import smollm2.cpu_attention as attention
import smollm2.model as network


def reference(q, k, v) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ v


def random_case(batch=2, heads=6, kv_heads=2, time=70, dim=8, dtype=torch.float64) -> list[torch.Tensor]:
    """q, k, v and a gradient of the output, laid out as the projections leave them."""
    generator = torch.Generator().manual_seed(3)
    sizes = (heads, kv_heads, kv_heads, heads)
    drawn = [torch.randn(batch, time, n, dim, generator=generator, dtype=torch.float64) for n in sizes]
    *qkv, grad = (x.to(dtype).transpose(1, 2) for x in drawn)
    return [*(x.requires_grad_() for x in qkv), grad]


def values_and_gradients(attend, q, k, v, grad) -> list[torch.Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    y = attend(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad)]


@torch.no_grad()
def by_blocks(q, k, v, grad) -> list[torch.Tensor]:
    """The same by the functions of which `cpu_block` is made."""
    batch, heads, time, dim = q.shape
    kv_heads, groups = k.shape[1], heads // k.shape[1]

    def rows(x):  # (B, H, T, D) -> (B * K, T * G, D)
        return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).reshape(batch * kv_heads, -1, dim)

    scaled, k, v = rows(q * dim**-0.5), rows(k), rows(v)
    out = q.new_empty(batch, kv_heads, time, groups, dim)
    kept = attention.forward_in_blocks(scaled, k, v, out)
    grad_q, *others = attention.backward_in_blocks(scaled, k, v, kept, rows(grad))
    grad_q = (grad_q * dim**-0.5).view(out.shape).transpose(2, 3).flatten(1, 2)
    others = (x.to(q.dtype).view(batch, kv_heads, time, dim) for x in others)
    return [out.transpose(2, 3).flatten(1, 2), grad_q, *others]


@pytest.mark.parametrize("kept", [0, 10**6], ids=["computed again", "kept"])
@pytest.mark.parametrize("time", [2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (3, 1), (4, 4), (8, 1)])
def test_blocks_equal_the_definition(monkeypatch, heads, kv_heads, time, kept):
    monkeypatch.setattr(attention, "KEPT_BYTES", kept)
    inputs = random_case(heads=heads, kv_heads=kv_heads, time=time)
    found, right = by_blocks(*inputs), values_and_gradients(reference, *inputs)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert torch.equal(network.attend(*inputs[:3]), found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_computed_again_give_the_bits_of_kept_ones(monkeypatch, dtype):
    inputs = random_case(time=200, dtype=dtype)
    kept = by_blocks(*inputs)
    monkeypatch.setattr(attention, "KEPT_BYTES", 0)
    assert all(map(torch.equal, kept, by_blocks(*inputs)))


def test_long_rows_never_hold_the_whole_matrix(monkeypatch):
    largest = []
    original = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *x: largest.append(original(*x)) or largest[-1])
    by_blocks(*random_case(time=640))
    assert max(x.numel() for x in largest) <= 2 * 2 * 3 * attention.BLOCK * 640


def test_a_run_in_bf16_samples_behind_a_cache():
    """Under autocast the queries are bf16 and a new cache holds the weights' fp32."""
    model, ids = tiny_model(), torch.arange(12)[None]
    with torch.autocast("cpu", torch.bfloat16):
        cached, plain = (model.generate(ids, 4, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
