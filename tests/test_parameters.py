"""134,515,008, row by row."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config, tiny_model

from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2
from smollm2.parameters import group_totals, parameter_count, parameter_table
from smollm2.settings import load_config


def meta_model(config: SmolLM2Config) -> SmolLM2:
    with torch.device("meta"):
        return SmolLM2(config)


def transformers_count(config: SmolLM2Config) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**config.to_hf_dict())).parameters())


def test_the_default_model_has_exactly_134_515_008_parameters():
    assert sum(p.numel() for p in meta_model(SmolLM2Config()).parameters()) == 134_515_008


@pytest.mark.parametrize("preset", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b", "nano"])
def test_every_preset_has_as_many_parameters_as_transformers_counts(preset):
    config = load_config(preset).model
    ours = sum(p.numel() for p in meta_model(config).parameters())
    assert (
        ours
        == transformers_count(config)
        == parameter_count(config)
        == sum(row.count for row in parameter_table(config))
    )


@pytest.mark.parametrize(
    ("preset", "total"),
    [("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384)],
)
def test_the_presets_are_the_published_sizes(preset, total):
    assert parameter_count(load_config(preset).model) == total


def test_the_groups_of_the_135m_are_those_of_the_design():
    totals = group_totals(parameter_table(SmolLM2Config()))
    assert totals == {
        "embedding": 28_311_552,
        "attention": 30 * 884_736,
        "MLP": 30 * 2_654_208,
        "norms": 30 * 1_152 + 576,
    }
    # one forgotten matrix a layer is the whole difference to the 107,972,928 that is often quoted
    assert 134_515_008 - 30 * 576 * 1536 == 107_972_928


@pytest.mark.parametrize(
    "shape", [{}, {"tie_word_embeddings": False}, {"head_dim": 16}, {"num_key_value_heads": 6}], ids=str
)
def test_each_row_equals_its_formula_and_its_tensor(shape):
    model = tiny_model(**shape)
    tensors = dict(model.named_parameters())
    rows = parameter_table(model)
    assert {row.name for row in rows} == set(tensors)
    for row in rows:
        assert row.shape == tuple(tensors[row.name].shape)
        assert row.count == tensors[row.name].numel()
        assert (
            eval(row.formula.replace(" x ", " * "), {"__builtins__": {}}, model.config.model_dump())
            == row.count
        )
    assert sum(row.count for row in rows) == sum(p.numel() for p in model.parameters())


def test_a_model_that_differs_from_the_table_is_refused():
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(48, 81, bias=False)
    with pytest.raises(ValueError, match="table and tensors differ"):
        parameter_table(model)


def test_the_output_matrix_has_a_row_only_when_untied():
    names = [row.name for row in parameter_table(tiny_config(tie_word_embeddings=False))]
    assert names[-1] == "lm_head.weight"
    assert "lm_head.weight" not in [row.name for row in parameter_table(tiny_config())]
