"""Opening a run: everything that training needs, found or made in safe order, and told in plain lines.

What is wrong with the text, the settings or the folder is said before anything is written. Then the folder is
locked and tidied of what a kill left, the newest checkpoint that verifies is found (here or on Drive), and
tokenizer, tokens and logs are those it was made with.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from pydantic import ValidationError

from . import __version__
from .checkpoint import FINAL_NAMES, MANIFEST, Manifest, candidates, newest_usable, verify
from .config import RunConfig, TrainConfig, problems
from .data import TokenData, check_length, identity_key, note_on_passes, prepare_tokens
from .dataset import dataset_to_text
from .device import (
    Precision,
    check_memory,
    choose_device,
    choose_precision,
    device_name,
    fingerprint,
    why_not_compiled,
)
from .drive import DriveMirror, check_places, newest_on_drive
from .drive_folder import is_below_mount_point
from .errors import CheckpointError, ConfigError, DataError, UserError, named
from .files import dump_json, load_tensors, replace_durably, sha256_json
from .folder import absent_folders, clear, locked_folder, set_aside, tidy
from .logs import CHECKPOINTS, Logs
from .model import SmolLM2
from .optim import Schedule, moments_by_name
from .origin import origin_name, published_base, whereabouts
from .parameters import parameter_count, training_bytes
from .progress import Reporter
from .saver import Saver, check_space
from .state import TrainState, check_unchanged, fixed_settings, read_state, restore_rng, rng_tensors
from .text import END_OF_TEXT, documents, read_split, read_text, source_identity
from .tokenizer import Tokenizer, choose_tokenizer
from .weights import (
    MODEL_FILES,
    load_weights,
    model_files,
    read_config,
    read_weights,
    resolve,
    stored_tensors,
)
from .workers import announce_open, check_workers, is_first_worker, wait_until_open

BPE_TRAINING_PIECES = 64  # of about 1 MiB each: enough for any vocabulary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What is open while a run trains. Workers other than the first have no logs and no mirror: they write
    nothing."""

    config: RunConfig
    device: torch.device
    precision: Precision
    tokenizer: Tokenizer
    data: TokenData
    saver: Saver
    reporter: Reporter
    say: Say
    logs: Logs | None
    mirror: DriveMirror | None
    copied: deque[int]  # steps that the mirror has copied to Drive and read back

    @property
    def is_first_worker(self) -> bool:
        return self.logs is not None

    @property
    def world_size(self) -> int:
        return self.config.run.devices * self.config.run.num_nodes

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.sequence_length

    @property
    def total_steps(self) -> int:
        return self.config.train.max_steps + self.config.train.continue_steps

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        return self.saver.newest.step if self.saver.newest else 0

    def phases_to_do(self) -> list[tuple[int, str]]:
        """(target step, final folder) of each phase that is not done yet; says so when there is none."""
        max_steps = self.config.train.max_steps
        phases = dict(zip((max_steps, self.total_steps), FINAL_NAMES, strict=True))
        if self.total_steps == max_steps:
            phases = {max_steps: FINAL_NAMES[0]}
        to_do = [(at, name) for at, name in phases.items() if self.step < at or not self._is_final(at, name)]
        if not to_do:
            more = f"--max_steps {self.step + max_steps} or --continue_steps N"
            self.say(f"finished: the run is at step {self.step}; ask for more with {more}")
        return to_do

    def _is_final(self, target: int, name: str) -> bool:
        try:
            return self.step > target or verify(self.saver.folder / name).step == target
        except (CheckpointError, OSError):
            return False

    def save(self, name: str, state: TrainState, model: SmolLM2, optimizer: torch.optim.Optimizer) -> None:
        """Hand everything to the saver as the checkpoint `name`; returns as soon as the copies are made."""
        config = self.config
        if not self.is_first_worker:
            return
        try:
            state.log_lines = self.logs.line_counts()
        except OSError as error:  # a checkpoint must not be ahead of its logs
            self.saver.refuse(state.step, error)
            return
        state.config = fixed_settings(config)
        model_config, length = config.model, config.model.max_position_embeddings
        ids = model_config.bos_token_id, model_config.eos_token_id
        files = model_files(model_config) | self.tokenizer.files(length, *ids)
        files["state.json"] = dump_json(state.to_json())
        moments = moments_by_name(model, optimizer) | rng_tensors(self.device)
        tensors = {"model.safetensors": stored_tensors(model), "optim.safetensors": moments}
        facts = {
            "data_sha256": self.data.sha256,
            "tokenizer_sha256": self.tokenizer.sha256,
            "config_sha256": sha256_json(state.config),
            "fingerprint": fingerprint(self.device, self.precision, config.train),
            "versions": {"smollm2": __version__, "torch": torch.__version__},
        }
        self.saver.save(name, state.step, files, tensors, facts, state.best.get("step"))

    def report_saves(self) -> None:
        """Tell of saves, and of copies to Drive, that have ended since this was last called."""
        events = []
        for save in self.saver.finished():
            if save.manifest:
                facts = {
                    "bytes": save.manifest.bytes,
                    "seconds": round(save.seconds, 3),
                    "blocked": round(save.blocked, 4),
                }
                events.append((save.step, {"event": "saved", "name": save.manifest.folder.name} | facts))
                events += [(save.step, {"event": "removed", "name": name}) for name in save.removed]
                if self.mirror:
                    self.mirror.submit(save.manifest)
            if save.problem:
                reason = getattr(save.problem, "strerror", None) or str(save.problem)
                what = (
                    "older checkpoints could not be removed"
                    if save.manifest
                    else f"saving step {save.step} failed"
                )
                self.say(f"{what} ({reason}); training goes on, {self.saver.last_good()}")
                events.append((save.step, {"event": "save_failed", "reason": reason}))
        while self.copied:
            events.append((self.copied.popleft(), {"event": "copied_to_drive"}))
        for step, event in events:
            self.logs.write(CHECKPOINTS, step, **event)
        if events:
            self.reporter.saved(self.step, self.drive_step)

    @property
    def drive_step(self) -> int | None:
        """Newest step that is on Drive; 0 for nothing yet, None without a Drive folder."""
        return (self.mirror.copied.step if self.mirror.copied else 0) if self.mirror else None


@contextlib.contextmanager
def open_run(config: RunConfig, reporter: Reporter) -> Iterator[Run]:
    """Open the run that `config` describes; waits for its last save and its last copy in the end. Raises
    `UserError`."""
    place, output_dir, device = config.run, Path(config.run.output_dir), choose_device()
    if not config.data.dataset:
        source_identity(config.data.input_file)
    if place.drive_dir or is_below_mount_point(output_dir):
        check_places(output_dir, place.drive_dir, place.resume)
    check_workers(place, torch.cuda.device_count() if device.type == "cuda" else 0)
    is_first = is_first_worker(place)
    run, made = None, absent_folders(output_dir)
    with locked_folder(output_dir, locks=is_first):
        try:
            run = _open(config, device, reporter, is_first)
            try:
                yield run
            finally:
                close(run)
        except UserError as error:
            is_bad_start = run is None or (
                error.exit_code == UserError.exit_code and run.saver.newest is None
            )
            if is_first and is_bad_start:  # nothing is left behind by a mistake
                clear(output_dir, made)
            raise


def _open(config: RunConfig, device: torch.device, reporter: Reporter, is_first: bool) -> Run:
    say = reporter.message if is_first else lambda text: None
    output_dir, checkpoint_dir = Path(config.run.output_dir), Path(config.run.output_dir) / "checkpoints"
    if not is_first:
        wait_until_open(output_dir)
    config = _with_text(_with_base_model(config), say)
    check_memory(config, device)
    precision = choose_precision(config.train.precision, device)
    if config.train.compile and (reason := why_not_compiled(device)):
        say(f"train.compile: not possible here, so training runs uncompiled ({reason})")
        config = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    try:
        if is_first:
            if config.run.resume == "never":
                set_aside(output_dir, say)
            tidy(output_dir)
        say(
            f"model: {config.preset}, {parameter_count(config.model):,} parameters, context "
            f"{config.model.max_position_embeddings:,}, RoPE theta {config.model.rope_theta:,.0f}"
        )
        say(f"device: {device_name(device)}; precision {precision.name}: {precision.reason}")
        place, way_out = whereabouts(config.run, is_here=bool(candidates(checkpoint_dir)))
        newest = _find_newest(config, say, is_first)
        tokenizer = _choose_tokenizer(config, newest, way_out, say)
        config = _with_token_ids(config, tokenizer)
        began_with = [origin_name(config.run.init_from)] if config.run.init_from else []
        state = read_state(newest) if newest else TrainState()
        if newest:
            check_unchanged(state, config, *(began_with or [None]), place, way_out)
        data = _prepare_data(config, tokenizer, newest, way_out, say)
        steps = config.train.max_steps + config.train.continue_steps
        rate = config.train.batch_size * config.data.sequence_length / len(data.train.tokens)
        if note := note_on_passes(steps, rate):
            say(note)
        run_id = sha256_json([fixed_settings(config), data.sha256, *began_with])[:16]
        saver = Saver(checkpoint_dir, newest.run_id if newest else run_id, config.train.keep_last, newest)
        copied: deque[int] = deque()
        logs = mirror = None
        if is_first:
            _check_space(config, saver, len(tokenizer.raw), say)
            replace_durably(output_dir / "config.yaml", config.to_yaml().encode())
            logs = Logs(output_dir / "logs", state.log_lines, say)
            if config.run.drive_dir:
                mirror = DriveMirror(config.run.drive_dir, say, copied.append)
                if newest:
                    mirror.submit(newest)
            announce_open(output_dir)
    except OSError as error:
        raise named(error, output_dir) from None
    return Run(config, device, precision, tokenizer, data, saver, reporter, say, logs, mirror, copied)


def close(run: Run) -> None:
    """Wait for the last save and the last copy."""
    try:
        run.saver.wait()
    finally:
        if run.is_first_worker:
            run.report_saves()
            if run.mirror:
                run.mirror.close()
                run.report_saves()
            run.logs.close()


# --- the parts, in the order in which they are asked for ----------------------------------------------------


def _with_base_model(config: RunConfig) -> RunConfig:
    """With `run.init_from`: its shape, its RoPE theta above all. A checkpoint of ours is verified first."""
    source = config.run.init_from
    if source is None:
        return config
    folder = resolve(source)
    try:
        if (folder / MANIFEST).exists():
            verify(folder, only=MODEL_FILES)
        return RunConfig(**config.model_dump() | {"model": read_config(folder).model_dump()})
    except CheckpointError as error:
        raise CheckpointError(f"run.init_from={source}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"run.init_from={source}: {error.strerror or error}") from None
    except ValidationError as error:
        raise ConfigError(f"run.init_from={source}: {problems(error, RunConfig)}") from None


def _with_text(config: RunConfig, say: Say) -> RunConfig:
    """With `data.dataset`: the text that was read from it as the input file."""
    data = config.data
    if data.dataset is None:
        return config
    folder = Path(config.run.output_dir) / "data"
    path = dataset_to_text(data.dataset, folder, data.dataset_tokens, data.dataset_column, say)
    return config.model_copy(update={"data": data.model_copy(update={"input_file": str(path)})})


def _find_newest(config: RunConfig, say: Say, is_first: bool) -> Manifest | None:
    """Newest verified checkpoint of this machine, or of Drive when that one is newer."""
    place = config.run
    folder = Path(place.output_dir) / "checkpoints"
    if place.drive_dir and is_first:
        local = candidates(folder)
        return newest_on_drive(
            place.drive_dir, folder, local, say, check=read_state, take_over=place.take_over
        )
    return newest_usable(candidates(folder), say, read_state)


def _choose_tokenizer(config: RunConfig, newest: Manifest | None, way_out: str, say: Say) -> Tokenizer:
    """The checkpoint's own, that of `init_from`, or what `data.tokenizer` says."""
    data, vocab_size = config.data, config.model.vocab_size

    def training_texts():
        pieces = islice(read_split(data.input_file, "train", data.held_out_fraction), BPE_TRAINING_PIECES)
        return (text for text, _ in documents(pieces))  # no entries for the letters of separator lines

    if newest and data.tokenizer == "auto":
        tokenizer, reason = Tokenizer.from_file(newest.folder), "the checkpoint's own"
    elif config.run.init_from and data.tokenizer == "auto":
        tokenizer = Tokenizer.from_file(resolve(config.run.init_from))
        reason = f"that of {config.run.init_from}"
        if tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"run.init_from={config.run.init_from}: its tokenizer has {tokenizer.vocab_size:,} entries, "
                f"its model {vocab_size:,}: they do not belong together"
            )
    else:
        size = data.tokenizer_vocab_size
        tokenizer, reason = choose_tokenizer(data.tokenizer, vocab_size, size, training_texts, say)
    if newest and newest.facts.get("tokenizer_sha256") != tokenizer.sha256:
        asked = f"--tokenizer {data.tokenizer} is not the one this run was trained with"
        raise ConfigError(f"{asked}; leave it out, or {way_out}")
    say(f"tokenizer: {reason}")
    pieces = islice(read_text(data.input_file), BPE_TRAINING_PIECES)
    _, lost = tokenizer.not_kept(text for text, _ in documents(pieces))
    if lost:
        cost = "they are not learned, and bits per byte of this run are too good by what they would cost"
        say(f"note: {data.input_file}: {lost}; {cost}")
    return tokenizer


def _with_token_ids(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """One source for each id: what documents begin and end with is what config.json, generation and exports
    say.

    Ids that were given (by `init_from`, a file or `--set`) count, where they are entries that can end a
    document.
    """
    model = config.model
    own = {
        name: getattr(model, name)
        for name in ("bos_token_id", "eos_token_id")
        if name in model.model_fields_set
    }
    end = tokenizer.end_id(own.get("eos_token_id"))
    begin = own.get("bos_token_id", tokenizer.begin_ids[-1] if tokenizer.begin_ids else end)
    ids = {"bos_token_id": begin, "eos_token_id": end}
    return config.model_copy(update={"model": model.model_copy(update=ids)})


def _prepare_data(
    config: RunConfig, tokenizer: Tokenizer, newest: Manifest | None, way_out: str, say: Say
) -> TokenData:
    """Token files of the text; raises `DataError` when the checkpoint was trained on another one."""
    path, fraction, end_id = config.data.input_file, config.data.held_out_fraction, config.model.eos_token_id
    source = source_identity(path)
    if end_id is not None and end_id != tokenizer.end_of_text_id:
        say(
            f"documents end with {tokenizer.token(end_id)} (id {end_id}), the model's own end, not "
            f"{END_OF_TEXT}"
        )
    identity = sha256_json(identity_key(source, tokenizer, fraction, end_id))
    if newest and newest.facts.get("data_sha256") != identity and not config.run.allow_data_change:
        raise DataError(
            f"{path} is not the text this run was trained on (its hash differs from the checkpoint's); "
            f"restore it, pass --set run.allow_data_change=true, or {way_out}"
        )
    data = prepare_tokens(path, tokenizer, Path(config.run.output_dir) / "data", fraction, end_id)
    check_length(data, config.data.sequence_length, path)
    say(
        f"data: {path}, {source['bytes']:,} bytes; {len(data.train.tokens):,} tokens to train on, "
        f"{len(data.val.tokens):,} held out ({data.val.text_bytes:,} bytes)"
    )
    return data


def _check_space(config: RunConfig, saver: Saver, tokenizer_bytes: int, say: Say) -> None:
    """Says, or raises `OutputLost`, when the checkpoints of what is left to train cannot fit on the disk."""
    train = config.train
    if saver.newest and saver.newest.step >= train.max_steps + train.continue_steps:
        return  # finished: nothing more will be written
    each = training_bytes(config.model, train.optimizer) + tokenizer_bytes
    count = (
        train.keep_last + 2 + bool(train.continue_steps)
    )  # the best, the one being written, final_model.ckpt
    check_space(saver.folder, each, count, say)


# --- where training begins ----------------------------------------------------------------------------------


def load(run: Run) -> tuple[SmolLM2, TrainState, dict[str, torch.Tensor]]:
    """Model (on the CPU), state and optimizer moments of the newest checkpoint, or fresh ones."""
    config, train, saver = run.config, run.config.train, run.saver
    rows = train.batch_size // run.world_size
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    if not run.is_first_worker:  # what the first one has committed since
        saver.newest = newest_usable(candidates(saver.folder), run.say, read_state)
    model = SmolLM2(config.model)
    if saver.newest is None:
        state = TrainState(
            schedule_total=run.total_steps,
            micro_batch_size=min(train.micro_batch_size or rows, rows),
            preset=config.preset,
            text=re.sub(r"[\x00-\x1f|`]", "_", origin_name(config.data.dataset or config.data.input_file))[
                :200
            ],
        )
        if config.run.init_from:
            folder = resolve(config.run.init_from)
            load_weights(model, read_weights(folder, config.model), str(folder))
            run.say(f"weights: from {config.run.init_from}")
            state.init_from = origin_name(config.run.init_from)
            state.base_model = published_base(config.run.init_from, folder)
        run.say(f"starting at step 0 of {run.total_steps}")
        return model, state, {}
    folder, state = saver.newest.folder, read_state(saver.newest)
    load_weights(model, read_weights(folder, config.model), str(folder))
    tensors = load_tensors(folder / "optim.safetensors")
    restore_rng({name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}, run.device)
    state.restore_python_rng()
    state.micro_batch_size = min(state.micro_batch_size, train.micro_batch_size or rows, rows)
    if run.logs:
        run.logs.write(CHECKPOINTS, state.step, event="resumed", name=folder.name)
    run.say(f"continuing from {folder.name}: step {state.step} of {run.total_steps}")
    _say_what_differs(run)
    _extend_schedule(run, state)
    return model, state, tensors


def schedule_of(train: TrainConfig, state: TrainState) -> Schedule:
    """The learning rate between the steps that the state names."""
    start, total = state.schedule_start, state.schedule_total
    return Schedule(train.learning_rate, train.warmup_steps, train.decay_fraction, start, total)


def _say_what_differs(run: Run) -> None:
    """A line where the bits of an undisturbed run cannot be expected."""
    before, now = (
        run.saver.newest.facts.get("fingerprint", {}),
        fingerprint(run.device, run.precision, run.config.train),
    )
    changes = [
        f"{key}: {before[key]} -> {value}" for key, value in now.items() if before.get(key, value) != value
    ]
    if changes:
        run.say(f"continuing, not bit-exact: {'; '.join(changes)}")
    elif now["deterministic"] == "false":
        run.say("continuing; a GPU repeats its sums bit for bit only with --set train.deterministic=true")


def _extend_schedule(run: Run, state: TrainState) -> None:
    """More or fewer steps than the checkpoint was heading for: say what becomes of the learning rate."""
    total, train = run.total_steps, run.config.train
    if total == state.schedule_total or state.step >= total:
        return
    if state.step >= state.schedule_total:
        state.schedule_start = state.step
        warmup = min(train.warmup_steps, (total - state.step) // 2)
        run.say(
            f"schedule: the finished run had decayed to 0 at step {state.schedule_total}; a new cycle of "
            f"{total - state.step} steps begins (warm-up {warmup} steps, then as before, 0 at step {total})"
        )
    else:
        old = schedule_of(train, state)
        rises = " (the rate rises again: the old decay had begun)" if state.step > old.decay_start else ""
        run.say(f"schedule: now ends at step {total} instead of {state.schedule_total}{rises}")
    state.schedule_total = total
