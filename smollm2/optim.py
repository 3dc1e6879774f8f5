"""The update: AdamW or Muon, and a learning rate that is a pure function of the step.

* Fused AdamW on GPU and CPU; weight decay on matrices, none on the norms' gains.
* Muon for the matrices of the blocks, all of one shape at once; then AdamW for embedding and gains only.
* Warmup-stable-decay (SmolLM2's schedule): linear up, flat, linear down to 0 over the last part.
* Moments are saved and restored by parameter *name*: by index, a changed order would swap them silently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import TrainConfig
from .errors import CheckpointError
from .parameters import is_block_matrix

ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum",)
MUON_MOMENTUM = 0.95
# x -> ax + bx^3 + cx^5 brings singular values from [0.01, 1] to about 1 in five rounds (Jordan et al. 2024)
NEWTON_SCHULZ, ROUNDS = (3.4445, -4.7750, 2.0315), 5
MAX_STACKED = 2**26  # numbers that one stack of matrices holds: 256 MiB; a larger model takes several


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


def orthogonalized(stack: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, rows, columns) fp32 -> about U V^T of each matrix's U S V^T, in `dtype`, by Newton-Schulz rounds.

    Never transposed, which would cost a CPU two passes: the products with the Gram matrix, of the smaller
    side, stand on that side. Normalised in fp32 first, so that fp16 neither overflows nor loses the small
    matrices.
    """
    is_tall = stack.shape[1] > stack.shape[2]
    # singular values of at most 1
    x = (stack / stack.norm(dim=(1, 2), keepdim=True).clamp_min(1e-20)).to(dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        gram = x.mT @ x if is_tall else x @ x.mT
        powers = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, powers) if is_tall else (powers, x)), beta=a)
    return x


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for `matrices`, a list for each shape; `adamw` for everything else.

    The direction of a matrix's momentum, with all its singular values set to about 1, times
    sqrt(max(1, rows / columns)): every direction learns, not only the few that dominate the gradient. One
    moment a weight instead of two. Newton-Schulz runs in `dtype`; weights and momentum stay fp32.
    """

    def __init__(
        self, matrices: list[list[nn.Parameter]], adamw: torch.optim.AdamW, lr: float, weight_decay: float,
        dtype: torch.dtype,
    ):  # fmt: skip
        groups = [{"params": alike, "lr": lr, "weight_decay": weight_decay} for alike in matrices]
        # the same groups and state as the inner optimizer's: what changes here changes there
        super().__init__([*groups, *adamw.param_groups], {})
        self.adamw, self.muon_groups, self.dtype = adamw, self.param_groups[: len(groups)], dtype
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.adamw.step()
        for group in self.muon_groups:
            most = max(1, MAX_STACKED // group["params"][0].numel())
            for start in range(0, len(group["params"]), most):
                self._update(group["params"][start : start + most], group["lr"], group["weight_decay"])

    def _update(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        rows, columns = matrices[0].shape
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients, momenta = [p.grad for p in matrices], [self.state[p]["momentum"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM))  # Nesterov's
        updates = orthogonalized(ahead, self.dtype).to(ahead.dtype).unbind()
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, updates, alpha=-lr * max(1, rows / columns) ** 0.5)


def make_optimizer(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """As `config.optimizer` says: fused AdamW over all parameters, or Muon for the blocks' matrices and AdamW
    for the rest. `dtype`: of Muon's products; None is fp32."""
    is_muon = config.optimizer == "muon"
    by_muon = [p for name, p in model.named_parameters() if is_muon and is_block_matrix(name, p.shape)]
    ours = {id(p) for p in by_muon}
    matrices = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in ours]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0}]
    # fused: one pass over weights, gradients and moments instead of one for each operation, on a CPU as well
    betas = (config.adam_beta1, config.adam_beta2)
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=True)
    if not is_muon:
        return adamw
    alike = [[p for p in by_muon if p.shape == shape] for shape in dict.fromkeys(p.shape for p in by_muon)]
    rate = config.muon_learning_rate
    optimizer = MuonAdamW(alike, adamw, rate, config.weight_decay, dtype or torch.float32)
    for group in optimizer.muon_groups:
        group["times"] = rate / config.learning_rate  # one schedule for both rates
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """`learning_rate` is AdamW's; Muon's moves with it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("times", 1)


def _moments_of(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[str, ...]]:
    """Which moments each parameter has."""
    muon = {p for group in getattr(optimizer, "muon_groups", ()) for p in group["params"]}
    every = (p for group in optimizer.param_groups for p in group["params"])
    return {p: MUON_MOMENTS if p in muon else ADAM_MOMENTS for p in every}


def moments_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`exp_avg.<parameter name>` and `exp_avg_sq.<parameter name>`, or Muon's `momentum.<parameter name>`;
    empty before the first update."""
    moments = _moments_of(optimizer)
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in moments[parameter]
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
    moments = _moments_of(optimizer)
    expected = {f"{moment}.{name}": p for name, p in model.named_parameters() for moment in moments[p]}
    wrong = set(expected) ^ set(tensors) or {k for k, p in expected.items() if not _fits(tensors[k], p)}
    if wrong:
        raise CheckpointError(f"optimizer moments do not fit the model: {', '.join(sorted(wrong)[:5])}")
    for name, parameter in model.named_parameters():
        device, state = parameter.device, optimizer.state[parameter]
        for moment in moments[parameter]:
            state[moment] = tensors[f"{moment}.{name}"].to(device, torch.float32, copy=True)
        if moments[parameter] == ADAM_MOMENTS:
            # for the bias correction; the fused kernel reads it on the device
            state["step"] = torch.tensor(float(updates), device=device)
