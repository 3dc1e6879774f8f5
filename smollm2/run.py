"""One run: its folder, lock, data, tokenizer, logs and checkpoints, and what happens when it is opened again.

Opening a run checks the input text first (nothing is written for a bad one), takes the lock, tidies leftovers of a
kill, finds the newest checkpoint that verifies, and says in plain lines what it found and what it will do.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError

from . import __version__
from .checkpoint import FINAL_NAMES, Manifest, candidates, newest_usable, verify
from .config import RunConfig, problems
from .data import TokenData, check_length, identity_key, prepare_tokens
from .device import check_memory, choose_device, choose_precision, device_name, fingerprint
from .drive_folder import is_below_mount_point
from .drive_restore import check_places
from .errors import CheckpointError, ConfigError, DataError, OutputLost, UserError
from .evaluate import compression_bits_per_byte, score_tokens
from .files import load_tensors, replace_durably, sha256_json
from .folder import OutputFolder
from .logs import CHECKPOINTS, TextLogs
from .model import SmolLM2
from .optim import Schedule, moments_by_name
from .origin import check_origin, origin_name, published_base, whereabouts
from .parameters import parameter_count
from .progress import Reporter
from .result import TrainResult
from .retention import check_space
from .saver import Saver
from .state import TrainState, check_unchanged, fixed_settings, read_state, restore_rng, rng_tensors
from .text import documents, read_split, read_text, source_identity
from .tokenizer import END_OF_TEXT, Tokenizer, choose_tokenizer
from .weights import load_weights, model_files, read_config, read_weights, resolve, stored_tensors
from .workers import announce_open, check_workers, is_first_worker, wait_until_open

BPE_TRAINING_PIECES = 64  # of about 1 MiB each: enough for any vocabulary
MANY_PASSES = 5  # over a small text; measured in docs/log.md


class Run:
    """An opened run. Made by `open_run`; used by the training loop and its chores."""

    def __init__(self, config: RunConfig, reporter: Reporter):
        self.config, self.reporter = config, reporter
        self.output_dir = Path(config.run.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.device = choose_device()
        self.precision = choose_precision(config.train.precision, self.device)
        self.world_size = config.run.devices * config.run.num_nodes
        self.is_first_worker = is_first_worker()
        self.tokens_per_step = config.train.batch_size * config.data.sequence_length
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float, float]] = []
        self.tokens_per_second = 0.0
        self.drive_step: int | None = 0 if config.run.drive_dir else None  # newest step that is on Drive
        self.mirror = None
        self.newest: Manifest | None = None
        self.source: dict | None = None  # identity of the input text
        self._saved_step: int | None = None

    def say(self, text: str) -> None:
        if self.is_first_worker:
            self.reporter.message(text)

    # --- opening

    def prepare(self, folder: OutputFolder) -> None:
        """Settle model, device, checkpoint and data, saying what was found. Only tidies, restores and tokenises."""
        try:
            if not self.is_first_worker:
                wait_until_open(self.output_dir)
            self.config = config = _resolve(self.config, self.say)
            check_memory(config, self.device)
            if self.is_first_worker:
                if config.run.resume == "never":
                    folder.archive(self.say)
                folder.tidy()
            model = config.model
            self.say(
                f"model: {config.preset}, {parameter_count(model):,} parameters, context {model.max_position_embeddings:,}, RoPE theta {model.rope_theta:,.0f}"
            )
            self.say(
                f"device: {device_name(self.device)}; precision {self.precision.name}: {self.precision.reason}"
            )
            self.find_checkpoint()
            if self.newest:
                state = read_state(self.newest)
                check_origin(state.init_from, state.config.get("model"), config, *self.whereabouts)
                check_unchanged(state.config, config, *self.whereabouts)
            self.prepare_data()
            if self.is_first_worker:
                self.check_space()
        except OSError as error:
            raise OutputLost(f"cannot write to {self.output_dir}: {error.strerror}") from None

    def find_checkpoint(self) -> None:
        """Newest verified checkpoint of this machine, or of Drive when that one is newer."""
        place, folders = self.config.run, candidates(self.checkpoint_dir)
        self.whereabouts = whereabouts(place, is_here=bool(folders))
        if place.drive_dir and self.is_first_worker:
            from .drive import newest_on_drive

            self.newest = newest_on_drive(
                place.drive_dir,
                self.checkpoint_dir,
                folders,
                self.say,
                check=read_state,
                take_over=place.take_over,
            )
        else:
            self.newest = newest_usable(folders, self.say, read_state)

    def prepare_data(self) -> None:
        """Tokenizer and token files; both are those of the checkpoint when there is one."""
        config = self.config
        path = config.data.input_file
        source = self.source or source_identity(path)
        if self.newest:
            self.tokenizer = Tokenizer.from_file(self.newest.folder)
            if config.data.tokenizer != "auto":
                asked, _ = choose_tokenizer(config.data.tokenizer, config.model.vocab_size, None, None)
                if asked.sha256 != self.tokenizer.sha256:
                    raise ConfigError(
                        f"--tokenizer {config.data.tokenizer} is not the one this run was trained with; leave it out, or {self.whereabouts[1]}"
                    )
            reason = "the checkpoint's own"
        elif config.run.init_from and config.data.tokenizer == "auto":
            self.tokenizer, reason = (
                Tokenizer.from_file(resolve(config.run.init_from)),
                f"that of {config.run.init_from}",
            )
        else:

            def texts():
                pieces = islice(read_split(path, "train", config.data.held_out_fraction), BPE_TRAINING_PIECES)
                return (
                    text for text, _ in documents(pieces)
                )  # no entries for the letters of separator lines

            self.tokenizer, reason = choose_tokenizer(
                config.data.tokenizer,
                config.model.vocab_size,
                config.data.tokenizer_vocab_size,
                texts,
                self.say,
            )
        self.say(f"tokenizer: {reason}")
        _, lost = self.tokenizer.not_kept(
            text for text, _ in documents(islice(read_text(path), BPE_TRAINING_PIECES))
        )
        if lost:
            self.say(
                f"note: {path}: {lost}; they are not learned, and bits per byte of this run are too good by what they would cost"
            )
        end_id = self.tokenizer.end_id(config.model.eos_token_id)
        if end_id != self.tokenizer.end_of_text_id:
            self.say(
                f"documents end with {self.tokenizer.token(end_id)} (id {end_id}), the model's own: its tokenizer has no {END_OF_TEXT}"
            )
        identity = sha256_json(identity_key(source, self.tokenizer, config.data.held_out_fraction, end_id))
        if (
            self.newest
            and self.newest.facts.get("data_sha256") != identity
            and not config.run.allow_data_change
        ):
            raise DataError(
                f"{path} is not the text this run was trained on (its hash differs from the checkpoint's); "
                f"restore it, pass --set run.allow_data_change=true, or {self.whereabouts[1]}"
            )
        self.data: TokenData = prepare_tokens(
            path, self.tokenizer, self.output_dir / "data", config.data.held_out_fraction, end_id
        )
        check_length(self.data, config.data.sequence_length, path)
        self.say(
            f"data: {path}, {source['bytes']:,} bytes; {len(self.data.train.tokens):,} tokens to train on, "
            f"{len(self.data.val.tokens):,} held out ({self.data.val.text_bytes:,} bytes)"
        )
        self._say_passes()

    def _say_passes(self) -> None:
        """A word where the run would read its text too often to learn from it, or hardly at all."""
        train, count = self.config.train, len(self.data.train.tokens)
        steps = train.max_steps + train.continue_steps
        passes = steps * self.tokens_per_step / count
        if passes > MANY_PASSES:
            self.say(
                f"note: {steps:,} steps read this text {passes:.0f} times; after about {MANY_PASSES} it is learned by heart rather than learned from: "
                f"more text (--input_file, --dataset) or about {max(1, MANY_PASSES * count // self.tokens_per_step):,} steps do better"
            )
        elif passes < 0.5:
            self.say(
                f"note: {steps:,} steps read {passes:.1%} of this text; --max_steps {count // self.tokens_per_step:,} read it once"
            )

    def begin_writing(self) -> None:
        """Logs, saver and the copy on Drive; the other workers may read the folder from now on."""
        config = self.config
        self.logs = TextLogs(self.output_dir / "logs", say=self.say)
        if self.is_first_worker:
            replace_durably(self.output_dir / "config.yaml", config.to_yaml().encode())
            announce_open(self.output_dir)
        began = [origin_name(config.run.init_from)] if config.run.init_from else []
        run_id = (
            self.newest.run_id
            if self.newest
            else sha256_json([fixed_settings(config), self.data.sha256, *began])[:16]
        )
        self.saver = Saver(
            self.checkpoint_dir, run_id, config.train.keep_last, self.on_saved, self.on_save_failed
        )
        if config.run.drive_dir and self.is_first_worker:
            from .drive import DriveMirror

            self.mirror = DriveMirror(config.run.drive_dir, self.say, self.on_copied)
            if self.newest:
                self.mirror.submit(self.newest)

    def close(self) -> None:
        """Wait for the last save and the last copy."""
        try:
            self.saver.wait()
        finally:
            if self.mirror:
                self.mirror.close()
            self.logs.close()

    # --- what to do

    def phases(self) -> Iterator[tuple[int, str]]:
        """(target step, final folder) of each phase that is not done yet; says so when there is none."""
        train = self.config.train
        plan = [(train.max_steps, FINAL_NAMES[0])]
        if train.continue_steps:
            plan.append((train.max_steps + train.continue_steps, FINAL_NAMES[1]))
        did_something = False
        for target, name in plan:
            step = self.newest.step if self.newest else 0
            if step > target or (step == target and self.is_final(name, target)):
                continue
            did_something = True
            yield target, name
        if not did_something:
            step = self.newest.step
            self.say(
                f"finished: the run is at step {step}; ask for more with --max_steps {step + train.max_steps} or --continue_steps N"
            )

    def is_final(self, name: str, step: int) -> bool:
        try:
            return verify(self.checkpoint_dir / name).step == step
        except (CheckpointError, OSError):
            return False

    def check_space(self) -> None:
        """Says, or raises `OutputLost`, when the checkpoints of what is left to train cannot fit; see `retention.check_space`."""
        train = self.config.train
        if self.newest and self.newest.step >= train.max_steps + train.continue_steps:
            return  # finished: nothing more will be written
        each = 12 * parameter_count(self.config.model) + len(
            self.tokenizer.raw
        )  # weights and two moments, in fp32
        count = (
            train.keep_last + 2 + bool(train.continue_steps)
        )  # the best, the one being written, final_model.ckpt
        check_space(self.checkpoint_dir, each, count, self.say)

    def has_checkpoint_at(self, step: int) -> bool:
        return self._saved_step == step

    def load(self, target: int) -> tuple[SmolLM2, TrainState, dict[str, torch.Tensor]]:
        """Model (on the CPU), state and optimizer moments of the newest checkpoint, or fresh ones."""
        train = self.config.train
        total = train.max_steps + train.continue_steps
        rows = train.batch_size // self.world_size
        torch.manual_seed(train.seed)
        random.seed(train.seed)
        if not self.is_first_worker:
            self.find_checkpoint()  # what the first worker has committed since
        if self.newest is None:
            model, data = SmolLM2(self.config.model), self.config.data
            origin = {
                "preset": self.config.preset,
                "text": re.sub(r"[\x00-\x1f|`]", "_", origin_name(data.dataset or data.input_file))[:200],
            }
            if self.config.run.init_from:
                folder = resolve(self.config.run.init_from)
                load_weights(model, read_weights(folder, self.config.model), str(folder))
                self.say(f"weights: from {self.config.run.init_from}")
                origin |= {
                    "init_from": origin_name(self.config.run.init_from),
                    "base_model": published_base(self.config.run.init_from, folder),
                }
            if self.is_first_worker:
                self.logs.rewind(0, [])  # lines of a run that was killed before its first checkpoint
            state = TrainState(
                schedule_total=total, micro_batch_size=min(train.micro_batch_size or rows, rows), **origin
            )
            self.say(f"starting at step 0 of {total}")
            return model, state, {}
        folder = self.newest.folder
        state = read_state(self.newest)
        model = SmolLM2(self.config.model)
        load_weights(model, read_weights(folder, self.config.model), str(folder))
        tensors = load_tensors(folder / "optim.safetensors")
        restore_rng({k: tensors.pop(k) for k in list(tensors) if k.startswith("rng.")}, self.device)
        state.restore_python_rng()
        state.micro_batch_size = min(state.micro_batch_size, train.micro_batch_size or rows, rows)
        if self.is_first_worker:
            self.logs.rewind(state.step, state.pending, state.log_lines)
            self.logs.write(CHECKPOINTS, state.step, event="resumed", name=folder.name)
        self._saved_step = state.step
        self.say(f"continuing from {folder.name}: step {state.step} of {total}")
        self._say_what_differs()
        self._extend_schedule(state, total)
        return model, state, tensors

    def _say_what_differs(self) -> None:
        before, now = (
            self.newest.facts.get("fingerprint", {}),
            fingerprint(self.device, self.precision, self.config.train),
        )
        changes = [
            f"{key}: {before.get(key)} -> {value}"
            for key, value in now.items()
            if before.get(key, value) != value
        ]
        if changes:
            self.say(f"continuing, not bit-exact: {'; '.join(changes)}")
        elif now["deterministic"] == "false":
            self.say(
                "continuing; a GPU repeats its sums bit for bit only with --set train.deterministic=true"
            )

    def _extend_schedule(self, state: TrainState, total: int) -> None:
        if total == state.schedule_total or state.step >= total:
            return
        if state.step >= state.schedule_total:
            state.schedule_start = state.step
            warmup = min(self.config.train.warmup_steps, (total - state.step) // 2)
            self.say(
                f"schedule: the finished run had decayed to 0 at step {state.schedule_total}; a new cycle of {total - state.step} steps "
                f"begins (warm-up {warmup} steps, then as before, 0 at step {total})"
            )
        else:
            train = self.config.train
            decay_start = Schedule(
                train.learning_rate,
                train.warmup_steps,
                train.decay_fraction,
                state.schedule_start,
                state.schedule_total,
            ).decay_start
            rises = " (the rate rises again: the old decay had begun)" if state.step > decay_start else ""
            self.say(f"schedule: now ends at step {total} instead of {state.schedule_total}{rises}")
        state.schedule_total = total

    # --- saving

    def save(self, name: str, state: TrainState, model: SmolLM2, optimizer: torch.optim.Optimizer) -> None:
        """Snapshot everything and hand it to the saver; returns as soon as the copies are made."""
        config = self.config
        try:
            state.log_lines = self.logs.line_counts()
        except OSError as error:  # a checkpoint must not be ahead of its logs
            self.saver.wait()
            self.saver.failed(state.step, error)
            return
        state.config = fixed_settings(config)
        small = model_files(config.model) | self.tokenizer.files(config.model.max_position_embeddings)
        tensors = {
            "model.safetensors": stored_tensors(model),
            "optim.safetensors": moments_by_name(model, optimizer) | rng_tensors(self.device),
        }
        facts = {
            "data_sha256": self.data.sha256,
            "tokenizer_sha256": self.tokenizer.sha256,
            "config_sha256": sha256_json(state.config),
            "fingerprint": fingerprint(self.device, self.precision, config.train),
            "versions": {"smollm2": __version__, "torch": torch.__version__},
        }
        self.saver.submit(
            name,
            state.step,
            small,
            tensors,
            state.to_json(),
            facts,
            int(state.best["step"]) if state.best else None,
        )
        self._saved_step = state.step

    def on_saved(self, manifest: Manifest, seconds: float, blocked: float, removed: list[str]) -> None:
        self.newest = manifest
        facts = {
            "bytes": manifest.bytes,
            "seconds": round(seconds, 3),
            "blocked": round(blocked, 4),
        }  # blocked: training stood still
        self.logs.write(CHECKPOINTS, manifest.step, event="saved", name=manifest.folder.name, **facts)
        for name in removed:
            self.logs.write(CHECKPOINTS, manifest.step, event="removed", name=name)
        if self.mirror:
            self.mirror.submit(manifest)
        self.reporter.saved(manifest.step, self.drive_step)

    def on_save_failed(self, step: int, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        self.say(
            f"saving step {step} failed ({reason}); training goes on, the last good checkpoint is untouched"
        )
        with contextlib.suppress(OSError):  # the log lies on the same disk
            self.logs.write(CHECKPOINTS, step, event="save_failed", reason=reason)

    def on_copied(self, step: int) -> None:
        """A checkpoint was copied to Drive and read back."""
        self.drive_step = step
        self.logs.write(CHECKPOINTS, step, event="copied_to_drive")
        self.reporter.saved(self.newest.step if self.newest else step, step)

    # --- odd events

    def report_skip(self, state: TrainState, reason: str) -> None:
        self.say(
            f"step {state.step}: update skipped ({reason}); the step does not count, batch {state.position - 1} is used up"
        )
        if self.is_first_worker:
            self.logs.write(
                CHECKPOINTS, state.step, event="skipped", position=state.position - 1, reason=reason
            )

    def report_smaller_micro_batch(self, state: TrainState) -> None:
        self.say(
            f"out of memory: micro-batch halved to {state.micro_batch_size}, the window is redone with the same tokens; bit-exactness restarts here"
        )
        self.logs.write(
            CHECKPOINTS, state.step, event="micro_batch_halved", micro_batch_size=state.micro_batch_size
        )

    # --- the end

    def result(self, stopped_by: int | None, seconds: float) -> TrainResult:
        step = self.newest.step if self.newest else 0
        score, references, best = None, {}, None
        if self.is_first_worker and stopped_by is None and self.newest:
            last = self.validations[-1] if self.validations else None
            score = last[2] if last and last[0] == step else self._score_newest()
            found = read_state(self.newest).best
            if (
                found and self.config.train.val_max_tokens is None
            ):  # else it was measured on fewer tokens than the last one
                best = (int(found["step"]), found["bits_per_byte"])
            if self.data.val.text_bytes <= 256 * 2**20:
                references = compression_bits_per_byte(
                    self.config.data.input_file, "val", self.config.data.held_out_fraction
                )
        if self.mirror:
            self.mirror.close()
        folder = self.newest.folder if self.newest else None
        return TrainResult(
            step,
            folder,
            stopped_by,
            seconds,
            self.tokens_per_second,
            score,
            references,
            self.losses,
            self.validations,
            self.drive_step,
            best,
        )

    def _score_newest(self) -> float:
        model = SmolLM2.from_pretrained(self.newest.folder, device=self.device)
        val = self.data.val
        return score_tokens(
            model, val.tokens, val.text_bytes, block_length=self.config.data.sequence_length
        ).bits_per_byte


def _resolve(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """Take the shape of `init_from` (its RoPE theta above all), and the dataset's text as the input file."""
    if config.run.init_from:
        fields = config.model_dump() | {"model": read_config(resolve(config.run.init_from)).model_dump()}
        try:
            config = RunConfig(**fields)
        except ValidationError as error:
            raise ConfigError(f"run.init_from={config.run.init_from}: {problems(error, RunConfig)}") from None
    if config.data.dataset:
        from .dataset import dataset_to_text

        path = dataset_to_text(
            config.data.dataset, Path(config.run.output_dir) / "data", config.data.dataset_tokens, say=say
        )
        config = config.model_copy(update={"data": config.data.model_copy(update={"input_file": str(path)})})
    return config


@contextlib.contextmanager
def open_run(config: RunConfig, reporter: Reporter) -> Iterator[Run]:
    """Everything that `train` needs, opened in safe order; closes it (and waits for the last save) in the end."""
    run = Run(config, reporter)
    if not config.data.dataset:
        run.source = source_identity(
            config.data.input_file
        )  # a bad text is reported before anything is written
    if config.run.drive_dir or is_below_mount_point(run.output_dir):
        check_places(config.run.output_dir, config.run.drive_dir, config.run.resume)
    check_workers(config.run, torch.cuda.device_count() if run.device.type == "cuda" else 0)
    is_open = False
    with OutputFolder(run.output_dir, run.is_first_worker) as folder:
        try:
            run.prepare(folder)
            run.begin_writing()
            is_open = True
            try:
                yield run
            finally:
                run.close()
        except UserError as error:
            if not is_open or (error.exit_code == UserError.exit_code and run.newest is None):
                folder.unmake()  # nothing is left behind by a bad start
            raise
