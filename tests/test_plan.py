"""What a run needs and what its minutes buy."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smollm2 import plan as planning
from smollm2.config import DataConfig, RunConfig, SmolLM2Config
from smollm2.dataset import open_text
from smollm2.device import choose_precision
from smollm2.errors import ConfigError, UserError
from smollm2.model import SmolLM2
from smollm2.parameters import parameter_count, parameter_table
from smollm2.settings import load_config

BF16 = choose_precision("bf16", torch.device("cpu"))
FP32 = choose_precision("fp32", torch.device("cpu"))


def small(**train) -> RunConfig:
    model = SmolLM2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return RunConfig(model=model, data={"sequence_length": 32}, train={"batch_size": 8} | train)


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside it that are alive, now and at the `most`, but for those of `model`."""

    def __init__(self, model: SmolLM2):
        super().__init__()
        self.own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.made, self.most = {}, 0  # by address

    def bytes(self) -> int:
        self.made = {at: (ref, size) for at, (ref, size) in self.made.items() if not ref.expired()}
        return sum(size for _, size in self.made.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.own:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.bytes())
        return out


def counted(config: SmolLM2Config, rows: int, length: int, is_half: bool, device_type: str) -> np.ndarray:
    """(kept by a forward pass for the backward pass, most that this adds), the weights left out."""
    model = SmolLM2(config).train(device_type == "cpu")
    ids, parameters = torch.zeros(rows, length, dtype=torch.int64), list(model.model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half), Alive(model) as alive:
        hidden = model.model(ids)
        kept = alive.bytes()
        torch.autograd.grad(hidden, parameters, torch.empty_like(hidden))
    # of autocast: a CPU's own block casts the weights for one product alone
    copies = 2 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    return np.array([kept - copies * (is_half and not model.training), alive.most - kept])


@pytest.mark.parametrize(("preset", "length"), [("nano", 128), ("smollm2-10m", 256), ("smollm2-135m", 1024)])
@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_activations_are_those_that_a_block_keeps(preset, length, is_half, device_type):
    """Counted on twins of one and two layers: a layer's exactly, a backward pass in bounds (on a GPU, where
    autograd frees as it goes, it is little)."""
    small = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    config = load_config(preset).model.model_copy(update=small)
    rows = 2048 // length
    one_layer, two_layers = (config.model_copy(update={"num_hidden_layers": n}) for n in (1, 2))
    kept, passing = counted(one_layer, rows, length, is_half, device_type)
    found = counted(two_layers, rows, length, is_half, device_type)[0] - kept
    layer, backward = planning.activation_bytes(config, length, is_half, device_type)
    planned = rows * backward + 4 * sum(row.count for row in parameter_table(one_layer)[1:-1])
    if device_type == "cpu":
        assert rows * layer == pytest.approx(found, rel=0.002)
        assert 0.98 * passing < planned < 1.2 * passing
    else:  # with room for keys and values of every head
        assert found < rows * layer < 1.12 * found and passing < planned


def test_on_a_gpu_a_run_takes_as_many_rows_at_once_as_free_memory_holds(monkeypatch):
    """A GPU that is not here; what does not fit at all is tried with one row."""
    config = load_config("nano", **{"train.batch_size": 12})
    need = sum(planning.memory_parts(config, 12, True, "cuda").values())
    for free, rows in ((need / planning.SHARE_PLANNED + 1, {12}), (0.9 * need, {6, 4, 3, 2}), (0, {1})):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert planning.rows_in_free_memory(config, torch.device("cuda"), BF16) in rows


def test_the_largest_micro_batch_that_fits_is_chosen_and_divides_the_rows():
    config = small(batch_size=12)
    need = {rows: sum(planning.memory_parts(config, rows, False, "cpu").values()) for rows in range(1, 13)}
    assert planning.micro_batch_that_fits(config, False, "cpu", need[12]) == 12
    assert planning.micro_batch_that_fits(config, False, "cpu", need[12] - 1) == 6
    # 5 fits but is no divisor of 12
    assert planning.micro_batch_that_fits(config, False, "cpu", need[5]) == 4
    assert planning.micro_batch_that_fits(config, False, "cpu", need[1] - 1) == 0


@pytest.mark.parametrize("preset", ["nano", "smollm2-135m", "smollm2-360m"])
def test_a_t4_gets_a_plan_that_fits_it(preset):
    facts = planning.plan(load_config(preset), gpu="t4")
    assert sum(facts["memory_bytes"].values()) < 14.5 * 2**30 and facts["precision"] == "fp16"
    assert not facts["is_measured"] and "estimate" in planning.table(facts)


def test_a_model_too_large_for_the_card_is_refused_with_figures():
    words = r"smollm2-1.7b needs .* GiB with one row of 512 .* 14.5 GiB: choose"
    with pytest.raises(ConfigError, match=words):
        planning.plan(load_config("smollm2-1.7b"), gpu="t4")


@pytest.mark.parametrize(
    ("tokens", "preset"), [(1e6, "nano"), (2e7, "smollm2-10m"), (4.5e7, "smollm2-30m"), (1e9, "smollm2-135m")]
)
def test_the_largest_model_is_chosen_for_which_the_minutes_suffice(monkeypatch, tokens, preset):
    tried = []

    def plan(config, minutes):
        tried.append(config.preset)
        (asked,) = minutes
        return {"buys": [{"tokens": tokens * asked / 20}], "parameters": parameter_count(config.model)}

    monkeypatch.setattr(planning, "plan", plan)
    chosen, why = planning.preset_that_fits(20)
    assert chosen == preset and "20 minutes give" in why
    assert preset in (["nano", *tried])[-2:], "nothing beyond the first that is too large is tried"


def test_passes_over_a_dataset_count_what_will_be_read_of_it(tmp_path):
    (tmp_path / "a.txt").write_text("A story. " * 1000)
    settings = {"data.dataset": str(tmp_path), "data.dataset_tokens": 50_000}
    settings["run.output_dir"] = str(tmp_path / "output")
    facts = planning.plan(load_config("smollm2-10m", **settings), gpu="t4", minutes=(1,))
    assert facts["text_tokens"] == 50_000


@pytest.mark.parametrize(
    ("preset", "card", "cores", "millions"),
    [
        ("nano", None, 2, 24),
        ("smollm2-135m", (7, 5, 40), 2, 21),  # a T4 learns from about 15 million in 20 minutes
        ("smollm2-10m", (7, 5, 40), 2, 96),  # and more of a small model's than two cores read in two minutes
        ("smollm2-135m", (9, 0, 132), 26, 283),  # an H100
    ],
)
def test_minutes_read_what_this_device_can_learn_from(preset, card, cores, millions, monkeypatch):
    """A constant of 24 million would be read by an H100 within a minute, and then again and again."""
    major, minor, processors = card or (0, 0, 0)
    facts = SimpleNamespace(major=major, minor=minor, multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    config = load_config(preset, **{"data.dataset": "who/texts", "train.minutes": 20})
    assert open_text(config, None).tokens == pytest.approx(millions * 1e6 / 0.9, rel=0.05)


def test_steps_leave_time_for_what_else_a_run_does():
    config = small(val_every=10, sample_every=20, sample_tokens=30, prompts=("a", "b"))
    speed = planning.Speed(step=1.0, scored_token=0.001, sampled_token=0.01)
    steps = planning.steps_within(config, speed, 1000, 0, seconds=600)
    spent = steps * (1.0 + 1.0 / 10 + 2 * 30 * 0.01 / 20) + 1.0
    share = planning.SHARE_OF_TIME  # two cores sustain less than they give at first
    assert share - 0.02 < spent / 600 < share + 0.01
    assert planning.steps_within(config, speed, 1000, 0, 0.5) == 1  # a run is at least a step


def test_a_trial_goes_on_while_its_steps_differ_too_much_to_know_their_mean():
    quiet, shared = np.array([0.13, 0.131, 0.129]), np.array([0.13, 0.4] * 8)
    assert planning.is_known(quiet) and not planning.is_known(quiet[:2])
    assert not planning.is_known(shared) and planning.is_known(np.tile(shared, 30))


def test_the_trial_halves_a_micro_batch_that_does_not_fit_as_training_does(monkeypatch):
    original, room, tried = SmolLM2.loss, [2], []

    def loss(model, ids, targets):
        tried.append(len(ids))
        if torch.is_grad_enabled() and len(ids) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory: planted")
        return original(model, ids, targets)

    monkeypatch.setattr(SmolLM2, "loss", loss)
    assert planning.measure(small(), torch.device("cpu"), FP32, seconds=0.0).step > 0
    assert tried[:4] == [8, 4, 2, 2]
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        planning.measure(small(), torch.device("cpu"), FP32, seconds=0.0)


@pytest.fixture
def graphs(monkeypatch) -> list:
    """Of what is compiled, as it comes, and run as it is."""
    made, compile_module = [], torch.nn.Module.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda *m, **o: compile_module(*m, backend=backend, **o))
    return made


def test_a_run_is_compiled_however_many_others_this_process_has_compiled_before(graphs):
    with torch._dynamo.config.patch(recompile_limit=2):
        for count, length in enumerate((8, 16, 24, 32), 1):
            config = small().model_copy(update={"data": DataConfig(sequence_length=length)})
            assert planning.why_not_compiled(config, 2, torch.device("cpu"), FP32) is None
            assert len(graphs) == count


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_a_trial_stays_in_memory(compiled, graphs, monkeypatch):
    """An optimizer, and a compiled block, refer to themselves: a full GPU does not call Python's collector."""
    weights, initialize = [], SmolLM2.initialize

    def noting(model):
        weights.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight))
        initialize(model)

    monkeypatch.setattr(SmolLM2, "initialize", noting)
    gc.disable()
    try:
        planning.measure(small(compile=compiled), torch.device("cpu"), FP32, seconds=0.0)
        assert [weight() for weight in weights] == [None]
    finally:
        gc.enable()


def test_measuring_leaves_random_numbers_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    speed = planning.measure(small(), torch.device("cpu"), FP32, seconds=0.1)
    assert torch.equal(torch.rand(3), expected)
    assert 0 < speed.scored_token < speed.step and speed.sampled_token > 0


def test_the_command_prints_a_table_or_one_json_object(capsys):
    command = [sys.executable, "-m", "smollm2.plan", "--gpu", "l4", "--minutes", "20"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "smollm2-135m: 134,515,008 parameters on L4" in lines and "passes" in lines
    planning.main([*command[3:], "--json"])
    facts = json.loads(capsys.readouterr().out)
    (row,) = facts["buys"]
    assert row["tokens"] == row["steps"] * facts["tokens_per_step"] == row["steps"] * 8192
    training = row["tokens"] / facts["tokens_per_second"]  # the rest: validations, samples, saves
    assert 0.7 * 20 * 60 < training < planning.SHARE_OF_TIME * 20 * 60


def test_peak_memory_is_0_where_the_system_does_not_tell(monkeypatch):
    for status in ("VmRSS: 1 kB\n", OSError()):
        monkeypatch.setattr(Path, "read_text", Mock(side_effect=[status]))
        assert planning._peak_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1", "0", "1e300"])
def test_minutes_that_are_none_are_refused(minutes):
    with pytest.raises(ConfigError, match=r"train\.minutes: Input should be "):
        planning.main(["--preset", "smollm2-10m", "--gpu", "t4", f"--minutes={minutes}"])


def test_minutes_and_a_dataset_may_be_set(capsys):
    words = [
        "--preset",
        "smollm2-10m",
        "--gpu",
        "t4",
        "--set",
        "minutes=7",
        "--set",
        "dataset=texts",
        "--json",
    ]
    assert planning.main(words) == 0
    assert [row["minutes"] for row in json.loads(capsys.readouterr().out)["buys"]] == [7]


def test_four_cards_train_four_times_as_fast_as_one():
    settings = {"train.batch_size": 64, "train.micro_batch_size": 8}
    speeds = [
        planning.plan(load_config("smollm2-135m", **settings | {"run.devices": n}), gpu="t4")[
            "tokens_per_second"
        ]
        for n in (1, 4)
    ]
    assert speeds[1] == pytest.approx(4 * speeds[0])


def test_passes_are_over_what_is_trained_on(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A story. " * 20000)
    words = [
        "--preset",
        "smollm2-10m",
        "--gpu",
        "t4",
        "--input_file",
        str(tmp_path / "a.txt"),
        "--minutes",
        "9",
    ]
    planning.main([*words, "--set", "held_out_fraction=0.5", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["training_tokens"] == pytest.approx(facts["text_tokens"] / 2, abs=1)
    talks = load_config(
        "smollm2-10m", None, ["held_out_fraction=0.5"], **{"data.chat_file": str(tmp_path / "a.txt")}
    )
    assert planning.plan(talks, gpu="t4", minutes=(9,))["text_tokens"] == facts["text_tokens"]
    passes = facts["buys"][0]["tokens"] / facts["training_tokens"]
    assert planning.table(facts).endswith(f"   {passes:.1f}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "precision=fp32"], r"train\.precision fp32: the speed of --gpu t4 is known in fp16 only"),
        (["--input_file", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_what_a_plan_cannot_follow_is_refused_not_passed_over(words, told):
    with pytest.raises(UserError, match=told):
        planning.main(["--preset", "smollm2-10m", "--gpu", "t4", *words])
