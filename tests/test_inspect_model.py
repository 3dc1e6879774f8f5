"""Looking inside changes nothing: the logits are the model's own, attention and hidden states are transformers'."""

from __future__ import annotations

import pytest
import torch
from conftest import random_ids, tiny_model, transformers_twin

from smollm2.notebook.inspect_model import logit_lens, look_inside, token_probabilities


@pytest.fixture(scope="module")
def seen():
    model = tiny_model().eval()
    ids = random_ids(model, 2, 17)
    return model, ids, look_inside(model, ids)


def test_the_logits_are_the_models_own_bit_for_bit(seen):
    model, ids, inside = seen
    with torch.inference_mode():
        assert torch.equal(inside.logits, model(ids))


def test_attention_and_hidden_states_are_those_of_transformers(seen):
    model, ids, inside = seen
    twin = transformers_twin(model)
    twin.set_attn_implementation("eager")
    with torch.inference_mode():
        theirs = twin(ids, output_attentions=True, output_hidden_states=True)
    assert len(inside.attention) == len(theirs.attentions) == model.config.num_hidden_layers
    for mine, other in zip(inside.attention, theirs.attentions, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    # transformers gives the last one behind the final norm
    hidden = [*inside.hidden[:-1], model.model.norm(inside.hidden[-1])]
    for mine, other in zip(hidden, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_lens_after_the_last_block_is_the_models_answer(seen):
    model, _, inside = seen
    lens = logit_lens(model, inside.hidden)
    assert lens.shape == (model.config.num_hidden_layers + 1, 2, 17, model.config.vocab_size)
    assert torch.equal(lens[-1], inside.logits.float().softmax(-1))
    assert (lens[0] - lens[-1]).abs().max() > 1e-3


def test_token_probabilities_multiply_to_the_loss(seen):
    model, ids, _ = seen
    chances = token_probabilities(model, ids)
    with torch.inference_mode():
        loss = model.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(-chances.log().mean(), loss, rtol=1e-5, atol=1e-5)
