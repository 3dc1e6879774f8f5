"""The sampling panel: every callback at its extremes, the same seed the same text, ■ keeps the text, nothing unescaped."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from smollm2 import token_text
from smollm2.notebook import sampler as sampler_module
from smollm2.notebook import token_view
from smollm2.notebook.sampler import Sampler, show
from smollm2.sampling import complete, next_token_probabilities


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tiny_model(vocab_size=tiny_tokenizer().vocab_size, max_position_embeddings=64), tiny_tokenizer()


@pytest.fixture
def panel(model_and_tokenizer) -> Sampler:
    return Sampler(*model_and_tokenizer, prompt="Once upon", new_tokens=12)


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


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "new_tokens", "seed"])
def test_every_slider_writes_at_both_ends(panel, name):
    control = panel.settings.get(name) or getattr(panel, name)
    for value in (control.min, min(control.max, 100)):  # beyond 64 the older half of the context is forgotten
        control.value = value
        panel.write()
        assert "data:image/png" in panel.picture.value
        assert re.match(f"{panel.new_tokens.value} tokens|.*ended its text", panel.status.value)


def test_settings_move_the_bars_at_once_and_keep_the_text(panel):
    before, tokens = panel.picture.value, list(panel.tokens)
    for name, value, left in (("top_k", 3, 3), ("min_p", 1.0, 1), ("min_p", 0.0, 3)):
        panel.settings[name].value = value
        assert panel.picture.value != before and panel.alt.endswith(f"{left} tokens can still be drawn.")
    assert panel.tokens == tokens


def test_a_new_prompt_starts_a_new_page_an_empty_one_a_document_and_one_too_long_is_a_line(panel):
    written(panel)
    panel.prompt.value = ""
    assert ids(panel) == [] and len(panel.tokens) == 1
    assert written(panel) and len(panel.tokens) == 1 + 12
    panel.prompt.value = "why " * 200
    panel.write()
    assert "shorten the prompt" in panel.status.value
    panel.prompt.value = "Once"
    assert written(panel)


def test_more_tokens_go_on_and_can_pass_the_end_of_the_context(panel):
    begun = written(panel) and ids(panel)
    panel.new_tokens.value = 100  # context 64
    written(panel)
    assert ids(panel)[:12] == begun and len(ids(panel)) == 100


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

    monkeypatch.setattr(sampler_module, "stream", real)
    monkeypatch.setitem(panel.model.config.__dict__, "eos_token_id", whole[0])
    assert written(panel) == "" and "ended its text" in panel.status.value
    monkeypatch.setattr(sampler_module, "stream", lambda *_, **__: iter(1 / 0 for _ in "x"))
    with pytest.raises(ZeroDivisionError):
        panel.write()


def test_no_text_reaches_html_unescaped(panel):
    panel.prompt.value = "<script>alert('x')</script><img src=x onerror=y>&amp;\"quoted\""
    panel.write()
    for shown in (panel.page.value, panel.picture.value):
        assert "<script" not in shown and "<img src=x" not in shown and "&lt;" in panel.page.value


def test_every_token_is_coloured_by_its_own_probability(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    tokens = tokenizer.encode("The king said: come hither")[:5]
    markup, text = token_view.coloured(tokenizer, tokens, [None, 0.9, 0.3, 0.05, 0.001])
    assert {markup.count(shade[1]) for shade in token_view.SHADES} == {2}  # the token, and the legend

    assert text.count("(") == 4 and "(90 %)" in text and "(0.1 %)" in text


def test_any_token_of_any_vocabulary_can_be_shown(model_and_tokenizer):
    class SentencePiece:
        def token(self, token_id):
            return ["\u2581king", "<0x0A>", "\u6771"][token_id]

    assert token_text.piece(model_and_tokenizer[1], 10**6) == "[no entry 1000000]"
    shown = [token_text.visible(raw) for raw in (b" the", b"\n", b"\0", b"\xe6", "日".encode())]
    assert shown == ["·the", "↵", "[0]", "e6", "日"]
    assert [token_text.spelled(SentencePiece(), i) for i in range(3)] == [b" king", b"\n", "\u6771".encode()]


def test_the_bars_show_the_distribution_that_is_drawn_from(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    logits = torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    expected = next_token_probabilities(logits, 0.7, 5).sort(descending=True).values[:10].tolist()
    greedy = [1.0] + [0.0] * 9
    for options, drawn in (({"temperature": 0.7, "top_k": 5}, expected), ({"temperature": 0.0}, greedy)):
        fig, alt = token_view.bars(tokenizer, logits, options, "next")
        assert [bar.get_width() for bar in fig.axes[0].containers[1]] == pytest.approx(drawn)
        assert f"{sum(share > 0 for share in drawn)} tokens can still be drawn" in alt


def test_without_a_kernel_the_default_is_still_shown(model_and_tokenizer, capsys):
    panel = show(*model_and_tokenizer, prompt="Once upon", new_tokens=8)
    said = capsys.readouterr().out
    assert "[text] " in said and "[figure] Probabilities of the next token" in said and len(ids(panel)) == 8
