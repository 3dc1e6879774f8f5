"""Pictures of tokens and of the rows they are packed into."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

from matplotlib.patches import Rectangle

from .. import plots
from ..tokenizer import Tokenizer

TINTS = ["#cfe6f5", "#fde7c2", "#cdebdf", "#f8d5c2", "#ead9e6"]  # pale: black text stays readable on each
CHARACTERS_PER_LINE = 72
BORDER, PADDING = -1, -2  # of a token that belongs to no document
_STYLES = {
    BORDER: {
        "color": plots.BLACK,
        "edgecolor": plots.BLACK,
        "linewidth": 1.5,
    },  # one token is narrower than a pixel
    PADDING: {"color": "white", "edgecolor": plots.GREY, "linewidth": 0.5, "hatch": "///"},
}


@cache
def _byte_of() -> dict[str, int]:
    """Byte-level BPE writes every byte as one printable character (Radford et al. 2019): character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of text that a token stands for (a special token's name is plain ASCII, which maps to itself)."""
    return bytes(_byte_of()[character] for character in tokenizer.token(token_id))


@cache
def _drawable() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def visible(raw: bytes) -> str:
    """Bytes as a label: blanks as `·`, line breaks as `↵`, and what is no character or not in the font as hex."""
    try:
        text = raw.decode().replace(" ", "·").replace("\n", "↵")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02x}" for byte in raw)
    return "".join(c if ord(c) in _drawable() and c.isprintable() else f"[{ord(c):x}]" for c in text)


def _lines(widths: list[int]) -> list[list[int]]:
    """Indices of the boxes of each line, filled from the left."""
    lines, used = [[]], 0
    for index, width in enumerate(widths):
        if used + width > CHARACTERS_PER_LINE and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append(index)
        used += width
    return lines


def token_strip(tokenizer: Tokenizer, ids: list[int], title: str) -> plots.Figure:
    """Every token as a box: its text above, its id below, in reading order."""
    labels = [visible(token_bytes(tokenizer, i)) for i in ids]
    widths = [max(len(text), len(str(i))) + 1 for text, i in zip(labels, ids, strict=True)]
    lines = _lines(widths)
    fig, ax = plots.figure(9, 0.5 + 0.55 * len(lines))
    for row, line in enumerate(lines):
        left = 0.0
        for index in line:
            ax.add_patch(
                Rectangle((left, -row - 0.9), widths[index] - 0.15, 0.8, color=TINTS[index % len(TINTS)])
            )
            middle = left + widths[index] / 2 - 0.07
            style = {"ha": "center", "va": "center", "parse_math": False}
            ax.text(middle, -row - 0.35, labels[index], fontsize=9, family="monospace", **style)
            ax.text(middle, -row - 0.7, str(ids[index]), fontsize=7, color="#444444", **style)
            left += widths[index]
    ax.set_xlim(0, CHARACTERS_PER_LINE)
    ax.set_ylim(-len(lines), 0)
    ax.set_axis_off()
    plots.label(ax, title, "", "")
    return fig


def runs(numbers: list[int]) -> list[tuple[int, int, int]]:
    """(value, begin, end) of each stretch of equal numbers."""
    edges = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]), len(numbers)]
    return [(numbers[begin], begin, end) for begin, end in pairwise(edges)]


def packed_rows(batches: dict[str, list[list[int]]]) -> plots.Figure:
    """Batches beside each other by title, a row of tokens each line, coloured and numbered by document.

    `batches[title][r][t]` is the document number of a token, or `BORDER`, or `PADDING`.
    """
    height, width = (
        max(map(len, batches.values())),
        max(len(row) for rows in batches.values() for row in rows),
    )
    fig, axes = plots.figure(9, 0.9 + 0.22 * height, columns=len(batches), sharey=True, squeeze=False)
    for ax, (title, rows) in zip(axes[0], batches.items(), strict=True):
        for row, numbers in enumerate(rows):
            for number, begin, end in runs(numbers):
                ax.barh(
                    row,
                    end - begin,
                    left=begin,
                    height=0.8,
                    **_STYLES.get(number, {"color": TINTS[number % len(TINTS)]}),
                )
                if number >= 0 and end - begin > width / 16:  # wide enough for its number
                    ax.text((begin + end) / 2, row, str(number), ha="center", va="center", fontsize=8)
        ax.set_yticks(range(height), [f"row {r}" for r in range(height)])
        ax.set_ylim(height - 0.4, -0.6)
        ax.grid(False)
        ax.set_xlim(0, width)  # one scale, so that areas can be compared
        plots.label(ax, title, "position in the row (token)", "")
    return fig
