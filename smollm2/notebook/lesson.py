"""What makes a notebook a lesson: visible checks and predictions that are scored, in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import torch

WIDTH = 84  # characters of a line that a notebook beside an open side bar still shows unbroken
_scores: dict[str, float] = {}  # question -> points, so that running a cell again replaces its score


class CheckFailed(AssertionError):
    """A visible check of a notebook did not hold."""


def largest(difference) -> float:
    """Largest absolute value of a number, tensor or array; NaN when any entry is NaN, 0 for nothing to
    compare."""
    values = torch.as_tensor(difference).detach().cpu().double().abs()
    return values.max().item() if values.numel() else 0.0


def _figure(value) -> str:
    value = float(value)
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"


def check(name: str, difference, tolerance: float = 0.0, likely: str = "") -> None:
    """Print `✔ name: max|difference| = 3.1e-06 (tolerance 1e-04)`; of whole numbers and booleans `✔ name`
    alone.

    `difference` is a number, tensor or array that should be zero, or False. Raises `CheckFailed` when it
    exceeds `tolerance` or is NaN; `likely` names the likely mistake there. `name` says what holds.
    """
    size = largest(difference)
    found = f"max|difference| = {_figure(size)}"
    allowed = f"tolerance {_figure(tolerance)}" if tolerance else "exact"
    if not torch.as_tensor(difference).is_floating_point():  # whole numbers are equal, or they are not
        found, allowed = f"not so, off by {_figure(size)}", ""
    told = f"{found} ({allowed})" if allowed else found
    if not size <= tolerance:  # written so that NaN fails
        raise CheckFailed(f"✘ {name}: {told}." + (f" Likely: {likely}" if likely else ""))
    print(f"✔ {name}: {told}" if allowed else f"✔ {name}")


def true(name: str, holds, likely: str = "") -> None:
    """Print `✔ name` when it `holds`; raises `CheckFailed` when not."""
    check(name, not holds, likely=likely)


def yours_or(given: Callable, yours: Callable) -> Callable:
    """`yours`, or `given` while `yours` is the empty stub: one that raises NotImplementedError."""
    is_empty = "NotImplementedError" in yours.__code__.co_names
    print("still empty: the lesson goes on with the given one" if is_empty else "yours is used from here on")
    return given if is_empty else yours


def judge(name: str, yours, right: torch.Tensor, mistakes: dict[str, torch.Tensor]) -> None:
    """`check` that the tensor `yours` is `right` within 1e-5; where not, name the one of `mistakes` (words ->
    what that mistake gives) that lies ten times nearer to it than `right`, or all where none does."""
    if getattr(yours, "shape", None) != right.shape:
        found = f"shape {tuple(yours.shape)}" if isinstance(yours, torch.Tensor) else repr(yours)
        raise CheckFailed(f"✘ {name}: found {found}, expected shape {tuple(right.shape)}")
    apart = {words: largest(yours - wrong) for words, wrong in mistakes.items()}
    nearest = min(apart, key=apart.get)
    is_known = apart[nearest] < 0.1 * largest(yours - right)
    check(name, yours - right, 1e-5, nearest if is_known else "none of: " + "; ".join(mistakes))


def check_fails(name: str, action: Callable[[], object]) -> None:
    """Print `✔ name` when `action` trips a check, as a planted bug must; raises `CheckFailed` when it does
    not."""
    try:
        action()
    except CheckFailed as failure:
        print(f"✔ {name}: found. {failure}")
        return
    raise CheckFailed(f"✘ {name}: the check let it pass, so it proves nothing")


def _points(guess, answer, within: float) -> float:
    if isinstance(answer, str):
        return float(str(guess).strip().casefold() == answer.strip().casefold())
    if abs(float(guess) - answer) <= within * abs(answer):
        return 1.0
    return 0.5 if answer / 2 <= float(guess) <= 2 * answer else 0.0


def predict(question: str, guess, answer, *, within: float = 0.1, unit: str = "", why: str = "") -> None:
    """Score a prediction: 1 point within `within` (relative) of the answer, 0.5 within a factor of two, else
    0.

    With `guess=None` (or "?") it only asks; answer and explanation (`why`) stay closed. Words are compared as
    words.
    """
    print(textwrap.fill(f"? {question}", WIDTH, subsequent_indent="  "))
    _scores[question] = 0.0
    if guess is None or guess == "?":
        print(f"  No guess yet: put one in place of {guess!r} and run this cell again to see the answer.")
        return
    try:
        reached = _scores[question] = _points(guess, answer, within)
    except (TypeError, ValueError):
        print(f"  {guess!r} is no number: type digits alone, such as 42 or 1.5, and run this cell again.")
        return
    if not isinstance(answer, str):
        guess, answer = (f"{_figure(value)} {unit}".rstrip() for value in (guess, answer))
    word = {1.0: "right", 0.5: "within a factor of two"}.get(reached, "not this time")
    print(f"  You said {guess}; it is {answer}: {word} ({reached:g} of 1 point).")
    if why:
        print(textwrap.fill(f"  {why}", WIDTH, subsequent_indent="  "))


def score() -> None:
    """Print the points of this notebook so far."""
    reached = f"{sum(_scores.values()):g} of {len(_scores)} points"
    print(f"Predictions: {reached}. A guess can be changed and its cell run again at any time.")


def quiet() -> None:
    """Silence the progress bars and hints of transformers and huggingface_hub; errors still show."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
