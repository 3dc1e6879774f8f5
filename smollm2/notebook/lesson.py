"""What makes a notebook a lesson: visible checks and predictions that are scored. Plain text, so it works everywhere."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable

import numpy as np

WIDTH = 84  # characters of a line that a notebook beside an open side bar still shows unbroken
_scores: dict[str, float] = {}  # question -> points, so that running a cell again replaces its score


class CheckFailed(AssertionError):
    """A visible check of a notebook did not hold."""


def largest(difference) -> float:
    """Largest absolute value of a number, tensor or array; NaN when any entry is NaN, 0 for nothing to compare."""
    if hasattr(difference, "detach"):
        difference = difference.detach().cpu().double().numpy()
    if hasattr(difference, "shape"):
        return float(abs(difference).max()) if difference.size else 0.0
    return abs(float(difference))


def counts(difference) -> bool:
    """Whether a difference is of whole numbers or a yes or no: there "how close" has no meaning."""
    if hasattr(difference, "is_floating_point"):
        return not difference.is_floating_point()
    return np.asarray(difference).dtype.kind in "biu"


def _figure(value: float) -> str:
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.1e}".replace(".0e", "e") if abs(value) < 1e-2 or abs(value) >= 1e6 else f"{value:.4g}"


def check(name: str, difference, tolerance: float = 0.0, likely: str = "") -> None:
    """Print `✔ name: max|difference| = 3.1e-06 (tolerance 1e-04)`; of whole numbers and booleans `✔ name` alone.

    `difference` is a number, tensor or array that should be zero, or False. Raises `CheckFailed` when it exceeds
    `tolerance` or is NaN; `likely` names the likely mistake there. `name` says what holds.
    """
    size = largest(difference)
    if not size <= tolerance:  # written so that NaN fails
        hint = f" Likely: {likely}" if likely else ""
        found = (
            f"not so, off by {_figure(size)}"
            if counts(difference)
            else f"max|difference| = {_figure(size)}, allowed is {_figure(tolerance)}"
        )
        raise CheckFailed(f"✘ {name}: {found}.{hint}")
    if counts(difference):
        print(f"✔ {name}")
        return
    allowed = f"tolerance {_figure(tolerance)}" if tolerance else "exact"
    print(f"✔ {name}: max|difference| = {_figure(size)} ({allowed})")


def check_fails(name: str, action: Callable[[], object]) -> None:
    """Print `✔ name` when `action` trips a check, as a planted bug must; raises `CheckFailed` when it does not."""
    try:
        action()
    except CheckFailed as failure:
        print(f"✔ {name}: found. {failure}")
        return
    raise CheckFailed(f"✘ {name}: the check let it pass, so it proves nothing")


def _points(guess, answer, within: float) -> float:
    if isinstance(answer, str):
        return float(str(guess).strip().casefold() == answer.strip().casefold())
    guess, answer = float(guess), float(answer)
    if abs(guess - answer) <= within * abs(answer):
        return 1.0
    return 0.5 if guess > 0 and answer > 0 and 0.5 <= guess / answer <= 2.0 else 0.0


def _shown(value) -> str:
    return value if isinstance(value, str) else _figure(float(value))


def predict(question: str, guess, answer, *, within: float = 0.1, unit: str = "", why: str = "") -> None:
    """Score a prediction: 1 point within `within` (relative) of the answer, 0.5 within a factor of two, else 0.

    With `guess=None` (or "?") it only asks; answer and explanation (`why`) stay closed. Words are compared as words.
    """
    unit = f" {unit}" if unit else ""
    print(textwrap.fill(f"? {question}", WIDTH, subsequent_indent="  "))
    if guess is None or guess == "?":
        _scores.setdefault(question, 0.0)
        print(f"  No guess yet: put one in place of {guess!r} and run this cell again to see the answer.")
        return
    try:
        reached = _points(guess, answer, within)
    except (TypeError, ValueError):
        _scores.setdefault(question, 0.0)
        print(f"  {guess!r} is no number: type digits alone, such as 42 or 1.5, and run this cell again.")
        return
    _scores[question] = reached
    word = {1.0: "right", 0.5: "within a factor of two"}.get(reached, "not this time")
    print(f"  You said {_shown(guess)}{unit}; it is {_shown(answer)}{unit}: {word} ({reached:g} of 1 point).")
    if why:
        print(textwrap.fill(f"  {why}", WIDTH, subsequent_indent="  "))


def points() -> tuple[float, int]:
    """(points so far, questions asked) in this notebook."""
    return sum(_scores.values()), len(_scores)


def score() -> None:
    """Print the points of this notebook so far."""
    reached, asked = points()
    print(
        f"Predictions: {reached:g} of {asked} points. A guess can be changed and its cell run again at any time."
    )


def quiet() -> None:
    """Silence the progress bars and hints of transformers and huggingface_hub; errors still show."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def forget() -> None:
    """Start the score again."""
    _scores.clear()
