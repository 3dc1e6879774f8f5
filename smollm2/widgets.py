"""Controls that redraw a figure. Only what ipywidgets 7.7 and 8 share; callbacks are plain functions that tests call.

`explore` shows the live panel and, under it, the figure of the default settings: where no widget renders (a static
page, a plain script) the reader still sees that one.
"""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets

from . import plots

Render = Callable[..., tuple[plots.Figure, str]]
LABEL = {"description_width": "9em"}
live: list[ipywidgets.VBox] = []  # panels on the page, so that a test can move their controls


def slider(name: str, low: int, high: int, value: int, step: int = 1) -> ipywidgets.IntSlider:
    """An integer slider that reports when released."""
    return ipywidgets.IntSlider(
        value=value, min=low, max=high, step=step, description=name, continuous_update=False, style=LABEL
    )


def float_slider(
    name: str, low: float, high: float, value: float, step: float = 0.1
) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        value=value, min=low, max=high, step=step, description=name, continuous_update=False, style=LABEL
    )


def choice(name: str, options: list, value) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, value=value, description=name, style=LABEL)


def switch(name: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value=value, description=name)


def text(name: str, value: str) -> ipywidgets.Text:
    return ipywidgets.Text(value=value, description=name, continuous_update=False, style=LABEL)


def panel(render: Render, **controls) -> ipywidgets.VBox:
    """Controls above a picture that follows them. `render(**values)` returns (figure, alt text); its errors are not
    caught: they reach the reader and the tests."""
    picture = ipywidgets.HTML()
    picture.add_class("smollm2-picture")

    def redraw(_change=None):
        fig, alt = render(**{name: control.value for name, control in controls.items()})
        picture.value = plots.image_html(fig, alt)

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), picture])


def explore(render: Render, **controls) -> None:
    """Show `panel(render, **controls)` where widgets can be, and always the default figure below it."""
    default = {name: control.value for name, control in controls.items()}
    if plots.in_notebook():
        from IPython.display import display

        shown = panel(render, **controls)
        live.append(shown)
        display(shown)
    plots.show(*render(**default))


def sampler(model, tokenizer, **settings):
    """The live sampling panel of `smollm2.notebook.sampler`, and under it what its default settings write."""
    from .notebook.sampler import show

    return show(model, tokenizer, **settings)
