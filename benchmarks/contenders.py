"""The contenders: the same weights, the same tokens and the same work, each in its own library's usual way.

Training: forward, mean cross-entropy, backward, clipping at norm 1, fused AdamW. Decoding: greedy, with the
library's own KV cache. A contender is a function that does one unit of that work.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from smollm2.config import SmolLM2Config, TrainConfig
from smollm2.errors import ConfigError
from smollm2.model import SmolLM2
from smollm2.optim import make_optimizer

OURS = "smollm2"
PEERS = ("transformers",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED = 0


@dataclass(frozen=True)
class Job:
    """What is measured. `length`: tokens of a training row, or of the prompt that `new_tokens` follow."""

    task: str
    config: SmolLM2Config
    batch: int
    length: int
    new_tokens: int
    dtype: str
    device: torch.device

    def input_ids(self) -> torch.Tensor:
        """(batch, length) int64, the same for every contender."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch, self.length)
        return torch.randint(0, self.config.vocab_size, shape, generator=generator).to(self.device)

    def autocast(self):
        """Autocast to a half-precision `dtype`, nothing for any other."""
        if self.dtype in ("bf16", "fp16"):
            return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])
        return contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(name: str, job: Job, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """A contender's model on the device, with the weights of `state` (None: freshly drawn)."""
    torch.manual_seed(SEED)
    if name == OURS:
        model = SmolLM2(job.config)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**job.config.to_hf_dict()))
        model.generation_config.eos_token_id = None  # every contender decodes exactly new_tokens
        model.generation_config.pad_token_id = 0
    if state is not None:
        model.load_state_dict(state)
    if job.task == "decode":
        model = model.to(DTYPES[job.dtype])
    return model.to(job.device).train(job.task == "train")


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) shifted targets, the last one ignored: what transformers makes of `labels=ids`."""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), dim=1)


def loss_of(name: str, model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (
        model.loss(ids, targets) if name == OURS else model(input_ids=ids, labels=ids, use_cache=False).loss
    )


def logits_of(name: str, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids) if name == OURS else model(input_ids=ids, use_cache=False).logits


def train_step(name: str, model: torch.nn.Module, job: Job) -> Callable[[], torch.Tensor]:
    """One optimizer step on batch x length tokens; returns the loss before it."""
    ids = job.input_ids()
    targets = targets_of(ids)
    optimizer = make_optimizer(model, TrainConfig())
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.dtype == "fp16")

    def step() -> torch.Tensor:
        with job.autocast():
            loss = loss_of(name, model, ids, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


class _Clock:
    """transformers' streamer interface: notes when each new token was there."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(
    name: str, model: torch.nn.Module, job: Job, **options
) -> Callable[[], tuple[torch.Tensor, float]]:
    """Continue the prompt; returns (ids (batch, length + new), seconds between the first and the last new
    token). `options` go to transformers' `generate`."""
    ids = job.input_ids()

    def ours() -> tuple[torch.Tensor, float]:
        from smollm2.sampling import stream

        times, tokens = [], []
        for token, _ in stream(model, ids, job.new_tokens, stop_ids=()):
            synchronize(job.device)
            times.append(time.perf_counter())
            tokens.append(token.unsqueeze(1))
        return torch.cat([ids, *tokens], dim=1), times[-1] - times[0]

    def transformers() -> tuple[torch.Tensor, float]:
        clock, mask = _Clock(), torch.ones_like(ids)
        greedy = {"max_new_tokens": job.new_tokens, "do_sample": False, "use_cache": True, "streamer": clock}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, **greedy, **options)
        return out, clock.times[-1] - clock.times[1]  # the first call is the prompt

    return ours if name == OURS else transformers


def contender_names(peers: str) -> list[str]:
    """Ours and the peers of `--peers a,b`; raises `ConfigError` for one that is not known."""
    names = [name for name in peers.split(",") if name]
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers {name!r}: expected some of {', '.join(PEERS)}")
    return [OURS, *names]
