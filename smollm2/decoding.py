"""The same network made ready to write on a CPU, where a token costs one reading of all weights.

Notable:
* fewer bytes: the matrices stay fp32, or become bf16, or int8 with one scale a row;
* the layout that the kernels read fastest, made once (oneDNN's own for fp32 and bf16);
* fewer calls: q, k and v are one matrix, gate and up another; RoPE is one product of complex numbers.

Between the products everything is fp32, so in fp32 it computes what `SmolLM2` computes (tests: 1e-5).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .device import choose_decoding, plain_defaults
from .model import KVCache, SmolLM2, attend, rope_tables
from .weights import halves_to_pairs

INT8_ROWS = 32  # from here on it is faster to cast the weights back and to multiply in bf16 (docs/log.md)
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and multiplies this dtype in hardware."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Matrix:
    """A weight (out, in), made ready: called with x (rows, in) it gives x @ weight.T, (rows, out)."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self.scale, self.is_packed = None, False
        # torch's int8 product checks no shape: with rows of another length it reads beyond them (torch 2.13)
        self.int8_rows = INT8_ROWS if weight.shape[1] % 16 == 0 else 0
        self.input_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        if dtype == torch.int8:
            # the scale first, as it will be read, then the integers: its rounding costs nothing
            self.scale = (weight.abs().amax(1) / 127).clamp_min(1e-30).to(torch.bfloat16)
            self.weight = (weight / self.scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        else:
            self.weight, self.is_packed = weight.to(dtype, copy=True), can_pack(dtype)
            if self.is_packed:
                self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of an int8 matrix as fp32: (...,) ids -> (..., in)."""
        return self.weight[ids].float() * self.scale[ids].unsqueeze(-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.input_dtype)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        if self.scale is None:
            return F.linear(x, self.weight)
        if len(x) < self.int8_rows:
            return torch._weight_int8pack_mm(x, self.weight, self.scale)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


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
        dtype: of the matrices: fp32, bf16 or int8. int8 multiplies in bf16.
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
            self.layers.append((*norms, *(Matrix(weight.float(), kind) for weight in matrices)))
            if take:
                layer.to_empty(device="meta")
        self.floor = torch.tensor(model.config.hidden_size * model.config.rms_norm_eps).sqrt()
        self.norm = self._scaled(decoder.norm.weight)
        self.head = Matrix(model.lm_head.weight.float(), kind)
        is_shared = model.config.tie_word_embeddings and kind == torch.int8
        embedding = decoder.embed_tokens.weight.to(self.head.input_dtype, copy=not take)
        self.embed = self.head.rows if is_shared else lambda ids: embedding[ids].float()

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
        x = self.embed(input_ids).flatten(0, 1)  # (B * T, C)
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
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.floor)
        return torch.div(x * gain, length, out=x.new_empty(x.shape, dtype=self.head.input_dtype))

    def _one(self, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """One token of one row: what `hidden` does, in as few operations as there are."""
        at, (heads, kv_heads), head_dim = cache.length, self.heads, self.config.head_dim
        turn, shape = self.turns[at], (1, kv_heads, heads // kv_heads, head_dim)
        seen = [kept[..., : at + 1, :].unbind() for kept in (cache.keys, cache.values)]
        slots = [kept[:, 0, :, at].unbind() for kept in (cache.keys, cache.values)]
        x = self.embed(input_ids[0])
        for layer, keys, values, key, value in zip(self.layers, *seen, *slots, strict=True):
            attention_norm, mlp_norm, qkv, o, gate_up, down = layer
            h = qkv(self._normed(x, attention_norm)).float().view(-1, head_dim)
            qk = torch.view_as_complex(h[: heads + kv_heads].unflatten(1, (-1, 2))) * turn
            qk = torch.view_as_real(qk).view(-1, head_dim)
            key.copy_(qk[heads:])
            value.copy_(h[heads + kv_heads :])
            y = F.scaled_dot_product_attention(qk[:heads].view(shape), keys, values)
            x += o(y.view(1, -1))
            gate, up = gate_up(self._normed(x, mlp_norm)).chunk(2, dim=1)
            x += down(F.silu(gate).mul_(up))
        cache.length = at + 1
        return self._normed(x, self.norm)

    @torch.inference_mode()
    def next_logits(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) -> fp32 logits (B, V) of what follows each row."""
        return self.head(self.hidden(input_ids, cache)[:, -1]).float()

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) -> fp32 logits (B, T, V)."""
        return self.head(self.hidden(input_ids, cache).flatten(0, 1)).float().unflatten(0, input_ids.shape)
