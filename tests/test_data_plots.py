"""Pictures of tokens: every text can be drawn, and what a box says is what the token stands for."""

from __future__ import annotations

import warnings

import pytest

from smollm2 import plots, token_text
from smollm2.notebook import data_plots
from smollm2.tokenizer import Tokenizer

TEXTS = [
    "",
    "a",
    "one token: $_$",
    "in 日本 語 🙂 Ωμέγα\n\ttab\0end",
    "x" * 500,
    "<|endoftext|>",
    "{\\frac a b} _ ^ %",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, the cat sat $_$ 日本 " * 20], 400)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_drawn_without_a_warning_and_its_tokens_have_its_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(token_text.spelled(tokenizer, i) for i in ids) == text.encode()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = data_plots.token_strip(tokenizer, ids, "title")
        assert plots.png_bytes(fig).startswith(b"\x89PNG")
    assert [t.get_text() for t in fig.axes[0].texts[::2]] == [token_text.piece(tokenizer, i) for i in ids]


def test_a_packed_row_is_covered_from_end_to_end():
    border, padding = data_plots.BORDER, data_plots.PADDING
    fig = data_plots.packed_rows({"packed": [[0, 0, border, 1], [1, 1, 1, 1]], "padded": [[0, 0, padding]]})
    packed, padded = ([bar.get_width() for bar in ax.patches] for ax in fig.axes)
    assert packed == [2, 1, 1, 4] and padded == [2, 1]
    numbers = [text.get_text() for text in fig.axes[0].texts]
    assert numbers == ["0", "1", "1"], "a reader who sees no colours reads the number of the piece"
    plots.png_bytes(fig)
