"""Configuration: one typed, validated object; `settings.py` says where its values come from.

* `SmolLM2Config` is the network; its fields carry the names of transformers' `LlamaConfig`.
* `RunConfig` is a whole run: `model`, `data`, `train` and `run` sections, as in `presets/*.yaml`.

Nothing here imports torch, so that a mistake is reported before anything slow starts.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import CheckpointError, did_you_mean

MAX_ROPE_ENTRIES = 2**27  # cosines and sines of a million positions of heads of 128: half a GiB


def _is_torn(text: str) -> bool:
    """Whether a text from the command line held bytes that are not UTF-8 (Python keeps them as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info):
        """pydantic reads True as 1; in a configuration that is always a mistake."""
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or _is_torn(text)):
                raise ValueError("holds a NUL character or bytes that are not UTF-8")
        annotation = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in annotation:
            raise ValueError(f"expected a {annotation.replace('class ', '')}, not the boolean {value}")
        return value


class SmolLM2Config(_Section):
    """Shape of the network. `SmolLM2Config()` is SmolLM2-135M as it was pre-trained.

    Sources: huggingface/smollm `config_smollm2_135M.yaml` (context 2,048, theta 10,000) and the released
    `config.json` (context 8,192, theta 100,000 after long-context training).
    """

    vocab_size: int = Field(49152, ge=2, le=65536, description="entries of the tokenizer; must fit uint16")
    hidden_size: int = Field(576, ge=2, le=2**16)
    intermediate_size: int = Field(1536, ge=1, le=2**20)
    num_hidden_layers: int = Field(30, ge=1, le=1000)
    num_attention_heads: int = Field(9, ge=1, le=1024)
    num_key_value_heads: int = Field(3, ge=1, le=1024)
    head_dim: int | None = Field(
        None, ge=2, le=2**12, description="default hidden_size / num_attention_heads"
    )
    max_position_embeddings: int = Field(2048, ge=1, le=2**20)
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(
        1 / 24, gt=0, description="std of the normal initialisation; 1/24 = 1/sqrt(576)"
    )
    bos_token_id: int | None = Field(0, ge=0)
    eos_token_id: int | None = Field(0, ge=0)
    pad_token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _consistent(self):
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs, so it must be even")
        if self.max_position_embeddings * self.head_dim > MAX_ROPE_ENTRIES:
            raise ValueError(
                f"max_position_embeddings {self.max_position_embeddings:,} x head_dim {self.head_dim:,}: RoPE tables of that size need "
                f"{self.max_position_embeddings * self.head_dim * 4 / 2**30:.1f} GiB: make one of them smaller"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: each key/value head serves a whole group of query heads"
            )
        return self

    def to_hf_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """`config.json` for transformers. Both RoPE forms and both dtype forms are written: version 4 reads the old
        keys and silently falls back to theta 10,000 without them, version 5 writes only the new ones."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "rope_scaling": None,
            "use_cache": True,
        }
        fields |= self.model_dump()
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        fields["dtype"] = fields["torch_dtype"] = dtype
        return dict(sorted(fields.items()))

    @classmethod
    def from_hf_dict(cls, fields: dict[str, Any], where: str = "config.json") -> SmolLM2Config:
        """Read transformers' `config.json`; raises `CheckpointError` for anything this network cannot compute."""
        rope, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
        for key, value in {"rope_parameters": rope, "rope_scaling": scaling}.items():
            if not isinstance(value, dict):
                raise CheckpointError(f"{where}: {key} is {value!r}; expected a mapping")
        unsupported = {
            "model_type": fields.get("model_type", "llama") not in ("llama",),
            "hidden_act": fields.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(fields.get("attention_bias")),
            "mlp_bias": bool(fields.get("mlp_bias")),
            "rope_parameters": rope.get("rope_type", "default") != "default",
            "rope_scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
            "quantization_config": bool(fields.get("quantization_config")),
        }
        for key, is_unsupported in unsupported.items():
            if is_unsupported:
                raise CheckpointError(
                    f"{where}: {key} is {fields.get(key)!r}; expected a plain Llama with SiLU, default RoPE and no biases"
                )
        known = {name: fields[name] for name in cls.model_fields if fields.get(name) is not None}
        known["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
        known.setdefault("num_key_value_heads", fields.get("num_attention_heads"))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = fields.get(key)
            known[key] = next(iter(value), None) if isinstance(value, list) else value
        missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers") if k not in known]
        if missing:
            raise CheckpointError(
                f"{where}: no {', '.join(missing)}; expected the config.json of a Llama model"
            )
        try:
            return cls(**known)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {problems(error, cls)}") from None


class DataConfig(_Section):
    """Where the tokens come from."""

    input_file: str = "input.txt"
    dataset: str | None = Field(None, description="Hub id or local folder of a dataset with a 'text' column")
    dataset_tokens: int = Field(
        50_000_000, ge=1000, description="stop streaming a dataset after about this many tokens"
    )
    tokenizer: str = Field(
        "auto", min_length=1, description="auto, a Hub id, or a tokenizer.json / its folder"
    )
    tokenizer_vocab_size: int | None = Field(
        None, ge=257, le=65536, description="auto: train a BPE of this size"
    )
    sequence_length: int = Field(1024, ge=2, description="tokens of one training row")
    held_out_fraction: float = Field(
        0.1, gt=0, lt=1, description="the end of the text that is never trained on"
    )


class TrainConfig(_Section):
    """How the weights are updated, and how often what is written."""

    max_steps: int = Field(1000, ge=1, le=10**9, description="optimizer steps of the first phase")
    continue_steps: int = Field(
        0, ge=0, le=10**9, description="steps of the second phase, resumed from the first's checkpoint"
    )
    batch_size: int = Field(16, ge=1, le=2**20, description="rows of one optimizer step, over all devices")
    micro_batch_size: int | None = Field(
        None, ge=1, description="rows of one forward pass; halved when memory runs out"
    )
    learning_rate: float = Field(3e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay_fraction: float = Field(
        0.2, ge=0, le=1, description="share of the steps in which the rate falls to 0"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    deterministic: bool = False
    on_spike: Literal["ignore", "skip", "stop"] = Field("ignore", description="6 sigma over 128 steps")
    seed: int = Field(1337, ge=0, lt=2**63)
    log_every: int = Field(10, ge=1)
    val_every: int = Field(500, ge=1)
    val_max_tokens: int | None = Field(
        None, ge=2, description="cap of the validations during training; not the last"
    )
    sample_every: int = Field(500, ge=1)
    sample_tokens: int = Field(64, ge=1)
    prompts: tuple[str, ...] = Field(("Once upon a time", "The", "Why does"), min_length=1)
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints")
    save_every_seconds: float | None = Field(120.0, gt=0, description="and at the latest after this long")
    keep_last: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _consistent(self):
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class PlaceConfig(_Section):
    """Where a run writes and on what it runs."""

    output_dir: str = Field("output", min_length=1)
    drive_dir: str | None = Field(
        None, min_length=1, description="a second, remote tier for checkpoints (Google Drive)"
    )
    resume: Literal["auto", "never"] = "auto"
    take_over: bool = Field(
        False, description="write to drive_dir although another runtime did so in the last five minutes"
    )
    allow_data_change: bool = False
    init_from: str | None = Field(
        None, min_length=1, description="folder or Hub id whose weights the run starts from"
    )
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
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}"
            )
        world = self.run.devices * self.run.num_nodes
        if self.train.batch_size % world:
            raise ValueError(f"train.batch_size {self.train.batch_size} is not a multiple of {world} workers")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)


def problems(error: ValidationError, root: type[BaseModel]) -> str:
    """All problems of a validation, separated by semicolons, with a suggestion for misspelt keys."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            model = root
            for part in problem["loc"][:-1]:
                field = model.model_fields.get(str(part))
                model = field.annotation if field else model
            lines.append(f"unknown key {where!r}{did_you_mean(str(problem['loc'][-1]), model.model_fields)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = (
                ""
                if isinstance(problem["input"], dict | BaseModel)
                else f", found {str(problem['input'])[:60]!r}"
            )
            lines.append(f"{where}: {message}{found}" if where else message)
    return "; ".join(lines)
