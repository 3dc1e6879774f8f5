"""A live panel that writes with a model: greedy, temperature, top-k, top-p, min-p, and the next token as
bars.

Text streams from inside the button's callback, in the main thread. While it runs no other button can answer,
so what stops it early is the notebook's interrupt (■, in Colab also Runtime > Interrupt execution): what is
written stays. Every callback is a plain method that tests call; only a `UserError` (a prompt too long)
becomes a line in the panel.
"""

from __future__ import annotations

import time

import ipywidgets
import torch

from .. import plots, widgets
from ..errors import UserError
from ..sampling import prompt_ids, stream
from .token_view import bars, coloured

REDRAW_SECONDS = 0.1  # between two updates of the text while it streams


class Sampler:
    """The panel's controls and callbacks: `box` is the widget, `tokens` the page as (id, its probability)
    pairs; tokens of the prompt have None."""

    def __init__(self, model, tokenizer, prompt: str = "Once upon a time", new_tokens: int = 40):
        self.model, self.tokenizer, self.tokens = model, tokenizer, []
        self.prompt = widgets.text("prompt", prompt)
        self.settings = {
            "temperature": widgets.slider("temperature (0: greedy)", 0.0, 2.0, 0.8, 0.05),
            "top_k": widgets.slider("top-k (0: off)", 0, 100, 0),
            "top_p": widgets.slider("top-p (1: off)", 0.05, 1.0, 1.0, 0.05),
            "min_p": widgets.slider("min-p (0: off)", 0.0, 1.0, 0.0, 0.05),
        }
        self.new_tokens = widgets.slider("new tokens", 1, 256, new_tokens)
        self.seed = widgets.slider("seed", 0, 99, 0)
        self.write_button = ipywidgets.Button(description="Write", icon="play", button_style="primary")
        self.more_button = ipywidgets.Button(description="Go on", icon="forward", disabled=True)
        self.page, self.picture, self.status = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.Label()
        self.write_button.on_click(self.write)
        self.more_button.on_click(self.go_on)
        self.prompt.observe(self.restart, names="value")
        for control in self.settings.values():
            control.observe(self.draw, names="value")
        controls = [self.prompt, *self.settings.values(), self.new_tokens, self.seed]
        buttons = ipywidgets.HBox([self.write_button, self.more_button])
        self.box = ipywidgets.VBox([*controls, buttons, self.status, self.page, self.picture])
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
        self.more_button.disabled = True
        self.status.value = f"{len(ids)} tokens in the prompt."
        self.draw()
        return True

    def write(self, _button=None) -> None:
        """Start from the prompt and write; the same settings and seed write the same text."""
        if self.restart():
            self._run(self.seed.value)

    def go_on(self, _button=None) -> None:
        """Write on behind what is there, with a seed of its own."""
        self._run(self.seed.value + 1_000_003 * len(self.tokens))

    def _context(self, limit: int) -> torch.Tensor:
        return torch.tensor([[token_id for token_id, _ in self.tokens[-limit:]]], device=self.model.device)

    def _run(self, seed: int) -> None:
        before, began, drawn, reason = len(self.tokens), time.monotonic(), 0.0, "length reached"
        context = self._context(self.model.config.max_position_embeddings - 1)
        steps = stream(self.model, context, self.new_tokens.value, seed=seed, **self.options())
        try:
            for tokens, logits in steps:
                if int(tokens) == self.model.config.eos_token_id:
                    reason = "the model ended its text"
                    break
                self.tokens.append((int(tokens), logits[0].float().softmax(-1)[tokens].item()))
                if time.monotonic() - drawn >= REDRAW_SECONDS:
                    self._draw_page()
                    drawn = time.monotonic()
        except KeyboardInterrupt:
            reason = "stopped by you"
        count, seconds = len(self.tokens) - before, max(time.monotonic() - began, 1e-9)
        self.more_button.disabled = False
        self.status.value = f"{count} tokens in {seconds:.1f} s ({count / seconds:.0f} a second); {reason}."
        self.draw()

    def _draw_page(self) -> None:
        self.page.value, self.twin = coloured(self.tokenizer, *zip(*self.tokens, strict=True))

    @torch.inference_mode()
    def draw(self, _change=None) -> None:
        """The page, and as bars the token after it with the settings of now."""
        self._draw_page()
        logits = self.model(self._context(self.model.config.max_position_embeddings))[0, -1]
        figure, self.alt = bars(self.tokenizer, logits, self.options(), "What comes next")
        self.picture.value = plots.image_html(figure, self.alt)


def show(model, tokenizer, **settings) -> Sampler:
    """Show the panel with what its default settings write; where no widget can live, that text and the bars
    after it."""
    panel = Sampler(model, tokenizer, **settings)
    panel.write()
    text = f"[text] {panel.twin}\n{plots.figure_text(panel.alt)}"
    plots.show_html(panel.page.value + panel.picture.value, text, panel.box)
    return panel
