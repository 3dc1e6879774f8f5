"""A live panel that writes with a model: greedy, temperature, top-k, top-p, min-p, and the next token's bars.

Text streams from inside the button's callback, in the main thread, so what stops it early is the notebook's
interrupt (■, in Colab also Runtime > Interrupt execution): what is written stays. Only a `UserError` (a
prompt too long) becomes a line in the panel; callbacks are plain methods that tests call.
"""

from __future__ import annotations

import time

import ipywidgets
import torch

from .. import plots, widgets
from ..cpu_decoder import fast_decoder
from ..errors import UserError
from ..sampling import prompt_ids, stream
from .token_view import bars, coloured

REDRAW_SECONDS = 0.1  # between two updates of the text while it streams


class Sampler:
    """`box` is the widget, `tokens` the page as (id, probability); those of the prompt have None."""

    def __init__(self, model, tokenizer, prompt="Once upon a time", new_tokens: int = 40, dtype="auto"):
        self.model, self.how = fast_decoder(model, dtype)
        self.tokenizer = tokenizer
        self.prompt = widgets.text("prompt", prompt)
        self.settings = {
            "temperature": widgets.slider("temperature (0: greedy)", 0.0, 2.0, 0.8, 0.05),
            "top_k": widgets.slider("top-k (0: off)", 0, 100, 0),
            "top_p": widgets.slider("top-p (1: off)", 0.05, 1.0, 1.0, 0.05),
            "min_p": widgets.slider("min-p (0: off)", 0.0, 1.0, 0.0, 0.05),
        }
        self.new_tokens = widgets.slider("new tokens", 1, 256, new_tokens)
        self.seed = widgets.slider("seed", 0, 99, 0)
        self.button = ipywidgets.Button(description="Write", icon="play", button_style="primary")
        self.status, self.page, self.picture = ipywidgets.Label(), ipywidgets.HTML(), ipywidgets.HTML()
        self.button.on_click(self.write)
        self.prompt.observe(self.restart, names="value")
        for control in self.settings.values():
            control.observe(self.draw, names="value")
        controls = [self.prompt, *self.settings.values(), self.new_tokens, self.seed, self.button]
        self.box = ipywidgets.VBox([*controls, self.status, self.page, self.picture])
        self.restart()

    def options(self) -> dict:
        """The settings as `smollm2.sampling.stream` takes them: there top-p 1 and min-p 0 are off, too."""
        values = {name: control.value for name, control in self.settings.items()}
        return values | {"top_k": values["top_k"] or None}

    def restart(self, _change=None) -> bool:
        """Begin the page again with the prompt; False, and why, where that is too long."""
        try:
            ids = prompt_ids(self.model, self.tokenizer, self.prompt.value)
        except UserError as error:
            self.status.value = str(error)
            return False
        self.tokens = [(token_id, None) for token_id in ids]
        self.status.value = f"{len(ids)} tokens in the prompt."
        self.draw()
        return True

    def write(self, _button=None) -> None:
        """Write behind the prompt; the same settings and seed write the same text."""
        if not self.restart():
            return
        given, began, drawn, reason = len(self.tokens), time.monotonic(), 0.0, "length reached"
        asked = {"max_new_tokens": self.new_tokens.value, "seed": self.seed.value} | self.options()
        try:
            for token, logits in stream(self.model, self._ids(), **asked):
                if int(token) in self.model.end_ids:
                    reason = "the model ended its text"
                    break
                self.tokens.append((int(token), logits[0].float().softmax(-1)[token].item()))
                if time.monotonic() - drawn >= REDRAW_SECONDS:
                    self._draw_page()
                    drawn = time.monotonic()
        except KeyboardInterrupt:
            reason = "stopped by you"
        count, seconds = len(self.tokens) - given, time.monotonic() - began
        self.status.value = f"{count} tokens in {seconds:.1f} s; {reason}. ({self.how})"
        self.draw()

    def _ids(self) -> torch.Tensor:
        return torch.tensor([[token_id for token_id, _ in self.tokens]], device=self.model.device)

    def _draw_page(self) -> None:
        self.page.value, self.twin = coloured(self.tokenizer, *zip(*self.tokens, strict=True))

    @torch.inference_mode()
    def draw(self, _change=None) -> None:
        """The page, and as bars the token after it with the settings of now."""
        self._draw_page()
        context = self._ids()[:, -self.model.config.max_position_embeddings :]
        logits = self.model.next_logits(context)[0]
        figure, self.alt = bars(self.tokenizer, logits, self.options(), "What comes next")
        self.picture.value = plots.image_html(figure, self.alt)


def show(model, tokenizer, **settings) -> Sampler:
    """Show the panel with what its default settings write; where no widget lives, that text and the bars."""
    panel = Sampler(model, tokenizer, **settings)
    panel.write()
    text = f"[text] {panel.twin}\n{plots.figure_text(panel.alt)}"
    plots.show_html(panel.page.value + panel.picture.value, text, panel.box)
    return panel
