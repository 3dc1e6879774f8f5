"""Numbers that go wrong and memory that runs out: skipped or redone, bounded, and never on disk."""

import json
import math
import random
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from smollm2 import data, training
from smollm2.checkpoint import FINAL_NAMES, candidates, newest_usable
from smollm2.errors import MemoryStop, NumericStop
from smollm2.guard import MAX_SCALER_SKIPS
from smollm2.logs import CHECKPOINTS, TRAINING, read_log
from smollm2.model import SmolLM2
from smollm2.progress import Reporter
from smollm2.training import TrainingLoop, train
from tests.soak import compare, outcome, small_config

FINAL = FINAL_NAMES[0]


def config(text: Path, folder: Path, **settings):
    often = {"max_steps": 40, "val_every": 40, "sample_every": 40, "save_every": 5, "keep_last": 20}
    return small_config(text, folder, **often | settings)


def expect_finite_files(folder: Path) -> None:
    for path in candidates(folder / "checkpoints"):
        for file in path.glob("*.safetensors"):
            floats = [tensor for tensor in load_file(file).values() if tensor.is_floating_point()]
            assert all(torch.isfinite(tensor).all() for tensor in floats), file
        assert not re.search("NaN|Infinity", (path / "state.json").read_text())
    losses = [float(event.get("train_loss", 0)) for event in read_log(folder / "logs" / TRAINING)]
    assert all(map(math.isfinite, losses))


def same_tensors(one: Path, other: Path) -> None:
    for file in ("model.safetensors", "optim.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def events(folder: Path, kind: str) -> list[dict[str, str]]:
    return [event for event in read_log(folder / "logs" / CHECKPOINTS) if event.get("event") == kind]


@pytest.fixture
def loops(monkeypatch) -> list[TrainingLoop]:
    """The loops that are made from now on."""
    made, original = [], TrainingLoop.configure_optimizers
    monkeypatch.setattr(TrainingLoop, "configure_optimizers", lambda it: made.append(it) or original(it))
    return made


def state_of(folder: Path, name: str = FINAL) -> dict:
    return json.loads((folder / "checkpoints" / name / "state.json").read_text())


def poison(monkeypatch, at: dict[int, str] | None, value: float = math.nan) -> None:
    """Make loss or gradients non-finite at batch positions {position: "loss" or "gradient"}; None: gradients always."""
    original = TrainingLoop.gradients

    def gradients(self, batch):
        loss = original(self, batch)
        what = "gradient" if at is None else at.get(self.state.position)
        if what == "loss":
            loss = loss * value
        elif what == "gradient":
            parameter = random.choice([p for p in self.model.parameters() if p.grad is not None])
            parameter.grad.view(-1)[0] = value
        return loss

    monkeypatch.setattr(TrainingLoop, "gradients", gradients)


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_poisoned_steps_are_as_if_their_batches_had_not_been(text, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    bad = {position: rng.choice(["loss", "gradient"]) for position in rng.sample(range(0, 50, 2), 10)}
    with monkeypatch.context() as patch:
        poison(patch, bad, rng.choice([math.nan, math.inf, -math.inf]))
        assert train(config(text, tmp_path / "poisoned"), Reporter()).step == 40
    expect_finite_files(tmp_path / "poisoned")
    state, skips = state_of(tmp_path / "poisoned"), events(tmp_path / "poisoned", "skipped")
    assert (state["step"], state["position"]) == (40, 40 + len(skips))
    assert state["guard"]["total"] == len(skips)
    assert {int(event["position"]) for event in skips} == {at for at in bad if at < state["position"]}

    with monkeypatch.context() as patch:  # the same run over a stream without those batches
        good = [n for n in range(200) if n not in bad]
        original = data.BatchStream.batch
        patch.setattr(data.BatchStream, "batch", lambda self, n: original(self, good[n]))
        train(config(text, tmp_path / "without"), Reporter())
    same_tensors(tmp_path / "poisoned/checkpoints" / FINAL, tmp_path / "without/checkpoints" / FINAL)


TOO_MANY = [([17, 18, 19], "3 in a row"), ([*range(1, 36, 3)], "11 of the last 1000")]


@pytest.mark.parametrize(("bad", "cause"), TOO_MANY)
def test_too_many_skips_end_the_run_with_code_5_and_a_checkpoint(text, tmp_path, monkeypatch, bad, cause):
    with monkeypatch.context() as patch:
        poison(patch, dict.fromkeys(bad, "gradient"))
        with pytest.raises(NumericStop, match=f"updates skipped: {cause}.*what was saved stays") as stop:
            train(config(text, tmp_path / "output"), Reporter())
    assert stop.value.exit_code == 5
    expect_finite_files(tmp_path / "output")
    assert newest_usable(candidates(tmp_path / "output/checkpoints")).step >= 10
    assert train(config(text, tmp_path / "output"), Reporter()).step == 40


def test_skips_are_replayed_exactly_after_a_stop(text, tmp_path, monkeypatch):
    poison(monkeypatch, {3: "loss", 12: "gradient", 13: "loss", 31: "loss"})
    train(config(text, tmp_path / "whole"), Reporter())
    with monkeypatch.context() as patch:
        original = TrainingLoop.training_step

        def step(self, batch, batch_idx):
            if self.state.position == 23:
                raise KeyError("an accident of another kind")
            return original(self, batch, batch_idx)

        patch.setattr(TrainingLoop, "training_step", step)
        with pytest.raises(KeyError, match="accident"):
            train(config(text, tmp_path / "stopped"), Reporter())
    train(config(text, tmp_path / "stopped"), Reporter())
    compare(tmp_path / "stopped", outcome(tmp_path / "whole"))


def test_weights_that_are_not_finite_reach_no_disk(text, tmp_path, loops):
    class Poisoning(Reporter):
        def step(self, step, *rest):
            if step == 20:  # between the update and the save that is due
                with torch.no_grad():
                    loops[0].model.model.norm.weight[3] = math.inf

    words = r"model.norm.weight holds numbers that are not finite|updates skipped"
    with pytest.raises(NumericStop, match=words) as stop:
        train(config(text, tmp_path / "output"), Poisoning())
    assert stop.value.exit_code == 5
    expect_finite_files(tmp_path / "output")
    assert newest_usable(candidates(tmp_path / "output/checkpoints")).step == 15


def test_an_fp16_scale_that_overflows_comes_down_and_training_goes_on(text, tmp_path, monkeypatch):
    original = torch.amp.GradScaler

    def high(device, enabled, init_scale):
        return original(device, enabled=enabled, init_scale=2.0**30)

    monkeypatch.setattr(torch.amp, "GradScaler", high)
    assert train(config(text, tmp_path / "output", precision="fp16"), Reporter()).step == 40
    state = state_of(tmp_path / "output")
    skips = state["guard"]["total"]
    assert 3 <= skips < MAX_SCALER_SKIPS and state["position"] == 40 + skips
    assert state["scaler"]["scale"] == 2.0 ** (30 - skips)
    assert state["guard"]["recent"] == [] and state["guard"]["overflows_in_a_row"] == 0
    expect_finite_files(tmp_path / "output")


def test_an_fp16_loop_of_overflows_ends_at_the_lowest_scale_with_code_5(text, tmp_path, monkeypatch, loops):
    scales = []

    class Watching(Reporter):
        def message(self, text):
            if "skipped" in text:
                scales.append(loops[0].scaler.get_scale())

    poison(monkeypatch, None, math.inf)
    with pytest.raises(NumericStop, match=r"overflowed 20 times in a row.*train.precision=bf16") as stop:
        train(config(text, tmp_path / "output", precision="fp16"), Watching())
    assert stop.value.exit_code == 5 and len(scales) == MAX_SCALER_SKIPS - 1
    assert scales[0] == 2.0**15 and scales[-1] == 1.0 and min(scales) == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_fp16_scale_is_resumed_exactly(text, tmp_path, monkeypatch, optimizer):
    poison(monkeypatch, {3: "gradient", 22: "gradient"}, math.inf)
    settings = {"precision": "fp16", "optimizer": optimizer}
    train(config(text, tmp_path / "whole", **settings), Reporter())
    assert state_of(tmp_path / "whole")["scaler"] == {"scale": 2.0**14, "_growth_tracker": 40 - 21}
    train(config(text, tmp_path / "parts", **settings, max_steps=20, continue_steps=20), Reporter())
    same_tensors(tmp_path / "parts/checkpoints" / FINAL_NAMES[1], tmp_path / "whole/checkpoints" / FINAL)
    assert state_of(tmp_path / "parts", FINAL_NAMES[1])["scaler"] == state_of(tmp_path / "whole")["scaler"]


NO_MEMORY = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
}


def no_memory(monkeypatch, at: set[int] | None, error: RuntimeError = NO_MEMORY["torch"]) -> list[list[int]]:
    """Fail at the micro-batches numbered `at` (from 0; None: always); returns the rows of the windows that were completed."""
    windows: list[list[int]] = []
    original, accumulate, count = SmolLM2.loss, TrainingLoop.accumulate, 0

    def loss(self, *arguments, **options):
        nonlocal count
        if self.training:
            count += 1
            windows[-1].append(len(arguments[0]))
            if at is None or count - 1 in at:
                raise error
        return original(self, *arguments, **options)

    def window(self, batch):
        windows.append([])
        try:
            return accumulate(self, batch)
        except RuntimeError:
            windows.pop()
            raise

    monkeypatch.setattr(SmolLM2, "loss", loss)
    monkeypatch.setattr(TrainingLoop, "accumulate", window)
    return windows


@pytest.mark.parametrize("who", NO_MEMORY)
def test_whoever_runs_out_of_memory_the_micro_batch_is_halved(who, text, tmp_path, monkeypatch):
    windows = no_memory(monkeypatch, {0}, NO_MEMORY[who])
    monkeypatch.setattr(training, "free_unused_memory", freed := Mock())
    assert train(config(text, tmp_path / "output", accumulation=2, max_steps=2), Reporter()).step == 2
    assert freed.call_count == 1
    assert [max(rows) for rows in windows] == [2, 2]


@pytest.mark.parametrize("at", [0, 1, 13, 23])
def test_out_of_memory_in_any_micro_batch_halves_it_and_redoes_the_window(text, tmp_path, monkeypatch, at):
    settings = {"accumulation": 2, "max_steps": 12, "save_every": 3, "val_every": 12, "sample_every": 12}
    with monkeypatch.context() as patch:
        windows = no_memory(patch, {at})
        assert train(config(text, tmp_path / "output", **settings), Reporter()).step == 12
    assert len(windows) == 12 and all(sum(rows) == 8 for rows in windows)
    assert [max(rows) for rows in windows] == [4] * (at // 2) + [2] * (12 - at // 2)
    (halved,) = events(tmp_path / "output", "micro_batch_halved")
    assert int(halved["step"]) == at // 2 and state_of(tmp_path / "output")["micro_batch_size"] == 2

    original = TrainingLoop.training_step

    def by_hand(self, batch, batch_idx):
        if self.state.step == at // 2:
            self.state.micro_batch_size = 2
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingLoop, "training_step", by_hand)  # halved before that window: the same bits
    train(config(text, tmp_path / "by-hand", **settings), Reporter())
    compare(tmp_path / "output", outcome(tmp_path / "by-hand"))


def test_out_of_memory_at_micro_batch_1_ends_the_run_with_exit_code_6(text, tmp_path, monkeypatch):
    train(config(text, tmp_path / "output", max_steps=10), Reporter())
    before = outcome(tmp_path / "output")
    no_memory(monkeypatch, None)
    words = r"out of memory at micro-batch 1 .*2.00 GiB.*the checkpoint of step 10 is untouched"
    with pytest.raises(MemoryStop, match=words) as stop:
        train(config(text, tmp_path / "output", max_steps=20), Reporter())
    assert stop.value.exit_code == 6 and outcome(tmp_path / "output") == before
