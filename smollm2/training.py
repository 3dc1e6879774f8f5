"""Training: from a configuration to checkpoints, logs and samples. `train(config)` is the whole job.

Lightning drives the loop. One Lightning "batch" is the whole window of one optimizer step, so that gradient
accumulation, the check before the update and a retry after running out of memory are atomic, and a checkpoint can only
fall between two updates. Learning rate and data are pure functions of the step and the position: a resumed run and
an uninterrupted one compute the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import warnings

import pytorch_lightning as pl
import torch

from .chores import Chores
from .data import BatchOrder, BatchStream
from .device import autocast, repeatable_sums
from .errors import MemoryStop, disk_failures_named
from .guard import MIN_SCALE, NumericGuard
from .model import SmolLM2
from .optim import Schedule, load_moments, make_optimizer, set_learning_rate
from .progress import Outlet, TerminalReporter
from .result import TrainResult
from .run import Run, open_run
from .signals import StopSignals
from .state import TrainState


class TrainingModule(pl.LightningModule):
    """One optimizer step a `training_step`: micro-batches, check, clip, update."""

    def __init__(self, run: Run, model: SmolLM2, state: TrainState, moments: dict[str, torch.Tensor]):
        super().__init__()
        self.automatic_optimization = False
        self.run, self.model, self.state = run, model, state
        self._moments = moments
        train = run.config.train
        self.schedule = Schedule(
            train.learning_rate,
            train.warmup_steps,
            train.decay_fraction,
            state.schedule_start,
            state.schedule_total,
        )
        self.guard = NumericGuard(train.on_spike, run.precision.needs_scaler, state.guard)
        self.last_loss, self.last_norm, self.last_applied = float("nan"), float("nan"), False

    def configure_optimizers(self):
        self.optimizer = make_optimizer(self.model, self.run.config.train)
        load_moments(self.model, self.optimizer, self._moments, self.state.step)
        self._moments = {}
        self.scaler = torch.amp.GradScaler(
            self.run.device.type, enabled=self.run.precision.needs_scaler, init_scale=2.0**16
        )
        if self.state.scaler:
            self.scaler.load_state_dict(dict(self.scaler.state_dict(), **self.state.scaler))
        return self.optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """batch (rows, sequence_length + 1) int64: this worker's rows of one optimizer step."""
        loss = self._gradients_of_window(batch)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.run.config.train.gradient_clip_norm
        )
        if self.run.world_size > 1:
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self.last_loss, self.last_norm = torch.stack(
            (loss, norm)
        ).tolist()  # the step's one device-to-host transfer, where no scaler adds its own
        state = self.state
        reason = self.guard.verdict(self.last_loss, self.last_norm, state.position)
        state.position += 1
        state.guard = self.guard.state()
        self.last_applied = reason is None
        if self.last_applied:
            set_learning_rate(self.optimizer, self.schedule(state.step))
            self.scaler.step(self.optimizer)
            state.step += 1
        else:
            self.run.report_skip(state, reason)
        if self.scaler.is_enabled():
            self.scaler.update()
            if self.scaler.get_scale() < MIN_SCALE:
                self.scaler.update(MIN_SCALE)
            state.scaler = {k: self.scaler.state_dict()[k] for k in ("scale", "_growth_tracker")}
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients_of_window(self, batch: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradients of all rows; after running out of memory, halve the micro-batch and redo them all."""
        while True:
            try:
                return self._accumulate(batch)
            except torch.OutOfMemoryError as error:
                self.optimizer.zero_grad(set_to_none=True)
                if self.run.device.type == "cuda":
                    torch.cuda.empty_cache()
                if self.state.micro_batch_size == 1 or self.run.world_size > 1:
                    raise MemoryStop(
                        f"out of memory at micro-batch {self.state.micro_batch_size} ({str(error)[:160]}); set a smaller "
                        "train.micro_batch_size, data.sequence_length or model; the last checkpoint is untouched"
                    ) from None
                self.state.micro_batch_size //= 2
                self.run.report_smaller_micro_batch(self.state)

    def _accumulate(self, batch: torch.Tensor) -> torch.Tensor:
        rows, micro = batch.shape[0], self.state.micro_batch_size
        total = torch.zeros((), device=batch.device)
        for start in range(0, rows, micro):
            part = batch[start : start + micro]
            is_last = start + micro >= rows
            wait = (
                contextlib.nullcontext()
                if is_last or self.run.world_size == 1
                else self.trainer.strategy.block_backward_sync()
            )
            with wait:
                with autocast(self.run.precision, self.run.device):
                    loss = self.model.loss(part[:, :-1], part[:, 1:]) * (len(part) / rows)
                self.manual_backward(self.scaler.scale(loss))
            total += loss.detach().float()
        return total


def _quiet_lightning() -> None:
    """Lightning's start-up tips and the warnings about choices that are made on purpose here."""
    for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*max_epochs.*",
        ".*isinstance.treespec.*",
        ".*GPU available but not used.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.filterwarnings("ignore", module="pytorch_lightning.*|lightning_fabric.*|torchmetrics.*")


def make_trainer(run: Run, chores: Chores) -> pl.Trainer:
    """A bare Lightning trainer: saving, validation, logging and progress are the chores' business."""
    _quiet_lightning()
    return pl.Trainer(
        accelerator="gpu" if run.device.type == "cuda" else "cpu",
        devices=run.config.run.devices,
        num_nodes=run.config.run.num_nodes,
        strategy="ddp" if run.world_size > 1 else "auto",
        precision="32-true",  # autocast and scaler are set in the step: see device.py for the choice
        max_epochs=1,
        callbacks=[chores],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=str(run.output_dir),
    )


def run_phase(run: Run, target: int, final_name: str, signals: StopSignals) -> None:
    """Train from the newest checkpoint (or from nothing) to step `target` with a fresh trainer."""
    model, state, moments = run.load(target)
    if run.config.train.compile:
        for layer in model.model.layers:
            layer.compile()  # one graph serves all layers ; parameter names stay
    order = BatchOrder(
        len(run.data.train.tokens),
        run.config.data.sequence_length,
        run.config.train.batch_size,
        run.config.train.seed,
    )
    module = TrainingModule(run, model, state, moments)
    chores = Chores(run, order, target, final_name, signals)
    trainer = make_trainer(run, chores)
    rank, world = trainer.global_rank, run.world_size
    stream = BatchStream(run.data.train.tokens, order, state.position, rank, world)
    try:
        if state.step < target:
            trainer.fit(module, stream)
        else:  # killed between the last update and the final folder: only the chores are left
            module.model.to(run.device)
            module.configure_optimizers()
            chores.finish(module)
    except SystemExit:  # Lightning's answer to a second Ctrl-C
        raise KeyboardInterrupt from None
    except (
        torch.OutOfMemoryError
    ) as error:  # in the update, a validation or a sample: a smaller micro-batch is no help there
        raise MemoryStop(
            f"out of memory outside the micro-batches ({str(error)[:160]}); use a smaller model or data.sequence_length; the last checkpoint is untouched"
        ) from None
    finally:
        chores.close()


def train(config, reporter=None) -> TrainResult:
    """Train as `config` (a `RunConfig`) says, or continue where the output directory stands.

    The first phase ends at `train.max_steps` with `final_model.ckpt`; with `train.continue_steps` a fresh trainer
    resumes from that file and ends with `final_continued_model.ckpt`. Ctrl-C, SIGTERM and SIGHUP finish the step, save and
    return (`result.stopped_by`). Raises `UserError` subclasses; their `exit_code` says which kind.
    """
    started = time.monotonic()
    outlet = Outlet(reporter or TerminalReporter(), lambda: setattr(signals, "received", signal.SIGPIPE))
    signals = StopSignals(outlet.message)
    with (
        disk_failures_named(config.run.output_dir),
        repeatable_sums(config.train.deterministic),
        open_run(config, outlet) as run,
        signals,
    ):
        for target, final_name in run.phases():
            if signals.received is None:
                run_phase(run, target, final_name, signals)
        return run.result(signals.received, time.monotonic() - started)
