"""Generation: what a real trained model says, with the cache and without, and that sampling samples what it promises."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import random_ids, tiny_model, transformers_twin

import smollm2.model as model_module
from smollm2.errors import UserError
from smollm2.model import SmolLM2
from smollm2.sampling import (
    check_sampling,
    complete,
    generate,
    next_token_probabilities,
    prompt_ids,
    stream,
    stream_text,
)
from smollm2.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def stories(test_data):
    """A real, trained model of 656,000 parameters, and what transformers computes with it."""
    folder = test_data / "stories-656k"
    return SmolLM2.from_pretrained(folder), json.loads((folder / "reference.json").read_text())["prompts"]


def test_a_real_model_gives_the_reference_loss_and_logits(stories):
    model, prompts = stories
    assert len(prompts) == 3
    for prompt in prompts:
        ids = torch.tensor([prompt["input_ids"]])
        with torch.no_grad():
            logits = model(ids)
            loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
        top = logits[0, -1].topk(10)
        assert top.indices.tolist() == prompt["last_logits_top10_indices"]
        torch.testing.assert_close(
            top.values, torch.tensor(prompt["last_logits_top10_values"]), atol=2e-5, rtol=0
        )
        assert loss == pytest.approx(prompt["loss"], abs=1e-5)
        assert logits.abs().mean().item() == pytest.approx(prompt["all_logits_abs_mean"], abs=2e-6)
        assert logits[0, -1].mean().item() == pytest.approx(prompt["last_logits_mean"], abs=2e-6)


def test_a_real_models_prompt_and_text_are_those_of_transformers(stories, test_data):
    """Its tokenizer marks blanks and asks for a begin token: neither a blank nor that token may be lost, however long the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, folder = stories[0], test_data / "stories-656k"
    tokenizer, theirs = Tokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs("The cat", return_tensors="pt")
    assert prompt_ids(model, tokenizer, "The cat") == expected.input_ids[0].tolist() == [1, 80, 247, 476]
    assert prompt_ids(model, tokenizer, "") == theirs("").input_ids
    ids = AutoModelForCausalLM.from_pretrained(folder).generate(
        **expected, max_new_tokens=150, do_sample=False
    )[0]
    assert "The cat" + complete(model, tokenizer, "The cat", 150, temperature=0.0) == theirs.decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_real_model_continues_as_the_reference_does(stories, use_cache):
    model, prompts = stories
    for prompt in prompts:
        ids = torch.tensor([prompt["input_ids"]])
        new = len(prompt["greedy_ids"]) - ids.shape[1]
        assert new == 48
        assert (
            model.generate(ids, max_new_tokens=new, temperature=0.0, use_cache=use_cache)[0].tolist()
            == prompt["greedy_ids"]
        )


def test_the_real_models_text_is_the_reference_text(stories, test_data):
    _, prompts = stories
    tokenizer = Tokenizer.from_file(test_data / "stories-656k")
    for prompt in prompts:
        assert tokenizer.decode(prompt["greedy_ids"]) == prompt["greedy_text"]


def lively_model(**changes) -> SmolLM2:
    """A random model whose greedy text does not fall into one repeated token, as that of a tied one soon does."""
    return tiny_model(tie_word_embeddings=False, initializer_range=0.3, eos_token_id=None, **changes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "seed": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("new", [1, 20, 90])  # 90: the context of 40 overflows twice
def test_the_cache_changes_no_token(options, new):
    model = lively_model(max_position_embeddings=40)
    ids = random_ids(model, batch=3, time=9)
    cached = model.generate(ids, max_new_tokens=new, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=new, use_cache=False, **options))
    assert cached.shape == (3, 9 + new) and torch.equal(cached[:, :9], ids)
    assert new == 1 or len(cached[:, 9:].unique()) > 10  # or there was little to compare


def test_greedy_tokens_equal_transformers():
    model = lively_model()
    ids = random_ids(model, batch=2, time=5)
    twin = transformers_twin(model)
    theirs = twin.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, max_new_tokens=60), theirs)


def test_a_cache_that_mixes_up_positions_is_caught(monkeypatch):
    model = lively_model()
    ids = random_ids(model, batch=1, time=9)
    expected = model.generate(ids, max_new_tokens=30)

    class Mixed(model_module.KVCache):
        def update(self, layer, k, v):
            keys, values = super().update(layer, k, v)
            return keys.roll(1, dims=2), values  # every value under the key of its neighbour

    monkeypatch.setattr(model_module, "KVCache", Mixed)
    assert not torch.equal(model.generate(ids, max_new_tokens=30), expected)


def test_a_prompt_as_long_as_the_context_can_be_continued():
    model = lively_model(max_position_embeddings=16)
    for time in (15, 16, 17, 40):
        ids = random_ids(model, batch=1, time=time)
        out = model.generate(ids, max_new_tokens=3)
        assert out.shape == (1, time + 3) and torch.equal(
            out, model.generate(ids, max_new_tokens=3, use_cache=False)
        )


def test_every_row_stops_at_its_own_end_of_text():
    model = lively_model()
    ids = random_ids(model, batch=2, time=4)
    free = model.generate(ids, max_new_tokens=30)
    stop = int(free[0, 10])
    stopped = model.generate(ids, max_new_tokens=30, stop_ids=(stop,))
    for row, expected in zip(stopped[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row[:end] == expected[:end] and set(row[end:]) <= {stop}
    assert stopped.shape[1] < free.shape[1] or stop not in free[1]


def test_generation_leaves_no_gradient_and_does_not_touch_the_weights():
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    out = model.generate(random_ids(model, 1, 4), max_new_tokens=5)
    assert not out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- sampling -----------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -8.0])


def test_temperature_divides_the_logits():
    torch.testing.assert_close(next_token_probabilities(LOGITS, temperature=0.5), (LOGITS / 0.5).softmax(-1))


def test_top_k_keeps_the_k_likeliest():
    assert next_token_probabilities(LOGITS, top_k=2).nonzero().flatten().tolist() == [0, 1]
    assert (next_token_probabilities(LOGITS, top_k=100) > 0).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    probabilities = LOGITS.softmax(-1)
    for p in (0.01, 0.5, 0.75, 0.9, 0.99):
        kept = next_token_probabilities(LOGITS, top_p=p).count_nonzero().item()
        assert probabilities[:kept].sum() >= p and (kept == 1 or probabilities[: kept - 1].sum() < p)


def test_min_p_keeps_tokens_relative_to_the_best():
    kept = next_token_probabilities(LOGITS, min_p=0.2)
    assert kept.nonzero().flatten().tolist() == [0, 1, 2]  # e^-1 and e^-1.5 reach 0.2, e^-2 does not
    assert next_token_probabilities(LOGITS, min_p=1.0).count_nonzero() == 1


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-45, 100.0])
def test_extreme_temperatures_give_a_distribution(temperature):
    probabilities = next_token_probabilities(LOGITS, temperature=temperature)
    assert torch.isfinite(probabilities).all() and probabilities.sum().item() == pytest.approx(1, abs=1e-5)


def test_filters_equal_transformers():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(9)
    logits = torch.randn(5, 200) * 3
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(0.8), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    )
    expected = warpers(None, logits).softmax(-1)
    torch.testing.assert_close(
        next_token_probabilities(logits, 0.8, top_k=40, top_p=0.9, min_p=0.05), expected
    )


def test_sampled_frequencies_follow_the_distribution():
    model = tiny_model(vocab_size=11, eos_token_id=None, initializer_range=0.3)
    ids = random_ids(model, batch=1, time=3).expand(4000, -1)
    sampled = model.generate(ids, max_new_tokens=1, temperature=0.9, top_k=6, seed=5)[:, -1]
    with torch.no_grad():
        expected = next_token_probabilities(model(ids[:1])[0, -1], 0.9, top_k=6)
    frequencies = torch.bincount(sampled, minlength=11) / len(sampled)
    assert (frequencies - expected).abs().max() < 4 * 0.5 / 4000**0.5
    assert not frequencies[expected == 0].any()


def test_a_seed_fixes_the_sample_and_another_changes_it():
    model = tiny_model(eos_token_id=None)
    ids = random_ids(model, 1, 4)

    def sample(seed):
        return model.generate(ids, max_new_tokens=40, temperature=1.0, seed=seed)

    torch.manual_seed(0)
    first = sample(1)
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(first, sample(1)) and not torch.equal(first, sample(2))
    assert not torch.equal(sample(None), sample(None))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(changes, name):
    settings = {"max_new_tokens": 5, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    with pytest.raises(ValueError, match=f"^{name} is .*expected"):
        check_sampling(**(settings | changes))


def test_empty_and_misshapen_prompts_are_refused():
    model = tiny_model()
    for ids in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected \\(batch, time\\)"):
            generate(model, ids)


# --- text ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker():
    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 20], 300)
    return tiny_model(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=64, eos_token_id=None
    ), tokenizer


def test_streamed_pieces_join_to_the_whole_text(talker):
    model, tokenizer = talker
    for seed in range(5):
        options = {"temperature": 1.5, "seed": seed}  # random bytes: characters often begin and do not end
        ids = torch.tensor([[0, *tokenizer.encode("the cat")]])
        expected = tokenizer.decode(
            model.generate(ids, max_new_tokens=150, **options)[0, ids.shape[1] :], skip_special_tokens=True
        )
        assert "".join(stream_text(model, tokenizer, "the cat", 150, **options)) == expected
        assert complete(model, tokenizer, "the cat", 150, **options) == expected


def test_text_appears_as_it_is_made_and_not_at_the_end(talker):
    model, tokenizer = talker
    pieces = stream_text(model, tokenizer, "the cat", 1000, temperature=1.0, seed=0)
    assert isinstance(next(pieces), str)


def test_an_empty_prompt_begins_a_new_document(talker):
    model, tokenizer = talker
    expected = tokenizer.decode(
        model.generate(torch.tensor([[0]]), max_new_tokens=8)[0, 1:], skip_special_tokens=True
    )
    assert complete(model, tokenizer, "", 8) == expected


def test_a_prompt_longer_than_the_context_is_one_clear_error(talker):
    model, tokenizer = talker
    with pytest.raises(UserError, match="the model's context is 64"):
        list(stream_text(model, tokenizer, "cat mat " * 100))


def test_stream_stops_where_the_caller_stops():
    model = tiny_model(eos_token_id=None)
    tokens = [
        int(token)
        for (token, _), _ in zip(stream(model, random_ids(model, 1, 3), 10**9), range(4), strict=False)
    ]
    assert len(tokens) == 4
