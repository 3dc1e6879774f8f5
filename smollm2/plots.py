"""Figures: one look, readable in dark mode and by the colour-blind, each with a text for those who see none.

Figures are made without pyplot, so nothing depends on a backend and no notebook shows a picture twice.
"""

from __future__ import annotations

import base64
import html
import io
import sys
import textwrap
import warnings

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart with every common colour blindness, and in this order also by lightness.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#222222"]
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW, BLACK = PALETTE
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
GREY = "#767676"
STYLE = {
    "axes.edgecolor": GREY, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6",
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE, marker=MARKERS), "lines.markersize": 4,
    "axes.spines.right": False, "axes.spines.top": False,
}  # fmt: skip
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def figure(width: float = 7.5, height: float = 3.2, rows: int = 1, columns: int = 1, **options):
    """(figure, axes) like `pyplot.subplots`, in the house style, `width` x `height` in inches."""
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        return fig, fig.subplots(rows, columns, **options)


def label(axis, title: str, x: str, y: str, legend: bool = False):
    """Title and axes with their units; returns the axis."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if legend:
        axis.legend(framealpha=0.9, edgecolor="none")
    return axis


def png_bytes(fig: Figure) -> bytes:
    """The figure as PNG on opaque white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script the font lacks: drawn as a box
        fig.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def image_html(fig: Figure, alt: str) -> str:
    """An `<img>` with its alternative text; the picture is inside, so it shows wherever HTML shows."""
    data = base64.b64encode(png_bytes(fig)).decode()
    style = "background:#fff;max-width:100%"
    return f'<img alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{data}"/>'


def in_notebook() -> bool:
    """Whether a kernel is there to show rich output (IPython at a terminal is not one)."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it long before this
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def show_html(markup: str, text: str, widget=None, kind: str = "text/html") -> None:
    """HTML (or another `kind` of markup) in a notebook, `text` elsewhere.

    `widget` is a live twin of the markup, in the same output: a page with a kernel shows the widget, and a
    page where none can live (nbconvert, nbviewer) the markup. It is one output, so nobody sees both.
    """
    if not in_notebook():
        print(text)
        return
    from IPython.display import display  # not at the top: the exporter draws too, and needs no IPython

    bundle = {kind: markup, "text/plain": text}
    if widget is not None:  # what ipywidgets 7 and 8 both send when they display a widget
        bundle[WIDGET_VIEW] = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    display(bundle, raw=True)


def figure_text(alt: str) -> str:
    """What stands for a figure where only text is shown."""
    return textwrap.fill(f"[figure] {alt}", 110, subsequent_indent="  ")


def show(fig: Figure, alt: str, widget=None) -> None:
    """Show a figure. `alt` says in words what it shows, with the number that matters; a plain script prints
    it."""
    if len(alt) < 20:
        raise ValueError(f"alt text {alt!r} is too short: say what the figure shows and its main number")
    show_html(image_html(fig, alt), figure_text(alt), widget)
