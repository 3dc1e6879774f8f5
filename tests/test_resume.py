"""A run that was killed and resumed is the run that was never disturbed: same weights, moments, state and logs, bit for bit.

`python -m tests.soak` is the long version of this file.
"""

import errno
import os
import random
import re
import shutil
import signal
import string
from pathlib import Path
from types import SimpleNamespace

import check_export_compat
import pytest
import torch
from conftest import Heard, earlier_cell

from smollm2 import load_config, saver
from smollm2 import run as opening
from smollm2.checkpoint import FINAL_NAMES, step_name, verify
from smollm2.device import Precision, choose_precision
from smollm2.errors import OutputLost
from smollm2.logs import EPOCHS, SAMPLES, TRAINING
from smollm2.progress import Reporter
from smollm2.state import TrainState, read_state
from smollm2.training import TrainingLoop, train
from tests import soak
from tests.soak import compare, outcome, small_config

FINAL, CONTINUED = FINAL_NAMES


def fifty(text: Path, folder: Path, **train_settings):
    often = {"max_steps": 50, "val_every": 10, "sample_every": 10, "keep_last": 10}
    return small_config(text, folder, **often | train_settings)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """The output directory of an undisturbed run of 50 steps."""
    folder = tmp_path_factory.mktemp("finished") / "output"
    result = train(fifty(text, folder), Reporter())
    assert result.step == 50 and result.stopped_by is None
    return folder


def same_result(folder: Path, name: str, other: Path, other_name: str) -> None:
    for file in (*soak.STATE_FILES, "config.json", "tokenizer.json"):
        ours, theirs = folder / "checkpoints" / name / file, other / "checkpoints" / other_name / file
        assert ours.read_bytes() == theirs.read_bytes(), file
    for file in (TRAINING, SAMPLES, EPOCHS):
        assert soak.log_events(folder / "logs" / file) == soak.log_events(other / "logs" / file), file


def test_forty_steps_and_ten_more_equal_fifty_bit_for_bit(text, finished, tmp_path):
    result = train(fifty(text, tmp_path / "output", max_steps=40, continue_steps=10), Reporter())
    assert result.checkpoint.name == CONTINUED
    assert verify(tmp_path / "output" / "checkpoints" / FINAL).step == 40
    same_result(tmp_path / "output", CONTINUED, finished, FINAL)


def test_every_checkpoint_opens_in_transformers_with_the_same_logits_and_tokens(finished):
    folders = sorted((finished / "checkpoints").iterdir())
    assert len(folders) == 5  # 10, 20, 30, 40 and the final one
    for folder in folders:
        found = check_export_compat.compare(folder, length=16)
        assert found["logits"] <= 2e-6 and not found["tokens"], folder


@pytest.mark.parametrize("accumulation", [1, 4])
def test_killed_anywhere_a_run_ends_in_the_same_bits(text, tmp_path, accumulation):
    undisturbed = soak.reference(small_config(text, tmp_path / "undisturbed", accumulation), tmp_path / "log")
    config, killer = (
        small_config(text, tmp_path / "disturbed", accumulation),
        soak.Soak(tmp_path, accumulation),
    )
    assert killer.disturbed_run(config, undisturbed, max_kills=4, multi=accumulation == 4) >= 1


def killed_at(config, log: Path, trigger) -> None:
    """Run in a child in which `trigger()` has been called to plant a SIGKILL; it must have happened."""
    pid = soak.start(config, soak.Blackboard(), log, drop_tokens=False, sabotage=trigger)
    assert soak.wait(pid) == -signal.SIGKILL, log.read_text()


def plant_kill(owner, name: str, is_it, after: bool = True):
    """Kill the process before or after that call of `owner.name` of which `is_it(*arguments)` holds."""

    def plant() -> None:
        original = getattr(owner, name)

        def killed(*arguments):
            is_here = is_it(*arguments)
            result = original(*arguments) if after or not is_here else None
            if is_here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, killed)

    return plant


def named(prefix: str):
    return lambda parent, name, *rest: name.startswith(prefix)


KILLS = {  # where, and the steps that may be saved then: that of step 20 may still be under way at step 30
    "before the final folder": (plant_kill(saver, "commit", named("final"), after=False), (40,)),
    "before older ones are pruned": (plant_kill(saver, "commit", named("final")), (50,)),
    "in validation": (plant_kill(TrainingLoop, "validate", lambda loop: loop.state.step == 30), (10, 20)),
    "in sampling": (plant_kill(TrainingLoop, "sample", lambda loop: loop.state.step == 30), (10, 20)),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_there_the_rest_is_made_up_and_once(text, finished, tmp_path, where):
    """A save comes when all that is due at its step is done."""
    config, (plant, saved) = fifty(text, tmp_path / "output"), KILLS[where]
    killed_at(config, tmp_path / "log", plant)
    assert soak.newest_verified_step(tmp_path / "output") in saved
    assert train(config, Reporter()).step == 50
    same_result(tmp_path / "output", FINAL, finished, FINAL)


def test_a_run_that_ends_where_it_was_saved_gets_its_final_folder(text, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "output")
    shutil.rmtree(tmp_path / "output/checkpoints" / FINAL)
    result = train(fifty(text, tmp_path / "output", max_steps=40), Reporter())
    assert (result.step, result.checkpoint.name) == (40, FINAL)
    assert verify(result.checkpoint).files == verify(result.checkpoint.with_name(step_name(40))).files


def test_saves_follow_the_clock_not_the_validations(text, tmp_path):
    settings = {"max_steps": 20, "val_every": 2, "sample_every": 5, "save_every": None, "keep_last": 99}
    train(small_config(text, tmp_path / "output", save_every_seconds=3600.0, **settings), Reporter())
    assert [path.name for path in (tmp_path / "output/checkpoints").iterdir()] == [FINAL]
    train(small_config(text, tmp_path / "often", save_every_seconds=1e-6, **settings), Reporter())
    assert len(list((tmp_path / "often/checkpoints").iterdir())) == 20


def test_a_finished_run_can_be_extended_and_killed_meanwhile(text, finished, tmp_path):
    for name in ("whole", "killed"):
        shutil.copytree(finished, tmp_path / name)
    train(fifty(text, tmp_path / "whole", max_steps=80), heard := Heard())
    assert any("new cycle of 30 steps" in line for line in heard.messages)
    killed = fifty(text, tmp_path / "killed", max_steps=80)
    killed_at(killed, tmp_path / "log", plant_kill(saver, "commit", named("step-00000070")))
    assert train(killed, Reporter()).step == 80
    compare(tmp_path / "killed", outcome(tmp_path / "whole"))
    assert verify(tmp_path / "killed" / "checkpoints" / FINAL).step == 80


def test_another_micro_batch_is_taken_and_told_and_one_that_was_halved_stays(text, tmp_path):
    heard = [Heard() for _ in range(4)]
    settings = {"sample_every": 100, "val_every": 100}
    for steps, micro, listener in zip((2, 4, 6, 8), (2, 8, None, 4), heard, strict=True):
        config = small_config(
            text, tmp_path / "output", **settings | {"max_steps": steps, "micro_batch_size": micro}
        )
        train(config, listener)
        state = read_state(verify(tmp_path / "output/checkpoints" / FINAL))
        assert state.micro_batch_size == (micro or 8)
    told = [
        "continuing, not bit-exact: micro_batch: 2 -> 8",
        "continuing, not bit-exact: micro_batch: 8 -> 4",
    ]
    assert [line for one in heard for line in one.messages if "bit-exact" in line] == told

    halved, cpu = state.model_copy(update={"micro_batch_size": 2}), torch.device("cpu")
    saved = SimpleNamespace(newest=verify(tmp_path / "output/checkpoints" / FINAL))
    facts = {
        "device": cpu,
        "precision": choose_precision("fp32", cpu),
        "config": config,
        "say": heard[0].message,
    }
    opening._settle_differences(SimpleNamespace(saver=saved, **facts), halved)
    assert halved.micro_batch_size == 2


def test_scores_of_another_text_are_no_best_of_this_one(text, tmp_path):
    """A harder text: no later score would ever be better, and the end would be said to be learned by heart."""
    draw, other = random.Random(1), tmp_path / "other.txt"
    other.write_text("".join(draw.choices(string.ascii_letters, k=9000)))
    allowed = {"place": {"allow_data_change": True}, "val_every": 10, "sample_every": 100}
    first = train(small_config(text, tmp_path / "output", max_steps=20, **allowed), Reporter())
    result = train(small_config(other, tmp_path / "output", max_steps=40, **allowed), Reporter())
    assert result.best[0] > 20 and result.best[1] > first.best[1]


def test_the_largest_seed_has_samples_too(text, tmp_path):
    """Each prompt draws with the next seed."""
    config = small_config(text, tmp_path / "output", max_steps=1, seed=2**63 - 1)
    assert train(config, Reporter()).step == 1


def test_running_a_finished_run_again_changes_nothing(text, finished):
    before = outcome(finished)
    result = train(fifty(text, finished), heard := Heard())
    assert result.step == 50 and outcome(finished) == before
    (said,) = [line for line in heard.messages if line.startswith("finished: the run is at step 50")]
    steps = [int(word) for word in re.findall(r"_steps (\d+)", said)]  # of the first phase, or of a second
    assert steps[0] > 50 and fifty(text, finished).train.max_steps + steps[1] > 50


def test_resume_never_starts_anew_and_moves_the_old_run_aside(text, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "output")
    config = fifty(text, tmp_path / "output", place={"resume": "never"}, max_steps=10, learning_rate=0.01)
    assert train(config, Reporter()).step == 10
    moved = tmp_path / "output" / "previous-1"
    same_result(moved, FINAL, finished, FINAL)


@pytest.mark.parametrize("mount", ["checkpoints", "logs"])
def test_a_run_that_cannot_move_aside_stays_whole(text, finished, tmp_path, monkeypatch, mount):
    output, real = shutil.copytree(finished, tmp_path / "output"), os.rename
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def rename(source, target):
        if Path(source) == output / mount:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputLost, match=f"{mount} cannot be moved aside .*busy.*--output_dir"):
        train(fifty(text, output, place={"resume": "never"}), Reporter())
    assert before.items() <= {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}.items()
    assert not list(output.glob("previous-*"))


def test_every_training_step_runs_compiled_whatever_was_sampled_before_it(text, tmp_path, monkeypatch):
    """A resumed run samples first, a killed one did not: both must take the same kernels afterwards."""
    torch._dynamo.reset()
    graphs, calls, compile_module = [], [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: (calls.append(torch.is_grad_enabled()), graph.forward(*args))[1]

    monkeypatch.setattr(torch.nn.Module, "compile", lambda it, dynamic: compile_module(it, backend=backend))
    settings = {"max_steps": 3, "val_every": 2, "sample_every": 1, "compile": True}
    config = small_config(text, tmp_path / "output", **settings)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_hidden_layers": 9})})
    train(config, Reporter())
    assert len(graphs) == 1, "one graph serves all layers"
    assert len(calls) == 1 + 3 * 9 and all(calls), "the trial, every layer of every step, and nothing else"
    torch._dynamo.reset()


@pytest.mark.parametrize("stray", ["bfloat16", "meta", "with meta"])
def test_a_default_set_in_an_earlier_cell_changes_no_bit(text, finished, tmp_path, stray):
    with earlier_cell(stray):
        train(fifty(text, tmp_path / "output"), Reporter())
        assert (torch.get_default_dtype() == torch.bfloat16) or torch.get_default_device().type == "meta"
    same_result(tmp_path / "output", FINAL, finished, FINAL)


def test_without_a_compiler_training_runs_uncompiled_and_says_so(text, tmp_path, monkeypatch):
    def no_compiler(*arguments, **options):
        raise RuntimeError("No working C++ compiler found in cpp.cxx: ('g++',)")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert train(small_config(text, tmp_path, max_steps=3, compile=True), heard := Heard()).step == 3
    assert any("training runs uncompiled (RuntimeError: No working C++" in line for line in heard.messages)


@pytest.mark.parametrize("minutes, steps, was, compiles", [
    (None, 10, None, False), (None, 10**9, None, True), (20.0, 10, None, True), (1.0, 10, None, False),
    (None, 10, "true", True), (None, 10**9, "false", False),
])  # fmt: skip
def test_compile_auto_is_for_long_runs_on_a_gpu(minutes, steps, was, compiles, monkeypatch):
    """A GPU that is not here: nothing is put on it. A run that has begun stays as it was."""
    auto = load_config("smollm2-135m", **{"train.minutes": minutes, "train.max_steps": steps})
    newest = SimpleNamespace(facts={"fingerprint": {"compiled": was}}) if was else None
    fp16 = Precision("fp16", torch.float16, True, "")
    for device, reason in (("cuda", None), ("cuda", "InductorError: no"), ("cpu", None)):
        monkeypatch.setattr(opening, "why_not_compiled", lambda *args, reason=reason: reason)
        heard = Heard()
        found = opening._with_compile(auto, newest, TrainState(), torch.device(device), fp16, heard.message)
        assert found.train.compile is (compiles and device == "cuda" and not reason)
        told = [f"train.compile auto: {'' if compiles else 'not '}compiled"] * (device == "cuda")
        told += ["train.compile: not possible here"] * (compiles and reason is not None)
        assert [a.startswith(b) for a, b in zip(heard.messages, told, strict=True)] == [True] * len(told)


@pytest.mark.slow
@pytest.mark.parametrize("broken", soak.SABOTAGES)
def test_the_soak_notices_what_is_broken_on_purpose(text, tmp_path, broken):
    undisturbed = soak.reference(small_config(text, tmp_path / "undisturbed"), tmp_path / "log")
    assert soak.caught(broken, text, tmp_path, undisturbed)


@pytest.mark.slow
def test_thirty_kills_and_three_fresh_interpreters(text, tmp_path):
    soak.soak_all(tmp_path, text, kills=30, multi=2, fresh=3)
