"""Looking inside changes nothing: the logits are the model's own, attention and hidden states are transformers'."""

import torch
from conftest import random_ids, tiny_model, transformers_twin

from smollm2.notebook.inspect_model import logit_lens, look_inside, token_probabilities


@torch.inference_mode()
def test_what_is_seen_inside_is_the_models_own_and_transformers():
    model = tiny_model().eval()
    ids = random_ids(model, 2, 17)
    inside, twin = look_inside(model, ids), transformers_twin(model)
    assert torch.equal(inside.logits, model(ids))
    twin.set_attn_implementation("eager")
    theirs = twin(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(tuple(inside.attention), theirs.attentions, rtol=0, atol=1e-5)
    hidden = [*inside.hidden[:-1], model.model.norm(inside.hidden[-1])]  # theirs is behind the norm
    torch.testing.assert_close(torch.stack(hidden), torch.stack(theirs.hidden_states), rtol=1e-4, atol=1e-4)
    lens = logit_lens(model, inside.hidden)
    assert lens.shape == (model.config.num_hidden_layers + 1, 2, 17, model.config.vocab_size)
    assert torch.equal(lens[-1], inside.logits.float().softmax(-1))
    assert (lens[0] - lens[-1]).abs().max() > 1e-3


@torch.inference_mode()
def test_token_probabilities_multiply_to_the_loss():
    model = tiny_model().eval()
    ids = random_ids(model, 2, 17)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(-token_probabilities(model, ids).log().mean(), loss, rtol=1e-5, atol=1e-5)
