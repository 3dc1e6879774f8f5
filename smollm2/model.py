"""SmolLM2: a Llama-style decoder, in the order in which data flows through it. Training on a CPU takes a
block as one function of the same mathematics (`cpu_block.py`).

Notable:
* the tensors carry transformers' `LlamaForCausalLM` names, so saving and loading is an identity;
* grouped-query attention: 9 query heads share 3 key/value heads, in PyTorch's fused kernel or, on a CPU, by
  blocks of queries (`cpu_attention.py`);
* RoPE rotates halves (first half against second half), as transformers does;
* RMSNorm before attention, before the MLP and at the end; SwiGLU; no biases; output tied to the input;
* the loss never materialises all logits (`loss.py`); generation keeps a preallocated KV cache.

Shapes: B batch, T time, C hidden_size, H query heads, K key/value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import weights
from .checkpoint import MANIFEST, verify
from .config import SmolLM2Config
from .cpu_attention import can_attend_in_blocks, causal_attention
from .cpu_block import cpu_block, trains_in_one_function
from .device import plain_defaults
from .errors import CheckpointError
from .files import write_durably, write_tensors
from .loss import linear_cross_entropy, matmul_dtype
from .sampling import generate

# All but cuDNN's, which plans for each new shape, and behind a cache every token has a new number of keys:
# 0.44 s each on a B200 (FunASR#3704); with fewer than 8 key/value heads its results there were wrong as well
# (pytorch#193893).
DECODING_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RMSNorm(nn.Module):
    """Scale each vector to root-mean-square 1, then by a learned gain (Zhang & Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # cast here, once: each matrix that reads the result would otherwise cast, and keep, a copy of its own
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(matmul_dtype(x))


def rope_tables(config: SmolLM2Config, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, each (max_position_embeddings, D/2), fp32.

    Pair i turns by position * theta^(-2i/D) (Su et al. 2021). Computed in fp32 from integer powers as
    transformers does, so that both give the same bits.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    inverse_frequencies = 1.0 / (config.rope_theta**exponents)
    positions = torch.arange(config.max_position_embeddings, device=device).float()
    angles = torch.outer(positions, inverse_frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate (..., D) by tables that broadcast to (..., D/2): dimension i pairs with i + D/2. Rotated in the
    tables' dtype (fp32 in training, as in transformers), then back to x's."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def fused_gqa(device: torch.device, dtype: torch.dtype, is_masked: bool) -> bool:
    """Whether a fused attention kernel of this device takes fewer key/value heads than query heads.

    Where none does, `enable_gqa` falls back to products in fp32 with the whole (T, T) matrix in memory,
    several times slower. The CPU's kernel does (torch 2.9). On a GPU only flash and cuDNN do: both want half
    precision and no mask, and flash compute capability 8.0, which a T4 does not have (pytorch#181528).
    """
    if device.type == "cpu":
        return True
    is_half = dtype in (torch.bfloat16, torch.float16)
    is_cuda = device.type == "cuda"
    return is_cuda and is_half and not is_masked and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None) -> torch.Tensor:
    """Grouped-query attention. q (B, H, T, D); k, v (B, K, S, D); mask (T, S): True is seen -> (B, H, T, D).

    Query head h reads key/value head h // (H/K). With no mask and T > 1, T must equal S and attention is
    causal; a single query (T = 1) sees all S keys.
    """
    batch, heads, time, dim = q.shape
    kv_heads = k.shape[1]
    if time == 1 and mask is None:
        # one query a head: the H/K queries of a group are rows of one product, nothing is expanded
        grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(batch, heads, 1, dim)
    if mask is None and can_attend_in_blocks(q) and not torch.is_grad_enabled():
        return causal_attention(q, k.to(q.dtype), v.to(q.dtype))  # a cache is fp32 under autocast
    gqa = heads != kv_heads
    if gqa and not fused_gqa(q.device, q.dtype, mask is not None):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        gqa = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)


class KVCache:
    """Keys and values of the tokens seen so far, preallocated: one (B, K, capacity, D) pair a layer.

    Args:
        config: shape of the model. batch: rows. capacity: tokens that fit. dtype, device: of the tensors.
    """

    def __init__(self, config: SmolLM2Config, batch: int, capacity: int, dtype: torch.dtype, device):
        shape = (config.num_hidden_layers, batch, 2 * config.num_key_value_heads, capacity, config.head_dim)
        self.both = torch.empty(shape, dtype=dtype, device=device)  # keys, then values
        self.capacity = capacity
        self.length = 0

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, K, T, D) to a layer and return all its keys and values so far."""
        heads, end = k.shape[1], self.length + k.shape[2]
        self.both[layer, :, :heads, self.length : end] = k
        self.both[layer, :, heads:, self.length : end] = v
        return self.both[layer, :, :heads, :end], self.both[layer, :, heads:, :end]


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with RoPE."""

    def __init__(self, config: SmolLM2Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache: KVCache | None = None, mask=None) -> torch.Tensor:
        batch, time, _ = x.shape
        q = self.q_proj(x).view(batch, time, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(batch, time, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(batch, time, -1, self.head_dim)
        # rotated, then transposed: attention gives y the layout of q, so that o_proj reads it without a copy
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (T, 1, D/2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): three matrices, `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SmolLM2Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache: KVCache | None = None, mask=None) -> torch.Tensor:
        if cache is None and trains_in_one_function(self, x):
            return cpu_block(self, x, cos, sin)  # these two lines, with a backward pass by hand
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.reset_rope()

    def reset_rope(self) -> None:
        """Compute the RoPE tables (again, after the module was materialised from the meta device)."""
        cos, sin = rope_tables(self.config)
        # not persistent: a checkpoint holds what was learned, under transformers' names alone
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        start, time = (cache.length if cache is not None else 0), input_ids.shape[1]
        if start + time > self.cos.shape[0]:
            raise ValueError(f"{start + time} tokens exceed max_position_embeddings {self.cos.shape[0]}")
        cos, sin = self.cos[start : start + time], self.sin[start : start + time]
        mask = None
        if start and time > 1:  # several new tokens behind a filled cache: causal among themselves
            mask = torch.ones(time, start + time, dtype=torch.bool, device=input_ids.device).tril(start)
        x = self.embed_tokens(input_ids)
        # around the layers alone: the setting is the whole process's, so no generator may yield inside it
        with contextlib.nullcontext() if cache is None else sdpa_kernel(DECODING_KERNELS):
            for layer in self.layers:
                x = layer(x, cos, sin, cache, mask)
        if cache is not None:
            cache.length = start + time
        return self.norm(x)


class SmolLM2(nn.Module):
    """The language model. `SmolLM2(SmolLM2Config())` has exactly 134,515,008 parameters."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.config = config
        # ids that end a text: a folder may name several
        self.end_ids = () if config.eos_token_id is None else (config.eos_token_id,)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Normal with std `initializer_range`; matrices that write to the residual stream (o_proj, down_proj)
        are divided by sqrt(2 * layers), once and only here (nanotron's scaling; huggingface/smollm)."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual_std if writes_residual else std)

    def compile_blocks(self) -> None:
        """One graph serves all blocks. Not dynamic: a second size would make graphs that no resumed process
        has."""
        for layer in self.model.layers:
            layer.compile(dynamic=False)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def forward(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) int64 -> logits (B, T, V) in the compute dtype.

        With a `cache` the ids are the tokens *after* those already in it. Raises ValueError when the tokens
        exceed `max_position_embeddings`.
        """
        return self.lm_head(self.model(input_ids, cache))

    def next_logits(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """As `forward`, but only of what follows each row: fp32 logits (B, V)."""
        return self.lm_head(self.model(input_ids, cache)[:, -1]).float()

    def loss(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats a token (scalar, fp32).

        `targets` (B, T) int64 are already shifted: targets[b, t] follows input_ids[b, t]; -100 is ignored.
        """
        hidden = self.model(input_ids)
        return linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens of `batch` rows, in the weights' dtype."""
        return KVCache(self.config, batch, capacity, self.model.embed_tokens.weight.dtype, self.device)

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int = 64, temperature: float = 0.0, **options
    ) -> torch.Tensor:
        """Continue (B, T) int64 ids; returns (B, T + new), prompt included. See `sampling.generate`."""
        return generate(self, input_ids, max_new_tokens, temperature=temperature, **options)

    @classmethod
    @plain_defaults()
    def from_pretrained(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, device="cpu", revision: str | None = None
    ) -> SmolLM2:
        """A model in eval mode, from a checkpoint folder, any Hugging Face Llama folder, or a Hub id.

        Our own checkpoints are verified byte by byte first. Raises `CheckpointError`.
        """
        folder = weights.resolve(source, revision)
        try:
            if (folder / MANIFEST).exists():
                verify(folder, only=weights.MODEL_FILES)
            config = weights.read_config(folder)
            tensors = weights.read_weights(folder, config)
        except CheckpointError as error:
            raise CheckpointError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
        with torch.device("meta"):
            model = cls(config)
        # before memory is taken for what the configuration claims
        weights.check_shapes(model, tensors, str(folder))
        model = model.to_empty(device="cpu")
        if config.tie_word_embeddings:  # two tensors again: each name was given memory of its own
            model.lm_head.weight = model.model.embed_tokens.weight
        model.model.reset_rope()
        model.end_ids = weights.read_end_ids(folder)
        weights.load_weights(model, tensors, str(folder))
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `generation_config.json` and `model.safetensors` (in the weights' own dtype)
        so that `AutoModelForCausalLM.from_pretrained(folder)` works."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        for name, data in weights.model_files(self.config, dtype, self.end_ids).items():
            write_durably(folder / name, data)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.stored_tensors(self).items()}
        write_tensors(folder / "model.safetensors", tensors)
