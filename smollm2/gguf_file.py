"""A model as one GGUF file, for llama.cpp, Ollama and everything built on them.

Notable:
* llama.cpp rotates neighbouring pairs (i, i+1), transformers and this project halves (i, i + D/2): the rows
  of q_proj and k_proj are reordered here, once. Converting twice is a classic silent error;
* the tokenizer travels as tokens and merges; `tokenizer.ggml.pre = "smollm"` names SmolLM2's splitting
  (single digits, then GPT-2's pattern): any other kind of tokenizer is refused, not written wrongly;
* f16 or q8_0. The K-quants need rows of a multiple of 256, and 576 is none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from .config import SmolLM2Config
from .errors import ConfigError, UserError
from .tokenizer import Tokenizer
from .weights import halves_to_pairs

if TYPE_CHECKING:
    import torch

GGUF_TYPES = ("f16", "q8_0")
Q8_0_BLOCK = 32
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM_SPLIT = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]


def vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges) of a tokenizer split as SmolLM2's; raises `UserError` for any other kind.

    Ids are those that encoding gives: the library numbers added tokens itself, whatever the file says. Those
    beyond the tokenizer's own, up to `size` rows of the embedding, are marked unused.
    """
    from gguf import TokenType

    read = tokenizers.Tokenizer.from_buffer(tokenizer.raw)
    fields, added = json.loads(read.to_str()), read.get_added_tokens_decoder()
    model, split = fields["model"], (fields["pre_tokenizer"] or {}).get("pretokenizers")
    if model["type"] != "BPE" or model["ignore_merges"] or fields["normalizer"] or split != SMOLLM_SPLIT:
        known = "split as SmolLM2's (byte-level BPE behind single digits), the one kind written here"
        raise UserError(f"--gguf: tokenizer.json is not {known}; use llama.cpp's convert_hf_to_gguf.py")
    names = [tokenizer.token(i) for i in range(size)]
    types = [TokenType.UNUSED if name is None else TokenType.NORMAL for name in names]
    for i, token in added.items():
        types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    tokens = [f"[UNUSED{i}]" if name is None else name for i, name in enumerate(names)]
    return tokens, types, [" ".join(merge) for merge in model["merges"]]


def encode_tensor(name: str, tensor: torch.Tensor, kind: str, config: SmolLM2Config) -> tuple:
    """A tensor in llama.cpp's row order and format: (numpy array, GGML type). Vectors stay fp32."""
    from gguf import GGMLQuantizationType, quants

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensor, role = tensor.detach().float().cpu(), name.split(".")[-2]
    array = (halves_to_pairs(tensor, heads[role]) if role in heads else tensor).numpy()
    if array.ndim == 1:
        return array, GGMLQuantizationType.F32
    if kind == "q8_0" and array.shape[-1] % Q8_0_BLOCK == 0:
        return quants.quantize(array, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
    return array.astype(np.float16), GGMLQuantizationType.F16  # trained weights are far from fp16's 65,504


def write_gguf(
    path: Path, config: SmolLM2Config, tensors: dict, tokenizer: Tokenizer, kind: str, name: str, fields: dict
) -> None:
    """Write one GGUF file.

    Args:
        path: the file. config, tensors: the model, by transformers' names (no `lm_head.weight` when tied).
        kind: `f16`, or `q8_0`: 8 bits and a scale for 32 numbers; rows that are no multiple of 32 stay f16.
        name: `general.name`. fields: `tokenizer_config.json`, which names the special tokens.
    Raises `ConfigError` without the `gguf` package, `UserError` for what cannot be written faithfully.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("--gguf needs the gguf package: pip install gguf") from None
    tokens, types, merges = vocabulary(tokenizer, config.vocab_size)
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "pad": config.pad_token_id}
    roles = (role for role in (*ids, "unk") if f"{role}_token" in fields)
    ids |= {role: tokenizer.token_id(fields[f"{role}_token"]) for role in roles}
    metadata = {  # each goes to the writer's method add_<key>; None where the model has none
        "name": name, "file_type": gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"],
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers, "layer_norm_rms_eps": config.rms_norm_eps,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim, "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim, "rope_freq_base": config.rope_theta,
        "tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "chat_template": fields.get("chat_template"),
        "token_list": tokens, "token_types": types, "token_merges": merges,
        # as transformers does with the same tokenizer.json
        "add_bos_token": tokenizer.around[0] == [ids["bos"]],
        "add_eos_token": tokenizer.around[1] == [ids["eos"]],
    }  # fmt: skip
    metadata |= {f"{role}_token_id": i for role, i in ids.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for tensor_name, tensor in tensors.items():
        array, dtype = encode_tensor(tensor_name, tensor, kind, config)
        writer.add_tensor(names.get_name(tensor_name, (".weight",)), array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
