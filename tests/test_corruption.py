"""Damaged checkpoints: none is loaded, each is named with its cause, and an older good one is used instead."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from smollm2 import SmolLM2
from smollm2.checkpoint import MANIFEST, candidates, newest_usable, step_name, verify
from smollm2.errors import CheckpointError, NoUsableCheckpoint
from smollm2.files import dump_json, load_tensors, sha256_file, sha256_json
from smollm2.progress import Reporter
from smollm2.state import read_state
from smollm2.training import train
from smollm2.weights import MODEL_FILES
from tests.soak import compare, outcome, small_config, small_text

NEWER, OLDER = step_name(20), step_name(10)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return small_text(tmp_path_factory.mktemp("text") / "text.txt")


def thirty(text: Path, folder: Path):
    return small_config(text, folder, max_steps=30, val_every=30, sample_every=30)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "output"
    train(thirty(text, folder), Reporter())
    return folder


@pytest.fixture
def pair(finished, tmp_path) -> Path:
    """A folder with the checkpoints of steps 10 and 20."""
    for name in (OLDER, NEWER):
        shutil.copytree(finished / "checkpoints" / name, tmp_path / "checkpoints" / name)
    return tmp_path / "checkpoints"


# --- the mutations: each changes the folder `bad` (with `good` beside it) and returns what it did --------------------


def some_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice([path for path in sorted(folder.iterdir()) if path.is_file()])


def forge(folder: Path, change: Callable[[dict], object]) -> None:
    """Edit the manifest and recompute its own digest, as someone who knows the format would."""
    body = json.loads((folder / MANIFEST).read_bytes())
    del body["sha256_of_this"]
    changed = change(body)
    body = changed if isinstance(changed, dict) else body
    body["sha256_of_this"] = sha256_json(body)
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def relist(folder: Path, name: str) -> None:
    """Make the manifest agree with a changed file."""
    path = folder / name
    forge(
        folder,
        lambda body: body["files"].update(
            {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}}
        ),
    )


def bit_flip(rng, bad, good):
    path = some_file(rng, bad)
    data = bytearray(path.read_bytes())
    where = rng.randrange(len(data) * 8)
    data[where // 8] ^= 1 << where % 8
    path.write_bytes(data)
    return f"bit {where} of {path.name}"


def truncation(rng, bad, good):
    path = some_file(rng, bad)
    size = rng.choice([0, rng.randrange(path.stat().st_size), path.stat().st_size - 1])
    os.truncate(path, size)
    return f"{path.name} cut to {size}"


def zero_page(rng, bad, good):
    path = some_file(rng, bad)
    data = bytearray(path.read_bytes())
    start = rng.randrange(0, len(data), 4096)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)
    return f"{path.name} zeroed from {start}"


def block_swap(rng, bad, good):
    path = bad / rng.choice(["model.safetensors", "optim.safetensors"])
    data = path.read_bytes()
    a, b = sorted(rng.sample(range(0, len(data) - 1024, 512), 2))
    b = max(b, a + 512)
    path.write_bytes(data[:a] + data[b : b + 512] + data[a + 512 : b] + data[a : a + 512] + data[b + 512 :])
    return f"{path.name}: blocks at {a} and {b} swapped"


def appended(rng, bad, good):
    path = some_file(rng, bad)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 40)))
    return f"{path.name} longer"


def swapped_files(rng, bad, good):
    a, b = rng.sample(sorted(p.name for p in bad.iterdir()), 2)
    os.rename(bad / a, bad / "x")
    os.rename(bad / b, bad / a)
    os.rename(bad / "x", bad / b)
    return f"{a} and {b} swapped"


def file_of_another_step(rng, bad, good):
    name = rng.choice(["model.safetensors", "optim.safetensors", "state.json", MANIFEST])
    shutil.copyfile(good / name, bad / name)
    return f"{name} of the other step"


def missing_file(rng, bad, good):
    path = some_file(rng, bad)
    path.unlink()
    return f"{path.name} missing"


def not_a_regular_file(rng, bad, good):
    path, kind = some_file(rng, bad), rng.choice(["link", "link to itself", "folder", "pipe", "broken link"])
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        outside = bad.parent / "outside"
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "broken link":
        path.symlink_to("/nowhere/at/all")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    return f"{path.name} is a {kind}"


def edited_manifest(rng, bad, good):
    body = json.loads((bad / MANIFEST).read_bytes())
    key = rng.choice(["step", "run_id", "format", "facts", "files", "sha256_of_this"])
    body[key] = {
        "step": 999,
        "run_id": "another",
        "format": 2,
        "facts": {},
        "files": {},
        "sha256_of_this": "0" * 64,
    }[key]
    (bad / MANIFEST).write_bytes(dump_json(body))
    return f"manifest: {key} edited"


def reformatted_manifest(rng, bad, good):
    body = json.loads((bad / MANIFEST).read_bytes())
    (bad / MANIFEST).write_text(
        json.dumps(body, indent=rng.choice([None, 0, 2, 4]), sort_keys=rng.random() < 0.5)
    )
    return "manifest reformatted"


ODD_VALUES = [None, True, -1, 0.5, 2**70, "", "x", [], [1], {}, {"a": 1}, "é" * 5, 10**300]


def forged_wrong_type(rng, bad, good):
    where = rng.choice(
        ["run_id", "step", "files", "facts", "format", "entry", "bytes", "sha256", "fingerprint"]
    )
    allowed = {"run_id": str, "facts": dict, "fingerprint": dict}
    value = rng.choice([v for v in ODD_VALUES if where not in allowed or not isinstance(v, allowed[where])])
    name = rng.choice(["model.safetensors", "state.json"])

    def change(body):
        if where == "entry":
            body["files"][name] = value
        elif where in ("bytes", "sha256"):
            body["files"][name][where] = value
        elif where == "fingerprint":
            body["facts"][where] = value
        elif rng.random() < 0.3:
            del body[where]
        else:
            body[where] = value

    forge(bad, change)
    return f"forged: {where} = {value!r}"


def forged_name(rng, bad, good):
    name = rng.choice(
        [
            "../" + OLDER + "/model.safetensors",
            "..",
            "/etc/hostname",
            "a/b",
            "",
            ".",
            "a..b",
            MANIFEST,
            "x" * 300,
            "a\0b",
            "\ud800",
            ".hidden",
            "C:\\x",
        ]
    )
    forge(bad, lambda body: body["files"].update({name: body["files"]["model.safetensors"]}))
    return f"forged: file name {name[:40]!r}"


def forged_table(rng, bad, good):
    name = rng.choice(
        ["model.safetensors", "optim.safetensors", "state.json", "config.json", "tokenizer.json"]
    )
    forge(bad, lambda body: body["files"].pop(name) and None)
    return f"forged: {name} not listed"


def forged_step(rng, bad, good):
    step = rng.choice([19, 21, 10**6])
    forge(bad, lambda body: body.update(step=step))
    return f"forged: step {step}"


def broken_json(rng, bad, good):
    raw = (bad / MANIFEST).read_text()
    kinds = {
        "duplicate key": raw.replace('"step": 20', '"step": 30,\n "step": 20'),
        "NaN": raw.replace('"step": 20', '"step": NaN'),
        "Infinity": raw.replace('"step": 20', '"step": -Infinity'),
        "1e999": raw.replace('"step": 20', '"step": 1e999'),
        "deep": "[" * 100_000,
        "deep table": '{"a":' * 5000 + "1" + "}" * 5000,
        "long number": raw.replace('"step": 20', '"step": ' + "9" * 10_000),
        "not a table": "[]",
        "null": "null",
        "empty": "",
        "two values": raw + raw,
        "large": raw + " " * 2**20,
        "byte order mark": "\ufeff" + raw,
    }
    kind = rng.choice(list(kinds))
    (bad / MANIFEST).write_text(kinds[kind])
    return f"manifest: {kind}"


def not_utf8(rng, bad, good):
    raw = (bad / MANIFEST).read_bytes()
    where = rng.randrange(len(raw))
    (bad / MANIFEST).write_bytes(raw[:where] + b"\xff" + raw[where:])
    return f"manifest: byte 0xff at {where}"


def forged_state(rng, bad, good):
    """state.json edited, and both digests made to agree with it."""
    state = json.loads((bad / "state.json").read_bytes())
    keys = [k for k in state if k != "config"]
    key, value = (
        rng.choice(keys),
        rng.choice([v for v in ODD_VALUES if v not in ({}, [])] + [float("nan"), float("inf")]),
    )
    if key == "log_lines" and value == {"a": 1}:
        value = {"a": "1"}
    if key == "pending" and value == []:
        value = "val"
    if (
        key in ("position", "schedule_start", "schedule_total", "micro_batch_size")
        and isinstance(value, int)
        and value is not True
        and value >= 0
    ):
        value = -value
    if key == "init_from" and isinstance(value, str):  # the name of any folder
        value = [value]
    if key == "base_model" and isinstance(value, str):  # it goes into the head of a model card
        value = f"a/b\nlicence: {value}"
    if key in ("preset", "text") and isinstance(value, str):  # any name in one line
        value = f"a\nlicence: {value}"
    if rng.random() < 0.3 and key not in (
        "init_from",
        "base_model",
        "preset",
        "text",
    ):  # without these it is a state of an earlier version
        del state[key]
    else:
        state[key] = value
    (bad / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    relist(bad, "state.json")
    return f"forged: state.{key} = {value!r}"


def huge_header(rng, bad, good):
    path = bad / rng.choice(["model.safetensors", "optim.safetensors"])
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", rng.choice([2**63, 2**40, 2**20 + 1, len(data), 0])) + data[8:])
    return f"{path.name}: header length"


MUTATIONS = (
    bit_flip, truncation, zero_page, block_swap, appended, swapped_files, file_of_another_step, missing_file, not_a_regular_file, edited_manifest,
    reformatted_manifest, forged_wrong_type, forged_name, forged_table, forged_step, broken_json, not_utf8, forged_state, huge_header,
)  # fmt: skip


def fingerprint(folder: Path) -> dict:
    return {
        p.name: (p.lstat().st_mode, p.read_bytes() if p.is_file() and not p.is_symlink() else b"")
        for p in folder.iterdir()
    }


def mutate_many(pair: Path, count: int, seed: int) -> Counter:
    rng, kinds = random.Random(seed), Counter()
    bad, good = pair / NEWER, pair / OLDER
    pristine = pair.parent / "pristine"
    shutil.copytree(bad, pristine)
    before = fingerprint(bad)
    while sum(kinds.values()) < count:
        mutation = MUTATIONS[sum(kinds.values()) % len(MUTATIONS)]
        what = mutation(rng, bad, good)
        if fingerprint(bad) != before:  # a page of zeros zeroed again is no mutation
            said: list[str] = []
            found = newest_usable(candidates(pair), said.append, check=read_state)
            assert found.folder == good, f"silently loaded: {what}"
            assert (
                len(said) == 1
                and said[0].startswith(f"checkpoint {NEWER} is not usable: ")
                and said[0].endswith("; trying the one before")
            ), what
            assert len(said[0]) < 400 and "Error" not in said[0], (what, said)
            kinds[mutation.__name__] += 1
        shutil.rmtree(bad)
        shutil.copytree(pristine, bad)
    return kinds


def test_two_hundred_mutations_are_all_noticed_and_the_older_checkpoint_is_used(pair):
    assert set(mutate_many(pair, 200, seed=0)) == {mutation.__name__ for mutation in MUTATIONS}


@pytest.mark.slow
def test_two_thousand_mutations_are_all_noticed_and_the_older_checkpoint_is_used(pair):
    kinds = mutate_many(pair, 2000, seed=1)
    print(dict(kinds))
    assert min(kinds.values()) >= 2000 // len(MUTATIONS)


def test_damaged_weights_are_never_opened_for_generation(pair):
    rng = random.Random(3)
    pristine = pair.parent / "pristine"
    shutil.copytree(pair / NEWER, pristine)
    for number in range(60):
        name = MODEL_FILES[number % 3] if number % 4 else MANIFEST
        data = bytearray((pair / NEWER / name).read_bytes())
        where = rng.randrange(len(data) * 8)
        data[where // 8] ^= 1 << where % 8
        (pair / NEWER / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=NEWER):
            SmolLM2.from_pretrained(pair / NEWER)
        shutil.copyfile(pristine / name, pair / NEWER / name)
    SmolLM2.from_pretrained(pair / NEWER)


def test_files_outside_the_manifest_are_named_and_never_read(pair):
    (pair / NEWER / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    said: list[str] = []
    assert newest_usable(candidates(pair), said.append).step == 20
    assert said == [f"checkpoint {NEWER}: not in its manifest, so never read: pytorch_model.bin"]


def test_when_no_checkpoint_is_usable_training_does_not_start_from_zero(text, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "output")
    folders = sorted((tmp_path / "output/checkpoints").iterdir())
    for folder in folders:
        with open(folder / "optim.safetensors", "rb+") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
    before = {
        p: p.read_bytes() for p in (tmp_path / "output").rglob("*") if p.is_file() and p.name != ".lock"
    }
    said: list[str] = []
    reporter = Reporter()
    reporter.message = said.append
    with pytest.raises(NoUsableCheckpoint, match=f"{len(folders)} checkpoint.*--resume never") as stop:
        train(thirty(text, tmp_path / "output"), reporter)
    assert stop.value.exit_code == 4
    assert sum(
        "optim.safetensors: sha256 differs from the manifest: damaged" in line for line in said
    ) == len(folders)
    assert before == {
        p: p.read_bytes() for p in (tmp_path / "output").rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_a_run_whose_newest_checkpoint_is_damaged_ends_in_the_same_bits(text, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "output")
    os.truncate(tmp_path / "output/checkpoints/final_model.ckpt/model.safetensors", 1000)
    os.truncate(tmp_path / "output/checkpoints" / NEWER / "state.json", 0)
    assert train(thirty(text, tmp_path / "output"), Reporter()).step == 30
    compare(tmp_path / "output", outcome(finished))
    verify(tmp_path / "output/checkpoints/final_model.ckpt")


def test_a_damaged_folder_does_not_push_out_a_good_one(text, finished, tmp_path):
    from smollm2.checkpoint import prune

    folder = tmp_path / "checkpoints"
    for name in (OLDER, NEWER):
        shutil.copytree(finished / "checkpoints" / name, folder / name)
    (folder / NEWER / MANIFEST).unlink()
    shutil.copytree(finished / "checkpoints" / "final_model.ckpt", folder / step_name(30))
    assert prune(folder, 2, None, verify(folder / step_name(30))) == [] and verify(folder / OLDER)


# --- a forger who makes every digest agree: the tensors themselves must fit ------------------------------------------


def rewrite_tensors(path: Path, change: Callable[[dict], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, metadata={"format": "pt"})


def set_nan(name):
    def change(tensors):
        tensors[name] = np.full_like(tensors[name], np.nan)

    return change


FORGERIES = {
    "weights that are not finite": ("model.safetensors", set_nan("model.norm.weight"), "not finite"),
    "a missing weight": (
        "model.safetensors",
        lambda t: t.pop("model.norm.weight"),
        "model.norm.weight: file absent",
    ),
    "a weight too many": (
        "model.safetensors",
        lambda t: t.update(extra=np.zeros(3, np.float32)),
        "extra: file",
    ),
    "another shape": (
        "model.safetensors",
        lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)}),
        r"\(7,\)",
    ),
    "integers": (
        "model.safetensors",
        lambda t: t.update({"model.norm.weight": np.zeros(24, np.int64)}),
        "expected floating point",
    ),
    "moments that are not finite": (
        "optim.safetensors",
        set_nan("exp_avg.model.norm.weight"),
        "moments do not fit",
    ),
    "a missing moment": (
        "optim.safetensors",
        lambda t: t.pop("exp_avg.model.norm.weight"),
        "moments do not fit",
    ),
    "moments of another type": (
        "optim.safetensors",
        lambda t: t.update({"exp_avg.model.norm.weight": np.zeros(24, np.float16)}),
        "moments do not fit",
    ),
    "no random state": ("optim.safetensors", lambda t: t.pop("rng.torch"), "no usable random state"),
    "a random state of another size": (
        "optim.safetensors",
        lambda t: t.update({"rng.torch": np.zeros(9, np.uint8)}),
        "no usable random state",
    ),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_tensors_that_do_not_fit_are_refused_even_with_a_manifest_that_agrees(text, finished, tmp_path, what):
    file, change, message = FORGERIES[what]
    shutil.copytree(finished, tmp_path / "output")
    folder = tmp_path / "output/checkpoints/final_model.ckpt"
    rewrite_tensors(folder / file, change)
    relist(folder, file)
    config = small_config(text, tmp_path / "output", max_steps=40, val_every=30, sample_every=30)
    with pytest.raises(CheckpointError, match=message):
        train(config, Reporter())


def test_a_header_that_claims_too_much_is_refused_before_anything_is_allocated(pair):
    path = pair / NEWER / "model.safetensors"
    data = path.read_bytes()
    for length in (2**63, 2**40, 2**20 + 1, len(data) - 7, 2, 0):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError):
            load_tensors(path)
    for size in (0, 4, 8):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            load_tensors(path)
