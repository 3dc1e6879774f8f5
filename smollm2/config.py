"""Configuration: one typed, validated object; `settings.py` says where its values come from.

* `SmolLM2Config` is the network; its fields carry the names of transformers' `LlamaConfig`.
* `RunConfig` is a whole run: `model`, `data`, `train` and `run` sections, as in `presets/*.yaml`.

Nothing here imports torch, so that a mistake is reported before anything slow starts.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator as After
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import CheckpointError, did_you_mean


def _whole(text: str) -> str:
    """Python keeps bytes of a command line that are not UTF-8 as lone surrogates, which no text may hold."""
    if "\0" in text or text.encode(errors="ignore").decode() != text:
        raise ValueError("holds a NUL character or bytes that are not UTF-8")
    return text


Text = Annotated[str, After(_whole)]
Place = Annotated[Text, Field(min_length=1), After(os.path.expanduser)]  # a path, perhaps a Hub id


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class SmolLM2Config(_Section):
    """Shape of the network. `SmolLM2Config()` is SmolLM2-135M as it was pre-trained.

    Sources: huggingface/smollm `config_smollm2_135M.yaml` (context 2,048, theta 10,000) and the released
    `config.json` (context 8,192, theta 100,000 after long-context training).
    """

    vocab_size: int = Field(49152, ge=2, le=65536)  # entries of the tokenizer; token files are uint16
    hidden_size: int = Field(576, ge=2, le=2**16)
    intermediate_size: int = Field(1536, ge=1, le=2**20)
    num_hidden_layers: int = Field(30, ge=1, le=1000)
    num_attention_heads: int = Field(9, ge=1, le=1024)
    num_key_value_heads: int = Field(3, ge=1, le=1024)
    head_dim: int | None = Field(None, ge=2, le=2**10)  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = Field(2048, ge=1, le=2**17)  # RoPE tables: at most half a GiB each
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(1 / 24, gt=0)  # std of the normal initialisation; 1/24 = 1/sqrt(576)
    bos_token_id: int | None = Field(0, ge=0, lt=2**16)
    eos_token_id: int | None = Field(0, ge=0, lt=2**16)
    pad_token_id: int | None = Field(None, ge=0, lt=2**16)

    @model_validator(mode="after")
    def _consistent(self):
        hidden, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None:
            if hidden % heads:
                raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
            object.__setattr__(self, "head_dim", hidden // heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs, so it must be even")
        if heads % groups:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
        return self

    def to_hf_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """`config.json` for transformers. Both RoPE forms and both dtype forms are written: version 4 reads
        the old keys and silently falls back to theta 10,000 without them, 5 writes only the new ones."""
        fields = self.model_dump() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        fields |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
        fields |= {"dtype": dtype, "torch_dtype": dtype, "rope_scaling": None, "use_cache": True}
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return dict(sorted(fields.items()))

    @classmethod
    def from_hf_dict(cls, fields: dict[str, Any], where: str = "config.json") -> SmolLM2Config:
        """Read transformers' `config.json`; a missing field has the default of `LlamaConfig`, which writes
        only what differs. Raises `CheckpointError` for anything this network cannot compute."""
        fields = LLAMA_DEFAULTS | fields
        rope = {key: fields[key] or {} for key in ("rope_parameters", "rope_scaling")}
        wrong = [key for key, plain in PLAIN_LLAMA.items() if fields[key] not in (plain, None)]
        for key, table in rope.items():
            kind = table.get("rope_type", table.get("type")) if isinstance(table, dict) else "no table"
            wrong += [key] * (kind not in ("default", None))
        if wrong:
            found = ", ".join(f"{key} is {str(fields[key])[:60]!r}" for key in wrong)
            raise CheckpointError(f"{where}: {found}; expected a plain Llama: SiLU, default RoPE, no biases")
        known = {name: fields[name] for name in cls.model_fields}
        table = rope["rope_scaling"] or rope["rope_parameters"]  # transformers' order
        known["rope_theta"] = table.get("rope_theta", fields["rope_theta"])
        if known["num_key_value_heads"] is None:
            known["num_key_value_heads"] = known["num_attention_heads"]
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        for key in ids:
            found = known[key] if isinstance(known[key], list) else [known[key]]  # several may end a text
            known[key] = next((i for i in found[:1] if i != -1), None)  # -1 is the old way to say none
        pad, size = known["pad_token_id"], known["vocab_size"]
        if isinstance(pad, int) and isinstance(size, int) and pad >= size:
            known["pad_token_id"] = None  # as models of 32,000 entries have it; nothing is padded here
        try:
            config = cls(**known)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {problems(error, cls)}") from None
        for key in ids:
            if (i := getattr(config, key)) is not None and i >= config.vocab_size:
                raise CheckpointError(f"{where}: {key} is {i}, but vocab_size is {config.vocab_size}")
        return config


PLAIN_LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "quantization_config": None,
}  # fmt: skip
LLAMA_DEFAULTS = PLAIN_LLAMA | {  # transformers' configuration_llama.py; but a model_type must be there
    "model_type": "", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_parameters": None, "rope_scaling": None, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip


class DataConfig(_Section):
    """Where the tokens come from."""

    input_file: Annotated[Text, After(os.path.expanduser)] = "input.txt"
    dataset: Place | None = None  # ID[:CONFIG][@SPLIT] of the Hub, a folder, a file; or A=0.7,B=0.3
    chat_file: Place | None = (
        None  # conversations whose answers are learned, instead of a text; see chat_data.py
    )
    dataset_column: Text | None = None  # None: text, or what must be it; see dataset.py
    dataset_tokens: int | None = Field(None, ge=1000)  # to read; None: enough for every step, once
    tokenizer: Place = "auto"  # or a Hub id, a tokenizer.json, a folder that holds one
    tokenizer_vocab_size: int | None = Field(None, ge=257, le=65536)  # auto: train a BPE of this size
    sequence_length: int = Field(1024, ge=2)  # tokens of one training row
    held_out_fraction: float = Field(0.1, gt=0, lt=1)  # the end of the text, or documents of the dataset


class TrainConfig(_Section):
    """How the weights are updated, and how often what is written."""

    max_steps: int = Field(1000, ge=1, le=10**9)  # optimizer steps of the first phase
    continue_steps: int = Field(0, ge=0, le=10**9)  # of the second, resumed from the first's checkpoint
    # instead of max_steps: what fits, measured when the run begins
    minutes: float | None = Field(None, gt=0, le=10**6)
    stop_after: float | None = Field(None, gt=0, le=10**6)  # minutes: saved by then, whatever step that is
    batch_size: int = Field(16, ge=1, le=2**20)  # rows of one optimizer step, over all devices
    micro_batch_size: int | None = Field(None, ge=1)  # rows of one forward pass (None: all; GPU: what fits)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
    learning_rate: float = Field(3e-3, gt=0)  # AdamW's
    muon_learning_rate: float = Field(0.02, gt=0)  # Muon's; both follow one schedule
    warmup_steps: int = Field(100, ge=0)
    decay_fraction: float = Field(0.2, ge=0, le=1)  # share of the steps in which the rate falls to 0
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool | Literal["auto"] = "auto"  # auto: on a GPU, where the run is long enough to pay for it
    deterministic: bool = False
    seed: int = Field(1337, ge=0, lt=2**63)
    log_every: int = Field(10, ge=1)
    val_every: int = Field(500, ge=1)
    val_max_tokens: int | None = Field(None, ge=2)  # of the validations during training; not the last
    sample_every: int = Field(500, ge=1)
    sample_tokens: int = Field(64, ge=1)
    prompts: tuple[Text, ...] = Field(("Once upon a time", "The", "Why does"), min_length=1)
    save_every: int | None = Field(None, ge=1)  # steps between checkpoints
    save_every_seconds: float | None = Field(120.0, gt=0)  # and at the latest after this long
    keep_last: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _consistent(self):
        rows, part = self.batch_size, self.micro_batch_size
        if part and rows % part:
            raise ValueError(f"batch_size {rows} is not a multiple of micro_batch_size {part}")
        return self


class PlaceConfig(_Section):
    """Where a run writes and on what it runs."""

    output_dir: Place = "output"
    drive_dir: Place | None = None  # a second, remote tier for checkpoints (Google Drive)
    resume: Literal["auto", "never"] = "auto"
    allow_data_change: bool = False
    init_from: Place | None = None  # folder or Hub id whose weights the run starts from
    compare_with: Place | None = None  # a model whose bits per byte are told beside the run's, at its end
    devices: int = Field(1, ge=1)
    num_nodes: int = Field(1, ge=1)


class RunConfig(_Section):
    """Everything one training run needs; `train(RunConfig(...))` is what notebook and command line call."""

    preset: str = "custom"
    model: SmolLM2Config = SmolLM2Config()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    run: PlaceConfig = PlaceConfig()

    @model_validator(mode="after")
    def _consistent(self):
        row, context = self.data.sequence_length, self.model.max_position_embeddings
        if row > context:
            raise ValueError(f"data.sequence_length {row} exceeds model.max_position_embeddings {context}")
        batch, world = self.train.batch_size, self.run.devices * self.run.num_nodes
        if batch % world:
            raise ValueError(f"train.batch_size {batch} is not a multiple of {world} workers")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)


DECODING_DTYPES = ("auto", "fp32", "bf16", "int8")  # auto: the fastest that costs less than 0.5 %


class SamplingOptions(BaseModel):
    """How a text is continued: the names, bounds and defaults for Python, command line and page alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(64, ge=1, description="tokens to write at the most")
    temperature: float = Field(0.0, ge=0, le=100, description="divides the logits; 0 = greedy")
    top_k: int | None = Field(None, ge=1, description="draw from the k likeliest tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest that together reach p")
    min_p: float | None = Field(None, ge=0, le=1, description="draw from those at least p times the best")
    seed: int | None = Field(None, ge=0, lt=2**63, description="same seed, same text (default: a fresh one)")

    def next_seed(self) -> SamplingOptions:
        """The same for the next text of a series, with the next seed where there is one."""
        return self if self.seed is None else self.model_copy(update={"seed": (self.seed + 1) % 2**63})


def problems(error: ValidationError, root: type[BaseModel]) -> str:
    """All problems of a validation, separated by semicolons, with a suggestion for misspelt keys."""
    lines = []
    for problem in error.errors(include_url=False):
        where, found = ".".join(map(str, problem["loc"])), problem["input"]
        if problem["type"] == "extra_forbidden":
            *section, leaf = problem["loc"]
            known = (root.model_fields[section[0]].annotation if section else root).model_fields
            lines.append(f"unknown key {where!r}{did_you_mean(str(leaf), known)}")
            continue
        line = f"{where}: " * bool(where) + problem["msg"].removeprefix("Value error, ")
        is_table = isinstance(found, dict | BaseModel)
        lines.append(line if is_table else f"{line}, found {str(found)[:60]!r}")
    return "; ".join(lines)
