"""A model as one GGUF file, for llama.cpp, Ollama and everything built on them.

Notable:
* llama.cpp rotates neighbouring pairs (i, i+1) where transformers and this project rotate halves (i, i + D/2): the rows
  of q_proj and k_proj are reordered here, once. Converting twice is a classic silent error;
* the tokenizer travels as tokens and merges; `tokenizer.ggml.pre = "smollm"` names SmolLM2's splitting (single digits,
  then GPT-2's pattern), so any other kind of tokenizer is refused instead of being written wrongly;
* f16 or q8_0. The K-quants need rows of a multiple of 256, and 576 is none.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from .config import SmolLM2Config
from .errors import ConfigError, UserError
from .tokenizer import Tokenizer

GGUF_TYPES = ("f16", "q8_0")
Q8_0_BLOCK = 32

# our tensor -> llama.cpp's; {} is the layer
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the output rows of a (heads * D, in) projection: row i and row i + D/2 of a head become neighbours."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges) of a tokenizer split as SmolLM2's; raises `UserError` for any other kind.

    Entries beyond the tokenizer's own, up to `size` rows of the embedding, are marked unused.
    """
    from gguf import TokenType

    fields = json.loads(tokenizer.raw)
    model, splitter = fields["model"], fields.get("pre_tokenizer") or {}
    steps = [
        (step.get("type"), step.get("individual_digits"), step.get("add_prefix_space"))
        for step in splitter.get("pretokenizers", [])
    ]
    is_smollm = steps == [("Digits", True, None), ("ByteLevel", None, False)] and splitter["pretokenizers"][
        1
    ].get("use_regex", True)
    if model.get("type") != "BPE" or fields.get("normalizer") or not is_smollm or model.get("ignore_merges"):
        raise UserError(
            "--gguf: the checkpoint's tokenizer.json is not split as SmolLM2's (byte-level BPE behind single digits), which is the "
            "one kind written here; use llama.cpp's convert_hf_to_gguf.py on the exported folder"
        )
    tokens, types = [f"[UNUSED{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in fields.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return tokens, types, merges


def encode_tensor(
    name: str, tensor: torch.Tensor, kind: str, config: SmolLM2Config
) -> tuple[np.ndarray, object]:
    """A tensor in llama.cpp's row order and number format: (array, GGML type). Vectors stay fp32, as llama.cpp expects."""
    from gguf import GGMLQuantizationType, quants

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    tensor = tensor.detach().float().cpu()
    array = (halves_to_pairs(tensor, heads) if heads else tensor).numpy()
    if array.ndim == 1:
        return array, GGMLQuantizationType.F32
    if kind == "q8_0" and array.shape[-1] % Q8_0_BLOCK == 0:
        return quants.quantize(array, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
    if np.abs(array).max() > np.finfo(np.float16).max:
        raise UserError(
            f"--gguf: {name} holds numbers beyond fp16's {np.finfo(np.float16).max:,.0f}: they cannot be written"
        )
    return array.astype(np.float16), GGMLQuantizationType.F16


def write_gguf(
    path: str | Path,
    config: SmolLM2Config,
    tensors: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    kind: str,
    name: str,
    template: str | None = None,
) -> None:
    """Write one GGUF file.

    Args:
        path: the file. config, tensors: the model, tensors by transformers' names (no `lm_head.weight` when tied).
        kind: `f16`, or `q8_0` (8 bits and a scale for each 32 numbers; rows that are no multiple of 32 stay f16).
        name: `general.name`. template: the Jinja chat template of an Instruct model.
    Raises `ConfigError` without the `gguf` package, `UserError` for a tokenizer that cannot be written faithfully.
    """
    try:
        from gguf import GGUFWriter, LlamaFileType
    except ImportError:
        raise ConfigError("--gguf needs the gguf package: pip install gguf") from None
    if kind not in GGUF_TYPES:
        raise ConfigError(f"--gguf {kind}: expected one of {', '.join(GGUF_TYPES)}")
    tokens, types, merges = vocabulary(tokenizer, config.vocab_size)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if kind == "f16" else LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, token_id in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_unk_token_id, tokenizer.end_of_text_id),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(
        False
    )  # as transformers does with the same tokenizer.json: it has no post-processor
    if template:
        writer.add_chat_template(template)
    for tensor_name, tensor in tensors.items():
        array, dtype = encode_tensor(tensor_name, tensor, kind, config)
        writer.add_tensor(gguf_name(tensor_name), array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
