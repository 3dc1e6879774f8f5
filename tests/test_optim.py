"""The update: Muon equal to a plain reference, moments by name, and both optimizers resumed exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from smollm2 import SmolLM2, SmolLM2Config, optim
from smollm2.config import TrainConfig
from smollm2.errors import CheckpointError, ConfigError
from smollm2.optim import load_moments, make_optimizer, moments_by_name, orthogonalized, set_learning_rate
from smollm2.parameters import training_bytes
from smollm2.progress import Reporter
from smollm2.state import TrainState, check_unchanged
from smollm2.training import train
from tests.soak import small_config

SHAPE = SmolLM2Config(
    vocab_size=50, hidden_size=24, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=1,
)  # fmt: skip
MUON = TrainConfig(optimizer="muon", learning_rate=0.01, muon_learning_rate=0.03, weight_decay=0.2)


TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 0.06, torch.float16: 0.02}


def plain_orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """One matrix, fp64, the polynomial on the singular values themselves."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES.items())
@pytest.mark.parametrize("shape", [(48, 48), (16, 48), (128, 48), (48, 128)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e5])
def test_a_stack_is_orthogonalized_as_each_matrix_by_its_singular_values(shape, size, dtype, tolerance):
    torch.manual_seed(0)
    stack = torch.randn(3, *shape) * torch.tensor([1.0, 0.01, 7.0]).view(3, 1, 1) * size
    found = orthogonalized(stack, dtype)
    assert found.dtype == dtype
    expected = torch.stack([plain_orthogonalized(matrix) for matrix in stack])
    assert (found.double() - expected).norm() < tolerance * expected.norm()


def test_a_gradient_of_zeros_moves_nothing():
    assert not orthogonalized(torch.zeros(2, 8, 4), torch.float32).any()


def twins() -> tuple[SmolLM2, SmolLM2]:
    torch.manual_seed(0)
    model, twin = SmolLM2(SHAPE), SmolLM2(SHAPE)
    twin.load_state_dict(model.state_dict())
    return model, twin


def learn(model: SmolLM2, optimizers: list, steps: int = 4, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(SHAPE.vocab_size, (2, 17), generator=generator)
        model.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("stacked", [optim.MAX_STACKED, 1600, 1], ids=["whole", "by twos", "by ones"])
def test_steps_are_those_of_torch_adamw_and_of_torch_muon_matrix_by_matrix(monkeypatch, stacked):
    """torch.optim.Muon computes in bf16, one matrix after the other; here it is given fp32 products."""
    monkeypatch.setattr(optim, "MAX_STACKED", stacked)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    model, twin = twins()
    inside = [p for name, p in twin.named_parameters() if ".layers." in name and p.dim() == 2]
    gains = [p for p in twin.parameters() if p.dim() == 1]
    embedding = twin.model.embed_tokens.weight
    groups = [{"params": [embedding], "weight_decay": 0.2}, {"params": gains, "weight_decay": 0}]
    theirs = [torch.optim.Muon(inside, lr=0.03, weight_decay=0.2, momentum=0.95)]
    theirs.append(torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True))
    ours = make_optimizer(model, MUON.model_copy(update={"learning_rate": 0.02, "muon_learning_rate": 0.06}))
    set_learning_rate(ours, 0.01)  # half of the highest: both rates follow one schedule
    learn(model, [ours])
    learn(twin, theirs)
    for (name, ours), their in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, their, atol=3e-5, rtol=0, msg=name)


def test_moments_go_by_name_and_those_of_another_optimizer_are_refused():
    model, twin = twins()
    first, second = (make_optimizer(m, MUON) for m in (model, twin))
    learn(model, [first])
    twin.load_state_dict(model.state_dict())
    load_moments(twin, second, moments_by_name(model, first), updates=4)
    learn(model, [first], seed=2)
    learn(twin, [second], seed=2)
    for (name, ours), their in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, their), name
    with pytest.raises(CheckpointError, match=r"do not fit the model: exp_avg"):
        load_moments(model, make_optimizer(model, TrainConfig()), moments_by_name(model, first), updates=4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_phases_are_one_bit_for_bit_and_the_files_have_the_size_foretold(text, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "precision": "auto", "save_every": 100}
    whole = train(small_config(text, tmp_path / "1", max_steps=16, **settings), Reporter()).checkpoint
    config = small_config(text, tmp_path / "2", max_steps=9, continue_steps=7, **settings)
    parts = train(config, Reporter()).checkpoint
    for name in ("model.safetensors", "optim.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    files = [load_file(whole / name) for name in ("model.safetensors", "optim.safetensors")]
    tensors = [t for file in files for name, t in file.items() if not name.startswith("rng.")]
    assert sum(t.nbytes for t in tensors) == training_bytes(config.model, optimizer)


def test_a_run_from_before_muon_goes_on_with_adamw_and_refuses_muon(text, tmp_path):
    finished = train(small_config(text, tmp_path / "output", max_steps=8), Reporter()).checkpoint
    facts = json.loads((finished / "state.json").read_text())
    assert facts["config"]["train"].pop("optimizer") == "adamw"
    del facts["config"]["train"]["muon_learning_rate"]
    state, config = TrainState.from_json(facts), small_config(text, tmp_path / "output", max_steps=12)
    check_unchanged(state, config, None, "here", "leave")
    with pytest.raises(ConfigError, match=r"train\.optimizer: adamw -> muon"):
        other = small_config(text, tmp_path / "output", optimizer="muon", max_steps=12)
        check_unchanged(state, other, None, "here", "leave")
