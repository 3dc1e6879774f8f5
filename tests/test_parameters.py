"""134,515,008, row by row."""

import pytest
import torch
from conftest import tiny_config, tiny_model

from smollm2.config import SmolLM2Config
from smollm2.model import SmolLM2
from smollm2.parameters import flops_per_token, group_totals, parameter_count, parameter_table
from smollm2.settings import load_config, preset_names

PUBLISHED = {"smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_as_many_parameters_as_was_published_and_as_transformers_counts(preset):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = load_config(preset).model
    with torch.device("meta"):
        ours, theirs = SmolLM2(config), LlamaForCausalLM(LlamaConfig(**config.to_hf_dict()))
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == parameter_count(config)
    assert count == PUBLISHED.get(preset, count)


def test_the_groups_of_the_135m_are_those_of_the_design():
    rows = parameter_table(SmolLM2Config())
    assert sum(row.count for row in rows) == 134_515_008
    assert group_totals(rows) == {
        "embedding": 28_311_552,
        "attention": 30 * 884_736,
        "MLP": 30 * 2_654_208,
        "norms": 30 * 1_152 + 576,
    }
    # one forgotten matrix a layer is the whole difference to the 107,972,928 that is often quoted
    assert 134_515_008 - 30 * 576 * 1536 == 107_972_928


SHAPES = [{}, {"tie_word_embeddings": False}, {"head_dim": 16}, {"num_key_value_heads": 6}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_row_equals_its_formula_and_its_tensor(shape):
    model = tiny_model(**shape)
    rows = parameter_table(model)
    assert {row.name: row.shape for row in rows} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    for row in rows:
        formula = row.formula.replace(" x ", " * ")
        assert eval(formula, {"__builtins__": {}}, model.config.model_dump()) == row.count
        assert row.count == torch.Size(row.shape).numel()


def test_a_model_that_differs_from_the_table_is_refused():
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(48, 81, bias=False)
    with pytest.raises(ValueError, match=r"table and tensors differ: .*gate_proj"):
        parameter_table(model)


def test_the_flops_of_a_token_are_six_a_matrix_parameter_and_causal_attention():
    config = SmolLM2Config()
    matrices = parameter_count(config) - (2 * 30 + 1) * 576
    assert flops_per_token(config, 2048) == 6 * matrices + 6 * 30 * 576 * 2048
    untied = tiny_config(tie_word_embeddings=False)  # its input embedding is a look-up
    assert flops_per_token(untied, 0) == flops_per_token(tiny_config(), 0)
