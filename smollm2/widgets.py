"""Controls that redraw a figure, of what ipywidgets 7.7 and 8 share; callbacks are plain functions.

`explore` shows the live panel where there is a kernel; a static page or a plain script shows the figure of
the default settings in its place.
"""

from __future__ import annotations

import ipywidgets

from . import plots

# wide enough for the longest name, and for a sentence in a text box
LOOK = {"style": {"description_width": "13em"}, "layout": {"width": "36em", "max_width": "100%"}}
# a control reports when it is released, not while it is dragged: drawing takes a tenth of a second
SETTLED = LOOK | {"continuous_update": False}
live: list[ipywidgets.VBox] = []  # panels on the page, so that a test can move their controls


def slider(name: str, low: float, high: float, value: float, step: float = 1) -> ipywidgets.Widget:
    """A slider over whole numbers, or over fractions where `step` is one."""
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=name, **SETTLED)


def choice(name: str, options: list, value) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, value=value, description=name, **LOOK)


def switch(name: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value=value, description=name)


def text(name: str, value: str) -> ipywidgets.Text:
    return ipywidgets.Text(value=value, description=name, **SETTLED)


def panel(render, **controls) -> ipywidgets.VBox:
    """Controls above a picture that follows them. `render(**values)` returns (figure, alt text); its errors
    are not caught: they reach the reader and the tests."""
    picture = ipywidgets.HTML()

    def redraw(_change=None):
        fig, alt = render(**{name: control.value for name, control in controls.items()})
        picture.value = plots.image_html(fig, alt)

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), picture])


def explore(render, **controls) -> None:
    """Show `panel(render, **controls)`, with the figure of the default settings where no widget can live."""
    default = render(**{name: control.value for name, control in controls.items()})
    box = panel(render, **controls) if plots.in_notebook() else None
    if box is not None:
        live.append(box)
    plots.show(*default, widget=box)
