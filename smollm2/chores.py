"""What happens between two updates: logging, saving, validation, samples, stopping.

Order at a step: log the loss; save if due, with the chores still to come noted as `pending`; then validate and
sample. A run killed in between resumes from that save and does the pending chores first.
"""

from __future__ import annotations

import math
import time
from collections import deque

import pytorch_lightning as pl
import torch

from . import logs
from .checkpoint import step_name
from .data import BatchOrder
from .device import autocast
from .errors import OutputLost
from .evaluate import score_tokens
from .result import NOTICEABLE
from .run import Run
from .sampling import complete
from .signals import StopSignals

SPEED_WINDOW = 20  # steps that tokens/s is the mean of


class Chores(pl.Callback):
    """The callback of one phase, from wherever the state stands to step `target`."""

    def __init__(self, run: Run, order: BatchOrder, target: int, final_name: str, signals: StopSignals):
        self.run, self.order, self.target, self.final_name, self.signals = (
            run,
            order,
            target,
            final_name,
            signals,
        )
        self.train = run.config.train
        self._last_save_at = time.monotonic()
        self._durations: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._step_began = 0.0
        self._has_said_overfit = False

    # --- Lightning's hooks

    def on_train_start(self, trainer, module) -> None:
        self.signals.install()  # Lightning has just put its own SIGTERM handler in front
        self.run.reporter.start(module.state.step, self.target, self.run.tokens_per_step)
        self._do_pending(module)

    def on_train_end(self, trainer, module) -> None:
        self.finish(module)  # inside the fit: afterwards Lightning moves everything to the CPU
        trainer.strategy.barrier()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._step_began = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        state = module.state
        if module.last_applied:
            self._durations.append(time.monotonic() - self._step_began)
            self._log_step(module)
        self._log_epoch(module)
        is_late = (
            self.train.save_every_seconds is not None
            and time.monotonic() - self._last_save_at >= self.train.save_every_seconds
        )
        received, is_late = self._agreed(trainer, self.signals.received, is_late and self.run.is_first_worker)
        stopping = received is not None
        if stopping:  # else a signal that came meanwhile would be forgotten
            self.signals.received = received
        if state.step >= self.target:
            trainer.should_stop = True  # the last save and its chores follow in `finish`
        elif module.last_applied or stopping:
            state.pending = self._due(state.step) if module.last_applied else []
            is_due = self.train.save_every is not None and state.step % self.train.save_every == 0
            if stopping or state.pending or is_due or is_late:
                self.save(module, step_name(state.step))
            if not stopping:
                self._do_pending(module)
        trainer.should_stop |= stopping

    def finish(self, module) -> None:
        """At the target: the step's checkpoint, its chores, then the final folder."""
        state = module.state
        if state.step >= self.target:
            if not self.run.has_checkpoint_at(state.step):
                state.pending = ["val", "sample"]
                self.save(module, step_name(state.step))
            self._do_pending(module)
            self.save(module, self.final_name)
        if self.run.is_first_worker:
            self.run.saver.wait()
            self._expect_saved(state.step, self.final_name if state.step >= self.target else None)

    def _expect_saved(self, step: int, name: str | None) -> None:
        newest = self.run.newest
        if newest is None or newest.step != step or (name and newest.folder.name != name):
            raise OutputLost(
                f"step {step} could not be saved in {self.run.checkpoint_dir} (reason above); the last good checkpoint "
                "is untouched: free or repair the disk and run the same command again"
            )

    def close(self) -> None:
        self.run.reporter.end()

    # --- the chores

    @property
    def tokens_per_second(self) -> float:
        return (
            self.run.tokens_per_step * len(self._durations) / sum(self._durations) if self._durations else 0.0
        )

    def _agreed(self, trainer, received: int | None, is_late: bool) -> tuple[int | None, bool]:
        """The same answers on every worker, also when a signal has reached only one of them."""
        if self.run.world_size > 1:
            said = torch.tensor([received or 0, is_late], dtype=torch.float32, device=self.run.device)
            number, late = trainer.strategy.reduce(said, reduce_op="max").tolist()
            received, is_late = int(number) or None, bool(late)
        return received, is_late

    def _due(self, step: int) -> list[str]:
        return [
            name
            for name, every in (("val", self.train.val_every), ("sample", self.train.sample_every))
            if step % every == 0
        ]

    def _log_step(self, module) -> None:
        state, loss = module.state, module.last_loss
        rate = module.schedule(state.step - 1)
        self.run.losses.append((state.step, loss))
        self.run.tokens_per_second = self.tokens_per_second
        if not self.run.is_first_worker:
            return
        self.run.reporter.step(state.step, loss, rate, self.tokens_per_second)
        if state.step % self.train.log_every == 0 or state.step == 1:
            write = self.run.logs.write
            tokens = state.step * self.run.tokens_per_step
            write(
                logs.TRAINING,
                state.step,
                train_loss=loss,
                lr=rate,
                gradient_norm=module.last_norm,
                tokens=tokens,
            )
            write(
                logs.METRICS,
                state.step,
                tokens_per_second=round(self.tokens_per_second, 1),
                **logs.resources(self.run.device),
            )
            self.run.logs.scalars(
                state.step,
                train_loss=loss,
                train_lr=rate,
                train_gradient_norm=module.last_norm,
                train_tokens_per_second=self.tokens_per_second,
            )

    def _log_epoch(self, module) -> None:
        """A line for every pass over the training tokens that the last batch completed."""
        state = module.state
        if module.last_applied:
            state.epoch["loss_sum"] += module.last_loss
            state.epoch["batches"] += 1
        before, after = int(self.order.epoch_of(state.position - 1)), int(self.order.epoch_of(state.position))
        if after == before:
            return
        if self.run.is_first_worker and state.epoch["batches"]:
            mean = state.epoch["loss_sum"] / state.epoch["batches"]
            self.run.logs.write(
                logs.EPOCHS,
                state.step,
                epoch=after,
                mean_train_loss=mean,
                tokens=state.position * self.run.tokens_per_step,
            )
        state.epoch = {"loss_sum": 0.0, "batches": 0}

    def save(self, module, name: str) -> None:
        """Hand the present state to the saver; workers other than the first do nothing."""
        self._last_save_at = time.monotonic()
        if self.run.is_first_worker:
            self.run.save(name, module.state, module.model, module.optimizer)

    def _do_pending(self, module) -> None:
        """Validation and samples that are due at this step; on one worker, the others go on to the next barrier."""
        state = module.state
        # only training runs compiled: sampling with a cache makes a graph for each layer, more than torch keeps, and whether a
        # step runs compiled would then depend on the samples taken before it in this process
        with torch.compiler.set_stance("force_eager"):
            if self.run.is_first_worker and "val" in state.pending:
                self._validate(module)
            if self.run.is_first_worker and "sample" in state.pending:
                self._sample(module)
        state.pending = []

    def _validate(self, module) -> None:
        state, val = module.state, self.run.data.val
        score = score_tokens(
            module.model,
            val.tokens,
            val.text_bytes,
            block_length=self.run.config.data.sequence_length,
            max_tokens=None if state.step >= self.target else self.train.val_max_tokens,
            autocast=lambda: autocast(self.run.precision, self.run.device),
        )
        if (
            state.best
            and score.bits_per_byte > NOTICEABLE * state.best["bits_per_byte"]
            and not self._has_said_overfit
        ):
            self._has_said_overfit = True
            self.run.say(
                f"step {state.step}: {score.bits_per_byte:.3f} bits per byte on the held-out text, {state.best['bits_per_byte']:.3f} at step {state.best['step']:.0f}: "
                "where the training loss goes on falling, the text is being learned by heart; the best checkpoint is kept"
            )
        if math.isfinite(score.bits_per_byte) and (
            not state.best or score.bits_per_byte < state.best["bits_per_byte"]
        ):
            state.best = {"step": state.step, "bits_per_byte": score.bits_per_byte}
        self.run.validations.append((state.step, score.loss, score.bits_per_byte))
        self.run.logs.write(
            logs.TRAINING,
            state.step,
            val_loss=score.loss,
            val_bits_per_byte=score.bits_per_byte,
            val_tokens=score.tokens,
        )
        self.run.logs.scalars(state.step, val_loss=score.loss, val_bits_per_byte=score.bits_per_byte)
        self.run.reporter.validation(state.step, score.loss, score.bits_per_byte)

    def _sample(self, module) -> None:
        """Continue the fixed prompts. The sampler has its own seeded generator: training randomness is untouched."""
        module.model.eval()
        for index, prompt in enumerate(self.train.prompts):
            options = {"temperature": 0.8, "top_k": 50, "seed": self.train.seed + index}
            with autocast(self.run.precision, self.run.device):
                text = complete(module.model, self.run.tokenizer, prompt, self.train.sample_tokens, **options)
            self.run.logs.write(logs.SAMPLES, module.state.step, prompt=prompt, text=text)
            self.run.reporter.sample(module.state.step, prompt, text)
        module.model.train()
