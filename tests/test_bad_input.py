"""Bad input of every kind: the right exit code, one clear line, nothing left behind, and never a traceback. In this
process, through the real programs' `run_command`, in a folder full of good and bad things, the shop."""

import contextlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess, run

import pytest
import torch
from safetensors.torch import load, save

import colab_train
from smollm2 import evaluate, export, generate
from smollm2.errors import CheckpointError, run_command
from smollm2.files import load_tensors
from smollm2.folder import locked_folder
from smollm2.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
MODEL = "run/checkpoints/final_model.ckpt"
MAIN = {"train": colab_train, "generate": generate, "evaluate": evaluate, "export": export}
SHORT = {  # in the command lines below; flags alone are for TRAIN
    "TRAIN": "train --config tiny.yaml --input_file good.txt --output_dir output",
    "GENERATE": f"generate --checkpoint {MODEL} --prompt x",
    "EVALUATE": f"evaluate --checkpoint {MODEL} --input_file good.txt",
}
CONFIG = """\
preset: nano
model: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 1, max_position_embeddings: 32}
data: {sequence_length: 16, tokenizer_vocab_size: 300}
train: {max_steps: 4, batch_size: 4, micro_batch_size: 2, learning_rate: 0.001, warmup_steps: 2,
  save_every: 2, val_every: 4, val_max_tokens: 100, sample_every: 4, sample_tokens: 2, precision: fp32}
"""
TEXT = "".join(f"{n} green bottles hanging on the wall, and {n * 7 % 13} of them fall.\n" for n in range(200))


def call(line: str, *more: object) -> CompletedProcess:
    """Run a command line in this process as the shell would; anything raised but its exit fails the test."""
    line = f"TRAIN {line}" if line.startswith("--") else line
    for word, words in SHORT.items():
        line = line.replace(word, words)
    program, *argv = [*shlex.split(line), *map(str, more)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run_command(lambda: MAIN[program].main(argv))
    return CompletedProcess(argv, ended.value.code or 0, out.getvalue(), err.getvalue())


def small_run(folder: Path, *more: object) -> Path:
    """A tiny trained run in `folder/run`, beside its text `good.txt` and its configuration `tiny.yaml`."""
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "good.txt").write_text(TEXT)
    places = f"--config {folder}/tiny.yaml --input_file {folder}/good.txt --output_dir {folder}/run"
    assert call(f"train {places}", *more).returncode == 0
    return folder / "run"


def files_below(*folders: Path) -> dict[Path, bytes | None]:
    paths = [path for folder in folders for path in folder.rglob("*") if path.name != ".lock"]  # it may stay
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def check_refusal(done: CompletedProcess, words: str = "", code: int = 2) -> None:
    assert done.returncode == code and re.fullmatch("error: .{5,800}\n", done.stderr), done
    for word in words.split("|"):
        assert word.lower() in done.stderr.lower(), f"{word!r} is not in {done.stderr!r}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    folder, letters = tmp_path_factory.mktemp("shop"), random.Random(0)
    small_run(folder)
    words = " ".join("".join(letters.choices("abcdefgh", k=4)) for _ in range(2000))
    good, large = TEXT.encode(), Tokenizer.train([words], 400).raw
    contents = {
        "empty.txt": b"", "short.txt": b"Too short.\n", "one.txt": b"a", "other.txt": good + b"One more.\n",
        "Übung.txt": good, "latin1.txt": good[:500] + b"caf\xe9 " + good, "cut.txt": good + "é".encode()[:1],
        "overlong.txt": good + b"\xc0\xaf", "surrogate.txt": good + b"\xed\xa0\x80",
        "beyond.txt": good + b"\xf5\x80\x80\x80", "utf16.txt": TEXT.encode("utf-16"),
        "utf16be.txt": b"\xfe\xff" + TEXT.encode("utf-16-be"), "utf32.txt": TEXT.encode("utf-32"),
        "late-nul.txt": good * 99 + b"\0", "nul.txt": good[:700] + b"\0" + good,
        "text.gz": b"\x1f\x8b\x08\x08" * 99, "text.zip": b"PK\x03\x04" + bytes(500),
        "text.bz2": b"BZh91AY&SY\xff" * 9, "table.parquet": b"PAR1\0\0",
        "control.txt": bytes(range(1, 32)) * 9, "mark.txt": b"\xef\xbb\xbf",
        "utf16-no-mark.txt": TEXT.encode("utf-16-be"),
        "text.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + good, "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "pickle.bin": b"\x80\x02}q\x00.", "program": b"\x7fELF\x02\x01\x01" + bytes(400),
        "not.json": b"hello", "list.json": b"[]", "empty.json": b"", "no-model.json": b'{"version": "1.0"}',
        "cut.json": large[: len(large) // 2], "binary.json": bytes(range(256)), "large.json": large,
        "deep.json": b"[" * 100_000,
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    return folder


@pytest.fixture
def here(shop, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shop)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return shop


@pytest.fixture
def refused(here, tmp_path) -> Callable:
    """`refused(line, words)`: the command is refused with these words, and not one file changed anywhere."""

    def check(line: str, words: str, *more: object, code: int = 2) -> None:
        before = files_below(here, tmp_path)
        check_refusal(call(line, *more), words, code)
        assert files_below(here, tmp_path) == before, "something was left behind"

    return check


@pytest.fixture(scope="module", autouse=True)
def modest_memory():
    """What a mistake asks for is refused before it is taken: this file needs less than half a GiB more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(mistake, words of its message) of a table {words: [mistakes]}."""
    return [(mistake, words) for words, mistakes in table.items() for mistake in mistakes]


BAD_TEXTS = {
    "no such file|expected a text file": ["missing.txt", "dangling", "-", "~/nothing.txt"],
    "expected a text file": ["", "https://example.org/input.txt"], "a folder|one of the files": ["a folder"],
    "a pipe": ["pipe"], "a device": ["/dev/zero"], "symbolic links": ["loop"],
    "not a directory": ["good.txt/x"], "name too long": ["x" * 300], "NUL character": ["a\0b"],
    "empty": ["empty.txt"], "not UTF-8|byte offset 503|0xe9": ["latin1.txt"],
    "not UTF-8": ["cut.txt", "surrogate.txt", "overlong.txt", "beyond.txt"],
    "UTF-16": ["utf16.txt", "utf16be.txt"], "UTF-32": ["utf32.txt"],
    "a NUL": ["nul.txt", "late-nul.txt", "utf16-no-mark.txt"],
    "gzip|unpack": ["text.gz"], "zip": ["text.zip"], "bzip2": ["text.bz2"], "PDF": ["text.pdf"],
    "binary: many control": ["control.txt"], "which --dataset reads": ["table.parquet"],
    "expected": ["picture.png", "pickle.bin", "program"], "error": ["\udcff.txt"],
}  # fmt: skip


@pytest.mark.parametrize("path, words", cases(BAD_TEXTS))
def test_a_text_that_is_none_is_refused(path, words, refused):
    refused("--input_file", words, path)
    refused("EVALUATE --input_file", words, path)


def test_the_default_text_is_named_when_it_is_neither_here_nor_beside_the_program(refused, monkeypatch):
    monkeypatch.setattr(colab_train, "__file__", "/nowhere/colab_train.py")
    refused("train", "input.txt|no such file")


def test_a_byte_order_mark_foreign_line_ends_and_a_path_with_blanks_change_nothing(here, tmp_path):
    path = tmp_path / "My Drive" / "Übung 日本" / ("n" * 251 + ".txt")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert call("--input_file", path, "--output_dir", path.parent / "run").returncode == 0
    assert (path.parent / MODEL / WEIGHTS).read_bytes() == (here / MODEL / WEIGHTS).read_bytes()


BAD_FILES = {
    "found NoneType": ["", "# nothing\n"], "found list": ["- a\n- b\n"], "error": ["just words"],
    "not valid YAML": [
        "model:\n\thidden_size: 5\n", "model: {hidden_size: 5", "a\0b", "train: {seed: 5}\n---\na: {}",
        "!!python/object/apply:os.system ['touch canary']", "train: !!python/name:os.system",
        "data: " + "[" * 2000 + "]" * 2000, "x: !!timestamp 2001-99-99\n",
    ],
    "aliases": ["a: &a [1, 2]\nb: *a", "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]"],
    "not a word": ["? [a]\n: b"], "appears twice": ["train: {seed: 5, seed: 6}", "train: {}\ntrain: {}"],
    "did you mean 'train'": ["trian: {max_steps: 5}"], "did you mean 'max_steps'": ["train: {max_stepss: 5}"],
    "train: ": ["train:", "train: 5", "train: [1]"], "train.max_steps": ["train: {max_steps: no}"],
    "unknown preset": ["preset: huge", "preset: smollm2-135", "preset: [nano]"],
    "as an integer": [f"train: {{max_steps: {'9' * 5000}}}"],
    "unknown key": ["model: {hidden: 5}", "1: 2", "yes: 1", "train:\n  <<: {seed: 1}\n"],
    "not a multiple": [
        "train: {batch_size: 6, micro_batch_size: 4}", "model: {num_key_value_heads: 2, num_attention_heads: 3}",
        "model: {hidden_size: 15, num_attention_heads: 2}",
    ],
    "train.batch_size|model.rms_norm_eps": ["train: {batch_size: -1}\nmodel: {rms_norm_eps: 0}"],
}  # fmt: skip
BAD_VALUES = {
    "train.max_steps": [".nan", "1.5", "0", "-5", "1e99", "2020-01-01", "[1]", "{a: 1}", "9" * 50],
    "train.learning_rate": [".nan", "-.inf", "fast", "-1", "1e999", "[1e-3]", "!!python/name:os.getcwd []"],
    "train.prompts": ["[]", "hello", "[" * 18 + "]" * 18], "train.batch_size": ["0", "null", "1e12"],
    "model.num_hidden_layers": ["0", "1000000000"], "train.precision": ["int4"],
    "train.seed": ["-1", "99999999999999999999"], "train.compile": ["3"],
    "run.resume": ["null"], "model.vocab_size": ["70000"], "model.rope_theta": ["0"],
    "model.tie_word_embeddings": ["maybe"], "data.sequence_length": ["999999"], "run.devices": ["0"],
    "data.held_out_fraction": ["1"],
}  # fmt: skip


@pytest.mark.parametrize("text, words", cases(BAD_FILES))
def test_a_bad_configuration_file_is_refused(text, words, refused, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    refused(f"train --config {tmp_path}/bad.yaml --input_file good.txt", words)


@pytest.mark.parametrize("value, key", cases(BAD_VALUES))
def test_a_bad_value_is_refused_by_name_from_a_file_and_from_the_command(value, key, refused, tmp_path):
    section, name = key.split(".")
    (tmp_path / "bad.yaml").write_text(f"{section}: {{{name}: {value}}}")
    refused(f"train --config {tmp_path}/bad.yaml --input_file good.txt", name)
    refused("--set", name, f"{key}={value}")


BAD_COMMANDS = {
    "--config|no such file": ["--config none.yaml"],
    "--config|expected a YAML file": ["--config 'a folder'", "--config pipe", "--config 'a\0b'"],
    "--config|not valid YAML": ["--config text.gz"],
    "unknown argument|did you mean '--max_steps'": ["--max_step 5"],
    "did you mean '--output_dir'": ["--output-dir x"], "did you mean '--prompt'": ["GENERATE --propmt x"],
    "did you mean '--json'": ["EVALUATE --jsn"], "did you mean 'nano'": ["--preset nanno"],
    "unknown argument": ["TRAIN extra"], "expected one argument": ["--max_steps", "generate --checkpoint"],
    "required: --checkpoint": ["generate", "evaluate --input_file good.txt"],
    "required: --input_file": [f"evaluate --checkpoint {MODEL}"],
    "max_steps": [f"--max_steps {value}" for value in ("-5", "1e99", "nan", "''", "9" * 5000)],
    "seed": [f"--seed {2**63}", f"GENERATE --seed {2**64}"], "resume|auto": ["--resume maybe"],
    "3 workers": ["--devices 3"], "unknown preset": ["--preset ../presets/nano"],
    "key=value": ["--set ''", "--set max_steps", "--set =5"],
    "unknown key": ["--set nothing=5", "--set \0=1"], "chosen by --preset": ["--set preset=smollm2-135m"],
    "did you mean 'train.learning_rate'": ["--set train.lerning_rate=1"],
    "expected a JSON list": ["--set 'train.prompts=[a, b]'"], "train.batch_size": ["--set batch_size=1:30"], "head_dim 31 is odd": ["--set head_dim=31"],
    "not a multiple of 7 workers": ["--set run.devices=7"],
    "UTF-8": ["--set 'train.prompts=[\"\udcff\"]'", "--output_dir \udcff", "GENERATE --prompt \udcff"],
    "output_dir": ["--output_dir ''", "--output_dir 'a\0b'"],
    "an address|expected a folder": ["--output_dir gs://bucket/run"],
    "lies in the checkpoint|run to go on": [f"--output_dir {MODEL}", f"--output_dir {MODEL}/a/b"],
    "lies inside the checkpoint": [f"export --checkpoint {MODEL} --out {MODEL}/a"],
    "aside|choose another --output_dir": [f"--output_dir run --resume never --set run.init_from={MODEL}"],
    "drive_dir|does not exist": ["--drive_dir nowhere/deep"], "drive_dir|own folder": ["--drive_dir output"],
    "drive_dir|not mounted": ["--drive_dir /content/drive/MyDrive/run"],
    "drive_dir": ["--drive_dir 'a\0b'", "--drive_dir good.txt"],
    "missing.json|no such file": ["--tokenizer missing.json --output_dir deep/and/deeper", "--tokenizer missing.json --resume never --output_dir run"],
    "not a tokenizer.json": [f"--tokenizer {name}.json" for name in ("not", "list", "empty", "no-model")],
    "a tokenizer.json": [f"--tokenizer {name}" for name in ("cut.json", "binary.json", "deep.json", "pipe")],
    "tokenizer": ["--tokenizer 'a\0b'", "--tokenizer 'a folder'"],
    "400 entries|vocab_size": ["--tokenizer large.json"],
    "nobody/nothing": ["--tokenizer nobody/nothing", "train --config tiny.yaml --dataset nobody/nothing"],
    "eos_token_id=70 is|special token": ["--set eos_token_id=70"],
    "bos_token_id=5000 is None|special token": ["--set bos_token_id=5000"],
    "model.bos_token_id": [f"--set bos_token_id={10**30}"],
    "--dataset and --input_file: give one": ["--dataset nobody/nothing"],
    "--minutes and --max_steps: give one": ["--minutes 3 --max_steps 5", "--minutes 3 --set max_steps=5"],
    "training tokens, but one row needs 17": ["--input_file short.txt"],
    "missing|no such file": ["--set run.init_from=./missing", "GENERATE --checkpoint missing"],
    "pickle.bin|never opened": ["--set run.init_from=pickle.bin", "GENERATE --checkpoint pickle.bin"],
    "single file": ["GENERATE --checkpoint good.txt"],
    "no config.json": ["--set 'run.init_from=a folder'", "GENERATE --checkpoint 'a folder'"],
    "did you mean|final_model.ckpt": ["GENERATE --checkpoint run", "GENERATE --checkpoint run/checkpoints"],
    "checkpoint": [f"GENERATE --checkpoint {name}" for name in ("''", "'a\0b'", "c" * 300, "pipe")],
    "no?thing": ["EVALUATE --checkpoint 'no body/no?thing'"],
    "temperature": ["GENERATE --temperature nan", "GENERATE --temperature hot"],
    "top_k": ["GENERATE --top_k 0", "GENERATE --top_k 1.5"],
    "max_new_tokens": ["GENERATE --max_new_tokens -1"],
    "context is 32|shorten": [
        f"GENERATE --prompt '{'word ' * 100}'", f"--set 'train.prompts=[\"{'word ' * 100}\"]'",
        f"--set 'train.prompts=[\"{'word ' * 100}\"]' --resume never --output_dir run",
    ],
    "chat template": ["GENERATE --chat"],
    "split|val": ["EVALUATE --split test"],
    "memory|choose a smaller": ["--set hidden_size=65536 --set num_hidden_layers=999"],
    "memory|train.micro_batch_size": ["train --preset nano --input_file good.txt --set batch_size=1048576"],
    "head_dim": ["--set head_dim=4096 --set max_position_embeddings=1048576"],
    "nothing to evaluate": ["EVALUATE --input_file one.txt --split train", "EVALUATE --input_file mark.txt"],
    "mark.txt: empty": ["--input_file mark.txt"],
    "--chat_file missing.jsonl: no such file": ["train --config tiny.yaml --chat_file missing.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("line, words", cases(BAD_COMMANDS))
def test_a_bad_command_line_is_refused(line, words, refused):
    refused(line, words)


@pytest.mark.parametrize("place", ["good.txt", "good.txt/x", "/dev/null", "/proc/nothing", "o" * 300, "loop"])
def test_an_output_folder_that_cannot_be_one_is_refused(place, refused):
    refused(f"--output_dir {place}", "--output_dir", code=7)


def test_an_output_folder_that_another_process_writes_is_refused(refused, tmp_path):
    with locked_folder(tmp_path / "busy"):
        refused(f"--output_dir {tmp_path}/busy", f"is being written by process {os.getpid()} on ", code=3)


def tensors(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[bytes], bytes]:
    return lambda raw: save({name: new for name, t in load(raw).items() if (new := change(t)) is not None})


def damage(path: Path, change: object) -> None:
    """A file becomes nothing (None), a folder (""), bytes, its JSON with other fields, a function of it."""
    raw = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if change == "":
        path.mkdir()
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(raw) | change))
    elif change is not None:
        path.write_bytes(change(raw) if callable(change) else change)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = [
    None, "", b"", b"[]", b"hello", b'{"hidden_size": NaN}', b'{"rope_theta": 1e999}', b'{"a": 1, "a": 2}',
    b" " * (2**20 + 1), b"[" * 50_000, bytes(range(256)), {"model_type": "gpt2"}, {"hidden_act": "gelu"},
    {"attention_bias": True}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": "linear"}, {"rope_parameters": [1]}, {"hidden_size": "many"}, {"hidden_size": 0},
    {"hidden_size": 16.5}, {"hidden_size": None}, {"num_attention_heads": 3, "head_dim": None},
    {"num_hidden_layers": 10**9}, {"hidden_size": 10**12, "head_dim": None},
    {"max_position_embeddings": 10**12}, {"vocab_size": 10**9},
    {"max_position_embeddings": 2**20, "head_dim": 2**12}, {"hidden_size": 32, "head_dim": None},
    {"mlp_bias": True}, {"quantization_config": {"bits": 4}}, {"rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, {"rms_norm_eps": -1}, {"bos_token_id": "x"},
    {"bos_token_id": 300}, {"eos_token_id": [10**30]},
    {"bos_token_id": 2**70},
    {"num_hidden_layers": 2}, {"vocab_size": 301}, {"tie_word_embeddings": False},
]  # fmt: skip
MISFITS = {"num_hidden_layers", "vocab_size", "tie_word_embeddings"}  # sound, but not those of the weights
WEIGHT_FILES = [
    None, "", b"", b"hello, I am a model " * 99, b"\x80\x02}q\x00.", lambda raw: raw[: len(raw) // 2],
    lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: raw[:8] + b"x" * len(raw[8:]),
    lambda raw: raw.replace(b'offsets":[0,', b'offsets":[9,', 1), tensors(lambda t: t * torch.nan),
    tensors(lambda t: t + torch.inf), tensors(lambda t: None), tensors(lambda t: t if t.dim() == 2 else None),
    tensors(lambda t: t[:3].contiguous()), tensors(lambda t: t.to(torch.int32)),
    tensors(lambda t: t.to(torch.float8_e4m3fn)), tensors(lambda t: t.double() * 1e300),
    tensors(lambda t: (t * torch.nan).to(torch.float8_e4m3fn)),
    *[lambda raw, n=n: n.to_bytes(8, "little") + raw[8:] for n in (2**63, 2**60, 2**40, 2**20 + 1, 2, 0)],
    *[lambda raw, n=n: raw[:n] for n in (4, 8)],
    lambda raw: save(load(raw) | {"model.extra": torch.zeros(2)}),
]  # fmt: skip

INDEXES = [
    [],
    *[{"weight_map": table} for table in ([], {"a": 1}, {"a": "../b"}, {"a": "b"}, {"a": "b" * 300})],
]
FOREIGN = [  # without our manifest, as from anywhere
    *[{"config.json": change} for change in CONFIGS],
    *[{WEIGHTS: change} for change in WEIGHT_FILES],
    *[{WEIGHTS: None, INDEX: json.dumps(table).encode()} for table in INDEXES],
    {WEIGHTS: None, "pytorch_model.bin": b"\x80\x02}q\x00."},
    *[{"tokenizer.json": new} for new in (None, b"", b"hello", lambda _: Path("large.json").read_bytes())],
]
BROKEN = [{"manifest.json": None} | changes for changes in FOREIGN]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_checkpoint_is_refused(number, refused, tmp_path):
    shutil.copytree(MODEL, tmp_path / "broken")
    for file, change in BROKEN[number].items():
        damage(tmp_path / "broken" / file, change)
    words = "tokenizer" if "tokenizer.json" in BROKEN[number] else "broken"
    wrong = BROKEN[number].get("config.json")
    if isinstance(wrong, dict) and len(wrong) == 1 and not wrong.keys() & MISFITS:
        words += f"|{next(iter(wrong))}"
    refused(f"GENERATE --checkpoint {tmp_path}/broken", words)
    refused(f"EVALUATE --checkpoint {tmp_path}/broken", words)
    refused(f"--set run.init_from={tmp_path}/broken", words)


RECORDS = [
    {"config": 5}, {"config": {"data": {"sequence_length": "x"}}}, {"config": {"train": {"batch_size": [8]}}},
    {"best": 5}, {"step": "x"}, {"step": -1}, {"text": ["a"]}, {"text": "\ud800"}, {"init_from": {}}, b"[]",
]  # fmt: skip


@pytest.mark.parametrize("change", RECORDS, ids=str)
def test_an_edited_record_of_a_run_is_refused(change, refused, tmp_path):
    broken = shutil.copytree(MODEL, tmp_path / "broken")
    damage(broken / "manifest.json", None)
    damage(broken / "state.json", change)
    refused(f"export --checkpoint {broken} --out {tmp_path}/out", "state.json")
    refused(f"EVALUATE --checkpoint {broken}", "state.json")


def test_a_file_that_holds_no_tensors_shows_how_it_begins(tmp_path):
    """Git without LFS leaves a pointer, a proxy a page."""
    file = tmp_path / WEIGHTS
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n")
    with pytest.raises(CheckpointError, match="it begins with b'version https://git-lfs"):
        load_tensors(file)


OTHER_SETTINGS = {
    "train.learning_rate: 0.001 -> 0.002|--resume never": ["--set learning_rate=0.002"],
    "train.seed: 1337 -> 7": ["--seed 7"], "train.batch_size: 4 -> 8": ["--set batch_size=8"],
    "model.hidden_size": ["--set hidden_size=32"],
    "model.num_hidden_layers: 1 -> 2": ["--set num_hidden_layers=2"],
    "model.rope_theta": ["--set rope_theta=100000.0"], "data.sequence_length": ["--set sequence_length=8"],
    "held_out_fraction": ["--set held_out_fraction=0.2"], "tokenizer": ["--tokenizer large.json"],
    "not the text this run was trained on|allow_data_change": ["--input_file other.txt"],
    "no such file": ["--input_file missing.txt"],
}  # fmt: skip


@pytest.fixture
def resume(here, tmp_path) -> str:
    shutil.copytree("run", tmp_path / "run")  # which a case may spoil
    return f"--output_dir {tmp_path}/run --max_steps 6"


@pytest.mark.parametrize("flags, words", cases(OTHER_SETTINGS))
def test_a_resume_with_other_settings_is_refused(flags, words, refused, resume):
    refused(f"{resume} {flags}", words)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(refused, resume, tmp_path):
    folders = (tmp_path / "run" / "checkpoints").iterdir()
    for folder, change in zip(folders, (None, lambda raw: raw[:-1] + b"?", b""), strict=False):
        damage(folder / "optim.safetensors", change)
    refused(resume, "checkpoint|none usable|--resume never", code=4)


CLOSED = [
    "--input_file one.txt", "--tokenizer large.json", "--set run.init_from=ours",
    "--set run.init_from=theirs", "GENERATE --checkpoint ours", "GENERATE --checkpoint theirs",
    "--output_dir closed", "--output_dir closed/run",
]  # fmt: skip


def test_what_may_not_be_read_or_written_is_told(here, monkeypatch):
    call("EVALUATE")  # loads the modules that nobody else may be able to load
    user, secret = os.geteuid(), ["one.txt", "large.json", f"ours/{WEIGHTS}", "theirs/config.json"]
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to others
        for folder in ("ours", "theirs", "closed"):
            shutil.copytree(MODEL, f"{name}/{folder}")
        for file in ("good.txt", "tiny.yaml", "one.txt", "large.json"):
            shutil.copy(file, name)
        os.remove(f"{name}/theirs/manifest.json")
        for path, mode in {"": 0o777, "closed": 0o555, **dict.fromkeys(secret, 0)}.items():
            Path(name, path).chmod(mode)
        monkeypatch.chdir(name)
        os.seteuid(user or 65534)  # root may read and write everything
        try:
            told = {line: call(line) for line in CLOSED}
        finally:
            os.seteuid(user)
        assert not os.path.exists("output")
    for line, done in told.items():
        name = re.split("[ =/]", line.removesuffix("/run"))[-1]
        check_refusal(done, f"Permission denied|{name}", code=7 if name == "closed" else 2)


def test_real_processes_on_a_terminal_that_knows_only_ascii(shop):
    variables = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    options = {"cwd": shop, "env": variables, "capture_output": True, "text": True}
    mistake = [sys.executable, ROOT / "colab_train.py", "--preset", "Übung"]
    check_refusal(run(mistake, **options), "unknown preset")
    words = [sys.executable, "-m", "smollm2.evaluate", "--checkpoint", MODEL, "--input_file", "Übung.txt"]
    assert run(words, **options).stdout.startswith("\\xdcbung.txt (all): ")
