"""Pictures of tokens, and of how a tensor changes shape on its way."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.patches import Rectangle

from .. import plots
from ..token_text import piece

TINTS = ["#cfe6f5", "#fde7c2", "#cdebdf", "#f8d5c2", "#ead9e6"]  # pale: black text stays readable on each
CHARACTERS_PER_LINE = 72


def token_strip(tokenizer, ids: list[int], title: str, tints: list[str] = TINTS) -> plots.Figure:
    """Every token as a box: its text above, its id below, in reading order; `tints` repeat."""
    fig, ax = plots.figure(9, 1)
    style = {"ha": "center", "va": "center", "parse_math": False}
    left, row = 0, 0
    for number, token_id in enumerate(ids):
        text, name = piece(tokenizer, token_id), str(token_id)
        width = max(len(text), len(name)) + 1
        if left and left + width > CHARACTERS_PER_LINE:
            left, row = 0, row + 1
        ax.add_patch(Rectangle((left, -row - 0.9), width - 0.15, 0.8, color=tints[number % len(tints)]))
        middle = left + width / 2 - 0.07
        ax.text(middle, -row - 0.35, text, fontsize=9, family="monospace", **style)
        ax.text(middle, -row - 0.7, name, fontsize=7, color="#444444", **style)
        left += width
    fig.set_size_inches(9, 1.05 + 0.55 * row)
    ax.set(xlim=(0, CHARACTERS_PER_LINE), ylim=(-row - 1, 0))
    ax.set_axis_off()
    plots.label(ax, title, "", "")
    return fig


def flow(title: str, steps: list[tuple[str, str]], skips: Iterable[tuple[int, int]] = ()) -> plots.Figure:
    """A chain of boxes, left to right: in each the name of a step and, below, the shape that leaves it. Steps
    of one name have one colour.

    `skips` are arcs over the boxes, (from, to): what leaves the one also enters the other.
    """
    lines = 2 + max(shape.count("\n") for _, shape in steps)
    fig, ax = plots.figure(9, 1.1 + 0.17 * lines + 0.3 * bool(skips))
    style = {"ha": "center", "fontsize": 9}
    names = list(dict.fromkeys(name for name, _ in steps))
    for x, (name, shape) in enumerate(steps):
        tint = TINTS[names.index(name) % len(TINTS)]
        ax.add_patch(Rectangle((x - 0.38, 0), 0.76, 1, facecolor=tint))
        ax.text(x, 0.5, name, va="center", **style)
        ax.text(x, -0.15, shape, va="top", family="monospace", **style | {"fontsize": 8})
        if x:
            ax.annotate("", (x - 0.37, 0.5), (x - 0.63, 0.5), arrowprops={"arrowstyle": "-|>"})
    for start, end in skips:
        left, right = start + 0.1, end - 0.1  # the next one may begin where this one ends
        ax.plot([left, left, right], [1, 1.5, 1.5], color=plots.RED, marker="")
        ax.annotate("", (right, 1), (right, 1.52), arrowprops={"arrowstyle": "-|>", "color": plots.RED})
    ax.set(xlim=(-0.5, len(steps) - 0.5), ylim=(0.1 - 0.3 * lines, 1.1 + 0.6 * bool(skips)))
    ax.set_axis_off()
    plots.label(ax, title, "", "")
    return fig
