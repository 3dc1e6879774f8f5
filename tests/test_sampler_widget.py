"""The sampling panel: every callback at its extremes, the same seed the same text, three ways to stop, nothing unescaped."""

from __future__ import annotations

import ipywidgets
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from smollm2 import widgets
from smollm2.notebook import sampler as sampler_module
from smollm2.notebook import token_view
from smollm2.notebook.sampler import Sampler
from smollm2.sampling import complete, next_token_probabilities


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return tiny_model(vocab_size=tiny_tokenizer().vocab_size, max_position_embeddings=64), tiny_tokenizer()


@pytest.fixture
def panel(model_and_tokenizer) -> Sampler:
    return Sampler(*model_and_tokenizer, prompt="Once upon", new_tokens=12)


def written(panel: Sampler) -> str:
    panel.write_button.click()  # as the reader does: through the widget
    return panel.text


def test_the_button_writes_what_the_package_writes(panel, model_and_tokenizer):
    text = written(panel)
    assert text == complete(*model_and_tokenizer, "Once upon", 12, seed=0, **panel.options())
    assert len(panel.ids) == len(panel.probabilities) == len(panel._start) + 12


def test_the_same_seed_writes_the_same_text_and_another_seed_another(panel):
    first = written(panel)
    assert written(panel) == first
    panel.seed.value = 1
    assert written(panel) != first


def test_temperature_zero_is_greedy_whatever_the_seed(panel, model_and_tokenizer):
    panel.temperature.value = 0.0
    texts = set()
    for seed in (0, 99):
        panel.seed.value = seed
        texts.add(written(panel))
    assert texts == {complete(*model_and_tokenizer, "Once upon", 12, temperature=0.0)}


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "new_tokens", "seed"])
def test_every_slider_writes_at_both_ends(panel, name):
    control = getattr(panel, name)
    for value in (control.min, control.max):
        control.value = value
        panel.new_tokens.value = min(
            panel.new_tokens.value, 80
        )  # beyond the context of 64: the older half is forgotten
        written(panel)
        assert "data:image/png" in panel.picture.value
        assert (
            f"{panel.new_tokens.value} tokens" in panel.status.value or "ended its text" in panel.status.value
        )


def test_all_filters_off_and_all_at_their_strictest(panel):
    panel.top_k.value, panel.top_p.value, panel.min_p.value = 0, 1.0, 0.0
    assert panel.options() == {"temperature": 0.8, "top_k": None, "top_p": None, "min_p": None}
    panel.min_p.value = 1.0
    assert panel.figure()[1].endswith("1 tokens can still be drawn."), "min-p 1 leaves only the best"
    panel.min_p.value, panel.top_p.value = 0.0, 0.05
    assert panel.options() == {"temperature": 0.8, "top_k": None, "top_p": 0.05, "min_p": None}
    panel.temperature.value = 0.0
    greedy = written(panel)
    panel.temperature.value, panel.top_k.value, panel.top_p.value, panel.min_p.value = 2.0, 1, 0.05, 1.0
    assert written(panel) == greedy, "with one token left to draw from, sampling is greedy"


def test_settings_move_the_bars_at_once_and_keep_the_text(panel):
    text, before = written(panel), panel.picture.value
    panel.top_k.value = 3
    assert panel.picture.value != before
    assert panel.text == text
    assert panel.figure()[1].endswith("3 tokens can still be drawn.")


def test_a_new_prompt_starts_a_new_page(panel):
    written(panel)
    panel.prompt.value = "The king"
    assert panel.text == "" and panel.more_button.disabled
    assert panel.ids == panel._start


def test_go_on_appends_and_can_pass_the_end_of_the_context(panel):
    panel.new_tokens.value = 30
    text = written(panel)
    for _ in range(3):  # 2 + 4 * 30 tokens, context 64
        panel.more_button.click()
    assert panel.text.startswith(text) and len(panel.ids) == len(panel._start) + 120


def test_an_empty_prompt_begins_a_document(panel):
    panel.prompt.value = ""
    written(panel)
    assert len(panel.ids) == 1 + 12


def test_a_prompt_that_is_too_long_is_one_line_and_the_next_one_works(panel):
    panel.prompt.value = "why " * 200
    written(panel)
    assert "shorten the prompt" in panel.status.value
    panel.prompt.value = "Once"
    assert written(panel)


def test_interrupting_keeps_what_is_written(panel, monkeypatch):
    whole = written(panel)
    real = sampler_module.stream

    def interrupted(*arguments, **options):
        for number, step in enumerate(real(*arguments, **options)):
            if number == 5:
                raise KeyboardInterrupt  # what the interrupt button raises in the callback
            yield step

    monkeypatch.setattr(sampler_module, "stream", interrupted)
    text = written(panel)
    assert "stopped by you" in panel.status.value and "5 tokens" in panel.status.value
    assert text.rstrip("\ufffd") and whole.startswith(text.rstrip("\ufffd"))
    monkeypatch.undo()
    panel.more_button.click()
    assert len(panel.ids) == len(panel._start) + 5 + 12


def test_a_stop_text_and_the_time_limit_end_it(panel):
    text = written(panel)
    panel.stop_text.value = text[3]
    assert written(panel) == text[: len(panel.text)] and text[3] in panel.text and len(panel.text) < len(text)
    assert "stop text reached" in panel.status.value
    panel.stop_text.value, panel.seconds = "", 0.0
    written(panel)
    assert "1 tokens" in panel.status.value and "stopped after 0 s" in panel.status.value


def test_a_stop_text_typed_as_backslash_n_is_a_line_break(panel):
    panel.text, panel.stop_text.value = "one line\nand more", "\\n"
    assert panel._stop_reached(0)
    assert not panel._stop_reached(10), "a line break written earlier does not count"


def test_the_model_ending_its_text_ends_the_page(panel, model_and_tokenizer):
    model, _ = model_and_tokenizer
    panel.temperature.value = 0.0
    text = written(panel)
    first = panel.ids[len(panel._start)]
    model.config.__dict__["eos_token_id"], old = first, model.config.eos_token_id
    try:
        assert written(panel) == "" and text
        assert "ended its text" in panel.status.value
    finally:
        model.config.__dict__["eos_token_id"] = old


def test_other_errors_reach_the_reader(panel, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("kernel failed")
        yield

    monkeypatch.setattr(sampler_module, "stream", broken)
    with pytest.raises(RuntimeError, match="kernel failed"):
        panel.write()


def test_no_text_reaches_html_unescaped(panel):
    evil = "<script>alert('x')</script><img src=x onerror=y>&amp;\"quoted\""
    panel.prompt.value = evil
    written(panel)
    for shown in (panel.page.value, panel.status.value, panel.picture.value):
        assert "<script" not in shown and "<img src=x" not in shown
    assert "&lt;" in panel.page.value and "&amp;" in panel.page.value
    panel._say(evil)
    assert "<script" not in panel.status.value


def test_every_token_is_coloured_by_its_own_probability(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    ids = tokenizer.encode("The king said: come hither")[:5]
    markup, text = token_view.coloured(tokenizer, ids, [None, 0.9, 0.3, 0.05, 0.001])
    assert [markup.count(shade[1]) for shade in token_view.SHADES] == [1, 1, 1, 1]
    assert text.count("(") == 4 and "(90 %)" in text and "(0.1 %)" in text


def test_ids_outside_the_tokenizer_and_half_characters_can_be_shown(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    assert token_view.piece(tokenizer, 10**6) == "[no entry 1000000]"
    half = next(i for i in range(tokenizer.vocab_size) if token_view.token_bytes(tokenizer, i) == b"\xe6")
    assert token_view.piece(tokenizer, half) == "e6"


def test_other_vocabularies_than_byte_level_can_be_shown():
    class SentencePiece:
        end_of_text_id = None

        def token(self, token_id):
            return ["\u2581king", "<0x0A>", "\u6771"][token_id]

    assert [token_view.spelled(SentencePiece(), i) for i in range(3)] == [b" king", b"\n", "\u6771".encode()]


def test_the_bars_show_the_distribution_that_is_drawn_from(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    logits = torch.randn(tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.7, "top_k": 5, "top_p": None, "min_p": None}
    assert torch.equal(token_view.sampled_from(logits, options), next_token_probabilities(logits, 0.7, 5))
    greedy = token_view.sampled_from(logits, {"temperature": 0.0})
    assert greedy.sum() == 1 and greedy.argmax() == logits.argmax()
    fig, alt = token_view.bars(tokenizer, logits, options, "next")
    widths = [bar.get_width() for bar in fig.axes[0].containers[1]]
    assert (
        widths[0] == pytest.approx(float(next_token_probabilities(logits, 0.7, 5).max()), abs=1e-6)
        and widths[5:] == [0.0] * 5
    )
    assert "5 tokens can still be drawn" in alt


def test_without_a_kernel_the_default_is_still_shown(model_and_tokenizer, capsys):
    panel = widgets.sampler(*model_and_tokenizer, prompt="Once upon", new_tokens=8)
    said = capsys.readouterr().out
    assert "[text] " in said and "[figure] Probabilities of the next token" in said
    assert isinstance(panel.box, ipywidgets.VBox) and len(panel.ids) == len(panel._start) + 8
