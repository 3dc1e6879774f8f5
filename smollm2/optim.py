"""The update: AdamW, and a learning rate that is a pure function of the step.

* Fused AdamW on GPU and CPU; weight decay on matrices, none on the norms' gains.
* Warmup-stable-decay (SmolLM2's schedule): linear up, flat, linear down to 0 over the last part.
* Moments are saved and restored by parameter *name*: by index, a changed order would swap them silently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import TrainConfig
from .errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Schedule:
    """Learning rate between optimizer steps `start` and `total`.

    Asking a finished run for more steps begins a new cycle: `start` is where the finished one ended.
    """

    peak: float
    warmup_steps: int
    decay_fraction: float
    start: int
    total: int

    @property
    def decay_start(self) -> int:
        return self.total - round((self.total - self.start) * self.decay_fraction)

    def __call__(self, step: int) -> float:
        """Rate of the update that leads from `step` to `step` + 1."""
        local = step - self.start
        # at most half of a short run, or it would end before its peak
        warmup = min(self.warmup_steps, (self.total - self.start) // 2)
        factor = 1.0
        if local < warmup:
            factor = (local + 1) / warmup
        elif step >= self.decay_start:
            factor = max(self.total - step, 0) / max(self.total - self.decay_start, 1)
        return self.peak * factor


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the model's parameters, in two groups (with and without weight decay)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0}]
    # fused: one pass over weights, gradients and moments instead of one for each operation, on a CPU as well
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def moments_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`exp_avg.<parameter name>` and `exp_avg_sq.<parameter name>`; empty before the first update."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def _fits(moment: torch.Tensor, parameter: torch.Tensor) -> bool:
    is_alike = moment.shape == parameter.shape and moment.dtype == torch.float32
    return is_alike and bool(torch.isfinite(moment).all())


def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], updates: int
) -> None:
    """Inverse of `moments_by_name` after `updates` optimizer steps; raises `CheckpointError` on any mismatch
    of names, shapes or dtype, and for numbers that are not finite."""
    if updates == 0:
        return
    expected = {f"{moment}.{name}": p for name, p in model.named_parameters() for moment in MOMENTS}
    wrong = set(expected) ^ set(tensors) or {k for k, p in expected.items() if not _fits(tensors[k], p)}
    if wrong:
        raise CheckpointError(f"optimizer moments do not fit the model: {', '.join(sorted(wrong)[:5])}")
    for name, parameter in model.named_parameters():
        state = {m: tensors[f"{m}.{name}"].to(parameter.device, torch.float32, copy=True) for m in MOMENTS}
        # for the bias correction; the fused kernel reads it on the device
        state["step"] = torch.tensor(float(updates), device=parameter.device)
        optimizer.state[parameter] = state
