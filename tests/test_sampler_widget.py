"""The sampling panel: every callback at its extremes, the same seed the same text, ■ keeps the text, nothing unescaped."""

import re

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from smollm2.notebook import sampler as sampler_module
from smollm2.notebook.sampler import Sampler
from smollm2.sampling import complete


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tiny_model(vocab_size=tiny_tokenizer().vocab_size, max_position_embeddings=64), tiny_tokenizer()


@pytest.fixture
def panel(model_and_tokenizer) -> Sampler:
    return Sampler(*model_and_tokenizer, prompt="Once upon", new_tokens=12, dtype="fp32")


def ids(panel: Sampler) -> list[int]:
    """What was written behind the prompt."""
    return [token_id for token_id, probability in panel.tokens if probability is not None]


def written(panel: Sampler, seed: int = 0) -> str:
    panel.seed.value = seed
    panel.button.click()  # as the reader does: through the widget
    return panel.tokenizer.decode(ids(panel))


def test_the_button_writes_what_the_package_writes_and_the_seed_decides(panel, model_and_tokenizer):
    first = complete(*model_and_tokenizer, "Once upon", 12, seed=0, **panel.options())
    assert first == written(panel) == written(panel) != written(panel, seed=1) and len(ids(panel)) == 12
    panel.settings["temperature"].value = 0.0
    greedy = complete(*model_and_tokenizer, "Once upon", 12, temperature=0.0)
    assert written(panel) == written(panel, seed=99) == greedy


def test_it_writes_with_the_fastest_weights_and_says_which(model_and_tokenizer, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    panel = sampler_module.show(*model_and_tokenizer, prompt="Once upon", new_tokens=12)
    assert panel.status.value.endswith("in int8: fastest here; costs less than 0.5 % in bits per byte)")


def test_a_prompt_may_be_empty_or_too_long_and_more_tokens_pass_the_end_of_the_context(panel):
    panel.prompt.value = ""
    assert ids(panel) == [] and len(panel.tokens) == 1
    panel.prompt.value = "why " * 200
    panel.write()
    assert "shorten the prompt" in panel.status.value
    panel.prompt.value = "Once"
    begun = written(panel) and ids(panel)
    panel.new_tokens.value = 100  # context 64
    written(panel)
    assert ids(panel)[:12] == begun and len(ids(panel)) == 100


def test_the_bars_ask_for_the_logits_of_one_position(panel, monkeypatch):
    """Those of all positions take 400 MB behind 2,000 tokens, at every move of a slider."""
    rows, head = [], panel.model.head
    monkeypatch.setattr(panel.model, "head", lambda x: rows.append(len(x)) or head(x))
    panel.settings["temperature"].value = 1.5
    assert rows == [1]


def test_interrupting_keeps_what_is_written_and_other_errors_reach_the_reader(panel, monkeypatch):
    written(panel)
    whole, real = ids(panel), sampler_module.stream

    def interrupted(*arguments, **options):
        for number, step in enumerate(real(*arguments, **options)):
            if number == 5:
                raise KeyboardInterrupt  # what the interrupt button raises in the callback
            yield step

    monkeypatch.setattr(sampler_module, "stream", interrupted)
    panel.write()
    assert re.search("5 tokens.*stopped by you", panel.status.value) and ids(panel) == whole[:5]

    monkeypatch.setattr(sampler_module, "stream", lambda *_, **__: iter(1 / 0 for _ in "x"))
    with pytest.raises(ZeroDivisionError):
        panel.write()


def test_no_text_reaches_html_unescaped(panel):
    panel.prompt.value = "<script>alert('x')</script><img src=x onerror=y>&amp;\"quoted\""
    panel.write()
    for shown in (panel.page.value, panel.picture.value):
        assert "<script" not in shown and "<img src=x" not in shown and "&lt;" in panel.page.value
