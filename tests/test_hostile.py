"""Files that try to run code: opened by every entry point, and nothing ever runs.

Each payload would create a canary file if anything unpickled, evaluated or imported it. Nothing has to be
refused for a test to pass, but nothing may run.
"""

import contextlib
import io
import os
import pickle  # only the tests write pickled payloads, and show that each of them would run elsewhere
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from smollm2 import SmolLM2
from smollm2.checkpoint import FINAL_NAMES, commit
from smollm2.errors import UserError
from smollm2.files import load_tensors
from smollm2.notebook.own_run import own_checkpoints
from smollm2.pretrained import load_model_and_tokenizer
from tests.test_bad_input import MODEL, call, small_run


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def torch_file(value: object, is_new: bool = True) -> bytes:
    torch.save(value, buffer := io.BytesIO(), _use_new_zipfile_serialization=is_new)
    return buffer.getvalue()


def numpy_file(value: object) -> bytes:
    np.save(buffer := io.BytesIO(), np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def payloads(canary: Path) -> dict[str, bytes]:
    """Bytes that create the file `canary` when they are loaded."""
    code = f"open({str(canary)!r}, 'w').close()"
    run, line = Calls(exec, code), code.replace("'", '"')
    return {
        "pickle": pickle.dumps(Calls(os.system, f"touch {canary}")),
        "inst opcode": f"(S'{line}'\nibuiltins\nexec\n.".encode(),
        "in a table": pickle.dumps({"state_dict": {"w": torch.zeros(2).numpy(), "x": run}, "epoch": 1}, 4),
        "torch zip": torch_file({"state_dict": {}, "hyper_parameters": {"_target_": run}}),
        "torch legacy": torch_file(run, is_new=False),
        "numpy": numpy_file(run),
    }


NAMES = sorted(payloads(Path("canary")))


@pytest.mark.parametrize("name", NAMES)
def test_every_payload_is_live(name, tmp_path):
    """A dud would prove nothing: this is what a careless program does with such a file."""
    data = payloads(tmp_path / "canary")[name]
    careless = (
        pickle.load,  # unsafe on purpose, here alone: a payload only touches a canary in this test's own folder
        partial(torch.load, weights_only=False),  # unsafe on purpose: shows that the payload is live
        partial(np.load, allow_pickle=True),  # unsafe on purpose: shows that the payload is live
    )
    for load in careless:
        with contextlib.suppress(Exception):
            load(io.BytesIO(data))
    assert (tmp_path / "canary").exists()


# Where a payload can lie: alone, beside a model, in the place of one of its files
FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "state.json")
PLACES = [
    *[f"weights{suffix}" for suffix in (".ckpt", ".pt", ".bin", ".safetensors")],
    *[f"beside {name}" for name in ("pytorch_model.bin", "last.ckpt")],
    *[f"only {name}" for name in ("pytorch_model.bin", "last.ckpt", "model-1.safetensors")],
    *[f"as {name}" for name in (*FILES, "optim.safetensors", "manifest.json")],
    *[f"signed {name}" for name in (*FILES, "optim.safetensors")],
]


def plant(folder: Path, place: str, data: bytes, canary: Path) -> Path:
    """The payload in its place in the model's folder or next to it; returns what an entry point is given."""
    how, _, name = place.partition(" ")
    if not name:
        folder.with_name(place).write_bytes(data)
        return folder.with_name(place)
    (folder / "manifest.json").unlink()
    if how == "signed":  # with a manifest that vouches for it: SHA-256 finds accidents, not attackers
        files = {path.name: path.read_bytes() for path in folder.iterdir()} | {name: data}
        shutil.rmtree(folder)
        commit(folder.parent, folder.name, files, "0" * 16, 4, {})
    elif how == "only":
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    elif how == "beside":  # a configuration that asks for code
        asks = '{"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, '
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("{", asks, 1))
        for file in ("evil.py", "setup.py", "__init__.py"):
            (folder / file).write_text(f"open({str(canary)!r}, 'w').close()")
    (folder / name).write_bytes(data)
    return folder


# The entry points; RESUME and DRIVE find the payload as the newest checkpoint of a run
RESUME, DRIVE = "--max_steps 5", "--max_steps 5 --drive_dir drive"
NEWEST = {RESUME: f"output/checkpoints/{FINAL_NAMES[0]}", DRIVE: "drive/step-00000004-0-01234567.ckpt"}
ENTRIES = [
    "GENERATE --max_new_tokens 2 --checkpoint TARGET", "GENERATE --chat --checkpoint TARGET",
    "EVALUATE --split val --checkpoint TARGET", "export --out out --gguf f16 --checkpoint TARGET",
    "--set run.init_from=TARGET", "--tokenizer TARGET", "--tokenizer none.json --input_file FILE",
    "--input_file none.txt --config FILE", RESUME, DRIVE, SmolLM2.from_pretrained, load_model_and_tokenizer,
    load_tensors, own_checkpoints,
]  # fmt: skip


def open_with(entry: str | Callable, target: Path, file: Path) -> int:
    """As it is used: a command with the target or with the file in it, or a function of the package."""
    if callable(entry):
        for given in (target, file):
            with contextlib.suppress(UserError):
                entry([given.parent] if entry is own_checkpoints else given)
        return 0
    if entry in NEWEST:
        Path(NEWEST[entry]).parent.mkdir(parents=True)
        (shutil.copytree if target.is_dir() else shutil.copy)(target, NEWEST[entry])
    return call(entry.replace("TARGET", str(target)).replace("FILE", str(file))).returncode


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("good")).parent


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_payload_runs_anywhere(entry, good, tmp_path, monkeypatch):
    """Every entry point meets every place and every payload."""
    canary = tmp_path / "canary"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("smollm2.drive.PAUSES", (0.0,), raising=False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    bombs = payloads(canary)
    assert len(bombs) <= len(PLACES)
    for number, place in enumerate(PLACES):
        area = tmp_path / str(number)
        model = shutil.copytree(good / MODEL, area / "given" / "model.ckpt")
        for file in ("tiny.yaml", "good.txt"):
            shutil.copy(good / file, area)
        monkeypatch.chdir(area)
        name = NAMES[number % len(NAMES)]
        target = plant(model, place, bombs[name], canary)
        code = open_with(entry, target, target / place.partition(" ")[2] if target.is_dir() else target)
        assert not canary.exists(), f"{entry} ran the payload {name}: {place}"
        is_good = place.startswith("beside") and entry == ENTRIES[0]  # such an entry gets all the way through
        assert code in ((0,) if is_good else (0, 2, 4, 7)), (entry, name, place, code)
        shutil.rmtree(area)
