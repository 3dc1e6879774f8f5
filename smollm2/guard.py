"""Numbers that go wrong: decide, before each update, whether it may be applied.

Loss and gradient norm arrive together, in the one transfer that the loss log needs anyway. A skipped update
moves neither the step nor the learning rate; its batch is counted as used.
"""

from __future__ import annotations

import math

import torch

from .errors import NumericStop

MAX_SKIPS_IN_A_ROW = 3
MAX_SKIPS_IN_WINDOW, WINDOW = 10, 1000
MAX_SCALER_SKIPS = 20  # from 2^16 the scale halves to 1 in 16
MIN_SCALE = 1.0  # below it gradients would be made smaller, which fp16 needs least of all


class NumericGuard:
    """Counts skipped updates and knows when to stop. Its `state` is a JSON value, so a resume replays it."""

    def __init__(self, has_scaler: bool = False, state: dict | None = None):
        self.has_scaler = has_scaler
        self.state = {"in_a_row": 0, "overflows_in_a_row": 0, "total": 0, "recent": []} | (state or {})

    def verdict(self, loss: float, norm: float, position: int) -> str | None:
        """None to apply the update, else why it is skipped; `NumericStop` when skipping has not helped."""
        counts = self.state
        if math.isfinite(loss) and math.isfinite(norm):
            counts["in_a_row"] = counts["overflows_in_a_row"] = 0
            return None
        counts["total"] += 1
        reason = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        if self.has_scaler and math.isfinite(loss):  # the scaler searches for its scale: counted apart
            counts["overflows_in_a_row"] += 1
            if counts["overflows_in_a_row"] < MAX_SCALER_SKIPS:
                return reason
            cause = f"fp16 gradients overflowed {MAX_SCALER_SKIPS} times in a row ({reason})"
            advice = "--set train.precision=fp32, or train.precision=bf16 from compute capability 8.0"
        else:
            counts["in_a_row"] += 1
            counts["recent"] = [at for at in counts["recent"] if position - at < WINDOW] + [position]
            in_a_row, recent = counts["in_a_row"], len(counts["recent"])
            if in_a_row < MAX_SKIPS_IN_A_ROW and recent <= MAX_SKIPS_IN_WINDOW:
                return reason
            is_row = in_a_row >= MAX_SKIPS_IN_A_ROW
            count = f"{in_a_row} in a row" if is_row else f"{recent} of the last {WINDOW}"
            cause = f"updates skipped: {count}; last cause: {reason}"
            advice = "or look at the data"
        raise NumericStop(f"{cause}; what was saved stays as it is: lower train.learning_rate, {advice}")


def make_scaler(device_type: str, enabled: bool, state: dict[str, float]) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs, from its saved `state`; where not `enabled` it does nothing."""
    scaler = torch.amp.GradScaler(device_type, enabled=enabled, init_scale=2.0**16)
    if state:
        scaler.load_state_dict(scaler.state_dict() | state)
    return scaler


def update_scale(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """Adjust the scale after a step, never below the floor; returns the scaler's state, empty for one that is
    off."""
    if not scaler.is_enabled():
        return {}
    scaler.update()
    now = scaler.state_dict()  # read once: each number of it is a transfer from the GPU
    if now["scale"] < MIN_SCALE:
        scaler.update(MIN_SCALE)
    return {"scale": max(now["scale"], MIN_SCALE), "_growth_tracker": now["_growth_tracker"]}
