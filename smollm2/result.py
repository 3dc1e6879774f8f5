"""What a finished or stopped run has to show."""

from __future__ import annotations

import contextlib
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import step_name
from .device import autocast
from .errors import UserError
from .evaluate import compressed_bits_per_byte, score_texts, score_tokens
from .files import dump_json, origin_name, replace_durably
from .logs import OTHERS
from .model import SmolLM2
from .ngram import NGram
from .pretrained import load_model_and_tokenizer
from .progress import safe_words
from .report import save_report
from .run import Run
from .state import read_state

NOTICEABLE = 1.01  # a held-out score that is worse by this factor is worth a word
MAX_REFERENCE_BYTES = 256 * 2**20  # of held-out text that gzip and xz are tried on
COUNTING_ORDER = 6  # a context of five bytes: about the best for a text of 1 MB
MAX_COUNTED_BYTES = 8 * 2**20  # of training text: counting keeps some 100 bytes for each
COMPARISON_SECONDS = 60  # that a model of 135 million parameters takes, about, for
COMPARED_BYTES = {"cpu": 150_000, "cuda": 4_000_000}
CONTEXT = 2048  # SmolLM2's in pre-training
BY_HEART = "from there on the text was being learned by heart: fewer steps or more text do better"


@dataclass(frozen=True)
class Comparison:
    """Bits per byte of another model, and of this run on the same `bytes`: all held-out, or the first."""

    name: str
    theirs: float
    ours: float
    bytes: int
    is_whole: bool

    def words(self) -> str:
        part = "same" if self.is_whole else "first"
        beside = f"where this run has {self.ours:.3f}"
        return f"{self.theirs:.3f} on the {part} {self.bytes:,} bytes, {beside}"


@dataclass
class TrainResult:
    """What `train` returns; the loop adds to `losses` and `validations` while it trains."""

    step: int = 0
    checkpoint: Path | None = None
    stopped_by: int | None = None  # signal number
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    bits_per_byte: float | None = None  # of the held-out part, at the last step
    references: dict[str, float] = field(default_factory=dict)  # gzip -9, xz, counting, of the same bytes
    compared: Comparison | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    drive_step: int | None = None  # newest step that was copied to Drive; None without a Drive folder
    best: tuple[int, float] | None = None  # (step, bits per byte) of the best validation
    report: Path | None = None  # the curves, as a picture

    def table(self) -> str:
        """The few lines a person wants at the end."""
        rows = []
        if self.bits_per_byte is not None:
            others = ", ".join(f"{name} {value:.3f}" for name, value in self.references.items())
            beside = f"  (the same bytes: {others})" * bool(others)
            rows.append(("held-out bits per byte", f"{self.bits_per_byte:.3f}{beside}"))
            if self.compared:
                rows.append((self.compared.name.split("/")[-1], self.compared.words()))
            if self.best and self.best[1] * NOTICEABLE < self.bits_per_byte:
                step, score = self.best
                kept = self.checkpoint.with_name(step_name(step))
                where = f", kept in {kept}" if kept.is_dir() else ""
                rows += [("best held-out", f"{score:.3f} at step {step}{where}"), ("", BY_HEART)]
        if self.tokens_per_second:
            rows.append(("tokens per second", f"{self.tokens_per_second:,.0f}"))
        rows.append(("time", f"{self.seconds:.0f} s"))
        if self.checkpoint:
            rows.append(("checkpoint", f"{self.checkpoint} (step {self.step})"))
            if self.drive_step is not None:
                rows.append(("saved", safe_words(self.step, self.drive_step)))
            if self.report:
                rows.append(("curves", str(self.report)))
            command = f"python -m smollm2.generate --checkpoint {shlex.quote(str(self.checkpoint))}"
            rows.append(("talk to it", f'{command} --prompt "Once upon a time"'))
        return "\n".join(f"{name:<24}{value}" for name, value in rows)


def complete_result(result: TrainResult, run: Run, stopped_by: int | None, seconds: float) -> TrainResult:
    """Where the run stands now; at its end how good it is, beside others."""
    newest, config, val = run.saver.newest, run.config, run.data.val
    result.stopped_by, result.seconds = stopped_by, seconds
    if newest and run.is_first_worker and stopped_by is None:
        if result.validations and result.validations[-1][0] == newest.step:
            result.bits_per_byte = result.validations[-1][2]
        else:
            model = SmolLM2.from_pretrained(newest.folder, device=run.device)
            length = config.data.sequence_length
            score = score_tokens(model, val.tokens, val.text_bytes, block_length=length)
            result.bits_per_byte = score.bits_per_byte
        best = read_state(newest).best
        if best and config.train.val_max_tokens is None:  # else measured on fewer tokens than the last one
            result.best = (best["step"], best["bits_per_byte"])
        if val.text_bytes <= MAX_REFERENCE_BYTES and not run.chat_template:
            text = "".join(val.texts(run.tokenizer, config.model.eos_token_id))
            result.references = compressed_bits_per_byte(text.encode()) | counted(run, text)
            result.compared = compare(run, text, result.bits_per_byte, seconds)
            if (other := result.compared) and other.is_whole:
                result.references[other.name] = other.theirs
        with contextlib.suppress(OSError):  # the disk is full: the run is safe, only its picture is not
            told = dump_json({"step": newest.step, "bits_per_byte": result.references})
            replace_durably(run.logs.folder / OTHERS, told)
            result.report = save_report(config, result.references)
    if run.mirror:
        run.mirror.close()
    if newest:
        result.step, result.checkpoint, result.drive_step = newest.step, newest.folder, run.drive_step
    return result


def counted(run: Run, text: str) -> dict[str, float]:
    """What `text` costs whom only counting on the training text taught; nothing for a large one."""
    train = run.data.train
    if train.text_bytes > MAX_COUNTED_BYTES:
        return {}
    learned = "".join(train.texts(run.tokenizer, run.config.model.eos_token_id)).encode()
    return {"counting": float(NGram(learned, COUNTING_ORDER).bits(text.encode()).mean())}


def compare(run: Run, text: str, bits_per_byte: float, seconds: float) -> Comparison | None:
    """The model that `run.compare_with` names, and the run (`bits_per_byte` on all of `text`), on the same
    bytes. None, and why in a line, where that is not to be had: all is saved, and nothing may spoil it."""
    config, name = run.config, run.config.run.compare_with
    if name is None:
        return None
    part = text.encode()[: COMPARED_BYTES[run.device.type]].decode(errors="ignore")
    ends = 60 * min(config.train.stop_after or math.inf, 1.05 * (config.train.minutes or math.inf))
    try:
        if ends - seconds < COMPARISON_SECONDS:
            raise UserError("no time is left for it")

        def bits_of(source, context: int) -> float:
            model, tokenizer = load_model_and_tokenizer(source, device=run.device)
            context = min(context, model.config.max_position_embeddings)
            options = {"block_length": context, "autocast": lambda: autocast(run.precision, run.device)}
            return score_texts(model, tokenizer, [part], name, **options).bits_per_byte

        run.say(f"{origin_name(name)}: reading {len(part.encode()):,} held-out bytes, for comparison ...")
        theirs, is_whole = bits_of(name, CONTEXT), part == text
        ours = bits_per_byte if is_whole else bits_of(run.saver.newest.folder, config.data.sequence_length)
    except Exception as error:  # of the network, of memory, of a folder: many unrelated types
        run.say(f"not compared with {origin_name(name)}: {' '.join(str(error).split())[:300]}")
        return None
    return Comparison(origin_name(name), theirs, ours, len(part.encode()), is_whole)
