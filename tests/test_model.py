"""The network equals transformers' `LlamaForCausalLM`, sees no future, and each classical mistake is caught."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, tiny_config, tiny_model, transformers_twin

import smollm2.model as network
from smollm2.config import SmolLM2Config
from smollm2.model import KVCache, SmolLM2
from smollm2.sampling import stream
from smollm2.settings import load_config

SHAPES = [
    {"num_attention_heads": 6, "num_key_value_heads": 2},
    {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64, "rope_theta": 100000.0},
    {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "rope_theta": 100000.0,
    },  # heads * head_dim != hidden_size
    {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "tie_word_embeddings": False,
        "rope_theta": 100000.0,
    },
    {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 4, "rms_norm_eps": 1e-2},
]


def largest_difference_from_transformers(**shape) -> float:
    model = tiny_model(**shape).eval()
    ids = random_ids(model, batch=2, time=130)
    with torch.no_grad():
        return (model(ids) - transformers_twin(model)(ids).logits).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_transformers(shape):
    assert largest_difference_from_transformers(**shape) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_loss_and_every_gradient_equal_transformers(shape):
    model = tiny_model(**shape)
    twin = transformers_twin(model)
    ids = random_ids(model, batch=3, time=71)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    reference = twin(ids, labels=ids).loss
    assert abs(loss.item() - reference.item()) <= 5e-6
    loss.backward()
    reference.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            theirs[name].grad,
            atol=2e-6,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_autocast_keeps_the_loss_and_gradients_close_to_fp32():
    model = tiny_model()
    ids = random_ids(model, batch=4, time=65)

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact_loss, exact = gradients(False)
    half_loss, half = gradients(True)
    assert half_loss == pytest.approx(exact_loss, abs=0.02) and half.dtype == torch.float32
    assert F.cosine_similarity(exact, half, dim=0) > 0.999


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


def test_a_model_on_the_meta_device_can_be_counted_without_memory():
    with torch.device("meta"):
        logits = SmolLM2(SmolLM2Config())(torch.zeros(1, 8, dtype=torch.long))
    assert logits.shape == (1, 8, 49152) and logits.device.type == "meta"


def test_no_token_sees_the_future():
    assert not leaks_from_the_future()


def test_rows_of_a_batch_do_not_see_each_other():
    model = tiny_model().eval()
    ids = random_ids(model, batch=3, time=20)
    with torch.no_grad():
        together, alone = model(ids), torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_attention_with_unequal_head_counts_runs_in_the_fused_kernel():
    """Anything else is several times slower and holds the whole probability matrix."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k = torch.randn(1, 6, 32, 8), torch.randn(1, 2, 32, 8)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # raises where this kernel cannot run
        fused = network.attend(q, k, k)
    with sdpa_kernel([SDPBackend.MATH]):
        torch.testing.assert_close(fused, network.attend(q, k, k), atol=1e-6, rtol=1e-5)


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "is_masked", "expected"),
    [
        ("cpu", None, SINGLE, True, True),
        ("cuda", (9, 0), HALF, False, True),
        ("cuda", (8, 0), torch.float16, False, True),
        ("cuda", (7, 5), torch.float16, False, False),
        ("cuda", (9, 0), SINGLE, False, False),
        ("cuda", (9, 0), HALF, True, False),
    ],
)
def test_keys_and_values_are_expanded_where_no_fused_kernel_takes_grouped_heads(
    monkeypatch, device, capability, dtype, is_masked, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert network.fused_gqa(torch.device(device), dtype, is_masked) is expected


class Kernels:
    """Notes how the fused attention is called: heads of q and k, and whether cuDNN may take the call."""

    def __init__(self, monkeypatch):
        self.calls, original = [], F.scaled_dot_product_attention

        def spy(q, k, v, **options):
            self.calls.append((q.shape[1], k.shape[1], torch.backends.cuda.cudnn_sdp_enabled()))
            return original(q, k, v, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)


def test_expanded_keys_and_values_give_the_same_logits(monkeypatch):
    model = tiny_model().eval()
    ids = random_ids(model, batch=2, time=24)
    cache = KVCache(model.config, 2, 24, torch.float32, "cpu")
    with torch.no_grad():
        grouped = model(ids)
        kernels = Kernels(monkeypatch)
        monkeypatch.setattr(network, "fused_gqa", lambda *facts: False)
        torch.testing.assert_close(model(ids), grouped)
        behind_a_cache = [model(piece, cache) for piece in ids.split([9, 15], dim=1)]  # the second has a mask
    torch.testing.assert_close(torch.cat(behind_a_cache, dim=1), grouped, atol=1e-5, rtol=0)
    assert {call[:2] for call in kernels.calls} == {(6, 6)}


def test_decoding_never_goes_through_cudnn_and_training_may(monkeypatch):
    """The setting is the process's: between two tokens it must be as it was."""
    model, kernels = tiny_model().eval(), Kernels(monkeypatch)
    ids = random_ids(model, batch=1, time=5)
    for _ in stream(model, ids, max_new_tokens=3, stop_ids=()):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert len(kernels.calls) == 3 * model.config.num_hidden_layers
    assert not any(may_be_cudnn for _, _, may_be_cudnn in kernels.calls)
    kernels.calls.clear()
    model(ids)
    assert all(may_be_cudnn for _, _, may_be_cudnn in kernels.calls)


# --- planted mistakes: the checks above must turn red ------------------------------------------------------------------


def interleaved_rope(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def attention_with(expand, is_causal=True):
    def attend(q, k, v, mask=None):
        groups = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(
            q, expand(k, groups), expand(v, groups), attn_mask=mask, is_causal=is_causal and mask is None
        )

    return attend


def test_a_correct_stand_in_for_the_attention_passes(monkeypatch):
    """The mistakes below differ from this one in a single word each."""
    monkeypatch.setattr(network, "attend", attention_with(lambda x, n: x.repeat_interleave(n, dim=1)))
    assert largest_difference_from_transformers() <= 1e-5 and not leaks_from_the_future()


def test_interleaved_rope_is_caught(monkeypatch):
    monkeypatch.setattr(network, "apply_rope", interleaved_rope)
    assert largest_difference_from_transformers() > 1e-3


def test_rope_turned_backwards_is_caught(monkeypatch):
    correct = network.apply_rope
    monkeypatch.setattr(
        network,
        "apply_rope",
        lambda x, cos, sin: correct(x, cos, -sin) if x.shape[2] == 2 else correct(x, cos, sin),
    )
    assert largest_difference_from_transformers() > 1e-3


def test_repeat_instead_of_repeat_interleave_is_caught(monkeypatch):
    monkeypatch.setattr(network, "attend", attention_with(lambda x, n: x.repeat(1, n, 1, 1)))
    assert largest_difference_from_transformers() > 1e-3


def test_a_missing_mask_is_caught(monkeypatch):
    monkeypatch.setattr(
        network, "attend", attention_with(lambda x, n: x.repeat_interleave(n, dim=1), is_causal=False)
    )
    assert leaks_from_the_future() and largest_difference_from_transformers() > 1e-3


def test_a_wrong_theta_is_caught(monkeypatch):
    correct = network.rope_tables
    monkeypatch.setattr(
        network,
        "rope_tables",
        lambda config, device=None: correct(config.model_copy(update={"rope_theta": 1e4}), device),
    )
    assert largest_difference_from_transformers(rope_theta=1e5) > 1e-3


# --- start of training --------------------------------------------------------------------------------------------------


def excess_over_uniform(model: SmolLM2, seed: int) -> float:
    """Nats by which the loss on random tokens exceeds ln(vocabulary), that of knowing nothing."""
    ids = random_ids(model, batch=4, time=129, seed=seed)
    with torch.no_grad():
        return model.loss(ids[:, :-1], ids[:, 1:]).item() - math.log(model.config.vocab_size)


@pytest.mark.parametrize(
    "shape",
    [{"vocab_size": 49152}, {"initializer_range": 1 / 24}, load_config("nano").model.model_dump()],
    ids=["wide", "tiny", "nano"],
)
def test_a_fresh_model_starts_within_half_a_nat_of_ln_vocabulary(shape):
    torch.manual_seed(1)
    assert abs(excess_over_uniform(SmolLM2(tiny_config(**shape)), seed=1)) < 0.5


def test_the_excess_of_a_fresh_model_is_half_the_variance_of_its_logits():
    """E[log sum exp] of Gaussian logits is ln V + variance/2, and std 1/sqrt(width) makes the variance 1: SmolLM2's official
    initialisation starts half a nat above ln(vocabulary), by design."""
    excess = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = SmolLM2(
            tiny_config(vocab_size=8192, hidden_size=192, intermediate_size=512, initializer_range=192**-0.5)
        )
        excess.append(excess_over_uniform(model, seed))
    assert sum(excess) / len(excess) == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_a_fresh_135m_starts_half_a_nat_above_ln_vocabulary():
    torch.manual_seed(0)
    assert excess_over_uniform(SmolLM2(SmolLM2Config()), seed=0) == pytest.approx(
        0.5, abs=0.15
    )  # seeds: 0.39 to 0.53


def test_initialisation_scales_the_residual_writers_once():
    torch.manual_seed(2)
    config = tiny_config(hidden_size=192, intermediate_size=512, num_hidden_layers=8, initializer_range=0.05)
    model = SmolLM2(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        expected = 0.05 / math.sqrt(2 * 8) if "o_proj" in name or "down_proj" in name else 0.05
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_the_same_seed_gives_the_same_model():
    first, second, other = tiny_model(seed=3), tiny_model(seed=3), tiny_model(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_tied_models_share_one_matrix_and_untied_ones_do_not():
    tied, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# --- cache and limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * 40, [7, 1, 1, 31], [20, 20], [1, 39]], ids=str)
def test_a_sequence_fed_in_pieces_gives_the_logits_of_the_whole(pieces):
    model = tiny_model().eval()
    ids = random_ids(model, batch=2, time=sum(pieces))
    cache = KVCache(model.config, 2, sum(pieces), torch.float32, "cpu")
    with torch.no_grad():
        whole = model(ids)
        parts = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert cache.length == sum(pieces)


def test_more_tokens_than_the_context_is_an_error_that_names_both():
    model = tiny_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match="17 tokens exceed max_position_embeddings 16"):
        model(random_ids(model, batch=1, time=17))


def test_the_default_configuration_is_smollm2_135m():
    config = SmolLM2Config()
    shape = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert shape == (576, 30, 9, 3, 64)
    assert (config.intermediate_size, config.vocab_size, config.tie_word_embeddings) == (1536, 49152, True)
    assert (config.max_position_embeddings, config.rope_theta, config.rms_norm_eps) == (2048, 10000.0, 1e-5)
    assert config.initializer_range == 1 / 24
