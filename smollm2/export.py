"""`python -m smollm2.export`: a checkpoint as a folder for transformers, llama.cpp, Ollama and the Hub.

Notable:
* transformers 4 and 5 read it alike: both RoPE forms, both dtype forms, a tokenizer class that both know;
* `tokenizer.json` is copied byte for byte;
* `max_position_embeddings` is the context really trained, the model card holds the run's own figures;
* written by `commit_folder`: `--out` is the old export or the new one, never a mixture.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from .card import model_card
from .chat_data import PLAIN
from .checkpoint import enclosing_checkpoint
from .config import SmolLM2Config
from .conversation import chat_template, render_chat, special_tokens, stop_ids, tokenizer_config
from .errors import ArgumentParser, CheckpointError, ConfigError, OutputLost, run_command
from .files import (
    commit_folder,
    dump_json,
    kind_of,
    origin_name,
    remove_leftovers,
    sha256_file,
    write_tensors,
)
from .gguf_file import GGUF_TYPES, write_gguf
from .origin import published_base, recorded
from .signals import loading
from .tokenizer import Tokenizer
from .weights import model_files, read_weights, resolve, stored_tensors

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
RECEIPT = "export.json"  # names every file of an export: what makes a folder ours to replace
TURN, ANSWER = "<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\n"  # ChatML
# chat.PLAIN in Ollama's language, around the end of an answer
PLAIN_ANSWER = '{{- range .Messages }}{{ if eq .Role "assistant" }}{{ .Content }}'
PLAIN_QUESTION = "{{ else }}Question: {{ .Content }}\nAnswer: {{ end }}{{ end }}"


def exported_config(config: SmolLM2Config, state: dict[str, Any]) -> SmolLM2Config:
    """The configuration with the context that was really trained: positions beyond it were never seen.

    Weights that started from others keep theirs: a short fine-tuning does not undo a long pre-training.
    """
    data, context = (state.get("config") or {}).get("data") or {}, config.max_position_embeddings
    trained = context if state.get("init_from") else data.get("sequence_length") or context
    return config.model_copy(update={"max_position_embeddings": min(trained, context)})


def tokenizer_files(
    tokenizer: Tokenizer, config: SmolLM2Config, template: str | None, named: dict[str, str]
) -> dict[str, bytes]:
    """`tokenizer.json` unchanged, `tokenizer_config.json` with the model's own special tokens: those that the
    folder named, for the chat template means them."""
    ids = config.bos_token_id, config.eos_token_id, config.pad_token_id
    files = tokenizer.files(config.max_position_embeddings, *ids, named)
    fields = json.loads(files["tokenizer_config.json"])
    fields |= {"chat_template": template} if template else {}
    return files | {"tokenizer_config.json": dump_json(fields)}


def chatml_system(template: str, special: dict[str, str]) -> str | None:
    """The system message that a ChatML template adds by itself, perhaps empty; None for any other template.

    Recognised by what it writes for a conversation of several turns, with a system message and without one.
    """
    talk = [{"role": role, "content": f"{role} said"} for role in ("system", "user", "assistant", "user")]
    system, *turns = [TURN.format(turn["role"], turn["content"]) for turn in talk]
    turns = "".join(turns) + ANSWER
    try:
        asked, alone = render_chat(template, talk, special), render_chat(template, talk[1:], special)
    except CheckpointError:  # it takes no system message, or does not run at all
        return None
    default = r"(?:<\|im_start\|>system\n(.*?)<\|im_end\|>\n)?"
    found = re.fullmatch(default + re.escape(turns), alone, re.DOTALL)
    return (found[1] or "") if found and asked == system + turns else None


def modelfile(weights: str, tokenizer: Tokenizer, ends: tuple, fields: dict) -> str:
    """Ollama's recipe. A base model completes the prompt as it stands, an Instruct model reads ChatML where
    its own template writes that. `ends`: ids that end a text. `fields`: `tokenizer_config.json`."""
    template = fields.get("chat_template")
    lines = [
        f"FROM {weights}",
        f"PARAMETER num_ctx {fields['model_max_length']}",
        "PARAMETER temperature 0.8",
    ]
    if weights == ".":  # Ollama's converter knows splittings by their patterns, and SmolLM2's has none
        other = "other tokens than the model learned: export with --gguf"
        lines.insert(0, f"# Ollama would cut texts for this folder into {other}.")
    stops = [tokenizer.token(i) for i in ends if tokenizer.is_special(i)]
    system = chatml_system(template, special_tokens(fields)) if template else None
    if not template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif template == PLAIN:
        lines.append(f'TEMPLATE """{PLAIN_ANSWER}{fields["eos_token"]}{PLAIN_QUESTION}"""')
    elif system is None:
        lines.append("# No TEMPLATE: the model's chat template is not ChatML, the one kind translated here.")
        lines.append("# Ollama takes the one in the model's own files where it knows it; else write one.")
    else:
        turns = "{{- range .Messages }}" + TURN.format("{{ .Role }}", "{{ .Content }}") + "{{ end }}" + ANSWER
        lines.append(f'TEMPLATE """{turns}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
        stops.append("<|im_end|>")
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def facts_of(file: Path) -> dict[str, Any]:
    """As a receipt has them."""
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def check_out(out: Path, source: Path) -> None:
    """`--out` must be new, empty, or an earlier export, nothing added or changed; raises `ConfigError`."""
    if around := source if out.is_relative_to(source.resolve()) else enclosing_checkpoint(out):
        raise ConfigError(f"--out {out}: lies inside the checkpoint {around}; expected a folder of its own")
    if Path.cwd().is_relative_to(out):  # whoever stands in it would see the old folder, not the new one
        raise ConfigError(f"--out {out}: is the current folder; expected another one")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: {kind_of(out)}; expected a folder that is new or empty")
    ours = recorded(out, RECEIPT).get("files")
    ours = ours if isinstance(ours, dict) else {}
    there = [path for path in sorted(out.glob("*")) if path.name != RECEIPT or not ours]
    foreign = [p.name for p in there if p.name not in ours or ours[p.name] != facts_of(p)]
    if foreign:  # a card that somebody has edited is theirs, too
        raise ConfigError(f"--out {out}: {foreign[0]} is no unchanged part of an export; name a new folder")


def export(
    checkpoint: str | Path, out: str | Path, dtype: str | None = None, gguf: str | None = None
) -> Path:
    """Write the export of a checkpoint folder or Hub id to `out` and return it.

    `dtype` is fp32 or bf16 (default: as stored); `gguf`, f16 or q8_0, adds `model-f16.gguf` or
    `model-q8_0.gguf`. Raises a `UserError` for anything wrong, before `out` is touched.
    """
    folder, target = resolve(checkpoint), Path(os.path.realpath(out))
    check_out(target, folder)
    remove_leftovers(target.parent, glob.escape(target.name))  # of an export that was killed
    if gguf not in (None, *GGUF_TYPES):
        raise ConfigError(f"--gguf {gguf}: expected one of {', '.join(GGUF_TYPES)}")
    with loading():
        import torch

        from .pretrained import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(folder)  # fp32; a checkpoint of ours is verified
    state, template, named = recorded(folder), chat_template(folder), special_tokens(tokenizer_config(folder))
    ends = tuple(i for i in stop_ids(folder, tokenizer) if i < model.config.vocab_size)
    config, tensors = exported_config(model.config, state), stored_tensors(model)
    if dtype is None:  # an export loses nothing unless asked to
        stored = {tensor.dtype for tensor in read_weights(folder, config).values()}
        dtype = "bf16" if stored == {torch.bfloat16} else "fp32"
    rounded = {
        name: tensor.to(getattr(torch, DTYPES[dtype])).contiguous() for name, tensor in tensors.items()
    }
    title = origin_name(checkpoint).removesuffix(".ckpt")
    base, gguf_file = published_base(checkpoint, folder), f"model-{gguf}.gguf" if gguf else None
    card = model_card(title, folder, config, sum(p.numel() for p in tensors.values()), dtype, gguf_file, base)
    files = model_files(config, DTYPES[dtype], ends)
    files |= tokenizer_files(tokenizer, config, template, named)
    fields = json.loads(files["tokenizer_config.json"])
    recipe = modelfile(f"./{gguf_file}" if gguf else ".", tokenizer, ends, fields)
    files |= {"README.md": card.encode(), "Modelfile": recipe.encode()}
    files["model.safetensors"] = lambda path: write_tensors(path, rounded)
    if gguf:  # from the fp32 weights, not from those rounded to bf16
        files[gguf_file] = lambda path: write_gguf(path, config, tensors, tokenizer, gguf, title, fields)
    receipt = {"made_by": "smollm2.export", "step": state.get("step"), "dtype": dtype, "base_model": base}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        commit_folder(target, files, lambda table: {RECEIPT: dump_json(receipt | {"files": table})})
    except OSError as error:
        raise OutputLost(f"--out {out}: {error.strerror or error}; nothing was changed there") from None
    return Path(out)


def main(argv: list[str] | None = None) -> int:
    about = "Write a checkpoint as a folder that other programs read."
    parser = ArgumentParser(prog="python -m smollm2.export", description=about)
    parser.add_path("--checkpoint", help="checkpoint folder, or a Hub id")
    parser.add_path("--out", help="folder: new, empty, or an export to replace")
    parser.add_argument("--dtype", choices=DTYPES, help="of model.safetensors (default: as stored)")
    parser.add_argument("--gguf", choices=GGUF_TYPES, help="also write a GGUF file for llama.cpp and Ollama")
    args = parser.parse_args(argv)
    out = export(args.checkpoint, args.out, args.dtype, args.gguf)
    files = (f"{path.name} {path.stat().st_size:,} bytes" for path in sorted(out.iterdir()))
    print(f"{out}: {', '.join(files)}")
    print(f"to publish it: hf upload OWNER/NAME {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    run_command(main)
