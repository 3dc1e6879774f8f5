"""Pictures of tokens, of the rows they are packed into, and of how a tensor changes shape on its way."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from matplotlib.patches import Rectangle

from .. import plots
from ..token_text import piece

TINTS = ["#cfe6f5", "#fde7c2", "#cdebdf", "#f8d5c2", "#ead9e6"]  # pale: black text stays readable on each
CHARACTERS_PER_LINE = 72
BORDER, PADDING = -1, -2  # of a token that belongs to no document
STYLES = {  # one token is narrower than a pixel, so a border gets an edge
    BORDER: {"color": plots.BLACK, "edgecolor": plots.BLACK, "linewidth": 1.5},
    PADDING: {"color": "white", "edgecolor": plots.GREY, "linewidth": 0.5, "hatch": "///"},
}


def token_strip(tokenizer, ids: list[int], title: str) -> plots.Figure:
    """Every token as a box: its text above, its id below, in reading order."""
    boxes, left, row = [], 0, 0
    for token_id in ids:
        text = piece(tokenizer, token_id)
        width = max(len(text), len(str(token_id))) + 1
        if left and left + width > CHARACTERS_PER_LINE:
            left, row = 0, row + 1
        boxes.append((text, str(token_id), left, row, width))
        left += width
    fig, ax = plots.figure(9, 1.05 + 0.55 * row)
    for number, (text, name, left, line, width) in enumerate(boxes):
        tint, middle = TINTS[number % len(TINTS)], left + width / 2 - 0.07
        ax.add_patch(Rectangle((left, -line - 0.9), width - 0.15, 0.8, color=tint))
        style = {"ha": "center", "va": "center", "parse_math": False}
        ax.text(middle, -line - 0.35, text, fontsize=9, family="monospace", **style)
        ax.text(middle, -line - 0.7, name, fontsize=7, color="#444444", **style)
    ax.set(xlim=(0, CHARACTERS_PER_LINE), ylim=(-row - 1, 0))
    ax.set_axis_off()
    plots.label(ax, title, "", "")
    return fig


def packed_rows(batches: dict[str, list[list[int]]]) -> plots.Figure:
    """Batches beside each other by title, a row of tokens each line, coloured and numbered by document.

    `batches[title][r][t]` is the document number of a token, or `BORDER`, or `PADDING`.
    """
    height = max(map(len, batches.values()))
    width = max(len(row) for rows in batches.values() for row in rows)
    fig, axes = plots.figure(9, 0.9 + 0.22 * height, columns=len(batches), sharey=True, squeeze=False)
    for ax, (title, rows) in zip(axes[0], batches.items(), strict=True):
        for y, row in enumerate(rows):
            left = 0
            for number, stretch in groupby(row):
                size = len(list(stretch))
                style = STYLES.get(number, {"color": TINTS[number % len(TINTS)]})
                ax.barh(y, size, left=left, height=0.8, **style)
                if number >= 0 and size > width / 16:  # wide enough for its number
                    ax.text(left + size / 2, y, str(number), ha="center", va="center", fontsize=8)
                left += size
        ax.set_yticks(range(height), [f"row {r}" for r in range(height)])
        ax.set(xlim=(0, width), ylim=(height - 0.4, -0.6))  # one scale, so that areas can be compared
        ax.grid(False)
        plots.label(ax, title, "position in the row (token)", "")
    return fig


def flow(title: str, steps: list[tuple[str, str]], skips: Iterable[tuple[int, int]] = ()) -> plots.Figure:
    """A chain of boxes from left to right: in each the name of a step and, below, the shape that leaves it.

    `skips` are arcs over the boxes, (from, to): what leaves the one also enters the other.
    """
    lines = 2 + max(shape.count("\n") for _, shape in steps)
    fig, ax = plots.figure(9, 1.1 + 0.17 * lines + 0.3 * bool(skips))
    style = {"ha": "center", "fontsize": 9}
    for x, (name, shape) in enumerate(steps):
        ax.add_patch(Rectangle((x - 0.38, 0), 0.76, 1, facecolor=TINTS[x % len(TINTS)]))
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
