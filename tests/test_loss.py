"""The loss is the cross-entropy, computed in blocks: its value, its gradients, its memory, what it ignores."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import smollm2.loss as loss_module
from smollm2.loss import linear_cross_entropy


def random_case(rows: int = 50, width: int = 16, vocab: int = 37, dtype=torch.float32, ignored: int = 7):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[:ignored] = -100
    return hidden, weight, targets


def in_blocks_of(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(loss_module, "rows_per_block", lambda *_: rows)


@pytest.mark.parametrize("block", [1, 7, 16, 50, 1000])
def test_value_and_gradients_equal_the_plain_cross_entropy_for_any_block(monkeypatch, block):
    in_blocks_of(monkeypatch, block)
    hidden, weight, targets = random_case(dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    reference = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100)
    expected = torch.autograd.grad(3 * reference, (hidden, weight))
    torch.testing.assert_close(loss, reference, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients, expected, atol=1e-12, rtol=0)


def test_a_row_with_nothing_to_predict_costs_nothing_and_has_no_gradient():
    hidden, weight, targets = random_case(ignored=50)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_survive_many_rows(dtype, scale):
    """A mean over N rows inside would let the smallest softmax gradients underflow in fp16, before any loss scale."""
    hidden, weight, targets = random_case(rows=4096, width=32, vocab=512, ignored=0)

    def gradients(enabled):
        h, w = ((x.detach() * 0.5).requires_grad_() for x in (hidden, weight))
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            loss = linear_cross_entropy(h, w, targets)
        (loss * scale).backward()
        return loss, h.grad / scale, w.grad / scale

    (loss, *half), (exact_loss, *exact) = gradients(True), gradients(False)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact_loss.item(), rel=2e-3)
    for gradient, reference in zip(half, exact, strict=True):
        assert (gradient - reference).norm() / reference.norm() < 0.02
        assert gradient.dtype == torch.float32


class Blocks(TorchDispatchMode):
    """The largest tensor made inside it, and how many (64, 512) were alive whenever the next logits were made."""

    def __init__(self):
        super().__init__()
        self.made, self.largest, self.alive = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[1].shape[1] == 512:
            self.alive.append(sum(not block.expired() for block in self.made))
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() == 64 * 512:
                    self.made.append(StorageWeakRef(tensor.untyped_storage()))
        return out


def test_only_one_block_of_logits_is_ever_held(monkeypatch):
    """Not (tokens, vocabulary), and not two blocks: 2 GB more on a GPU."""
    in_blocks_of(monkeypatch, 64)
    hidden, weight, targets = random_case(rows=1024, vocab=512)
    with Blocks() as blocks:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert blocks.largest <= 64 * 512 and blocks.alive == [0] * 16
    with Blocks() as usual:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert usual.largest >= 1024 * 512  # the usual way does: the check can fail
