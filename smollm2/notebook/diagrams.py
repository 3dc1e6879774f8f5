"""Pictures of tokens, of tables of numbers, of how a tensor changes shape, and of the model as a map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.patches import Rectangle

from .. import plots
from ..token_text import piece

TINTS = ["#cfe6f5", "#fde7c2", "#cdebdf", "#f8d5c2", "#ead9e6"]  # pale: black text stays readable on each
CHARACTERS_PER_LINE = 72
CENTRED = {"ha": "center", "va": "center"}
MODEL = ["ids", "embedding", "norm", "attention", "+", "norm", "MLP", "+", "norm", "embedding", "logits"]
BLOCK = range(2, 8)  # of MODEL
ATTENTION = ["q, k, v", "heads", "RoPE", "share", "scores", "÷ √D", "mask", "softmax", "mix", "o_proj"]


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


def _written(value: float) -> str:
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    return (f"{value:.0f}" if value == int(value) else f"{value:.2f}").replace("-", "−")


def show_tables(title: str, tables: dict, signs: Sequence[str], rows=(), columns=()) -> None:
    """Show tables of numbers (name -> matrix) from left to right; within a table, the larger the darker. An
    infinite number's cell is crossed out.

    `signs` stand between the tables, `rows` before the first, `columns` under each that has as many. The
    alternative text holds every number.
    """
    tables = {name: matrix.tolist() for name, matrix in tables.items()}
    tall, gap, left = max(len(table) for table in tables.values()), 1.45, 1.5 * bool(rows)
    fig, ax = plots.figure(9, 0.9 + 0.3 * (tall + 0.6 * bool(columns)))
    starts = []
    for name, table in tables.items():
        starts.append(left)
        wide, top = len(table[0]), (tall + len(table)) / 2  # centred on the tallest
        finite = [value for row in table for value in row if math.isfinite(value)]
        low, spread = min(finite), max(finite) - min(finite) or 1
        ax.text(left + wide / 2, top + 0.2, name, ha="center", fontsize=9, fontweight="bold")
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                corner, is_finite = (left + x, top - y - 1), math.isfinite(value)
                shade = matplotlib.colormaps["Blues"](0.62 * (value - low) / spread) if is_finite else "white"
                plain = {} if is_finite else {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
                hatch = None if is_finite else "///"
                ax.add_patch(Rectangle(corner, 1, 1, facecolor=shade, edgecolor=plots.GREY, hatch=hatch))
                ax.text(corner[0] + 0.5, corner[1] + 0.5, _written(value), fontsize=9, **CENTRED, **plain)
        for x, column in enumerate(columns if len(columns) == wide else ()):
            ax.text(left + x + 0.5, top - len(table) - 0.15, column, ha="center", va="top", fontsize=7)
        left += wide + gap
    for sign, start in zip(signs, starts[1:], strict=True):
        ax.text(start - gap / 2, tall / 2, sign, fontsize=8, **CENTRED)
    for y, row in enumerate(rows):
        ax.text(1.4, tall - y - 0.5, row, ha="right", va="center", fontsize=8)
    ax.set(xlim=(0, left - gap + 0.05), ylim=(-0.1 - 0.5 * bool(columns), tall + 0.9))
    ax.set_axis_off()
    plots.label(ax, title, "", "")
    told = {n: "; ".join(", ".join(map(_written, row)) for row in t) for n, t in tables.items()}
    alt = [f"{title}. Rows: {', '.join(rows)}"] if rows else [title]
    plots.show(fig, ". ".join([*alt, *(f"{name}: {numbers}" for name, numbers in told.items())]) + ".")


def _chain(ax, names: list[str], y: float, width: float, lit: Iterable[int]) -> None:
    """Boxes of `names` in a row over 0 to `width`, joined by arrows; the `lit` ones dark."""
    step = width / len(names)
    for number, name in enumerate(names):
        x, is_lit = (number + 0.5) * step, number in lit
        look = {"facecolor": plots.BLUE, "edgecolor": "black"} if is_lit else {"facecolor": "white"}
        half = 0.42 * step
        ax.add_patch(Rectangle((x - half, y), 2 * half, 1, **{"edgecolor": plots.GREY} | look))
        ax.text(x, y + 0.5, name, fontsize=8, color="white" if is_lit else "#444444", **CENTRED)
        if number:
            arrow = {"arrowstyle": "-|>", "color": plots.GREY, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", (x - half, y + 0.5), (x - step + half, y + 0.5), arrowprops=arrow)


def here(*lit: str) -> None:
    """Show the model as a chain of boxes with the parts named in `lit` dark ("block" for all of a block, none
    for all of the model); where a step inside attention is one of them, that chain stands below."""
    inside = [number for number, name in enumerate(ATTENTION) if name in lit]
    outside = [n for n, name in enumerate(MODEL) if name in lit or not lit or ("block" in lit and n in BLOCK)]
    outside += [MODEL.index("attention")] if inside else []
    wide = len(MODEL)
    fig, ax = plots.figure(9, 1.6 if inside else 1.0)
    ax.add_patch(Rectangle((2, -0.25), len(BLOCK), 2.2, facecolor="#eeeeee", edgecolor="none"))
    ax.text(7.93, 1.6, "block, 30 times", ha="right", va="center", fontsize=8, color="#444444")
    _chain(ax, MODEL, 0, wide, outside)
    for start, end in (2, 4.5), (5, 7.5):  # what goes past a norm, to the plus
        ax.plot([start, start, end], [0.5, 1.3, 1.3], color=plots.GREY, marker="", lw=1)
        ax.annotate("", (end, 1), (end, 1.32), arrowprops={"arrowstyle": "-|>", "color": plots.GREY})
    if inside:
        _chain(ax, ATTENTION, -1.9, wide, inside)
        for corner, end in (3.08, 0.09), (3.92, wide - 0.09):
            ax.plot([corner, end], [0, -0.8], color=plots.GREY, ls=":", marker="", lw=1)
    ax.set(xlim=(0, wide), ylim=(-2 if inside else -0.3, 2))
    ax.set_axis_off()
    chain = " → ".join([*MODEL[:2], "30 × (" + " → ".join(MODEL[n] for n in BLOCK) + ")", *MODEL[8:]])
    plots.show(fig, f"Map of the model. Dark: {', '.join(lit) or chain}.")
