"""Numbers that go wrong: decide, before each update, whether it may be applied.

Loss and gradient norm arrive together, in the one transfer that the loss log needs anyway. A skipped update
moves neither the step nor the learning rate; its batch is counted as used.
"""

from __future__ import annotations

import math
from collections import deque

import torch

from .errors import NumericStop

MAX_SKIPS_IN_A_ROW = 3
MAX_SKIPS_IN_WINDOW, WINDOW = 10, 1000
MAX_SCALER_SKIPS = 20  # from 2^16 the scale halves to 1 in 16
MIN_SCALE = 1.0  # below it gradients would be made smaller, which fp16 needs least of all
SPIKE_HISTORY, SPIKE_MINIMUM, SPIKE_SIGMAS = 128, 64, 6.0


class NumericGuard:
    """Counts skipped updates and knows when to stop. Its state is a JSON value, so a resume replays it."""

    def __init__(self, on_spike: str = "ignore", has_scaler: bool = False, state: dict | None = None):
        state = state or {}
        self.on_spike, self.has_scaler = on_spike, has_scaler
        self.in_a_row = state.get("in_a_row", 0)
        self.overflows_in_a_row = state.get("overflows_in_a_row", 0)
        self.total = state.get("total", 0)
        self.recent = deque(state.get("recent", []), WINDOW)  # positions of the skips among the last batches
        self.losses = deque(state.get("losses", []), SPIKE_HISTORY)
        self.norms = deque(state.get("norms", []), SPIKE_HISTORY)

    def state(self) -> dict:
        counts = {name: getattr(self, name) for name in ("in_a_row", "overflows_in_a_row", "total")}
        return counts | {name: list(getattr(self, name)) for name in ("recent", "losses", "norms")}

    def verdict(self, loss: float, norm: float, position: int) -> str | None:
        """None to apply the update, else why it is skipped; `NumericStop` when skipping has not helped."""
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        elif self.on_spike != "ignore":
            reason = self._spike("loss", loss, self.losses) or self._spike("gradient norm", norm, self.norms)
            if reason and self.on_spike == "stop":
                raise NumericStop(f"stopped on a spike: {reason}; what was saved stays as it is")
        if reason is None:
            self.in_a_row = self.overflows_in_a_row = 0
            if self.on_spike != "ignore":
                self.losses.append(loss)
                self.norms.append(norm)
            return None
        self.total += 1
        overflow = self.has_scaler and math.isfinite(loss) and not math.isfinite(norm)
        self._stop_if_hopeless(reason, position, overflow)
        return reason

    def _stop_if_hopeless(self, reason: str, position: int, overflow: bool) -> None:
        if overflow:  # a scaler that is searching for its scale; bounded by the floor and a count of its own
            self.overflows_in_a_row += 1
            if self.overflows_in_a_row >= MAX_SCALER_SKIPS:
                raise NumericStop(
                    f"fp16 gradients overflowed {self.overflows_in_a_row} times in a row ({reason}); what "
                    "was saved stays as it is: use a lower train.learning_rate, --set "
                    "train.precision=fp32, or train.precision=bf16 on a GPU that has it (compute "
                    "capability 8.0)"
                )
            return
        self.in_a_row += 1
        self.recent.append(position)
        recent = sum(position - at < WINDOW for at in self.recent)
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            count = f"{self.in_a_row} in a row"
        elif recent > MAX_SKIPS_IN_WINDOW:
            count = f"{recent} of the last {WINDOW}"
        else:
            return
        raise NumericStop(
            f"updates skipped: {count}; last cause: {reason}; what was saved stays as it is: "
            "lower train.learning_rate or look at the data"
        )

    @staticmethod
    def _spike(name: str, value: float, history: deque) -> str | None:
        if len(history) < SPIKE_MINIMUM:
            return None
        mean = math.fsum(history) / len(history)
        sigma = math.sqrt(math.fsum((v - mean) ** 2 for v in history) / len(history))
        if value <= mean + SPIKE_SIGMAS * sigma:
            return None
        bound = f"mean {mean:.4g} + {SPIKE_SIGMAS:g} sigma ({sigma:.3g}) of {len(history)} steps"
        return f"the {name} {value:.4g} is above {bound}"


def make_scaler(device_type: str, enabled: bool, state: dict[str, float]) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs, from its saved `state`; one that does nothing where it is not
    `enabled`."""
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
