"""The picture of a run: loss and bits per byte against steps, tokens and seconds, from its logs.

Beside the curves, what the same held-out bytes cost others.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

from . import plots
from .config import RunConfig
from .files import replace_durably
from .logs import METRICS, TRAINING, best_score, numbers, read_log


def training_seconds(output_dir: Path, tokens_per_step: int) -> dict[float, float]:
    """{logged step: seconds of training up to it}: without pauses, validations and samples."""
    seconds, before, total = {0.0: 0.0}, 0.0, 0.0
    for event in map(numbers, read_log(output_dir / "logs" / METRICS)):
        total += (event["step"] - before) * tokens_per_step / event["tokens_per_second"]
        before = event["step"]
        seconds[before] = total
    return seconds


def draw_report(config: RunConfig, references: dict[str, float]) -> tuple[plots.Figure, str] | None:
    """(figure, what it says in words) of the run in `config.run.output_dir`; None while it has no score.

    `references`: bits per byte of other ways to predict the held-out text, by name.
    """
    output_dir, data = Path(config.run.output_dir), config.data
    events = [numbers(event) for event in read_log(output_dir / "logs" / TRAINING)]
    trained = [(e["step"], e["train_loss"]) for e in events if "train_loss" in e]
    scored = [(e["step"], e["val_loss"], e["val_bits_per_byte"]) for e in events if "val_bits_per_byte" in e]
    if not trained or not scored or not scored[-1][1]:
        return None
    steps, held_out, bits = zip(*scored, strict=True)
    bits_per_nat = bits[-1] / held_out[-1]  # tokens per byte / ln 2: one curve serves both axes
    fig, ax = plots.figure(8, 4.6)
    ax.plot(*zip(*trained, strict=True), marker="", linewidth=1, label="training")
    ax.plot(steps, held_out, label=f"held out: {bits[-1]:.2f} bits per byte at step {steps[-1]:.0f}")
    best = best_score(events)
    style = {"color": plots.RED, "markersize": 9, "markerfacecolor": "none", "clip_on": False}
    words = f"lowest, at step {best['step']:.0f}: the one to publish"
    ax.plot(best["step"], best["val_loss"], "o", linestyle="", **style, label=words)
    dashes = ("--", ":", "-.", (0, (9, 2)))  # told apart without their colours, too
    for (name, value), color, dash in zip(references.items(), plots.PALETTE[2:], dashes, strict=False):
        style = {"color": color, "linestyle": dash, "linewidth": 1.2, "marker": ""}
        ax.axhline(value / bits_per_nat, **style, label=f"{name}: {value:.2f}")
    top, best_of_others = max(trained[0][1], *held_out), min(references.values(), default=8) / bits_per_nat
    low = min(*held_out, trained[-1][1], best_of_others)  # a mark outside would push everything else out
    last = max(trained[-1][0], steps[-1])  # the end is scored also where its loss is not due in the log
    ax.set(xlim=(0, last), ylim=(0.9 * low, 1.02 * top))
    scale = (lambda nats: nats * bits_per_nat, lambda bits: bits / bits_per_nat)
    ax.secondary_yaxis("right", functions=scale).set_ylabel("bits per byte")
    tokens = config.train.batch_size * data.sequence_length
    seconds = training_seconds(output_dir, tokens)
    known = list(seconds)
    ax.xaxis.get_major_locator().set_params(integer=True)  # no half steps, which would be called 0 and 2
    ticks = [step for step in ax.get_xticks() if 0 <= step <= trained[-1][0]]
    at = [seconds[known[min(bisect_left(known, step), len(known) - 1)]] for step in ticks]
    words = [f"{s:,.0f}\n{s * tokens / 1e6:.2f} M\n{t:,.0f} s" for s, t in zip(ticks, at, strict=True)]
    ax.set_xticks(ticks, words)
    x = "steps, tokens and seconds of training"
    text = Path(data.chat_file or data.dataset or data.input_file).name
    plots.label(ax, f"{config.preset} on {text}", x, "nats per token")
    fig.legend(loc="outside lower center", ncols=2, edgecolor="none")
    told = ", ".join(f"{name} {value:.2f}" for name, value in references.items())
    alt = f"Held-out bits per byte fall from {bits[0]:.2f} at step {steps[0]:.0f} to {bits[-1]:.2f} at step "
    alt += f"{steps[-1]:.0f} (lowest {best['val_bits_per_byte']:.2f} at step {best['step']:.0f})"
    return fig, f"{alt}, after {seconds[known[-1]]:,.0f} s of training; {told}."


def save_report(config: RunConfig, references: dict[str, float]) -> Path | None:
    """Draw the run into `report.png` in its output directory; None while there is nothing to draw. Raises
    OSError where the disk does not take it."""
    drawn = draw_report(config, references)
    if drawn is None:
        return None
    path = Path(config.run.output_dir) / "report.png"
    replace_durably(path, plots.png_bytes(drawn[0]))
    return path
