"""Training: from a configuration to checkpoints, logs and samples. `train(config)` is the whole job.

Everything from one optimizer step to the next stands in `TrainingLoop.training_step`, in the order in which
it happens: batch, forward, backward, check, update, log, validate, sample, save, stop. Lightning drives it:
one Lightning "batch" is all rows of one optimizer step, so that accumulation, the check before the update and
a retry after running out of memory are atomic, and a checkpoint can only fall between two updates. Learning
rate and data are pure functions of the step and the position: a resumed run and an uninterrupted one compute
the same bits.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque

import torch

from . import logs
from .checkpoint import step_name
from .config import RunConfig
from .data import BatchOrder, BatchStream
from .device import autocast, free_unused_memory, kept_memory, plain_defaults, repeatable_sums, sharing_cores
from .distributed import import_lightning, make_trainer
from .errors import MemoryStop, disk_failures_named, is_out_of_memory
from .evaluate import score_tokens
from .guard import NumericGuard, make_scaler, update_scale
from .loss import count_learned, inputs_and_targets
from .model import SmolLM2
from .optim import load_moments, make_optimizer, set_learning_rate
from .progress import Reporter, TerminalReporter
from .result import TrainResult, complete_result
from .run import Run, load, open_run, schedule_of
from .sampling import complete
from .signals import LOST_READER, OUT_OF_TIME, StopSignals
from .state import TrainState

SPEED_WINDOW = 20  # steps that tokens/s is the mean of
pl = import_lightning()


def train(config: RunConfig, reporter: Reporter | None = None, began: float | None = None) -> TrainResult:
    """Train as `config` says, or continue where the output directory stands.

    Ends at `train.max_steps` with `final_model.ckpt`; with `train.continue_steps` a fresh trainer resumes
    from that and ends with `final_continued_model.ckpt`. Ctrl-C, SIGTERM and SIGHUP finish the step, save and
    return (`result.stopped_by`). `began`: `time.monotonic()` that minutes count from, else now. Raises
    `UserError` subclasses; their `exit_code` says which kind.
    """
    began, result, reporter = began or time.monotonic(), TrainResult(), reporter or TerminalReporter()
    signals = StopSignals(reporter.message)
    with (
        disk_failures_named(config.run.output_dir),
        plain_defaults(),
        repeatable_sums(config.train.deterministic),
        kept_memory(),
        sharing_cores(),
        open_run(config, reporter, began) as run,
        signals,
    ):
        for target, final_name in run.phases_to_do():
            if run.step == target:
                if run.is_first_worker:
                    run.saver.copy_newest(final_name)
            elif signals.received is None:
                run_phase(run, target, final_name, signals, result)
        return complete_result(result, run, signals.over(), time.monotonic() - began)


def run_phase(run: Run, target: int, final_name: str, signals: StopSignals, result: TrainResult) -> None:
    """Train from the newest checkpoint (or from nothing) to step `target` with a fresh trainer."""
    model, state, moments = load(run)
    loop = TrainingLoop(run, model, state, moments, target, final_name, signals, result)
    trainer = make_trainer(run.config.run, run.device)
    rank, world = trainer.global_rank, run.world_size
    batches = BatchStream(run.data.train.tokens, loop.order, state.position, rank, world)
    try:
        trainer.fit(loop, batches)
    except SystemExit:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from None
    finally:
        run.reporter.end()


class TrainingLoop(pl.LightningModule):
    """One phase of a run, from where `state` stands to step `target`, saved there as `final_name`."""

    def __init__(
        self, run: Run, model: SmolLM2, state: TrainState, moments: dict[str, torch.Tensor], target: int,
        final_name: str, signals: StopSignals, result: TrainResult,
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.run, self.model, self.state, self.target, self.final_name = run, model, state, target, final_name
        self.signals, self.result, self.settings = signals, result, run.config.train
        length, rows, seed = run.config.data.sequence_length, self.settings.batch_size, self.settings.seed
        self.order = BatchOrder(len(run.data.train.tokens), length, rows, seed)
        self.schedule = schedule_of(self.settings, state)
        self.guard = NumericGuard(run.precision.needs_scaler, state.guard)
        self._moments = moments
        self._saved_at = time.monotonic()
        self._durations: deque[float] = deque(maxlen=SPEED_WINDOW)

    def configure_optimizers(self):
        self.optimizer = make_optimizer(self.model, self.settings, self.run.precision.autocast_dtype)
        load_moments(self.model, self.optimizer, self._moments, self.state.step)
        self._moments.clear()  # the caller's name for them would keep 1.08 GB alive at 135M
        self.scaler = make_scaler(self.run.device.type, self.run.precision.needs_scaler, self.state.scaler)
        return self.optimizer

    def on_train_start(self) -> None:
        self.signals.install()  # Lightning has just put its own SIGTERM handler in front
        self.run.reporter.start(self.state.step, self.target, self.run.tokens_per_step)

    # --- from one step to the next

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """batch (rows, sequence_length + 1) int64: this worker's rows of one optimizer step."""
        began = time.monotonic()
        state, train, run = self.state, self.settings, self.run
        # forward, backward, check: a skipped update uses up its batch, and its step does not count
        loss = self.gradients(batch)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.gradient_clip_norm)
        loss, norm, stopped_by = self.agree(loss, norm)
        reason = self.guard.verdict(loss, norm, state.position)
        state.position += 1
        state.guard = self.guard.state
        # the update
        is_applied = reason is None
        if is_applied:
            set_learning_rate(self.optimizer, self.schedule(state.step))
            self.scaler.step(self.optimizer)
            state.step += 1
        state.scaler = update_scale(self.scaler)
        self.optimizer.zero_grad(set_to_none=True)
        # what is due comes before the save: what is saved is never done again
        if is_applied:
            self._durations.append(time.monotonic() - began)
            self.log_step(loss, norm)
        else:
            self.log_skip(reason)
        self.log_epoch(loss, is_applied)
        is_last = state.step >= self.target
        improved = is_applied and (is_last or state.step % train.val_every == 0) and self.validate()
        if is_applied and (is_last or state.step % train.sample_every == 0):
            self.sample()
        if run.world_size == 1:
            stopped_by = self.heard()  # nobody to agree with: what came during this step counts, too
        if is_last or stopped_by or self.save_is_due(is_applied, improved):
            self._saved_at = time.monotonic()
            run.save(self.final_name if is_last else step_name(state.step), state, self.model, self.optimizer)
        run.report_saves()
        if stopped_by:
            self.signals.stop(stopped_by)  # on every worker, also if the signal has reached only one
        self.trainer.should_stop |= bool(is_last or stopped_by)

    def gradients(self, batch: torch.Tensor) -> torch.Tensor:
        """Of all rows; after running out of memory, halve the micro-batch and redo them all. Returns the mean
        loss in nats a token."""
        while True:
            try:
                return self.accumulate(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error)[:160]
            # behind the handler: inside it the traceback still holds the activations
            self.optimizer.zero_grad(set_to_none=True)
            free_unused_memory()
            micro = self.state.micro_batch_size
            if micro == 1 or self.run.world_size > 1:  # the others cannot know of it
                advice = "set a smaller train.micro_batch_size, data.sequence_length or model"
                kept = self.run.saver.last_good()
                raise MemoryStop(f"out of memory at micro-batch {micro} ({reason}); {advice}; {kept}")
            self.state.micro_batch_size = micro = micro // 2
            redone = "the step is redone with the same tokens; bit-exactness restarts here"
            self.run.say(f"out of memory: micro-batch halved to {micro}, {redone}")
            self.record(logs.CHECKPOINTS, event="micro_batch_halved", micro_batch_size=micro)

    def accumulate(self, batch: torch.Tensor) -> torch.Tensor:
        rows, micro = batch.shape[0], self.state.micro_batch_size
        total = torch.zeros((), device=batch.device)
        answers = None  # in a chat the mean is over those of all workers together, else over rows
        if self.run.chat_template:
            answers = self.trainer.strategy.reduce(count_learned(batch), reduce_op="mean")
        for start in range(0, rows, micro):
            part = batch[start : start + micro]
            share = len(part) / rows if answers is None else count_learned(part) / answers
            # workers exchange gradients once a step, with the last micro-batch
            is_early = self.run.world_size > 1 and start + micro < rows
            with self.trainer.strategy.block_backward_sync() if is_early else contextlib.nullcontext():
                with autocast(self.run.precision, self.run.device):
                    loss = self.model.loss(*inputs_and_targets(part)) * share
                self.manual_backward(self.scaler.scale(loss))
            total += loss.detach().float()
        return total

    def agree(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float, int]:
        """(loss, gradient norm, signal number or 0), the same on every worker, by one exchange a step."""
        mine = torch.stack((loss.double(), norm.double(), loss.new_tensor(self.heard(), dtype=torch.float64)))
        if self.run.world_size == 1:
            loss, norm, received = mine.tolist()
        else:
            said = self.trainer.strategy.all_gather(mine)  # (workers, 3); the norms are alike already
            (loss, norm), received = said[:, :2].mean(0).tolist(), said[:, 2].max().item()
        return loss, norm, int(received)

    def heard(self) -> int:
        """The signal that asks this process to stop; 0 for none."""
        is_late = time.monotonic() > self.run.ends_at - max(self._durations, default=0)
        return self.signals.received or (LOST_READER if self.run.reporter.is_lost else OUT_OF_TIME * is_late)

    # --- what is due at a step

    def record(self, file: str, **facts: object) -> None:
        """A line of a log; only the first worker writes."""
        if self.run.is_first_worker:
            self.run.logs.write(file, self.state.step, **facts)

    def log_step(self, loss: float, norm: float) -> None:
        step, run, rate = self.state.step, self.run, self.schedule(self.state.step - 1)
        speed = run.tokens_per_step * len(self._durations) / sum(self._durations)
        self.result.losses.append((step, loss))
        self.result.tokens_per_second = speed
        run.reporter.step(step, loss, rate, speed)
        if step % self.settings.log_every == 0 or step == 1:
            tokens = step * run.tokens_per_step
            self.record(logs.TRAINING, train_loss=loss, lr=rate, gradient_norm=norm, tokens=tokens)
            self.record(logs.METRICS, tokens_per_second=round(speed, 1), **logs.resources(run.device))

    def log_skip(self, reason: str) -> None:
        step, position = self.state.step, self.state.position - 1
        self.run.say(f"step {step}: update skipped ({reason}); batch {position} is used up all the same")
        self.record(logs.CHECKPOINTS, event="skipped", position=position, reason=reason)

    def log_epoch(self, loss: float, is_applied: bool) -> None:
        """A line for every pass over the training tokens that the last batch completed."""
        state = self.state
        total, count = state.epoch["loss_sum"], state.epoch["batches"]
        if is_applied:
            total, count = total + loss, count + 1
        before, after = (int(self.order.epoch_of(n)) for n in (state.position - 1, state.position))
        if after > before:
            if count:
                tokens = state.position * self.run.tokens_per_step
                self.record(logs.EPOCHS, epoch=after, mean_train_loss=total / count, tokens=tokens)
            total, count = 0.0, 0
        state.epoch = {"loss_sum": total, "batches": count}

    @torch.compiler.set_stance("force_eager")  # see `sample`
    def validate(self) -> bool:
        """Score the held-out text, on every worker alike; returns whether it is the best so far."""
        state, run, val = self.state, self.run, self.run.data.val
        score = score_tokens(
            self.model, val.tokens, val.text_bytes,
            block_length=run.config.data.sequence_length,
            max_tokens=None if state.step >= self.target else self.settings.val_max_tokens,
            autocast=lambda: autocast(run.precision, run.device),
        )  # fmt: skip
        bits = score.bits_per_byte
        improved = math.isfinite(bits) and bits < state.best.get("bits_per_byte", math.inf)
        if improved:
            state.best = {"step": state.step, "bits_per_byte": bits}
        self.result.validations.append((state.step, score.loss, bits))
        self.record(logs.TRAINING, val_loss=score.loss, val_bits_per_byte=bits, val_tokens=score.tokens)
        run.reporter.validation(state.step, score.loss, bits)
        return improved

    # Only training runs compiled: sampling with a cache makes a graph for each layer, more than torch keeps,
    # and whether a step runs compiled would then depend on the samples taken before it in this process.
    @torch.compiler.set_stance("force_eager")
    def sample(self) -> None:
        """Continue the fixed prompts, with a generator of their own: training's randomness is untouched."""
        if not self.run.is_first_worker:
            return
        self.model.eval()
        step, train, run = self.state.step, self.settings, self.run
        for index, prompt in enumerate(train.prompts):
            options = {"temperature": 0.8, "top_k": 50, "seed": (train.seed + index) % 2**63}
            with autocast(run.precision, run.device):
                text = complete(self.model, run.tokenizer, run.asked(prompt), train.sample_tokens, **options)
            self.record(logs.SAMPLES, prompt=prompt, text=text)
            run.reporter.sample(step, prompt, text)
        self.model.train()

    def save_is_due(self, is_applied: bool, improved: bool) -> bool:
        """By steps where asked for, else by the clock; a best model so far waits a quarter of the time."""
        every, seconds = self.settings.save_every, self.settings.save_every_seconds
        waited = time.monotonic() - self._saved_at
        by_clock = seconds is not None and waited >= (seconds / 4 if improved else seconds)
        return by_clock or (is_applied and every is not None and self.state.step % every == 0)

    def on_train_end(self) -> None:
        """Inside the fit: afterwards Lightning moves everything to the CPU."""
        if self.run.is_first_worker:
            self.run.saver.wait(for_step=self.state.step)
            self.run.report_saves()
        self.trainer.strategy.barrier()
