"""What a finished or stopped run has to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import step_name
from .logs import shell_word
from .progress import safe_words

NOTICEABLE = 1.01  # a held-out score that is worse by this factor is worth a word


@dataclass
class TrainResult:
    """What `train` returns."""

    step: int
    checkpoint: Path | None
    stopped_by: int | None  # signal number
    seconds: float
    tokens_per_second: float
    bits_per_byte: float | None  # of the held-out part, at the last step
    references: dict[str, float]  # gzip -9 and xz of the same bytes
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    drive_step: int | None = None  # newest step that was copied to Drive; None without a Drive folder
    best: tuple[int, float] | None = (
        None  # (step, bits per byte) of the best validation; its checkpoint is always kept
    )

    def table(self) -> str:
        """The few lines a person wants at the end."""
        rows = []
        if self.bits_per_byte is not None:
            others = ", ".join(f"{name} {value:.3f}" for name, value in self.references.items())
            rows.append(("held-out bits per byte", f"{self.bits_per_byte:.3f}  (the same bytes: {others})"))
            if self.best and self.checkpoint and self.best[1] * NOTICEABLE < self.bits_per_byte:
                step, score = self.best
                rows.append(
                    (
                        "best held-out",
                        f"{score:.3f} at step {step}, kept in {self.checkpoint.with_name(step_name(step))}",
                    )
                )
                rows.append(
                    (
                        "",
                        "where the training loss went on falling, the text was being learned by heart: fewer steps or more text do better",
                    )
                )
        if self.tokens_per_second:
            rows.append(("tokens per second", f"{self.tokens_per_second:,.0f}"))
        rows.append(("time", f"{self.seconds:.0f} s"))
        if self.checkpoint:
            rows.append(("checkpoint", f"{self.checkpoint} (step {self.step})"))
            if self.drive_step is not None:
                rows.append(("saved", safe_words(self.step, self.drive_step)))
            rows.append(
                (
                    "talk to it",
                    f'python -m smollm2.generate --checkpoint {shell_word(self.checkpoint)} --prompt "Once upon a time"',
                )
            )
        return "\n".join(f"{name:<24}{value}" for name, value in rows)
