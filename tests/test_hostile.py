"""Files that try to run code: opened by every entry point, and nothing ever runs.

Each payload would create a canary file if anything unpickled, evaluated or imported it; a first test shows that every
one of them is really loaded. Nothing here needs to be refused for the test to pass, but nothing may run.
"""

from __future__ import annotations

import ast
import contextlib
import io
import marshal
import os
import pickle  # reason: only the tests write pickled payloads, and show that each of them would run elsewhere
import shutil
import struct
import subprocess
import timeit
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import colab_train
from smollm2 import SmolLM2, evaluate, export, generate
from smollm2.checkpoint import FINAL_NAMES, commit
from smollm2.conversation import render_chat
from smollm2.drive import newest_on_drive
from smollm2.errors import CheckpointError, UserError, run_command
from smollm2.files import load_tensors
from smollm2.notebook.own_run import own_checkpoints
from smollm2.progress import Reporter
from smollm2.settings import load_config
from smollm2.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]

# --- the payloads: bytes that create the file `canary` when they are loaded


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Sets:
    """Pickles as an object whose state runs code when it is restored."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return dict, (), None, None, iter([("key", self.inner)])


def touch(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


def zipped(name: str, data: bytes) -> bytes:
    """torch.save's container around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{name}/data.pkl", data)
        for other, content in (("version", b"3\n"), ("byteorder", b"little")):
            file.writestr(f"{name}/{other}", content)
    return buffer.getvalue()


def legacy(data: bytes) -> bytes:
    """torch.save before the zip container: magic number, protocol version, system facts, then the object."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, facts)]
    return b"".join(parts) + data + pickle.dumps([], 2)


def numpy_object(data: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def payloads(canary: str) -> dict[str, bytes]:
    code = touch(canary)
    run = Calls(exec, code)
    plain = pickle.dumps(run, 2)
    line = code.replace("'", '"')
    return {
        **{f"protocol-{n}": pickle.dumps(run, n) for n in range(6)},
        "eval": pickle.dumps(Calls(eval, f"exec({code!r})")),
        "system": pickle.dumps(Calls(os.system, f"touch {canary}")),
        "popen": pickle.dumps(Calls(subprocess.call, ["touch", canary])),
        "inst-opcode": f"(S'{line}'\nibuiltins\nexec\n.".encode(),
        "obj-opcode": f"(cbuiltins\nexec\nS'{line}'\no.".encode(),
        "in-a-state": pickle.dumps({"state_dict": {"w": Sets(run)}, "epoch": 1}),
        "after-a-tensor": pickle.dumps([torch.zeros(2).numpy(), run]),
        "marshal": pickle.dumps(Calls(exec, Calls(marshal.loads, marshal.dumps(compile(code, "x", "exec"))))),
        "nested": pickle.dumps(Calls(pickle.loads, plain)),
        "torch-zip": zipped("archive", plain),
        "torch-zip-lightning": zipped(
            "last",
            pickle.dumps(
                {
                    "pytorch-lightning_version": "2.6.6",
                    "state_dict": {},
                    "hyper_parameters": {"_instantiator": run},
                },
                2,
            ),
        ),
        "torch-legacy": legacy(plain),
        "numpy-object": numpy_object(plain),
        "stdlib-gadget": pickle.dumps(Calls(timeit.timeit, code, "pass", timeit.default_timer, 1)),
    }


NAMES = sorted(payloads("canary"))


def detonate(data: bytes) -> None:
    """What a careless program does with such a file."""
    import numpy

    for load in (
        lambda: pickle.loads(data),  # noqa: S301 - the point of it
        lambda: torch.load(
            io.BytesIO(data), weights_only=False
        ),  # reason: plays the careless program, to prove that the payload is live
        lambda: numpy.load(io.BytesIO(data), allow_pickle=True),
    ):
        with contextlib.suppress(Exception):
            load()


@pytest.mark.parametrize("name", NAMES)
def test_every_payload_is_live(name, tmp_path):
    canary = tmp_path / "canary"
    detonate(payloads(str(canary))[name])
    assert canary.exists(), "a dud proves nothing"


def test_there_are_twenty():
    assert len(NAMES) >= 20


# --- where a payload can lie


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A tiny trained run in `run/`, its text and its configuration."""
    from smollm2.training import train

    folder = tmp_path_factory.mktemp("good")
    (folder / "input.txt").write_text(
        "".join(f"{n} green bottles hanging on the wall.\n" for n in range(200))
    )
    (folder / "tiny.yaml").write_text(
        "preset: nano\nmodel: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 32}\n"
        "data: {sequence_length: 16, tokenizer_vocab_size: 300}\n"
        "train: {max_steps: 2, batch_size: 2, warmup_steps: 1, val_every: 9, sample_every: 9, sample_tokens: 1, save_every: 1, precision: fp32, prompts: [a], val_max_tokens: 20}\n"
    )
    train(
        load_config(
            "nano",
            str(folder / "tiny.yaml"),
            **{"data.input_file": str(folder / "input.txt"), "run.output_dir": str(folder / "run")},
        ),
        Reporter(),
    )
    return folder


def replaced(file: str) -> Callable[[Path, bytes], Path]:
    def place(folder: Path, data: bytes) -> Path:
        (folder / "manifest.json").unlink()
        (folder / file).write_bytes(data)
        return folder

    return place


def signed(file: str) -> Callable[[Path, bytes], Path]:
    """The payload with a manifest that vouches for it: SHA-256 finds accidents, not attackers."""

    def place(folder: Path, data: bytes) -> Path:
        contents = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"
        } | {file: data}
        shutil.rmtree(folder)
        commit(folder.parent, folder.name, contents, "0" * 16, 2, {})
        return folder

    return place


def instead_of_weights(name: str) -> Callable[[Path, bytes], Path]:
    def place(folder: Path, data: bytes) -> Path:
        (folder / "manifest.json").unlink()
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(data)
        return folder

    return place


def beside(folder: Path, data: bytes) -> Path:
    """Strays in an otherwise good folder, with a configuration that asks for code."""
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "data.pkl",
        "last.ckpt",
    ):
        (folder / name).write_bytes(data)
    (folder / "manifest.json").unlink()
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace(
            "{", '{"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, ', 1
        )
    )
    canary = os.environ["CANARY"]
    (folder / "evil.py").write_text(touch(canary))
    (folder / "setup.py").write_text(touch(canary))
    (folder / "__init__.py").write_text(touch(canary))
    return folder


def sharded(folder: Path, data: bytes) -> Path:
    (folder / "manifest.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model-00001.safetensors").write_bytes(data)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    return folder


def as_file(suffix: str) -> Callable[[Path, bytes], Path]:
    def place(folder: Path, data: bytes) -> Path:
        path = folder.with_name(f"weights{suffix}")
        path.write_bytes(data)
        return path

    return place


PLACES: dict[str, Callable[[Path, bytes], Path]] = {
    **{
        f"file{suffix}": as_file(suffix)
        for suffix in (".ckpt", ".pt", ".bin", ".pth", ".pkl", ".safetensors")
    },
    **{f"only {name}": instead_of_weights(name) for name in ("pytorch_model.bin", "model.pt", "last.ckpt")},
    **{
        f"as {name}": replaced(name)
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "optim.safetensors",
            "state.json",
            "manifest.json",
        )
    },
    **{
        f"signed {name}": signed(name)
        for name in ("model.safetensors", "config.json", "tokenizer.json", "optim.safetensors", "state.json")
    },
    "beside": beside,
    "sharded": sharded,
}


# --- the entry points, each as it is used


def command(main, *argv: object) -> None:
    try:
        run_command(lambda: main([str(word) for word in argv]))
    except SystemExit as ended:
        assert ended.code in (0, 2, 4, 7), ended.code


def python(function, *arguments) -> None:
    with contextlib.suppress(UserError):
        function(*arguments)


def train_with(good: Path, output: Path, *more: object) -> None:
    command(
        colab_train.main,
        "--config",
        good / "tiny.yaml",
        "--input_file",
        good / "input.txt",
        "--output_dir",
        output,
        *more,
    )


def resume(good: Path, target: Path, work: Path) -> None:
    """The payload is the newest thing in the run's checkpoint folder."""
    folder = work / "run" / "checkpoints"
    folder.mkdir(parents=True)
    name = FINAL_NAMES[0] if target.is_dir() else "step-00000002.ckpt"
    (shutil.copytree if target.is_dir() else shutil.copy)(target, folder / name)
    train_with(good, work / "run", "--max_steps", "3")


def restore(good: Path, target: Path, work: Path) -> None:
    """The same on Drive."""
    for folder in (work / "drive", work / "local"):
        folder.mkdir()
    name = "step-00000002-0-01234567.ckpt"
    (shutil.copytree if target.is_dir() else shutil.copy)(target, work / "drive" / name)
    python(newest_on_drive, work / "drive", work / "local", [], lambda text: None)


def serve(good: Path, target: Path, work: Path) -> None:
    from smollm2.serving import Models

    python(lambda: Models(target).get())


def from_tokenizer_file(good: Path, target: Path, work: Path) -> None:
    for path in [target] if target.is_file() else [target, *target.glob("*.json")]:
        python(Tokenizer.from_file, path)
    if target.is_file():
        train_with(good, work / "run", "--tokenizer", target)


def as_text_or_configuration(good: Path, target: Path, work: Path) -> None:
    for path in [target] if target.is_file() else sorted(target.iterdir()):
        command(
            colab_train.main,
            "--input_file",
            path,
            "--output_dir",
            work / "run",
            "--config",
            good / "tiny.yaml",
        ) if path.suffix != ".json" else None
        command(
            colab_train.main,
            "--config",
            path,
            "--input_file",
            good / "nothing.txt",
            "--output_dir",
            work / "run",
        )


def load_everything(good: Path, target: Path, work: Path) -> None:
    for path in [target] if target.is_file() else sorted(target.iterdir()):
        python(load_tensors, path)


ENTRIES: dict[str, Callable[[Path, Path, Path], None]] = {
    "generate": lambda good, target, work: command(
        generate.main, "--checkpoint", target, "--prompt", "9 green", "--max_new_tokens", 2
    ),
    "chat": lambda good, target, work: command(
        generate.main, "--checkpoint", target, "--prompt", "9", "--chat", "--max_new_tokens", 2
    ),
    "evaluate": lambda good, target, work: command(
        evaluate.main, "--checkpoint", target, "--input_file", good / "input.txt", "--split", "val"
    ),
    "from_pretrained": lambda good, target, work: python(SmolLM2.from_pretrained, target),
    "export": lambda good, target, work: command(
        export.main, "--checkpoint", target, "--out", work / "out", "--gguf", "f16"
    ),
    "app": serve,
    "own_run": lambda good, target, work: python(own_checkpoints, [target, target.parent], lambda text: None),
    "init_from": lambda good, target, work: train_with(
        good, work / "run", "--max_steps", "1", "--set", f"run.init_from={target}"
    ),
    "resume": resume,
    "drive": restore,
    "tokenizer": from_tokenizer_file,
    "text": as_text_or_configuration,
    "tensors": load_everything,
}


@pytest.fixture
def attack(good, tmp_path, monkeypatch) -> Callable[[str, str, str], None]:
    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("smollm2.drive.PAUSES", (0.0,))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    everything = payloads(str(canary))

    def one(name: str, place: str, entry: str) -> None:
        area = tmp_path / f"{name}-{place}-{entry}".replace(" ", "_")
        source = area / "given" / "final_model.ckpt"
        shutil.copytree(good / "run" / "checkpoints" / FINAL_NAMES[0], source)
        (area / "work").mkdir()
        monkeypatch.chdir(area)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ENTRIES[entry](good, PLACES[place](source, everything[name]), area / "work")
        assert not canary.exists(), f"{entry} ran the payload {name} {place}"
        shutil.rmtree(area)

    return one


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_payload_runs_anywhere(entry, attack):
    """Every place at every entry point, with payloads in turn; `-m slow` tries all of them everywhere."""
    for n, place in enumerate(PLACES):
        attack(NAMES[(n + len(entry)) % len(NAMES)], place, entry)


@pytest.mark.parametrize("name", NAMES)
def test_no_entry_point_runs_this_payload(name, attack):
    """Every payload at every entry point, in places in turn."""
    for n, entry in enumerate(ENTRIES):
        attack(name, sorted(PLACES)[(n + NAMES.index(name)) % len(PLACES)], entry)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_combination_runs(name, entry, attack):
    for place in PLACES:
        attack(name, place, entry)


def test_a_stray_program_and_a_good_model_make_no_difference(attack, good, tmp_path, monkeypatch):
    """Control for the harness: in the place 'beside' the model itself is good, so the entry points get all the way through."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    folder = tmp_path / "given" / "model"
    shutil.copytree(good / "run" / "checkpoints" / FINAL_NAMES[0], folder)
    model = SmolLM2.from_pretrained(beside(folder, payloads(str(tmp_path / "canary"))["protocol-2"]))
    assert model.generate(torch.tensor([[1, 2]]), 2).shape == (1, 4) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__code__ }}",
        "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template, tmp_path):
    canary = tmp_path / "canary"
    with contextlib.suppress(CheckpointError):
        text = render_chat(template.replace("CANARY", str(canary)), [{"role": "user", "content": "hi"}])
        assert "class" not in text and "root:" not in text and "os" not in text
    assert not canary.exists()


# --- the source itself


def sources() -> list[Path]:
    return [*sorted((ROOT / "smollm2").glob("*.py")), ROOT / "colab_train.py"]


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_the_source_has_no_way_to_run_a_file(path):
    """None of what `find_problems` looks for: unpickling, remote code, an unsafe YAML loader, eval, a shell."""
    problems = find_problems(path.read_text(encoding="utf-8"))
    assert not problems, problems


def find_problems(text: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            problems += [
                f"{line}: import {name.name}"
                for name in node.names
                if name.name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            problems.append(f"{line}: from {node.module}")
        elif (
            isinstance(node, ast.Attribute)
            and node.attr == "load"
            and isinstance(node.value, ast.Name)
            and node.value.id in ("torch", "np", "numpy", "jit")
        ):
            problems.append(f"{line}: {node.value.id}.load")
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if isinstance(node.func, ast.Name) and name in FORBIDDEN_CALLS:
                problems.append(f"{line}: {name}()")
            if name in ("full_load", "unsafe_load", "load_from_checkpoint", "load_checkpoint"):
                problems.append(f"{line}: {name}()")
            if (
                name == "load"
                and getattr(getattr(node.func, "value", None), "id", "") == "yaml"
                and not any(k.arg == "Loader" for k in node.keywords)
            ):
                problems.append(f"{line}: yaml.load() without a Loader")
        elif isinstance(node, ast.keyword):
            risky = {"weights_only": False, "allow_pickle": True, "trust_remote_code": None, "shell": True}
            if node.arg in risky and (
                risky[node.arg] is None or getattr(node.value, "value", ...) is risky[node.arg]
            ):
                problems.append(f"{getattr(node.value, 'lineno', 0)}: {node.arg}={ast.unparse(node.value)}")
    return problems


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",  # each of these is text that the search must find in a file: none of it is ever run
        "from pickle import loads",  # likewise
        "import joblib as j",
        "torch.load(p)",
        "load(p, weights_only=False)",  # likewise
        "AutoModel.from_pretrained(p, trust_remote_code=flag)",  # likewise
        "yaml.load(t)",
        "np.load(p, allow_pickle=True)",
        "eval(t)",
        "subprocess.run(t, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert find_problems(line)
