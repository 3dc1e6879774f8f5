"""Pictures of tokens: every text can be drawn, and what a box says is what the token stands for."""

from __future__ import annotations

import warnings

import pytest

from smollm2 import plots
from smollm2.notebook import data_plots
from smollm2.tokenizer import Tokenizer

TEXTS = [
    "",
    "a",
    "price: $5 and $6",
    "one token: $_$",
    "日本語 🙂 Ωμέγα\n\ttab\0end",
    "x" * 500,
    "<|endoftext|>",
    "{\\frac a b} _ ^ %",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, the cat sat $_$ " * 20], 300)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_can_be_drawn_without_a_warning(tokenizer, text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = data_plots.token_strip(tokenizer, tokenizer.encode(text), "title")
        assert plots.png_bytes(fig).startswith(b"\x89PNG")


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, text):
    assert b"".join(data_plots.token_bytes(tokenizer, i) for i in tokenizer.encode(text)) == text.encode()


def test_a_token_that_looks_like_a_formula_is_drawn_as_it_is(tokenizer):
    ids = tokenizer.encode("on $_$")
    assert "·$_$" in [data_plots.visible(data_plots.token_bytes(tokenizer, i)) for i in ids]
    plots.png_bytes(data_plots.token_strip(tokenizer, ids, "title"))


def test_labels_show_blanks_breaks_and_broken_characters():
    assert data_plots.visible(b" the") == "·the"
    assert data_plots.visible(b"\n") == "↵"
    assert data_plots.visible("é".encode()[:1]) == "c3"
    assert data_plots.visible("日".encode()) == "[65e5]"


def test_a_packed_row_is_covered_from_end_to_end():
    border, padding = data_plots.BORDER, data_plots.PADDING
    fig = data_plots.packed_rows({"packed": [[0, 0, border, 1], [1, 1, 1, 1]], "padded": [[0, 0, padding]]})
    packed, padded = ([bar.get_width() for bar in ax.patches] for ax in fig.axes)
    assert packed == [2, 1, 1, 4] and padded == [2, 1]
    assert [text.get_text() for text in fig.axes[0].texts] == ["0", "1", "1"], (
        "a reader who sees no colours reads the number of the piece"
    )
    plots.png_bytes(fig)
