"""A live panel that writes with a model: greedy, temperature, top-k, top-p, min-p, and the next token as bars.

Text streams from inside the button's callback, in the main thread. While it runs no other button can answer, so there
are three other ways to stop: the interrupt button (■) keeps what is written, a stop text ends it, and a time limit does.
Every callback is a plain method that tests call; only a `UserError` (a prompt too long) becomes a line in the panel.
"""

from __future__ import annotations

import html
import time

import ipywidgets
import torch

from .. import plots, widgets
from ..errors import UserError
from ..model import SmolLM2
from ..sampling import StreamDecoder, prompt_ids, stream
from ..tokenizer import Tokenizer
from .token_view import LEGEND, bars, coloured, legend

REDRAW_SECONDS = 0.1  # between two updates of the text while it streams


class Sampler:
    """The panel's controls and callbacks. `box` is the widget; `ids`, `probabilities` and `text` hold what was written."""

    def __init__(
        self,
        model: SmolLM2,
        tokenizer: Tokenizer,
        prompt: str = "Once upon a time",
        new_tokens: int = 40,
        seconds: float = 60.0,
    ):
        self.model, self.tokenizer, self.seconds = model, tokenizer, seconds
        self.prompt = widgets.text("prompt", prompt)
        self.temperature = widgets.float_slider("temperature (0: greedy)", 0.0, 2.0, 0.8, 0.05)
        self.top_k = widgets.slider("top-k (0: off)", 0, 100, 0)
        self.top_p = widgets.float_slider("top-p (1: off)", 0.05, 1.0, 1.0, 0.05)
        self.min_p = widgets.float_slider("min-p (0: off)", 0.0, 1.0, 0.0, 0.05)
        self.new_tokens = widgets.slider("new tokens", 1, 256, new_tokens)
        self.seed = widgets.slider("seed", 0, 99, 0)
        self.stop_text = widgets.text("stop at text", "")
        self.controls = [
            self.prompt,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.new_tokens,
            self.seed,
            self.stop_text,
        ]
        for control in self.controls:
            control.style.description_width = "12em"
        self.write_button = ipywidgets.Button(description="Write", icon="pencil", button_style="primary")
        self.more_button = ipywidgets.Button(description="Go on", icon="forward", disabled=True)
        self.write_button.on_click(self.write)
        self.more_button.on_click(self.go_on)
        self.page, self.status, self.picture = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        for control in (self.prompt, self.temperature, self.top_k, self.top_p, self.min_p):
            control.observe(self.refresh, names="value")
        buttons = ipywidgets.HBox([self.write_button, self.more_button])
        self.box = ipywidgets.VBox([*self.controls, buttons, self.status, self.page, self.picture])
        self.refresh()

    def options(self) -> dict:
        """The settings as `smollm2.generate.stream` takes them."""
        top_p = self.top_p.value if self.top_p.value < 1.0 else None
        return {
            "temperature": self.temperature.value,
            "top_k": self.top_k.value or None,
            "top_p": top_p,
            "min_p": self.min_p.value or None,
        }

    def refresh(self, _change=None) -> None:
        """A setting or the prompt changed: the bars show the token after the prompt again."""
        try:
            ids = prompt_ids(self.model, self.tokenizer, self.prompt.value)
        except UserError as error:
            self._say(str(error))
            return
        if getattr(self, "_start", None) != ids:
            self._start, self.ids, self.probabilities, self.text = ids, list(ids), [None] * len(ids), ""
            self.more_button.disabled = True
            self._say(f"{len(ids)} tokens in the prompt. {LEGEND}.")
        self._draw_page()
        self._draw_bars()

    def write(self, _button=None) -> None:
        """Start from the prompt and write; the same settings and seed write the same text."""
        self._start = None  # forget what was written
        self.refresh()
        if self._start is not None:
            self._run(self.seed.value)

    def go_on(self, _button=None) -> None:
        """Write on behind what is there, with a seed of its own."""
        self._run(self.seed.value + 1_000_003 * len(self.ids))

    def _run(self, seed: int) -> None:
        decoder, began, drawn_at, reason = (
            StreamDecoder(self.tokenizer, before=self.ids),
            time.monotonic(),
            0.0,
            "length reached",
        )
        context = torch.tensor([self.ids[-(self.model.config.max_position_embeddings - 1) :]])
        first, count = len(self.text), 0
        try:
            for tokens, logits in stream(
                self.model, context, self.new_tokens.value, seed=seed, **self.options()
            ):
                token = int(tokens)
                if token == self.model.config.eos_token_id:
                    reason = "the model ended its text"
                    break
                count += 1
                self.ids.append(token)
                self.probabilities.append(float(logits[0].float().softmax(-1)[token]))
                self.text += decoder.push(token)
                now = time.monotonic()
                if now - drawn_at >= REDRAW_SECONDS:
                    self._draw_page()
                    drawn_at = now
                if self._stop_reached(first):
                    reason = "stop text reached"
                    break
                if now - began > self.seconds:
                    reason = f"stopped after {self.seconds:g} s"
                    break
        except KeyboardInterrupt:
            reason = "stopped by you"
        self.text += decoder.flush()
        seconds = time.monotonic() - began
        self.more_button.disabled = False
        self._say(
            f"{count} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):.0f} a second); {reason}. {LEGEND}."
        )
        self._draw_page()
        self._draw_bars()

    def _stop_reached(self, first: int) -> bool:
        wanted = self.stop_text.value.replace("\\n", "\n")  # typed as two characters: the field has one line
        return bool(wanted) and wanted in self.text[first:]

    def _say(self, text: str) -> None:
        self.status.value = f"<p>{html.escape(text)}</p>"

    def _draw_page(self) -> None:
        self.page.value, self.twin = coloured(self.tokenizer, self.ids, self.probabilities)

    @torch.inference_mode()
    def figure(self) -> tuple[plots.Figure, str]:
        """The next token after what is on the page, as (figure, alt text)."""
        context = torch.tensor(
            [self.ids[-self.model.config.max_position_embeddings :]], device=self.model.device
        )
        logits = self.model(context)[0, -1]
        return bars(self.tokenizer, logits, self.options(), "What comes next")

    def _draw_bars(self) -> None:
        self.picture.value = plots.image_html(*self.figure())


def show(model: SmolLM2, tokenizer: Tokenizer, **settings) -> Sampler:
    """Show the panel where widgets can be; below it, always, what its default settings write and the bars after it."""
    panel = Sampler(model, tokenizer, **settings)
    panel.write()
    if plots.in_notebook():
        from IPython.display import display

        display(panel.box)
    plots.show_html(panel.page.value + legend(), f"[text] {panel.twin}")
    plots.show(*panel.figure())
    return panel
