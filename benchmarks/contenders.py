"""The contenders: the same weights, the same tokens and the same work, each in its own library's usual way.

Training: forward, mean cross-entropy, backward, clipping at norm 1, fused AdamW. Decoding: greedy, with the
library's own KV cache. A contender is a function that does one unit of that work.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from smollm2.config import SmolLM2Config, TrainConfig
from smollm2.cpu_decoder import FastDecoder
from smollm2.device import choose_decoding, choose_precision
from smollm2.errors import ConfigError
from smollm2.model import SmolLM2
from smollm2.optim import make_optimizer
from smollm2.sampling import stream
from smollm2.tokenizer import Tokenizer

from . import COMPILED, LLAMA_CPP, NANOGPT, OURS, nanogpt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"int8": 1}
PEER_DTYPES = {
    "transformers": tuple(DTYPES),
    COMPILED: tuple(DTYPES),
    NANOGPT: ("fp32",),
    LLAMA_CPP: ("int8", "fp16"),
}  # the first where asked for another
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


def own_job(name: str, job: Job) -> Job:
    """What this contender trains: nanoGPT's own configuration, the common one for all others."""
    if name != NANOGPT:
        return job
    vocab = job.config.model_copy(update={"vocab_size": nanogpt.VOCAB})
    return replace(job, config=vocab, batch=nanogpt.BATCH, length=nanogpt.LENGTH, dtype="fp32")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_model(job: Job) -> SmolLM2:
    torch.manual_seed(SEED)
    return SmolLM2(job.config)


def build(name: str, job: Job, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """A contender's model on the device, with the weights of `state` (None: freshly drawn)."""
    if name == NANOGPT:
        torch.manual_seed(SEED)
        return nanogpt.NanoGPT().to(job.device)
    if name in (OURS, LLAMA_CPP):
        model = plain_model(job)
    else:
        torch.manual_seed(SEED)
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**job.config.to_hf_dict()))
        model.generation_config.eos_token_id = None  # every contender decodes exactly new_tokens
        model.generation_config.pad_token_id = 0
    if state is not None:
        model.load_state_dict(state)
    if job.task == "decode" and name != LLAMA_CPP and job.dtype != "int8":
        model = model.to(DTYPES[job.dtype])
    model = model.to(job.device).train(job.task == "train")
    return torch.compile(model, dynamic=False) if name == COMPILED else model


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) shifted targets, the last one ignored: what transformers makes of `labels=ids`."""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -100)), dim=1)


def loss_of(name: str, model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if name in (OURS, NANOGPT):
        return model.loss(ids, targets)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def logits_of(name: str, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids) if name == OURS else model(input_ids=ids, use_cache=False).logits


def train_step(
    name: str, model: torch.nn.Module, job: Job
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """One optimizer step on batch x length tokens; returns the loss before it and its gradient's norm."""
    job = own_job(name, job)
    ids = job.input_ids()
    targets = targets_of(ids)
    optimizer = make_optimizer(model, TrainConfig())
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.dtype == "fp16")

    def step() -> torch.Tensor:
        with job.autocast():
            loss = loss_of(name, model, ids, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

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
    if name == LLAMA_CPP:
        return llama_cpp(model, ids, job)
    if name == OURS and job.device.type == "cpu":
        model = FastDecoder(model, job.dtype, take=True)

    def ours() -> tuple[torch.Tensor, float]:
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


def serve_llama_cpp(pipe: Connection, path: str, context: int, threads: int) -> None:
    """Sends the address of llama.cpp's server, which lives until the other end of the pipe is closed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.model.path = path
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address)
    with contextlib.suppress(EOFError):
        pipe.recv()


def llama_cpp(model: SmolLM2, ids: torch.Tensor, job: Job) -> Callable[[], tuple[torch.Tensor, float]]:
    """llama.cpp's server on as many threads; it times its own tokens. In a process of its own: OpenMP puts the
    threads of a process to sleep at once where they are more than the cores, and all are slower for it."""
    from smollm2.gguf_file import write_gguf
    from smollm2.weights import stored_tensors

    kind = {"int8": "q8_0", "fp16": "f16"}[job.dtype]
    tokenizer = Tokenizer.train(["Once upon a time. " * 20], 260)  # a formality: the prompt is given as ids
    spawn, context = multiprocessing.get_context("spawn"), job.length + job.new_tokens + 8
    here, there = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.gguf"
        write_gguf(Path(path), job.config, stored_tensors(model), tokenizer, kind, "model", None)
        asked = (there, path, context, torch.get_num_threads())
        spawn.Process(target=serve_llama_cpp, args=asked, daemon=True).start()
        there.close()
        address = here.recv()
    asked = {
        "prompt": ids[0].tolist(),
        "n_predict": job.new_tokens,
        "temperature": 0.0,
        "return_tokens": True,
    }
    asked |= {"ignore_eos": True, "cache_prompt": False}
    header = {"Content-Type": "application/json"}

    def work() -> tuple[torch.Tensor, float]:
        assert not here.closed  # named here, the pipe and with it the server live as long as `work`
        request = urllib.request.Request(f"{address}/completion", json.dumps(asked).encode(), header)
        with urllib.request.urlopen(request) as answer:
            told = json.load(answer)
        return torch.tensor([ids[0].tolist() + told["tokens"]]), told["timings"]["predicted_ms"] / 1000

    return work


def own_dtypes(task: str, asked: list[str], device: torch.device) -> list[str]:
    """What was asked for, `auto` replaced by what a user gets here. Raises `ConfigError`."""
    if "fp16" in asked and device.type == "cpu":
        raise ConfigError("--dtype fp16: a CPU trains in fp32 or bf16 and writes in fp32, bf16 or int8")
    if task == "train":
        return [choose_precision(dtype, device).name for dtype in asked]
    return list(dict.fromkeys(choose_decoding(dtype, device)[0] for dtype in asked))


def contenders(task: str, dtypes: list[str], peers: list[str]) -> list[tuple[str, str]]:
    """(name, dtype) of each row, ours first; a peer without a dtype takes its usual one."""
    rows = [(OURS, dtype) for dtype in dtypes]
    for name in peers:
        has = PEER_DTYPES[name]
        rows += [(name, dtype if dtype in has else has[0]) for dtype in dtypes]
    return list(dict.fromkeys(rows))
