"""The same network made ready to write on a CPU, where a token costs one reading of all weights.

Notable:
* fewer bytes: the matrices stay fp32, or become bf16, or int8 with one scale a row (and inputs of 8 bits);
* the layout that each kernel reads fastest (fp32 transposed; oneDNN's for bf16, fbgemm's for int8);
* fewer calls: q, k and v are one matrix, gate and up another; RoPE is one product of complex numbers.

Between the products everything is fp32, so in fp32 it computes what `SmolLM2` computes (tests: 1e-5).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .device import choose_decoding, plain_defaults
from .model import KVCache, SmolLM2, attend, rope_tables
from .weights import halves_to_pairs

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def can_pack() -> bool:
    """Whether oneDNN is here and multiplies bf16 in hardware."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(weight: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a weight (out, in) ready: what comes back turns x (rows, in) into x @ weight.T, (rows, out)."""
    if dtype == torch.int8:
        return int8_product(weight)
    if dtype == torch.float32:
        across = weight.T.contiguous()  # for one row of x nearly as fast as memory is read (docs/log.md)
        return lambda x: x @ across
    weight = weight.to(dtype, copy=True)
    if not can_pack():
        return lambda x: F.linear(x.to(dtype), weight)
    packed, multiply = torch.ops.mkldnn._reorder_linear_weight(weight, 1), torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x.to(dtype), packed, None, "none", [], "")


def int8_product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """One scale for each row of the weight, and for each row of x, which is rounded to 8 bits, too."""
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated: `choose_decoding` asks for them
        rounded = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale).long(), 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(rounded, None)
    multiply = torch.ops.quantized.linear_dynamic
    # without VNNI two products are added in 16 bits: with 7 bits of x they fit
    is_narrow = not getattr(torch.cpu, "_is_vnni_supported", bool)()

    def rounds_and_multiplies(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return multiply(x, packed, is_narrow)
        # all of x gets one scale: each row is brought to -1..1, and a row of both ends fixes the scale,
        # so that no row takes bits from another
        largest = x.abs().amax(1, keepdim=True).clamp_min(1e-30)
        rows = F.pad(x / largest, (0, 0, 0, 1))
        rows[-1, 0], rows[-1, 1] = -1, 1
        return multiply(rows, packed, is_narrow)[:-1] * largest

    def or_nan(x: torch.Tensor) -> torch.Tensor:
        try:
            return rounds_and_multiplies(x)
        except RuntimeError:  # there is no scale for what is not finite
            if bool(x.isfinite().all()):
                raise
            return x.new_full((len(x), len(scale)), torch.nan)

    return or_nan


def fast_decoder(model: SmolLM2, dtype: str | None = None, take: bool = False):
    """(What writes fastest here: a `FastDecoder`, on a GPU the model itself; a line that names its weights).
    `dtype`: see `choose_decoding`; `take`: see `FastDecoder`."""
    name, why = choose_decoding(dtype, model.device)
    fast = FastDecoder(model, name, take) if model.device.type == "cpu" else model
    return fast, f"writing in {name}: {why}"


class FastDecoder:
    """A `SmolLM2` that only writes: `next_logits`, `new_cache`, or called as the model is. CPU.

    Args:
        model: its weights are copied; with `take` they move, layer by layer, and it is empty afterwards.
        dtype: of the matrices: fp32, bf16 or int8. int8 rounds its inputs to 8 bits, too.
    """

    @torch.inference_mode()
    @plain_defaults()
    def __init__(self, model: SmolLM2, dtype: str = "fp32", take: bool = False):
        self.config, self.device, self.end_ids = model.config, model.device, model.end_ids
        self.heads = model.config.num_attention_heads, model.config.num_key_value_heads
        decoder, kind = model.model, WEIGHTS[dtype]
        # (context, 1, D/2): what RoPE turns together, i and i + D/2, becomes one complex number
        self.turns = torch.complex(*rope_tables(model.config)).unsqueeze(1)
        self.layers = []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qk = torch.cat((attention.q_proj.weight, attention.k_proj.weight)).float()
            qkv = torch.cat((halves_to_pairs(qk, sum(self.heads)), attention.v_proj.weight))
            gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
            matrices = qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            norms = [self._scaled(gain) for gain in norms]
            self.layers.append((*norms, *(product(weight.float(), kind) for weight in matrices)))
            if take:
                layer.to_empty(device="meta")
        self.floor = torch.tensor(model.config.hidden_size * model.config.rms_norm_eps).sqrt()
        self.norm = self._scaled(decoder.norm.weight)
        self.head = product(model.lm_head.weight.float(), kind)
        stored = torch.float32 if kind == torch.float32 else torch.bfloat16
        self.embedding = decoder.embed_tokens.weight.detach().to(stored, copy=not take)

    generate = SmolLM2.generate

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.config, batch, capacity, torch.float32, self.device)

    def hidden(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) -> what the output matrix reads, (B, T, C)."""
        (batch, time), start = input_ids.shape, cache.length if cache is not None else 0
        turns = self.turns[start : start + time]
        if len(turns) < time:
            raise ValueError(f"{start + time} tokens exceed max_position_embeddings {len(self.turns)}")
        if start and batch == time == 1:
            return self._one(input_ids, cache).view(1, 1, -1)
        mask = None
        if start and time > 1:  # several new tokens behind a filled cache: causal among themselves
            mask = torch.ones(time, start + time, dtype=torch.bool, device=self.device).tril(start)
        (heads, kv_heads), head_dim = self.heads, self.config.head_dim
        x = self.embedding[input_ids].float().flatten(0, 1)  # (B * T, C)
        for i, (attention_norm, mlp_norm, qkv, o, gate_up, down) in enumerate(self.layers):
            h = qkv(self._normed(x, attention_norm)).float().view(batch, time, -1, head_dim)
            qk, v = h.split((heads + kv_heads, kv_heads), dim=2)
            qk = torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * turns  # (B, T, H + K, D/2)
            q, k = torch.view_as_real(qk).flatten(-2).transpose(1, 2).split(self.heads, dim=1)
            v = v.transpose(1, 2)
            if cache is not None:
                k, v = cache.update(i, k, v)
            y = attend(q, k, v, mask).transpose(1, 2).reshape(batch * time, -1)
            x = x + o(y)
            gate, up = gate_up(self._normed(x, mlp_norm)).chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        if cache is not None:
            cache.length = start + time
        return self._normed(x, self.norm).view(batch, time, -1)

    def _scaled(self, gain: torch.Tensor) -> torch.Tensor:
        return gain.float() * math.sqrt(self.config.hidden_size)

    def _normed(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """RMSNorm, in half the operations: x gain sqrt(C) / sqrt(sum(x^2) + C eps), which is a hypotenuse."""
        return (x * gain).div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.floor))

    def _one(self, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One token of one row: what `hidden` does, in as few operations as there are."""
        at, (heads, kv_heads), head_dim = cache.length, self.heads, self.config.head_dim
        # q, k and v in one product: v turns by what turns position 0, which is 1
        turn = torch.cat([self.turns[at]] * (heads + kv_heads) + [self.turns[0]] * kv_heads, dim=1)
        turned = torch.empty_like(turn)
        q, kv = torch.view_as_real(turned).view(-1, head_dim).split((heads, 2 * kv_heads))
        q = q.view(1, kv_heads, heads // kv_heads, head_dim)
        slots = cache.both[:, 0, :, at].unbind()
        seen = [kept.unbind() for kept in cache.both[..., : at + 1, :].chunk(2, dim=2)]
        # with the floor as one entry more, a vector's length is what RMSNorm divides by
        floored = torch.cat((self.embedding[input_ids[0]].float(), self.floor.view(1, 1)), dim=1)
        x = floored[:, :-1]
        for layer, slot, keys, values in zip(self.layers, slots, *seen, strict=True):
            attention_norm, mlp_norm, qkv, o, gate_up, down = layer
            h = qkv((x * attention_norm).div_(torch.linalg.vector_norm(floored))).float()
            torch.mul(h.view(torch.complex64), turn, out=turned)
            slot.copy_(kv)
            x += o(F.scaled_dot_product_attention(q, keys, values).view(1, -1))
            h = gate_up((x * mlp_norm).div_(torch.linalg.vector_norm(floored)))
            gate, up = h.chunk(2, dim=1)
            x += down(F.silu(gate).mul_(up))
        cache.length = at + 1
        return self._normed(x, self.norm)

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)  # the formats are those chosen here
    def next_logits(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) -> fp32 logits (B, V) of what follows each row."""
        return self.head(self.hidden(input_ids, cache)[:, -1]).float()

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)
    def __call__(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) -> fp32 logits (B, T, V)."""
        return self.head(self.hidden(input_ids, cache).flatten(0, 1)).float().unflatten(0, input_ids.shape)
