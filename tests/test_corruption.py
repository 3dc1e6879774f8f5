"""Damaged checkpoints: none is loaded, each is named with its cause, and an older good one is used."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors.numpy import load, save

from smollm2.checkpoint import FINAL_NAMES, MANIFEST, candidates, newest_usable, step_name
from smollm2.files import dump_json, sha256_bytes, sha256_json
from smollm2.state import read_state
from tests.test_bad_input import call, check_refusal, files_below, small_run

OLDER, NEWER, FINAL = step_name(2), step_name(4), FINAL_NAMES[0]
WEIGHTS, MOMENTS = "model.safetensors", "optim.safetensors"

SMALL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
READ_BY_GENERATE = {WEIGHTS, *SMALL_FILES}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("finished"), "--max_steps", 6)


@pytest.fixture
def pair(finished, tmp_path) -> Path:
    """A folder with the checkpoints of steps 2 and 4, of a run of 6 steps."""
    (tmp_path / "outside").touch()
    for name in (OLDER, NEWER):
        shutil.copytree(finished / "checkpoints" / name, tmp_path / "checkpoints" / name)
    return tmp_path / "checkpoints"


def train_on(run: Path, finished: Path, steps: int):
    places = ["--config", finished.parent / "tiny.yaml", "--input_file", finished.parent / "good.txt"]
    return call("train", *places, "--output_dir", run, "--max_steps", steps)


def spliced(raw: bytes, start: int, new: bytes, length: int | None = None) -> bytes:
    return raw[:start] + new + raw[start + (len(new) if length is None else length) :]


def bit_flip(rng: Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return spliced(raw, at, bytes([raw[at] ^ 1 << rng.randrange(8)]))


def zero_page(rng: Random, raw: bytes) -> bytes:
    at = rng.randrange(0, len(raw), 4096)
    return spliced(raw, at, bytes(min(4096, len(raw) - at)))


def forged(raw: bytes, change: Callable[[dict], object]) -> bytes:
    """A manifest edited by someone who knows the format: its digest of itself is right again."""
    body = json.loads(raw)
    del body["sha256_of_this"]
    change(body)
    return dump_json(body | {"sha256_of_this": sha256_json(body)})


def forge_file(path: Path, data: bytes) -> None:
    """Another content, and a manifest that agrees with it."""
    path.write_bytes(data)
    entry, manifest = {"bytes": len(data), "sha256": sha256_bytes(data)}, path.with_name(MANIFEST)
    manifest.write_bytes(forged(manifest.read_bytes(), lambda body: body["files"].update({path.name: entry})))


def forged_state(rng: Random, path: Path) -> None:
    state = json.loads(path.with_name("state.json").read_bytes())
    key = rng.choice(sorted(state))
    lost = {name: value for name, value in state.items() if name != key}
    wrong = state | {key: rng.choice([True, -1, 0.5, [1], {"a": None}, float("nan"), float("inf")])}
    forge_file(path.with_name("state.json"), json.dumps(rng.choice([lost, wrong])).encode())


def no_file(rng: Random, path: Path) -> None:
    path.unlink()
    rng.choice([lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)])()


BYTES: dict[str, Callable[[Random, bytes], bytes]] = {  # of any file
    "bit flip": bit_flip,
    "zero page": zero_page,
    "truncation": lambda rng, raw: raw[: rng.choice([0, rng.randrange(len(raw)), -1])],
    "longer": lambda rng, raw: raw + rng.randbytes(rng.randint(1, 40)),
}
TEXTS = [b"", b"null", b"[]", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000]
EDITS = {"step": 999, "run_id": "another", "format": 2, "facts": {}, "files": {}, "sha256_of_this": "0" * 64}
MANIFESTS: dict[str, Callable[[Random, bytes], bytes]] = {  # of the manifest's
    "edited": lambda rng, raw: dump_json(json.loads(raw) | dict([rng.choice(sorted(EDITS.items()))])),
    "other text": lambda rng, raw: rng.choice([*TEXTS, raw + raw, raw + b" " * 2**20, b"\xef\xbb\xbf" + raw]),
}
WRONG = [None, True, -1, 0.5, "x", [1], {"a": None}, "é" * 5, 2**70]
EMPTY = {"bytes": 0, "sha256": sha256_bytes(b"")}
NAMES = ["../../outside", "..", "/etc/hosts", "a/b", "", "a\0b", "x" * 300, "\ud800", ".hidden", "C:\\x"]
FORGED: dict[str, Callable[[Callable, dict], object]] = {  # of its content; `pick` is random.choice
    "lost field": lambda pick, body: body.pop(pick(["run_id", "step", "files", "format"])),
    "wrong field": lambda pick, body: body.update({pick(["step", "files"]): pick([3, 10**6, *WRONG])}),
    "wrong format": lambda pick, body: body.update(format=pick([2, *WRONG[2:]])),
    "wrong run": lambda pick, body: body.update(run_id=pick([None, True, -1, 0.5, [1], {"a": 1}])),
    "wrong entry": lambda pick, body: body["files"].update({WEIGHTS: pick(WRONG)}),
    "wrong facts": lambda pick, body: body["files"][WEIGHTS].update({pick(["bytes", "sha256"]): pick(WRONG)}),
    "wrong name": lambda pick, body: body["files"].update({pick(NAMES): EMPTY}),
    "no entry": lambda pick, body: body["files"].pop(pick([WEIGHTS, MOMENTS, "state.json", "config.json"])),
}
FILES: dict[str, Callable[[Random, Path], object]] = {  # of a whole file
    "another step's": lambda rng, path: shutil.copyfile(path.parents[1] / OLDER / path.name, path),
    "another file's": lambda rng, path: path.write_bytes(
        rng.choice(sorted(path.parent.iterdir())).read_bytes()
    ),
    "no file": no_file,
    "forged state": forged_state,
}
KINDS = [*BYTES, *MANIFESTS, *FORGED, *FILES]


def mutate(kind: str, rng: Random, folder: Path) -> None:
    path = folder / MANIFEST if kind in MANIFESTS | FORGED else rng.choice(sorted(folder.iterdir()))
    if kind in FILES:
        FILES[kind](rng, path)
    elif kind in FORGED:
        path.write_bytes(forged(path.read_bytes(), lambda body: FORGED[kind](rng.choice, body)))
    else:
        path.write_bytes((BYTES | MANIFESTS)[kind](rng, path.read_bytes()))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_thousands_of_mutations_are_all_noticed_and_the_older_checkpoint_is_used(pair, count):
    """A resume says one line about the newer checkpoint; `generate` refuses it if what it reads is bad."""
    rng, done, bad, whole = Random(count), Counter(), pair / NEWER, files_below(pair / NEWER)
    while done.total() < count:
        kind = KINDS[done.total() % len(KINDS)]
        mutate(kind, rng, bad)
        now = files_below(bad)
        changed = {path.name for path in whole if now.get(path) != whole[path]}
        if now.get(bad / MANIFEST) == whole[bad / MANIFEST].rstrip():  # its last line break is no content
            changed.discard(MANIFEST)
        if changed:  # a page of zeros zeroed again is no mutation
            done[kind] += 1
            what, said = f"{kind}: {changed}", []
            found = newest_usable(candidates(pair), said.append, read_state)
            assert found.folder.name == OLDER, f"silent: {what}"
            assert len(said) == 1 and len(said[0]) < 400 and "Error" not in said[0], (what, said)
            assert said[0].startswith(f"checkpoint {NEWER} is not usable: "), (what, said)
            answer = call("generate --prompt 9 --max_new_tokens 1 --checkpoint", bad)
            assert answer.returncode == 2 or not changed & READ_BY_GENERATE, (what, answer)
            if answer.returncode:
                check_refusal(answer)
                assert any(name in answer.stderr for name in (NEWER, *changed)), (what, answer)
        shutil.rmtree(bad)
        bad.mkdir()
        for path, content in whole.items():
            path.write_bytes(content)
    assert min(done.values()) >= count // len(KINDS)


def test_files_outside_the_manifest_are_named_and_never_read(pair):
    (pair / NEWER / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    said: list[str] = []
    assert newest_usable(candidates(pair), said.append).step == 4
    assert said == [f"checkpoint {NEWER}: not in its manifest, so never read: pytorch_model.bin"]


def test_a_run_whose_newest_checkpoint_is_damaged_ends_in_the_same_bits(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    os.truncate(run / "checkpoints" / FINAL / WEIGHTS, 1000)
    os.truncate(run / "checkpoints" / NEWER / "state.json", 0)
    done = train_on(run, finished, 6)
    assert done.returncode == 0 and f"continuing from {OLDER}" in done.stdout, done
    for path, content in files_below(finished / "checkpoints" / FINAL).items():
        assert (run / "checkpoints" / FINAL / path.name).read_bytes() == content, path.name


NORM, MOMENT, RANDOM = "model.norm.weight", "exp_avg.model.norm.weight", "rng.torch"
FORGERIES = {  # the tensor, what becomes of it, and the message
    "weights not finite": (WEIGHTS, NORM, lambda old: old * np.nan, "not finite"),
    "moments not finite": (MOMENTS, MOMENT, lambda old: old * np.nan, "moments do not fit"),
    "a missing moment": (MOMENTS, MOMENT, lambda old: None, "moments do not fit"),
    "moments of another type": (MOMENTS, MOMENT, lambda old: old.astype(np.float16), "moments do not fit"),
    "no random state": (MOMENTS, RANDOM, lambda old: None, "no usable random state"),
    "a short random state": (MOMENTS, RANDOM, lambda old: old[:9], "no usable random state"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_tensors_that_do_not_fit_are_refused_even_with_a_manifest_that_agrees(finished, tmp_path, what):
    file, name, change, message = FORGERIES[what]
    path = shutil.copytree(finished, tmp_path / "run") / "checkpoints" / FINAL / file
    tensors = load(path.read_bytes())
    tensors[name] = change(tensors.get(name))
    forge_file(path, save({key: tensor for key, tensor in tensors.items() if tensor is not None}))
    check_refusal(train_on(tmp_path / "run", finished, 8), message)
