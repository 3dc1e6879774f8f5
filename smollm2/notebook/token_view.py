"""Tokens as a reader sees them: coloured by the probability they had, and the next one's distribution as bars."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import torch

from .. import plots
from ..sampling import next_token_probabilities
from ..tokenizer import Tokenizer
from .data_plots import token_bytes, visible

# (probability below which it holds, background): dark = the model was surprised. Text stays readable on each.
SHADES = [
    (0.01, "#08519c", "#ffffff"),
    (0.1, "#4292c6", "#000000"),
    (0.5, "#9ecae1", "#000000"),
    (1.01, "#e8f1fa", "#000000"),
]
LEGEND = "dark: below 1 % · then below 10 %, below 50 %, palest: 50 % and more"
EDGE = "border-right:1px solid #ffffff"  # neighbours of one shade stay two tokens


def spelled(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of text that a token stands for, in a byte-level vocabulary or in SentencePiece's spelling."""
    name = tokenizer.token(token_id)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    try:
        return token_bytes(tokenizer, token_id)
    except KeyError:  # a character that no byte-level vocabulary uses: SentencePiece, whose blank is U+2581
        return name.replace("\u2581", " ").encode()


def piece(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text as one visible word: blanks as `·`, line breaks as `↵`, half a character as its bytes."""
    if tokenizer.token(token_id) is None:
        return f"[no entry {token_id}]"  # the network's vocabulary may be larger than the tokenizer's
    return visible(spelled(tokenizer, token_id))


def percent(probability: float) -> str:
    return (
        f"{100 * probability:.0f} %"
        if probability >= 0.095
        else f"{100 * probability:.1f} %"
        if probability >= 0.0005
        else "<0.1 %"
    )


def coloured(
    tokenizer: Tokenizer, ids: Sequence[int], probabilities: Sequence[float | None]
) -> tuple[str, str]:
    """(HTML, text) of tokens with the probability each had; None: it was given (the prompt), so it has none.

    The text twin says the same in words: `token(12 %)`. All text is escaped.
    """
    spans, words = [], []
    for token_id, probability in zip(ids, probabilities, strict=True):
        shown = piece(tokenizer, int(token_id))
        written = html.escape(shown.replace("·", " ")) + ("<br>" if "↵" in shown else "")
        if probability is None:
            spans.append(f"<b>{written}</b>")
            words.append(shown)
            continue
        _, back, front = next(shade for shade in SHADES if probability < shade[0])
        spans.append(
            f'<span style="background:{back};color:{front};{EDGE}" title="{percent(probability)}">{written}</span>'
        )
        words.append(f"{shown}({percent(probability)})")
    style = "background:#ffffff;color:#000000;padding:8px;white-space:pre-wrap;line-height:1.7;overflow-wrap:anywhere"
    return f'<div style="{style}">{"".join(spans)}</div>', " ".join(words)


def legend() -> str:
    """The shades of `coloured` as one line of HTML: the probability that the model gave a token."""
    names = [f"below {100 * limit:.0f} %" for limit, *_ in SHADES[:-1]] + [
        f"{100 * SHADES[-2][0]:.0f} % and more"
    ]
    spans = [
        f'<span style="background:{back};color:{front};padding:1px 6px">{name}</span>'
        for name, (_, back, front) in zip(names, SHADES, strict=True)
    ]
    return f'<div style="background:#ffffff;color:#000000;padding:0 8px 8px">probability of the token: {" ".join(spans)}</div>'


def bars(
    tokenizer: Tokenizer, logits: torch.Tensor, options: dict, title: str, top: int = 10
) -> tuple[plots.Figure, str]:
    """(figure, alt text) of the next token: logits (V,) -> the model's own probabilities and those sampled from.

    `options` are temperature (0: greedy), top_k, top_p and min_p of `smollm2.generate.stream`.
    """
    own = logits.float().softmax(-1)
    drawn = sampled_from(logits, options)
    best = own.topk(min(top, len(own))).indices
    names = [piece(tokenizer, int(i)) for i in best]
    fig, ax = plots.figure(7.5, 0.8 + 0.27 * len(names))
    rows = torch.arange(len(names))
    ax.barh(rows - 0.2, own[best].cpu(), 0.4, color=plots.GREY, label="the model's own")
    ax.barh(
        rows + 0.2,
        drawn[best].cpu(),
        0.4,
        color=plots.BLUE,
        hatch="//",
        edgecolor="white",
        label="sampled from",
    )
    ax.set_yticks(rows, [f"'{name}'" for name in names], family="monospace", parse_math=False)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    plots.label(ax, title, "probability of the next token", "", legend=True)
    listed = ", ".join(
        f"'{name}' {percent(own[i])} to {percent(drawn[i])}"
        for name, i in zip(names[:3], best[:3], strict=True)
    )
    return (
        fig,
        f"Probabilities of the next token, the model's own and after the settings: {listed}; {int((drawn > 0).sum()):,} tokens can still be drawn.",
    )


def sampled_from(logits: torch.Tensor, options: dict) -> torch.Tensor:
    """The distribution (V,) that `stream` draws from with these options; greedy puts all on the best token."""
    if options.get("temperature", 0.0) == 0.0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return next_token_probabilities(
        logits, **{k: options.get(k) for k in ("temperature", "top_k", "top_p", "min_p")}
    )
