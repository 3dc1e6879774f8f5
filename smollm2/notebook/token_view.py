"""Tokens as a reader sees them: coloured by probability, and the next one's distribution as bars."""

from __future__ import annotations

import html
from collections.abc import Sequence

import torch

from .. import plots
from ..sampling import next_token_probabilities
from ..token_text import percent, piece

# (probability below which it holds, background, text, in words): dark = the model was surprised
SHADES = [
    (0.01, "#08519c", "#ffffff", "below 1 %"),
    (0.1, "#4292c6", "#000000", "below 10 %"),
    (0.5, "#9ecae1", "#000000", "below 50 %"),
    (1.01, "#e8f1fa", "#000000", "50 % and more"),
]
PAGE = "background:#fff;color:#000;padding:8px;white-space:pre-wrap;line-height:1.7;overflow-wrap:anywhere"


def _span(shade, words: str, title: str = "") -> str:
    _, back, front, _ = shade
    style = f"background:{back};color:{front};border-right:1px solid #ffffff"  # neighbours stay two tokens
    return f'<span style="{style}" title="{title}">{words}</span>'


def coloured(tokenizer, ids: Sequence[int], probabilities: Sequence[float | None]) -> tuple[str, str]:
    """(HTML, text) of tokens with the probability each had; None: it was given (the prompt), so it has none.

    The HTML ends in a line that explains the shades; the text twin says the same in words: `token(12 %)`.
    """
    spans, words = [], []
    for token_id, probability in zip(ids, probabilities, strict=True):
        shown = piece(tokenizer, int(token_id))
        written = html.escape(shown.replace("·", " ")) + ("<br>" if "↵" in shown else "")
        if probability is None:
            spans.append(f"<b>{written}</b>")
            words.append(shown)
        else:
            shade = next(shade for shade in SHADES if probability < shade[0])
            spans.append(_span(shade, written, percent(probability)))
            words.append(f"{shown}({percent(probability)})")
    legend = " ".join(_span(shade, shade[3]) for shade in SHADES)
    markup = f'<div style="{PAGE}">{"".join(spans)}<br>probability of the token: {legend}</div>'
    return markup, " ".join(words)


def bars(tokenizer, logits: torch.Tensor, options: dict, title: str, top: int = 10):
    """(figure, alt text) of the next token: logits (V,) -> the model's own probabilities and those sampled
    from.

    `options` are temperature (0: greedy), top_k, top_p and min_p of `smollm2.sampling.stream`.
    """
    own, drawn = logits.float().softmax(-1).cpu(), next_token_probabilities(logits, **options).cpu()
    best = own.topk(min(top, len(own))).indices
    names = [f"'{piece(tokenizer, int(i))}'" for i in best]
    fig, ax = plots.figure(7.5, 0.8 + 0.27 * len(names))
    rows = torch.arange(len(names))
    ax.barh(rows - 0.2, own[best], 0.4, color=plots.GREY, label="the model's own")
    drawn_style = {"color": plots.BLUE, "hatch": "//", "edgecolor": "white"}
    ax.barh(rows + 0.2, drawn[best], 0.4, label="sampled from", **drawn_style)
    ax.set_yticks(rows, names, family="monospace", parse_math=False)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    plots.label(ax, title, "probability of the next token", "", legend=True)
    changes = [f"{n} {percent(own[i])} to {percent(drawn[i])}" for n, i in zip(names[:3], best, strict=False)]
    alt = "Probabilities of the next token, the model's own and after the settings: "
    return fig, f"{alt}{', '.join(changes)}; {int((drawn > 0).sum()):,} tokens can still be drawn."
