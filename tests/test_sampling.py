"""Samples follow the distribution they claim, options have bounds, and tokens stream as whole characters."""

import random

import pytest
import tokenizers as hf
import torch
from tiny_models import metaspace_tokenizer, tiny_model, tiny_tokenizer

from smollm2.sampling import StreamDecoder, generate, stream
from smollm2.tokenizer import Tokenizer

DRAWS = 20_000
SETTINGS = [
    {"temperature": 0.7}, {"temperature": 1.6, "min_p": 0.05}, {"top_k": 7}, {"temperature": 1.3, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.7}, {"temperature": 0.8, "top_k": 25, "top_p": 0.85, "min_p": 0.08},
]  # fmt: skip


def warped(logits: torch.Tensor, temperature=1.0, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """transformers' own distribution for the same settings, in its own order."""
    from transformers.generation import logits_process as theirs

    scores = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    for name, value in {"TopK": top_k, "TopP": top_p, "MinP": min_p}.items():
        if value is not None:
            scores = getattr(theirs, f"{name}LogitsWarper")(value)(None, scores)
    return scores.softmax(-1)


@pytest.fixture(scope="module")
def peaked():
    model = tiny_model(vocab_size=60, initializer_range=0.2)
    prompt = torch.tensor([[5, 17, 33]])
    with torch.no_grad():
        return model, prompt, model(prompt)[:, -1]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_20000_draws_follow_transformers_distribution(peaked, settings):
    model, prompt, logits = peaked
    options = {"temperature": 1.0, "stop_ids": (), "seed": 11} | settings
    fresh = generate(model, prompt.expand(DRAWS, -1), 1, **options)
    counts = torch.bincount(fresh[:, -1], minlength=logits.shape[-1])
    probabilities = warped(logits, **settings)[0]
    assert int((probabilities > 0).sum()) >= 3  # a distribution, not a single token
    assert counts[probabilities == 0].sum() == 0  # what is filtered out never comes
    mean = probabilities * DRAWS
    deviations = (counts - mean).abs() / (mean * (1 - probabilities)).clamp(min=1).sqrt()
    assert deviations.max() < 4.5  # a temperature of 1.1 for 1.0 makes more than 6


OUT_OF_RANGE = "max_new_tokens=0 temperature=-0.1 temperature=nan temperature=inf top_k=0 top_k=1.5 top_p=0 "
OUT_OF_RANGE += "top_p=1.5 top_p=nan min_p=-0.5 min_p=2 seed=-1 seed=1e19 top_q=1"


@pytest.mark.parametrize("wrong", OUT_OF_RANGE.split())
def test_options_out_of_range_are_named_before_anything_is_sampled(wrong):
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=f"SamplingOptions\n{name}\n"):
        next(stream(tiny_model(), torch.tensor([[1]]), **{name: float(value)}))


def byte_fallback_tokenizer() -> Tokenizer:
    """Bytes as tokens, as SentencePiece has them: one stray byte spoils the whole run it stands in."""
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a"]
    vocabulary = {name: i for i, name in enumerate(entries)}
    made = hf.Tokenizer(hf.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    blanks = [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    made.normalizer = hf.normalizers.Sequence(blanks)
    back = [hf.decoders.ByteFallback(), hf.decoders.Fuse(), hf.decoders.Strip(" ", 1, 0)]
    made.decoder = hf.decoders.Sequence([hf.decoders.Replace("\u2581", " "), *back])
    return Tokenizer(made.to_str().encode())


def pieces(tokenizer, before: list[int], after: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer, before)
    return [*map(decoder.push, after), decoder.flush()]


@pytest.mark.parametrize("length", [1, 3, 80, 400])
@pytest.mark.parametrize("made", [metaspace_tokenizer, tiny_tokenizer])
def test_streamed_text_is_what_all_ids_decode_to_less_the_prompt(made, length):
    """A Metaspace decoder strips the first blank it meets: that of a later piece may not go."""
    tokenizer, random_ids = made(), random.Random(13)
    for prompt in (None, "", "The king", "and speak of the year " * 30, "\ufffd"):
        before = [] if prompt is None else [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
        after = [random_ids.randrange(3, tokenizer.vocab_size) for _ in range(length)]  # half characters too
        after[length // 2] = tokenizer.begin_ids[0]  # a special token in the middle is hidden
        whole = tokenizer.decode(before + after, skip_special_tokens=True)
        shown = len(tokenizer.decode(before, skip_special_tokens=True))
        assert "".join(pieces(tokenizer, before, after)) == whole[shown:]


@pytest.mark.parametrize("made", [byte_fallback_tokenizer, tiny_tokenizer])
@pytest.mark.parametrize("prompt", ["", "a", "漢字🙂" * 30], ids=len)
def test_no_replacement_character_is_shown_while_a_character_is_incomplete(made, prompt):
    tokenizer = made()
    for text in ("日本語🙂é" * 40, "a日 本" * 60):
        ids, start = tokenizer.encode(prompt + text), len(tokenizer.encode(prompt))
        shown = pieces(tokenizer, ids[:start], ids[start:])
        assert "".join(shown) == tokenizer.decode(ids)[len(prompt) :]
        assert not any("\ufffd" in piece for piece in shown) and len(shown) > 100


def test_stray_bytes_spoil_only_what_is_not_yet_shown():
    tokenizer = byte_fallback_tokenizer()
    e_acute, stray, a = [1 + 0xC3, 1 + 0xA9], [1 + 0xE6], [258]
    assert "".join(pieces(tokenizer, [], e_acute + stray + a)) == "é\ufffd\ufffda"
