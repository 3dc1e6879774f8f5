"""Take a checkpoint anywhere: `python -m smollm2.export` writes a folder for transformers, llama.cpp, Ollama and the Hub.

Notable:
* transformers 4 and 5 read it alike: both RoPE forms, both dtype forms, a tokenizer class that both keep as it is;
* `tokenizer.json` is copied byte for byte;
* `max_position_embeddings` is the context really trained, the model card holds the run's own figures;
* written to a temporary sibling and renamed: `--out` is the old export or the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

import torch

from .card import PLOT, model_card, plot, read_log
from .config import SmolLM2Config
from .conversation import chat_template
from .errors import ArgumentParser, CheckpointError, ConfigError, OutputLost, run_command
from .files import dump_json, fsync_folder, kind_of, sha256_file, strict_json, write_durably
from .gguf_file import GGUF_TYPES, write_gguf
from .model import SmolLM2
from .origin import published_base, recorded
from .tokenizer import Tokenizer
from .weights import model_files, resolve, stored_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECEIPT = "export.json"  # names every file of an export: what makes a folder ours to replace


def exported_config(config: SmolLM2Config, state: dict) -> SmolLM2Config:
    """The configuration with the context that was really trained: positions beyond it were never seen.

    Weights that started from others keep theirs: a short fine-tuning does not undo a long pre-training.
    """
    run = state.get("config") or {}
    trained = (run.get("data") or {}).get("sequence_length")
    if not trained or state.get("init_from") or trained >= config.max_position_embeddings:
        return config
    return config.model_copy(update={"max_position_embeddings": trained})


def tokenizer_files(tokenizer: Tokenizer, config: SmolLM2Config, template: str | None) -> dict[str, bytes]:
    """`tokenizer.json` unchanged, and a `tokenizer_config.json` with the model's own special tokens and chat template."""
    files = tokenizer.files(config.max_position_embeddings)
    fields = json.loads(files["tokenizer_config.json"])
    for role in ("bos", "eos", "pad"):
        token_id = getattr(config, f"{role}_token_id")
        if token_id is not None and tokenizer.token(token_id) is not None:
            fields[f"{role}_token"] = tokenizer.token(token_id)
    if template:
        fields["chat_template"] = template
    return files | {"tokenizer_config.json": dump_json(fields)}


def modelfile(weights: str, config: SmolLM2Config, tokenizer: Tokenizer, is_chat: bool) -> str:
    """Ollama's recipe. A base model completes the prompt as it stands; an Instruct one is wrapped in ChatML."""
    chat = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    stop = (
        "<|im_end|>"
        if is_chat
        else tokenizer.token(config.eos_token_id)
        if config.eos_token_id is not None
        else None
    )
    lines = [
        f"FROM {weights}",
        f'TEMPLATE """{chat if is_chat else "{{ .Prompt }}"}"""',
        f"PARAMETER num_ctx {config.max_position_embeddings}",
    ]
    lines += ["PARAMETER temperature 0.8"] + ([f'PARAMETER stop "{stop}"'] if stop else [])
    return "\n".join(lines) + "\n"


def check_out(out: Path, source: Path) -> None:
    """`--out` must be new, empty, or an earlier export with nothing added to it; raises `ConfigError`."""
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--out {out}: lies inside the checkpoint {source}; expected a folder of its own")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise ConfigError(
            f"--out {out}: {'a link' if out.is_symlink() else kind_of(out)}; expected a folder that is new or empty"
        )
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    receipt = out / RECEIPT
    if not receipt.is_file() or receipt.stat().st_size > 2**20:
        raise ConfigError(
            f"--out {out}: not empty and not an export ({', '.join(sorted(found)[:3])}); name a new folder"
        )
    fields = strict_json(receipt.read_bytes(), str(receipt))
    known = set(fields.get("files", {})) if isinstance(fields, dict) else set()
    foreign = sorted(found - known - {RECEIPT})
    if foreign:
        raise ConfigError(
            f"--out {out}: an export, but {', '.join(foreign[:3])} was added to it and would be lost; move it or name a new folder"
        )


def stored_dtype(folder: Path) -> str:
    """`bf16` where the weights are stored so, else `fp32`: an export loses nothing unless asked to."""
    from safetensors import safe_open

    file = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    if file is None:
        return "fp32"
    with safe_open(file, framework="pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a dict
    return "bf16" if dtypes == {"BF16"} else "fp32"


def export(
    checkpoint: str | Path, out: str | Path, dtype: str | None = None, gguf: str | None = None
) -> Path:
    """Write the export of a checkpoint folder or Hub id to `out` and return it.

    `dtype` is fp32 or bf16 (default: as stored); `gguf` adds a `model-f16.gguf` or `model-q8_0.gguf`. Raises a
    `UserError` for anything wrong, before `out` is touched.
    """
    out, folder = Path(out), resolve(checkpoint)
    check_out(out, folder)
    state = recorded(folder)
    model = SmolLM2.from_pretrained(folder)  # fp32, verified byte by byte where there is a manifest
    tokenizer = Tokenizer.from_file(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer of {tokenizer.vocab_size:,} entries, model of {model.config.vocab_size:,}: they do not belong together"
        )
    config, template = exported_config(model.config, state), chat_template(folder)
    rows = read_log(folder, state.get("step"))
    dtype = dtype or stored_dtype(folder)
    title = folder.name.removesuffix(".ckpt") if Path(checkpoint).exists() else str(checkpoint)
    gguf_file = f"model-{gguf}.gguf" if gguf else None
    temporary = out.absolute().with_name(f".{out.absolute().name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        if gguf:  # from the fp32 weights, before they are rounded to bf16
            write_gguf(temporary / gguf_file, config, stored_tensors(model), tokenizer, gguf, title, template)
        model.to(DTYPES[dtype]).save_pretrained(temporary)
        small = model_files(config, str(DTYPES[dtype]).removeprefix("torch.")) | tokenizer_files(
            tokenizer, config, template
        )
        small["Modelfile"] = modelfile(
            f"./{gguf_file}" if gguf else ".", config, tokenizer, bool(template)
        ).encode()
        has_plot = plot(rows, temporary / PLOT)
        parameters = sum(p.numel() for p in model.parameters())
        base = published_base(checkpoint, folder)
        small["README.md"] = model_card(
            title, config, parameters, dtype, state, rows, has_plot, gguf_file, base
        ).encode()
        for name, data in small.items():
            write_durably(temporary / name, data)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(temporary.iterdir())
        }
        receipt = {
            "made_by": "smollm2.export",
            "step": state.get("step"),
            "dtype": dtype,
            "base_model": base,
            "files": files,
        }
        write_durably(temporary / RECEIPT, dump_json(receipt))
        fsync_folder(temporary)
        put_in_place(temporary, out.absolute())
    except OSError as error:
        raise OutputLost(f"--out {out}: {error.strerror or error}; nothing was changed there") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def put_in_place(temporary: Path, out: Path) -> None:
    """Rename the finished folder to its name. An earlier export steps aside first and is removed last."""
    aside = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
    if out.exists():
        os.rename(out, aside)
    try:
        os.rename(temporary, out)
    except OSError:
        if aside.exists():
            os.rename(aside, out)
        raise
    fsync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m smollm2.export",
        description="Write a checkpoint as a folder that other programs read.",
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a Hub id")
    parser.add_argument("--out", required=True, help="folder to write: new, empty, or an earlier export")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of model.safetensors (default: as stored)"
    )
    parser.add_argument(
        "--gguf", choices=GGUF_TYPES, default=None, help="also write a GGUF file for llama.cpp and Ollama"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", default=None, help="upload the folder to this model on the Hub"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="with --push: say what would be uploaded, upload nothing"
    )
    args = parser.parse_args(argv)
    if args.dry_run and not args.push:
        raise ConfigError(
            "--dry_run goes with --push OWNER/NAME: an export without it uploads nothing anyway"
        )
    if args.push:
        from .hub import check_repo_id

        check_repo_id(args.push, "--push")
    earlier = {path.name for path in Path(args.out).iterdir()} if os.path.isdir(args.out) else set()
    out = export(args.checkpoint, args.out, args.dtype, args.gguf)
    files = sorted(path for path in out.iterdir())
    print(f"{out}: " + ", ".join(f"{path.name} {path.stat().st_size:,} bytes" for path in files))
    if gone := sorted(earlier - {path.name for path in files}):
        print(
            f"removed with the earlier export: {', '.join(gone)} (an export replaces the whole folder; another --out keeps both)"
        )
    if args.push and args.dry_run:
        print(
            f"dry run: would upload {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes, to {args.push}; nothing was uploaded"
        )
    elif args.push:
        from .hub import push

        print(f"uploaded to {push(out, args.push)}")
    return 0


if __name__ == "__main__":
    run_command(main)
