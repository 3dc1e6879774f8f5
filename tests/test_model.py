"""The network equals transformers' `LlamaForCausalLM`, sees no future, and each classical mistake is caught."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import earlier_cell, random_ids, tiny_config, tiny_model, transformers_twin

import smollm2.model as network
from smollm2.config import SmolLM2Config
from smollm2.model import KVCache, SmolLM2, apply_rope, rope_tables
from smollm2.sampling import stream
from smollm2.settings import load_config


def shape(heads: int, kv_heads: int, **more) -> dict:
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more


SHAPES = [
    shape(6, 2),
    shape(9, 3, hidden_size=72),
    shape(8, 1, hidden_size=64, rope_theta=1e5),
    shape(4, 4, tie_word_embeddings=False),
    shape(6, 3, head_dim=16, rope_theta=1e5),  # heads * head_dim != hidden_size
    shape(8, 2, hidden_size=64, tie_word_embeddings=False, rope_theta=1e5),
    shape(6, 2, num_hidden_layers=4, rms_norm_eps=1e-2),
]


def largest_difference_from_transformers(**changes) -> float:
    model = tiny_model(**changes).eval()
    ids = random_ids(model, batch=2, time=130)
    with torch.no_grad():
        return (model(ids) - transformers_twin(model)(ids).logits).abs().max().item()


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_loss_and_every_gradient_equal_transformers(changes):
    assert largest_difference_from_transformers(**changes) <= 1e-5
    model = tiny_model(**changes)
    twin = transformers_twin(model)
    ids = random_ids(model, batch=3, time=71)
    loss, reference = model.loss(ids[:, :-1], ids[:, 1:]), twin(ids, labels=ids).loss
    assert abs(loss.item() - reference.item()) <= 5e-6
    loss.backward()
    reference.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    ours = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


def leaks_from_the_future() -> bool:
    """Whether changing token t + 1 changes any logit at or before t, for any t."""
    model = tiny_model().eval()
    ids = random_ids(model, batch=1, time=24)
    with torch.no_grad():
        before = model(ids)
        for t in range(ids.shape[1] - 1):
            changed = ids.clone()
            changed[0, t + 1] = (changed[0, t + 1] + 1) % model.config.vocab_size
            after = model(changed)
            if not torch.equal(before[:, : t + 1], after[:, : t + 1]):
                return True
            assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])  # or the comparison could not fail
    return False


def test_no_token_sees_the_future():
    assert not leaks_from_the_future()


@pytest.fixture
def attention_calls(monkeypatch) -> list[tuple[int, int, bool]]:
    """Heads of q and of k, and whether cuDNN may take the call, of each attention; all are fused, as on a GPU."""
    calls, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(network, "can_attend_in_blocks", lambda q: False)

    def spy(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1], torch.backends.cuda.cudnn_sdp_enabled()))
        return original(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def test_decoding_never_goes_through_cudnn_and_training_may(attention_calls):
    """The setting is the process's: between two tokens it must be as it was."""
    model = tiny_model().eval()
    ids = random_ids(model, batch=1, time=5)
    for _ in stream(model, ids, max_new_tokens=3, stop_ids=()):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert [may_be_cudnn for _, _, may_be_cudnn in attention_calls] == [False] * 3 * 2
    model(ids)
    assert [may_be_cudnn for _, _, may_be_cudnn in attention_calls[6:]] == [True] * 2


def interleaved_rope(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def attention_with(expand, is_causal=True):
    def attend(q, k, v, mask=None):
        groups = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(q, expand(k, groups), expand(v, groups), is_causal=is_causal)

    return attend


def interleave(x, n):
    return x.repeat_interleave(n, dim=1)


STAND_INS = {
    "no mistake": ("attend", attention_with(interleave)),  # of those below it differs in a single word each
    "a missing mask": ("attend", attention_with(interleave, is_causal=False)),
    "repeat for repeat_interleave": ("attend", attention_with(lambda x, n: x.repeat(1, n, 1, 1))),
    "interleaved RoPE": ("apply_rope", interleaved_rope),
    "the keys' RoPE turned backwards": (
        "apply_rope",
        lambda x, c, s: apply_rope(x, c, -s if x.shape[2] == 2 else s),
    ),
    "a wrong theta": ("rope_tables", lambda of: rope_tables(of.model_copy(update={"rope_theta": 1e4}))),
}


@pytest.mark.parametrize("mistake", STAND_INS)
def test_a_mistake_is_caught(monkeypatch, mistake):
    monkeypatch.setattr(network, *STAND_INS[mistake])
    difference = largest_difference_from_transformers(rope_theta=1e5)
    assert difference <= 1e-5 if mistake == "no mistake" else difference > 1e-3
    assert leaks_from_the_future() == (mistake == "a missing mask")


NANO = load_config("nano").model.model_dump()


@pytest.mark.parametrize("changes", [{"vocab_size": 49152}, {"initializer_range": 1 / 24}, NANO], ids=len)
def test_a_fresh_model_starts_within_half_a_nat_of_ln_vocabulary(changes):
    """Nats by which its loss on random tokens exceeds ln(vocabulary), that of knowing nothing."""
    torch.manual_seed(1)
    model = SmolLM2(tiny_config(**changes))
    ids = random_ids(model, batch=4, time=129, seed=1)
    with torch.no_grad():
        loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert abs(loss - math.log(model.config.vocab_size)) < 0.5


def test_initialisation_scales_the_residual_writers_once():
    torch.manual_seed(2)
    wide = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8, "initializer_range": 0.05}
    for name, parameter in SmolLM2(tiny_config(**wide)).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        expected = 0.05 / math.sqrt(2 * 8) if "o_proj" in name or "down_proj" in name else 0.05
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 40, [7, 1, 1, 31], [20, 20], [1, 39]], ids=str)
def test_pieces_of_a_sequence_give_the_logits_of_the_whole(monkeypatch, attention_calls, pieces, is_expanded):
    model = tiny_model().eval()
    ids = random_ids(model, batch=2, time=sum(pieces))
    cache = KVCache(model.config, 2, sum(pieces), torch.float32, "cpu")
    with torch.no_grad():
        whole = model(ids)
        attention_calls.clear()
        if is_expanded:
            monkeypatch.setattr(network, "fused_gqa", lambda *facts: False)
        parts = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert cache.length == sum(pieces)
    # a single query's heads are grouped anyway: two heads, each with a group of queries
    assert {call[:2] for call in attention_calls} <= {(2, 2), (6, 6) if is_expanded else (6, 2)}


def test_more_tokens_than_the_context_is_an_error_that_names_both():
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="17 tokens exceed max_position_embeddings 16"):
        model(random_ids(model, batch=1, time=17))


def test_the_default_configuration_is_smollm2_135m_and_needs_no_memory_to_be_looked_at():
    official = shape(9, 3, hidden_size=576, num_hidden_layers=30, head_dim=64, intermediate_size=1536)
    official |= {"vocab_size": 49152, "tie_word_embeddings": True, "initializer_range": 1 / 24}
    official |= {"max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
    assert official.items() <= SmolLM2Config().model_dump().items()
    assert load_config("smollm2-135m").model == SmolLM2Config()
    with torch.device("meta"):
        logits = SmolLM2(SmolLM2Config())(torch.zeros(1, 8, dtype=torch.long))
    assert logits.shape == (1, 8, 49152) and logits.device.type == "meta"


@pytest.mark.parametrize("stray", ["bfloat16", "meta", "with meta"])
def test_a_default_set_in_an_earlier_cell_changes_no_weight_and_no_token(tmp_path, stray):
    tiny_model().save_pretrained(tmp_path)
    said, ids = [], random_ids(tiny_model(), batch=1, time=9)
    for default in (None, stray):
        with earlier_cell(default):
            model = SmolLM2.from_pretrained(tmp_path)
            said.append((model.generate(ids, 9, temperature=1.0, top_p=0.9, seed=1), model.state_dict()))
    torch.testing.assert_close(*said, atol=0, rtol=0)
