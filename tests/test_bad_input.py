"""Bad input of every kind: an exit code, one clear line, nothing left behind, and never a traceback.

Most cases run `main(argv)` in this process, through the same `run_command` as the real programs; a few real processes
show that there is no difference.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import colab_train
from smollm2 import evaluate, generate
from smollm2.checkpoint import FINAL_NAMES
from smollm2.errors import run_command
from smollm2.progress import Reporter
from smollm2.settings import load_config

ROOT = Path(__file__).parents[1]
PROGRAMS = {"train": colab_train.main, "generate": generate.main, "evaluate": evaluate.main}
CONFIG = """\
preset: nano
model: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 32}
data: {sequence_length: 16, tokenizer_vocab_size: 300}
train:
  max_steps: 4
  batch_size: 4
  micro_batch_size: 2
  learning_rate: 1e-3
  warmup_steps: 2
  val_every: 4
  val_max_tokens: 100
  sample_every: 4
  sample_tokens: 2
  save_every: 2
  precision: fp32
"""
TEXT = "".join(f"{n} green bottles hanging on the wall, and {n * 7 % 13} of them fall.\n" for n in range(200))


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    seconds: float


def call(program: str, argv: list[str], stdin: bytes = b"") -> Outcome:
    """Run a program in this process as the shell would; an exception that is no exit is a traceback, and fails."""
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(lambda: PROGRAMS[program](argv))
    except SystemExit as ended:
        return Outcome(ended.code or 0, out.getvalue(), err.getvalue(), time.monotonic() - began)
    except BaseException as error:
        pytest.fail(
            f"{program} {argv}: a traceback instead of a message: {''.join(traceback.format_exception(error)[-3:])}",
            pytrace=False,
        )
    finally:
        sys.stdin = before
    raise AssertionError("run_command came back")


def files_below(*folders: Path) -> dict[str, tuple]:
    """Every name, with size and content hash of small regular files: what must not change."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                found[str(path)] = ("not a regular file",)
            else:
                found[str(path)] = (path.stat().st_size, hash(path.read_bytes()))
    return found


def check_refusal(outcome: Outcome, *words: str, code: int = 2) -> None:
    lines = outcome.err.splitlines()
    assert outcome.code == code, (outcome.code, outcome.err, outcome.out[-300:])
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert len(lines[0]) <= 800, f"{len(lines[0])} characters are no clear line"
    assert "Traceback" not in outcome.err + outcome.out
    for word in words:
        assert word.lower() in outcome.err.lower(), f"{word!r} is not in {outcome.err!r}"


# --- a workshop full of bad things


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A folder of inputs, good and bad, and a small trained run in `run/`."""
    from smollm2.training import train

    folder = tmp_path_factory.mktemp("shop")
    good = TEXT.encode()
    contents = {
        "good.txt": good, "tiny.yaml": CONFIG.encode(), "empty.txt": b"", "blank.txt": b" \n\t\n" * 300, "short.txt": b"Too short.\n", "one.txt": b"a",
        "latin1.txt": good[:500] + b"caf\xe9 " + good, "cut.txt": good + "é".encode()[:1], "utf16.txt": TEXT.encode("utf-16"),
        "utf16be.txt": b"\xfe\xff" + TEXT.encode("utf-16-be"), "utf32.txt": TEXT.encode("utf-32"), "utf32be.txt": b"\x00\x00\xfe\xff" + TEXT.encode("utf-32-be"),
        "nul.txt": good[:700] + b"\0" + good, "late-nul.txt": good * 100 + b"\0", "text.gz": gzip.compress(good), "text.zip": b"PK\x03\x04" + bytes(500), "text.pdf": b"%PDF-1.7\n" + good,
        "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(500), "jpeg.jpg": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4, "pickle.bin": b"\x80\x02}q\x00.", "text.xz": b"\xfd7zXZ\x00" + bytes(99),
        "text.zst": b"\x28\xb5\x2f\xfd" + bytes(99), "text.bz2": b"BZh9" + bytes(99), "program": b"\x7fELF\x02\x01\x01" + bytes(400), "controls.txt": bytes(range(1, 32)) * 100,
        "surrogate.txt": good + b"\xed\xa0\x80", "overlong.txt": good + b"\xc0\xaf", "beyond.txt": good + b"\xf5\x80\x80\x80",
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    make_tokenizers(folder)
    train(
        load_config(
            "nano",
            str(folder / "tiny.yaml"),
            **{"data.input_file": str(folder / "good.txt"), "run.output_dir": str(folder / "run")},
        ),
        Reporter(),
    )
    make_checkpoints(folder)
    return folder


def make_tokenizers(folder: Path) -> None:
    from smollm2.tokenizer import Tokenizer

    words = random.Random(0)
    large = Tokenizer.train([" ".join("".join(words.choices("abcdefgh", k=4)) for _ in range(2000))], 400)
    assert large.vocab_size == 400
    for name, data in {
        "not-json.json": b"hello", "list.json": b"[]", "empty.json": b"", "no-model.json": b'{"version": "1.0"}', "cut.json": large.raw[: len(large.raw) // 2],
        "binary.json": bytes(range(256)), "large.json": large.raw, "deep.json": b"[" * 100_000,
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)


def make_checkpoints(shop: Path) -> None:
    """Copies of the trained model's folder, each broken in its own way, in `broken/`."""
    source = shop / "run" / "checkpoints" / FINAL_NAMES[0]
    weights = load_file(source / "model.safetensors")
    name = next(iter(weights))

    def config(**changes):
        return lambda f: (f / "config.json").write_text(
            json.dumps(json.loads((f / "config.json").read_text()) | changes)
        )

    def tensors(change: Callable[[dict], dict]):
        return lambda f: save_file(change(dict(weights)), f / "model.safetensors")

    def put(file: str, data: bytes):
        return lambda f: (f / file).write_bytes(data)

    def flip(file: str):
        def change(f):
            data = bytearray((f / file).read_bytes())
            data[len(data) // 2] ^= 1
            (f / file).write_bytes(data)

        return change

    raw = (source / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    foreign = {  # without our manifest, as from anywhere
        "no-config": lambda f: (f / "config.json").unlink(), "config-list": put("config.json", b"[]"), "config-text": put("config.json", b"hello"), "config-empty": put("config.json", b""),
        "config-nan": put("config.json", b'{"hidden_size": NaN}'), "config-twice": put("config.json", b'{"a": 1, "a": 2}'), "config-huge": put("config.json", b" " * (2**20 + 1)),
        "config-deep": put("config.json", b"[" * 50_000), "config-folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config-binary": put("config.json", bytes(range(256))),
        "gpt2": config(model_type="gpt2"), "gelu": config(hidden_act="gelu"), "bias": config(attention_bias=True), "rope": config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "rope-text": config(rope_scaling="linear"), "rope-list": config(rope_parameters=[1]), "hidden-text": config(hidden_size="many"), "hidden-zero": config(hidden_size=0), "hidden-negative": config(hidden_size=-16),
        "hidden-float": config(hidden_size=16.5), "hidden-null": config(hidden_size=None), "heads": config(num_attention_heads=3, head_dim=None), "layers-huge": config(num_hidden_layers=10**9),
        "hidden-huge": config(hidden_size=10**12, head_dim=None), "context-huge": config(max_position_embeddings=10**12), "vocab-huge": config(vocab_size=10**9), "tables-huge": config(max_position_embeddings=2**20, head_dim=2**12), "theta-infinite": put("config.json", b'{"rope_theta": 1e999}'),
        "other-width": config(hidden_size=32, head_dim=None), "other-depth": config(num_hidden_layers=2), "other-vocabulary": config(vocab_size=301), "untied": config(tie_word_embeddings=False),
        "no-weights": lambda f: (f / "model.safetensors").unlink(), "weights-empty": put("model.safetensors", b""), "weights-8": put("model.safetensors", raw[:8]), "weights-cut": put("model.safetensors", raw[: len(raw) // 2]),
        "weights-last": put("model.safetensors", raw[:-1]), "weights-more": put("model.safetensors", raw + b"x"), "weights-header": put("model.safetensors", (2**60).to_bytes(8, "little") + raw[8:]),
        "weights-json": put("model.safetensors", raw[:8] + b"x" * header + raw[8 + header :]), "weights-text": put("model.safetensors", b"hello, I am a model " * 99), "weights-pickle": put("model.safetensors", b"\x80\x02}q\x00."),
        "weights-offsets": put("model.safetensors", raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)), "weights-folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "weights-nan": tensors(lambda w: w | {name: torch.full_like(w[name], torch.nan)}), "weights-infinite": tensors(lambda w: w | {name: torch.full_like(w[name], torch.inf)}),
        "weights-fewer": tensors(lambda w: {k: v for k, v in w.items() if k != name}), "weights-extra": tensors(lambda w: w | {"model.extra": torch.zeros(2)}), "weights-shape": tensors(lambda w: w | {name: w[name].T.contiguous()[:3]}),
        "weights-integers": tensors(lambda w: {k: (v * 100).to(torch.int32) for k, v in w.items()}), "weights-none": tensors(lambda w: {}),
        "index-list": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text("[]")), "index-map-list": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text('{"weight_map": []}')),
        "index-numbers": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')), "index-leaves": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')),
        "index-missing": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')), "only-bin": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no-tokenizer": lambda f: (f / "tokenizer.json").unlink(), "tokenizer-text": put("tokenizer.json", b"hello"), "tokenizer-empty": put("tokenizer.json", b""), "tokenizer-larger": lambda f: shutil.copy(shop / "large.json", f / "tokenizer.json"),
    }  # fmt: skip
    ours = {
        "ours-config": flip("config.json"), "ours-weights": flip("model.safetensors"), "ours-tokenizer": flip("tokenizer.json"), "ours-cut": put("model.safetensors", raw[:-1]), "ours-empty": put("model.safetensors", b""),
        "ours-manifest": flip("manifest.json"), "ours-manifest-empty": put("manifest.json", b""), "ours-manifest-list": put("manifest.json", b"[]"), "ours-manifest-huge": put("manifest.json", b" " * (2**20 + 1)),
        "ours-future": lambda f: forge(f, format=2), "ours-no-files": lambda f: forge(f, files={}), "ours-files-list": lambda f: forge(f, files=[1]), "ours-leaves": lambda f: forge(f, files={"../x": {"bytes": 1, "sha256": "0" * 64}}),
        "ours-step-text": lambda f: forge(f, step="many"), "ours-missing": lambda f: (f / "model.safetensors").unlink(), "ours-link": lambda f: ((f / "model.safetensors").rename(f / "elsewhere"), (f / "model.safetensors").symlink_to("elsewhere")),
    }  # fmt: skip
    for title, damage in (foreign | ours).items():
        target = shop / "broken" / title
        shutil.copytree(source, target)
        if title in foreign:
            (target / "manifest.json").unlink()
        damage(target)


def forge(folder: Path, **changes) -> None:
    """A manifest with other content and a right hash of itself, as an attacker or a later version would write it."""
    from smollm2.files import dump_json, sha256_json

    body = json.loads((folder / "manifest.json").read_text()) | changes
    body.pop("sha256_of_this")
    (folder / "manifest.json").write_bytes(dump_json(body | {"sha256_of_this": sha256_json(body)}))


@pytest.fixture(scope="module", autouse=True)
def modest_memory():
    """What a mistake asks for is refused before it is taken: the whole file needs less than half a GiB more than the process had."""
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(field: str) -> int:
        return int(
            next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1]
        )

    if not peak.exists():
        yield
        return
    before = kilobytes("VmRSS:")
    peak.write_text("5")  # forget the highest value so far
    yield
    assert kilobytes("VmHWM:") - before < 2**19


@pytest.fixture
def refused(shop, tmp_path, monkeypatch) -> Callable:
    """`refused(program, argv, *words)`: the call is refused with these words, and not one file changed anywhere."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = files_below(work, temporary)

    def check(program: str, argv: list[str], *words: str, code: int = 2, stdin: bytes = b"") -> Outcome:
        outcome = call(program, [str(a).replace("SHOP", str(shop)) for a in argv], stdin)
        check_refusal(outcome, *words, code=code)
        assert files_below(work, temporary) == before, "something was left behind"
        SECONDS.append(outcome.seconds)
        return outcome

    return check


SECONDS: list[float] = []
ACCEPTED: list[int] = []
TRAIN = ["--config", "SHOP/tiny.yaml", "--input_file", "SHOP/good.txt"]


# --- texts

BAD_TEXTS = {
    "SHOP/missing.txt": ("no such file", "expected a text file"),
    "SHOP/a folder": ("a folder", "one of the files"),
    "SHOP/pipe": ("a pipe",),
    "SHOP/socket": ("a socket",),
    "/dev/zero": ("a device",),
    "/dev/null": ("a device",),
    "SHOP/loop": ("symbolic links",),
    "SHOP/dangling": ("no such file",),
    "SHOP/good.txt/x": ("Not a directory",),
    "x" * 300: ("name too long",),
    "": ("expected a text file",),
    "-": ("no such file",),
    "~/nothing.txt": ("no such file",),
    "https://example.org/input.txt": ("expected a text file",),
    "a\0b": ("NUL character",),
    "\udcff.txt": (),
    "SHOP/empty.txt": ("empty",),
    "SHOP/latin1.txt": ("not UTF-8", "byte offset 503", "0xe9"),
    "SHOP/cut.txt": ("not UTF-8",),
    "SHOP/surrogate.txt": ("not UTF-8",),
    "SHOP/overlong.txt": ("not UTF-8",),
    "SHOP/beyond.txt": ("not UTF-8",),
    "SHOP/utf16.txt": ("UTF-16",),
    "SHOP/utf16be.txt": ("UTF-16",),
    "SHOP/utf32.txt": ("UTF-32",),
    "SHOP/utf32be.txt": ("UTF-32",),
    "SHOP/nul.txt": ("binary",),
    "SHOP/late-nul.txt": ("binary",),
    "SHOP/text.gz": ("gzip", "unpack"),
    "SHOP/text.zip": ("zip",),
    "SHOP/text.pdf": ("PDF",),
    "SHOP/picture.png": ("picture",),
    "SHOP/jpeg.jpg": ("binary",),
    "SHOP/pickle.bin": ("pickle",),
    "SHOP/text.xz": ("xz",),
    "SHOP/text.zst": ("zstd",),
    "SHOP/text.bz2": ("bzip2",),
    "SHOP/program": ("binary",),
    "SHOP/controls.txt": ("binary",),
}


@pytest.mark.parametrize("path", BAD_TEXTS)
def test_training_refuses_a_text_that_is_none(path, refused):
    refused(
        "train",
        ["--config", "SHOP/tiny.yaml", "--input_file", path, "--output_dir", "output"],
        *BAD_TEXTS[path],
    )


@pytest.mark.parametrize("path", BAD_TEXTS)
def test_evaluation_refuses_a_text_that_is_none(path, refused):
    refused(
        "evaluate",
        ["--checkpoint", f"SHOP/run/checkpoints/{FINAL_NAMES[0]}", "--input_file", path],
        *BAD_TEXTS[path],
    )


@pytest.mark.parametrize(
    "name, words",
    [("short.txt", ("training tokens, but one row needs 17",)), ("one.txt", ("tokens",)), ("blank.txt", ())],
)
def test_training_refuses_a_text_that_is_too_short(name, words, refused):
    if name != "blank.txt":  # 1,200 blanks are tokens like others
        refused(
            "train",
            ["--config", "SHOP/tiny.yaml", "--input_file", f"SHOP/{name}", "--output_dir", "output"],
            *words,
        )


def test_the_default_input_is_named_when_it_is_missing_here_and_beside_the_program(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setattr(colab_train, "__file__", str(tmp_path / "colab_train.py"))
    refused("train", [], "input.txt", "no such file")


def test_a_text_without_permission_is_named(shop, refused, tmp_path):
    path = shop / "secret.txt"
    path.write_text(TEXT)
    path.chmod(0)
    try:
        with somebody_else(shop, tmp_path):
            refused("train", ["--input_file", path, "--output_dir", "/dev/shm/never"], "Permission denied")
            refused(
                "evaluate",
                ["--checkpoint", f"SHOP/run/checkpoints/{FINAL_NAMES[0]}", "--input_file", path],
                "Permission denied",
            )
    finally:
        path.unlink()


@contextlib.contextmanager
def somebody_else(*folders: Path):
    """root may read everything, so become nobody for a moment; every folder above must let nobody through."""
    if os.geteuid() != 0:
        yield
        return
    closed = [
        (p, p.stat().st_mode)
        for folder in folders
        for p in (folder, *folder.parents)
        if p.stat().st_uid == 0 and not p.stat().st_mode & 1
    ]
    for path, mode in closed:
        path.chmod(mode | 0o55)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in closed:
            path.chmod(mode & 0o7777)


@pytest.mark.parametrize("form", ["plain", "bom", "crlf", "cr", "one line"])
def test_forms_of_one_text_train_alike(form, shop, tmp_path, monkeypatch):
    """A byte-order mark and foreign line ends change nothing, in a path with blanks and accents and at full length."""
    data = {
        "bom": b"\xef\xbb\xbf" + TEXT.encode(),
        "crlf": TEXT.replace("\n", "\r\n").encode(),
        "cr": TEXT.replace("\n", "\r").encode(),
        "one line": TEXT.replace("\n", " ").encode(),
    }.get(form, TEXT.encode())
    folder = tmp_path / "My Drive" / "Übung 日本"
    folder.mkdir(parents=True)
    path = folder / ("n" * 251 + ".txt")
    path.write_bytes(data)
    outcome = call(
        "train",
        [
            "--config",
            str(shop / "tiny.yaml"),
            "--input_file",
            str(path),
            "--output_dir",
            str(folder / "out put"),
        ],
    )
    assert outcome.code == 0, outcome.err
    if form != "one line":
        same = (folder / "out put" / "checkpoints" / FINAL_NAMES[0] / "model.safetensors").read_bytes()
        assert same == (shop / "run" / "checkpoints" / FINAL_NAMES[0] / "model.safetensors").read_bytes()


# --- configuration files


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


BAD_CONFIGS = {
    "": ("found NoneType",),
    "   \n\n": ("found NoneType",),
    "# nothing\n": ("found NoneType",),
    "- a\n- b\n": ("found list",),
    "just words": ("found str",),
    "42": ("found int",),
    "model:\n\thidden_size: 5\n": ("not valid YAML",),
    "model: {hidden_size: 5": ("not valid YAML",),
    "a\0b": ("not valid YAML",),
    "train: {max_steps: 5}\n---\ntrain: {}": ("not valid YAML",),
    "a: &a [1, 2]\nb: *a": ("aliases",),
    "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]": ("aliases",),
    "data: " + deep(2000): ("nested deeper",),
    "data: " + deep(25): ("nested deeper",),
    "train: {prompts: " + deep(18) + "}": ("prompts",),
    "x: " + "y" * 70_000: ("larger than 64 KiB",),
    "train: {max_steps: 5, max_steps: 6}": ("twice",),
    "train: {}\ntrain: {}": ("twice",),
    "!!python/object/apply:os.system ['touch canary']": ("not valid YAML",),
    "train: !!python/name:os.system": ("not valid YAML",),
    "1: 2": ("not a word",),
    "yes: 1": ("not a word",),
    "? [a]\n: b": ("not a word",),
    "? {a: b}\n: c": ("not a word",),
    "trian: {max_steps: 5}": ("unknown key 'trian'", "did you mean 'train'"),
    "train: {max_stepss: 5}": ("unknown key", "max_steps"),
    "model: {hidden: 5}": ("unknown key",),
    "train:": ("train",),
    "train: 5": ("train",),
    "train: [1]": ("train",),
    "train: text": ("train",),
    "train: {max_steps: .nan}": ("max_steps",),
    "train: {learning_rate: .nan}": ("learning_rate",),
    "train: {learning_rate: .inf}": ("learning_rate",),
    "train: {learning_rate: -.inf}": ("learning_rate",),
    "train: {learning_rate: fast}": ("learning_rate",),
    "train: {learning_rate: -1}": ("learning_rate",),
    "train: {learning_rate: 0}": ("learning_rate",),
    "train: {learning_rate: 1e999}": ("learning_rate",),
    "train: {learning_rate: [1e-3]}": ("learning_rate",),
    "train: {max_steps: no}": ("max_steps", "boolean"),
    "train: {max_steps: 1.5}": ("max_steps",),
    "train: {max_steps: 0}": ("max_steps",),
    "train: {max_steps: -5}": ("max_steps",),
    "train: {max_steps: 1e99}": ("max_steps",),
    "train: {max_steps: 12:30:99x}": ("max_steps",),
    "train: {max_steps: 2020-01-01}": ("max_steps",),
    "train: {max_steps: 99999999999999999999999999}": ("max_steps",),
    f"train: {{max_steps: {'9' * 5000}}}": (),
    "train: {batch_size: 0}": ("batch_size",),
    "train: {batch_size: 100000000000}": ("batch_size",),
    "train: {batch_size: 6, micro_batch_size: 4}": ("not a multiple",),
    "train: {precision: int4}": ("precision",),
    "train: {prompts: []}": ("prompts",),
    "train: {prompts: hello}": ("prompts",),
    "train: {prompts: [1]}": ("prompts",),
    "train: {seed: -1}": ("seed",),
    "train: {seed: 99999999999999999999}": ("seed",),
    "train: {adam_beta1: 1.0}": ("adam_beta1",),
    "train: {decay_fraction: 2}": ("decay_fraction",),
    "train: {on_spike: panic}": ("on_spike",),
    "train: {compile: 3}": ("compile",),
    "train: {keep_last: 0}": ("keep_last",),
    "data: {sequence_length: 1}": ("sequence_length",),
    "data: {sequence_length: 999999}": ("exceeds",),
    "data: {held_out_fraction: 1}": ("held_out_fraction",),
    "data: {held_out_fraction: 0}": ("held_out_fraction",),
    "data: {input_file: [a]}": ("input_file",),
    "data: {tokenizer: ''}": ("tokenizer",),
    "model: {hidden_size: 15, num_attention_heads: 2}": ("hidden_size",),
    "model: {hidden_size: 6, num_attention_heads: 2}": ("odd",),
    "model: {num_attention_heads: 6, num_key_value_heads: 4}": ("not a multiple",),
    "model: {vocab_size: 70000}": ("vocab_size",),
    "model: {vocab_size: 1}": ("vocab_size",),
    "model: {num_hidden_layers: 0}": ("num_hidden_layers",),
    "model: {num_hidden_layers: 1000000000}": ("num_hidden_layers",),
    "model: {hidden_size: 1000000000000}": ("hidden_size",),
    "model: {max_position_embeddings: 1000000000000}": ("max_position_embeddings",),
    "model: {hidden_size: 65536, num_attention_heads: 64, num_key_value_heads: 64, num_hidden_layers: 1000}": (
        "memory",
        "smaller model",
    ),
    "model: {head_dim: 4096, max_position_embeddings: 1048576}": ("RoPE tables", "GiB", "smaller"),
    "train: {batch_size: 1048576}": ("batch_size", "memory", "choose a smaller train.micro_batch_size"),
    "model: {rope_theta: 0}": ("rope_theta",),
    "model: {tie_word_embeddings: maybe}": ("tie_word_embeddings",),
    "run: {resume: sometimes}": ("resume",),
    "run: {devices: 0}": ("devices",),
    "run: {devices: 7}": ("7 workers",),
    "run: {output_dir: ''}": ("output_dir",),
    "preset: huge": ("unknown preset 'huge'",),
    "preset: [nano]": ("preset",),
    "preset: smollm2-135": ("did you mean 'smollm2-135m'",),
}


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_a_bad_configuration_file_is_refused(text, refused, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    places = {
        "data.input_file": ["--input_file", "SHOP/good.txt"],
        "run.output_dir": ["--output_dir", "output"],
    }
    argv = [
        word for key, words in places.items() if key.split(".")[1] not in text for word in words
    ]  # a flag would win over the file
    refused("train", ["--config", path, *argv], *BAD_CONFIGS[text])


@pytest.mark.parametrize(
    "path, word",
    [
        ("SHOP/none.yaml", "no such file"),
        ("SHOP/a folder", "not a regular file"),
        ("SHOP/pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("SHOP/text.gz", "not UTF-8"),
        ("SHOP/latin1.txt", "not UTF-8"),
        ("a\0b", "no such file"),
        ("SHOP/loop", ""),
        ("", "not a regular file"),
        ("y" * 300, ""),
    ],
)
def test_a_configuration_file_that_is_none_is_refused(path, word, refused):
    refused("train", ["--config", path, "--input_file", "SHOP/good.txt"], "--config", word)


# --- command lines

BAD_COMMANDS = [
    ("train", ["--max_step", "5"], ("unknown argument", "did you mean '--max_steps'")),
    ("train", ["--learning_rate", "1"], ("unknown argument",)),
    ("train", ["--output-dir", "x"], ("did you mean '--output_dir'",)),
    ("train", ["extra"], ("unknown argument",)),
    ("train", ["--"], ()),
    ("train", ["--max_steps"], ("expected one argument",)),
    ("train", ["--max_steps", "-5"], ("max_steps",)),
    ("train", ["--max_steps=-5"], ("max_steps",)),
    ("train", ["--max_steps", "0"], ("max_steps",)),
    ("train", ["--max_steps", "1e99"], ("max_steps",)),
    ("train", ["--max_steps", "nan"], ("max_steps",)),
    ("train", ["--max_steps", "1.5"], ("max_steps",)),
    ("train", ["--max_steps", ""], ("max_steps",)),
    ("train", ["--max_steps", "9" * 5000], ("max_steps",)),
    ("train", ["--max_steps", "9" * 50], ("max_steps",)),
    ("train", ["--continue_steps", "-1"], ("continue_steps",)),
    ("train", ["--seed", "-1"], ("seed",)),
    ("train", ["--seed", "x"], ("seed",)),
    ("train", ["--seed", str(2**63)], ("seed",)),
    ("train", ["--resume", "maybe"], ("resume", "auto")),
    ("train", ["--devices", "0"], ("devices",)),
    ("train", ["--devices", "3"], ("3 workers",)),
    ("train", ["--num_nodes", "-1"], ("num_nodes",)),
    ("train", ["--preset", "nanno"], ("did you mean 'nano'",)),
    ("train", ["--preset", ""], ("unknown preset",)),
    ("train", ["--preset", "../presets/nano"], ("unknown preset",)),
    ("train", ["--set", ""], ("key=value",)),
    ("train", ["--set", "max_steps"], ("key=value",)),
    ("train", ["--set", "=5"], ("key=value",)),
    ("train", ["--set", "nothing=5"], ("unknown key 'nothing'",)),
    ("train", ["--set", "train.learning_rat=5"], ("did you mean",)),
    ("train", ["--set", "train=5"], ("unknown key",)),
    ("train", ["--set", "train.max_steps="], ("max_steps",)),
    ("train", ["--set", "train.max_steps=[1]"], ("max_steps",)),
    ("train", ["--set", "train.max_steps={a: 1}"], ("max_steps",)),
    ("train", ["--set", "train.prompts=" + deep(3000)], ("prompts",)),
    ("train", ["--set", "train.learning_rate=" + "9" * 70000], ("too long",)),
    ("train", ["--set", "train.learning_rate=!!python/object/apply:os.getcwd []"], ("learning_rate",)),
    ("train", ["--set", "train.learning_rate=a: b: c"], ("learning_rate",)),
    ("train", ["--set", "\0=1"], ("unknown key",)),
    ("train", ["--set", "run.resume=null"], ("resume",)),
    ("train", ["--output_dir", "\udcff"], ("output_dir", "UTF-8")),
    ("train", ["--set", 'train.prompts=["\udcff"]'], ("prompts", "UTF-8")),
    ("train", ["--output_dir", "deep/and/deeper", "--tokenizer", "SHOP/missing.json"], ("missing.json",)),
    ("train", ["--output_dir", ""], ("output_dir",)),
    ("train", ["--output_dir", "SHOP/good.txt"], ("output_dir", "file", 7)),
    ("train", ["--output_dir", "SHOP/good.txt/x"], ("output_dir", 7)),
    ("train", ["--output_dir", "/dev/null"], ("output_dir", 7)),
    ("train", ["--output_dir", "/proc/nothing"], ("output_dir", 7)),
    ("train", ["--output_dir", "o" * 300], ("output_dir", "too long", 7)),
    ("train", ["--output_dir", "a\0b"], ("output_dir", "NUL")),
    ("train", ["--output_dir", "SHOP/loop"], ("output_dir", 7)),
    ("train", ["--drive_dir", "nowhere/deep"], ("drive_dir", "does not exist")),
    ("train", ["--drive_dir", "SHOP/good.txt"], ("drive_dir", "found a file")),
    ("train", ["--drive_dir", "SHOP/good.txt/x"], ("drive_dir",)),
    ("train", ["--drive_dir", "output"], ("drive_dir", "own folder")),
    ("train", ["--drive_dir", "/content/drive/MyDrive/run"], ("drive_dir", "not mounted")),
    ("train", ["--drive_dir", "a\0b"], ("drive_dir",)),
    ("train", ["--drive_dir", ""], ("drive_dir",)),
    ("train", ["--tokenizer", "SHOP/missing.json"], ("missing.json", "no such file")),
    ("train", ["--tokenizer", "SHOP/a folder"], ("tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/not-json.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/list.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/empty.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/no-model.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/cut.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/binary.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/deep.json"], ("not a tokenizer.json",)),
    ("train", ["--tokenizer", "SHOP/large.json"], ("400 entries", "vocab_size")),
    ("train", ["--tokenizer", "SHOP/pipe"], ("a pipe",)),
    ("train", ["--tokenizer", ""], ("tokenizer",)),
    ("train", ["--tokenizer", "a/b/c"], ("a/b/c",)),
    ("train", ["--tokenizer", "nobody/nothing"], ("nobody/nothing",)),
    ("train", ["--tokenizer", "a\0b"], ("tokenizer",)),
    ("train", ["--dataset", "nobody/nothing"], ("dataset",)),
    ("train", ["--set", "run.init_from=SHOP/missing"], ("SHOP/missing", "no such file")),
    ("train", ["--set", "run.init_from=SHOP/pickle.bin"], ("pickle.bin",)),
    ("train", ["--set", "run.init_from=SHOP/a folder"], ("config.json",)),
    ("train", ["--set", "run.init_from=SHOP/broken/weights-nan"], ("not finite",)),
    ("train", ["--set", "run.init_from=SHOP/broken/gpt2"], ("model_type",)),
    ("generate", [], ("--checkpoint",)),
    ("generate", ["--checkpoint"], ("expected one argument",)),
    ("generate", ["--checkpoint", "SHOP/missing", "--prompt", "x"], ("no such file",)),
    ("generate", ["--checkpoint", "SHOP/good.txt", "--prompt", "x"], ("single file",)),
    ("generate", ["--checkpoint", "SHOP/pickle.bin", "--prompt", "x"], ("never opened",)),
    ("generate", ["--checkpoint", "SHOP/a folder", "--prompt", "x"], ("no config.json",)),
    ("generate", ["--checkpoint", "SHOP/run", "--prompt", "x"], ("did you mean", "final_model.ckpt")),
    ("generate", ["--checkpoint", "SHOP/run/checkpoints", "--prompt", "x"], ("did you mean",)),
    ("generate", ["--checkpoint", "SHOP/pipe", "--prompt", "x"], ("a pipe",)),
    ("generate", ["--checkpoint", "", "--prompt", "x"], ("checkpoint",)),
    ("generate", ["--checkpoint", "a\0b", "--prompt", "x"], ("checkpoint",)),
    ("generate", ["--checkpoint", "c" * 300, "--prompt", "x"], ("checkpoint",)),
    ("generate", ["--checkpoint", "nobody/nothing", "--prompt", "x"], ("nobody/nothing",)),
    ("generate", ["--checkpoint", "no body/no?thing", "--prompt", "x"], ("no?thing",)),
    ("generate", ["MODEL", "--temperature", "-1"], ("temperature",)),
    ("generate", ["MODEL", "--temperature", "nan"], ("temperature",)),
    ("generate", ["MODEL", "--temperature", "inf"], ("temperature",)),
    ("generate", ["MODEL", "--temperature", "hot"], ("temperature",)),
    ("generate", ["MODEL", "--top_k", "0"], ("top_k",)),
    ("generate", ["MODEL", "--top_k", "-3"], ("top_k",)),
    ("generate", ["MODEL", "--top_k", "1.5"], ("top_k",)),
    ("generate", ["MODEL", "--top_p", "0"], ("top_p",)),
    ("generate", ["MODEL", "--top_p", "1.5"], ("top_p",)),
    ("generate", ["MODEL", "--top_p", "nan"], ("top_p",)),
    ("generate", ["MODEL", "--min_p", "-0.1"], ("min_p",)),
    ("generate", ["MODEL", "--min_p", "2"], ("min_p",)),
    ("generate", ["MODEL", "--max_new_tokens", "-1"], ("max_new_tokens",)),
    ("generate", ["MODEL", "--max_new_tokens", "many"], ("max_new_tokens",)),
    ("generate", ["MODEL", "--seed", "-1"], ("seed",)),
    ("generate", ["MODEL", "--seed", str(2**64)], ("seed",)),
    ("generate", ["MODEL", "--prompt", "word " * 100], ("context is 32", "shorten")),
    ("generate", ["MODEL", "--prompt", "\udcff"], ("UTF-8",)),
    ("generate", ["MODEL", "--propmt", "x"], ("did you mean '--prompt'",)),
    ("evaluate", [], ("--checkpoint",)),
    ("evaluate", ["MODEL"], ("--input_file",)),
    ("evaluate", ["MODEL", "--input_file", "SHOP/good.txt", "--split", "test"], ("split", "val")),
    ("evaluate", ["MODEL", "--input_file", "SHOP/good.txt", "--jsn"], ("did you mean '--json'",)),
    ("evaluate", ["MODEL", "--input_file", "SHOP/one.txt", "--split", "train"], ("nothing to evaluate",)),
    ("evaluate", ["--checkpoint", "SHOP/missing", "--input_file", "SHOP/good.txt"], ("no such file",)),
    ("evaluate", ["--checkpoint", "SHOP/run", "--input_file", "SHOP/good.txt"], ("did you mean",)),
]


@pytest.mark.parametrize(
    "program, argv, words",
    BAD_COMMANDS,
    ids=[f"{program}-{n}" for n, (program, *_) in enumerate(BAD_COMMANDS)],
)
def test_a_bad_command_line_is_refused(program, argv, words, refused, shop):
    if program == "train" and argv != ["--"]:
        argv = [*TRAIN, "--output_dir", "output", *argv]
    argv = [
        part
        for word in argv
        for part in (
            ["--checkpoint", f"SHOP/run/checkpoints/{FINAL_NAMES[0]}"] if word == "MODEL" else [word]
        )
    ]
    if program == "generate" and "--checkpoint" in argv and "--prompt" not in argv and len(argv) > 2:
        argv += ["--prompt", "x"]
    code = next((word for word in words if isinstance(word, int)), 2)
    refused(
        program,
        argv,
        *[word.replace("SHOP", str(shop)) for word in words if isinstance(word, str)],
        code=code,
    )


# --- checkpoints


def broken_names() -> list[str]:
    """The names `make_checkpoints` gives, known before the fixture runs."""
    import re

    source = (
        Path(__file__)
        .read_text(encoding="utf-8")
        .partition("foreign = {")[2]
        .partition("for title, damage")[0]
    )
    return re.findall(r'(?:^|\s)"([a-z0-9-]+)": (?:put|config|tensors|flip|lambda)', source)


@pytest.mark.parametrize("name", broken_names())
@pytest.mark.parametrize("program", ["generate", "evaluate"])
def test_a_broken_checkpoint_is_refused(program, name, refused, shop):
    rest = ["--prompt", "green"] if program == "generate" else ["--input_file", "SHOP/good.txt"]
    outcome = refused(
        program,
        ["--checkpoint", f"SHOP/broken/{name}", *rest],
        name if "tokenizer" not in name else "tokenizer",
    )
    assert outcome.seconds < 10


# --- resuming


@pytest.fixture
def run_here(shop, tmp_path) -> Path:
    """A copy of the trained run that a case may spoil."""
    shutil.copytree(shop / "run", tmp_path / "run")
    return tmp_path / "run"


def resume(refused, shop: Path, run: Path, *more: str, words: tuple[str, ...], code: int = 2) -> None:
    """A refused resume changes no checkpoint, no log, nothing."""
    before = {path: facts for path, facts in files_below(run).items() if Path(path).name != ".lock"}
    refused(
        "train",
        [
            "--config",
            "SHOP/tiny.yaml",
            "--input_file",
            "SHOP/good.txt",
            "--output_dir",
            run,
            "--max_steps",
            "6",
            *more,
        ],
        *words,
        code=code,
    )
    assert {path: facts for path, facts in files_below(run).items() if Path(path).name != ".lock"} == before


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--set", "learning_rate=0.002"], ("train.learning_rate: 0.001 -> 0.002", "--resume never")),
        (["--seed", "7"], ("train.seed: 1337 -> 7",)),
        (["--set", "batch_size=8"], ("train.batch_size: 4 -> 8",)),
        (["--set", "hidden_size=32"], ("model.hidden_size",)),
        (["--set", "num_hidden_layers=2"], ("model.num_hidden_layers: 1 -> 2",)),
        (["--set", "rope_theta=100000.0"], ("model.rope_theta",)),
        (["--set", "sequence_length=8"], ("data.sequence_length",)),
        (["--set", "held_out_fraction=0.2"], ("",)),
        (["--tokenizer", "SHOP/large.json"], ("tokenizer",)),
        (["--input_file", "SHOP/other.txt"], ("not the text this run was trained on", "allow_data_change")),
        (["--input_file", "SHOP/missing.txt"], ("no such file",)),
    ],
)
def test_a_resume_with_other_settings_is_refused(changes, words, refused, shop, run_here):
    (shop / "other.txt").write_text(TEXT + "One more.\n")
    resume(refused, shop, run_here, *changes, words=words)


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "missing", "manifest"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(damage, refused, shop, run_here):
    for folder in (run_here / "checkpoints").iterdir():
        path = folder / ("manifest.json" if damage == "manifest" else "optim.safetensors")
        data = path.read_bytes()
        path.write_bytes(
            {"empty": b"", "cut": data[:-1], "flip": bytes([data[0] ^ 1]) + data[1:]}.get(damage, b"")
        )
        if damage == "missing":
            path.unlink()
    resume(refused, shop, run_here, words=("none usable", "--resume never"), code=4)


def test_a_pickled_lightning_checkpoint_in_the_run_is_not_taken_for_ours(shop, run_here, refused):
    shutil.rmtree(run_here / "checkpoints")
    (run_here / "checkpoints").mkdir()
    (run_here / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    outcome = call(
        "train",
        [
            "--config",
            str(shop / "tiny.yaml"),
            "--input_file",
            str(shop / "good.txt"),
            "--output_dir",
            str(run_here),
        ],
    )
    assert outcome.code == 0 and "starting at step 0" in outcome.out


def test_two_processes_never_write_one_folder(shop, run_here, refused):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from smollm2.lock import OutputLock; l = OutputLock({str(run_here)!r}); l.__enter__(); print(1, flush=True); input()",
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        resume(refused, shop, run_here, words=("another process", f"pid {holder.pid}"), code=3)
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def test_an_output_folder_that_cannot_be_written_is_told(shop, tmp_path, refused):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with somebody_else(shop, closed):
        for target in (closed, closed / "inside"):
            refused("train", [*TRAIN, "--output_dir", target], "Permission denied", code=7)


# --- real processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, argv, code",
    [
        ("colab_train.py", ["--max_step", "5"], 2),
        ("colab_train.py", ["--input_file", "missing.txt"], 2),
        ("colab_train.py", ["--config", "SHOP/tiny.yaml", "--input_file", "SHOP/latin1.txt"], 2),
        (
            "colab_train.py",
            ["--config", "SHOP/tiny.yaml", "--input_file", "SHOP/good.txt", "--output_dir", "SHOP/good.txt"],
            7,
        ),
        ("colab_train.py", ["--input_file", b"\xff.txt"], 2),
        ("smollm2.generate", ["--checkpoint", "SHOP/pickle.bin", "--prompt", "x"], 2),
        ("smollm2.generate", ["--checkpoint", "SHOP/broken/ours-weights", "--prompt", "x"], 2),
        ("smollm2.evaluate", ["--checkpoint", "SHOP/broken/gpt2", "--input_file", "SHOP/good.txt"], 2),
    ],
)
def test_real_processes_say_one_line_too(module, argv, code, shop, tmp_path):
    start = [sys.executable, str(ROOT / module)] if module.endswith(".py") else [sys.executable, "-m", module]
    argv = [word if isinstance(word, bytes) else word.replace("SHOP", str(shop)) for word in argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*start, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
    check_refusal(Outcome(result.returncode, result.stdout, result.stderr, 0), code=code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_is_no_reason_to_fail(shop, tmp_path):
    """LC_ALL=C and an ASCII output: the text is printed with escapes, the run ends well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "OMP_NUM_THREADS": "1",
    }
    argv = [
        "--config",
        str(shop / "tiny.yaml"),
        "--input_file",
        str(shop / "good.txt"),
        "--output_dir",
        str(tmp_path / "Übung"),
        "--set",
        "prompts=[Čau, 日本]",
    ]
    result = subprocess.run(
        [sys.executable, str(ROOT / "colab_train.py"), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


# --- five hundred random mistakes

NASTY = [
    "", "0", "-1", "1e99", "nan", ".nan", ".inf", "-.inf", "null", "~", "true", "no", "[]", "{}", "''", "[1, 2]", "{a: 1}", "text", "1e-3", "0x10", "0123", "12:30", "2020-01-01", "9" * 30, "9" * 5000,
    "\0", "\udcff", "\u202e", "é", "💥", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "&a x", "*a", "? x", "- x", "---", "%YAML 9", "@", "`", "|", ">", "#", "\t", "a: b: c", "[" * 50, "{" * 50, "'", '"', "../..", "/dev/full", "\\",
]  # fmt: skip


def mutate_text(chance: random.Random, text: str) -> bytes:
    """One or two edits of a configuration, of lines, values, characters or bytes."""
    data = text
    for _ in range(chance.randint(1, 2)):
        lines = data.split("\n")
        at = chance.randrange(len(lines))
        kind = chance.randrange(8)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[chance.randrange(len(lines))])
        elif kind == 2:
            lines[at] = " " * chance.randint(0, 5) + lines[at]
        elif kind == 3:
            lines[at] = lines[at].split(":")[0] + ": " + chance.choice(NASTY)
        elif kind == 4:
            lines[at] = chance.choice(NASTY) + lines[at]
        data = "\n".join(lines)
        if kind >= 5 and data:
            position = chance.randrange(len(data))
            data = (
                data[:position]
                + chance.choice([*NASTY, ":", "{", "}", ",", " "])
                + data[position + chance.randint(0, 3) :]
            )
    raw = bytearray(data.encode("utf-8", "surrogateescape"))
    if chance.random() < 0.15 and raw:
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    return bytes(raw)


def mutate_command(chance: random.Random, argv: list[str]) -> list[str]:
    argv = list(argv)
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(len(argv))
        kind = chance.randrange(6)
        if kind == 0:
            del argv[at]
        elif kind == 1:
            argv.insert(at, chance.choice(NASTY))
        elif kind == 2:
            argv[at] = chance.choice(NASTY)
        elif kind == 3:
            argv[at] = argv[at][: len(argv[at]) // 2] + chance.choice(NASTY) + argv[at][len(argv[at]) // 2 :]
        elif kind == 4:
            argv.insert(at, chance.choice(argv))
        else:
            argv += [
                "--set",
                f"{chance.choice(['train.', 'model.', 'data.', 'run.', ''])}{chance.choice(['max_steps', 'learning_rate', 'hidden_size', 'prompts', 'resume', 'x'])}={chance.choice(NASTY)}",
            ]
        argv = argv or ["--help"]
    return argv


class Accepted(Exception):
    """The mistake was none: the configuration is valid, and training would begin."""


@pytest.mark.parametrize("block", range(10))
def test_random_mistakes_end_in_one_line_or_in_a_valid_run(block, shop, tmp_path, monkeypatch):
    """50 seeded mutations a block. What is accepted must be a whole configuration; the small ones are trained for two steps."""
    import smollm2.training

    chance = random.Random(1000 + block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    train, accepted, refusals = smollm2.training.train, 0, 0

    def stand_in(config, *rest):
        raise Accepted(config)

    path = tmp_path / "c.yaml"
    for case in range(50):
        monkeypatch.setattr(smollm2.training, "train", stand_in)
        path.write_bytes(mutate_text(chance, CONFIG) if case % 2 else CONFIG.encode())
        argv = [
            "--config",
            str(path),
            "--input_file",
            str(shop / "good.txt"),
            "--output_dir",
            "output",
            "--max_steps",
            "2",
            "--seed",
            "3",
        ]
        argv = argv if case % 2 else mutate_command(chance, argv)
        before = files_below(tmp_path)
        try:
            outcome = call_or_accept(argv)
        except Accepted as valid:
            accepted += 1
            assert files_below(tmp_path) == before
            if is_small(valid.args[0], tmp_path):
                outcome = try_out(train, valid.args[0])
                for name in ("output", valid.args[0].run.output_dir):
                    shutil.rmtree(tmp_path / name, ignore_errors=True)
            continue
        if outcome.code == 0:
            assert "usage" in outcome.out, (argv, outcome)
        else:
            refusals += 1
            check_refusal(outcome, code=outcome.code)
            assert outcome.code in (2, 7)
        assert files_below(tmp_path) == before, argv
    assert refusals >= 20, refusals
    ACCEPTED.append(accepted)


def call_or_accept(argv: list[str]) -> Outcome:
    """`call`, which lets `Accepted` through."""
    out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(lambda: colab_train.main(argv))
    except SystemExit as ended:
        SECONDS.append(time.monotonic() - began)
        return Outcome(ended.code or 0, out.getvalue(), err.getvalue(), SECONDS[-1])
    except Accepted:
        raise
    except BaseException as error:
        pytest.fail(
            f"{argv}: a traceback instead of a message: {''.join(traceback.format_exception(error)[-3:])}",
            pytrace=False,
        )
    raise AssertionError("run_command came back")


def is_small(config, folder: Path) -> bool:
    from smollm2.parameters import parameter_count

    inside = Path(config.run.output_dir) == Path("output")
    cheap = (
        config.train.max_steps <= 4
        and not config.train.continue_steps
        and config.train.sample_tokens < 50
        and not config.train.compile
    )
    return (
        inside
        and cheap
        and parameter_count(config.model) < 100_000
        and config.train.batch_size * config.data.sequence_length < 1000
        and config.run.devices == 1 == config.run.num_nodes
    )


def try_out(train, config) -> Outcome:
    """Train for real: it ends well or with one line."""
    from smollm2.errors import UserError

    try:
        result = train(config, Reporter())
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return Outcome(error.exit_code, "", str(error), 0)
    assert result.step == config.train.max_steps
    return Outcome(0, "", "", 0)


def test_mistakes_are_told_at_once():
    """Runs last in this file: the median of all refusals above."""
    if len(SECONDS) < 200:
        pytest.skip("needs the other tests of this file")
    assert statistics.median(SECONDS) < 0.5, statistics.median(SECONDS)


def test_some_mutations_stay_valid():
    """Mutations that are always refused would prove little."""
    if not ACCEPTED:
        pytest.skip("needs the mutation tests of this file")
    assert sum(ACCEPTED) / len(ACCEPTED) >= 2.5, ACCEPTED


def test_there_are_enough_cases():
    assert 2 * len(BAD_TEXTS) + len(BAD_CONFIGS) + len(BAD_COMMANDS) + 2 * len(broken_names()) >= 120


def test_yaml_bombs_are_really_bombs():
    """The refused ones would have expanded: the case is no straw man."""
    text = next(text for text in BAD_CONFIGS if "&c" in text)
    assert len(str(yaml.safe_load(text)["d"])) > 30
