"""Opening a run: everything that training needs, found or made in safe order, and told in plain lines.

What is wrong with the text, the settings or the folder is said before anything is written. Then the folder is
locked and tidied of what a kill left, the newest checkpoint that verifies is found (here or on Drive), and
tokenizer, tokens and logs are those it was made with.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from pydantic import ValidationError

from . import __version__, weights
from . import device as hardware
from .chat_data import ChatFile
from .checkpoint import FINAL_NAMES, MANIFEST, Manifest, candidates, newest_usable, verify
from .config import RunConfig, TrainConfig, problems
from .conversation import render_chat
from .data import InputFile, TokenData, check_length, note_on_passes
from .dataset import Dataset, open_text
from .distributed import announce_open, check_workers, is_first_worker, use_own_gpu, wait_until_open
from .drive import DriveMirror, check_places, newest_on_drive
from .errors import CheckpointError, ConfigError, DataError, UserError
from .files import dump_json, load_tensors, origin_name, replace_durably, sha256_json
from .folder import absent_folders, clear, locked_folder, set_aside, tidy
from .logs import CHECKPOINTS, Logs
from .model import SmolLM2
from .optim import Schedule, moments_by_name
from .origin import published_base, text_name, whereabouts
from .parameters import parameter_count, training_bytes
from .plan import (
    check_memory,
    compiling_pays,
    measure,
    rows_in_free_memory,
    save_seconds,
    steps_within,
    why_not_compiled,
)
from .progress import Reporter
from .sampling import prompt_ids
from .saver import Saver, check_space
from .settings import read_yaml
from .state import TrainState, check_unchanged, fixed_settings, read_state, restore_rng, rng_tensors
from .text import END_OF_TEXT, source_identity
from .tokenizer import Tokenizer, choose_tokenizer

BPE_TRAINING_CHARACTERS = 2**26  # enough for any vocabulary

Say = Callable[[str], None]
Text = InputFile | Dataset | ChatFile


@dataclass(frozen=True)
class Run:
    """What is open while a run trains. Workers other than the first have no logs, no mirror and a reporter
    that says nothing: they write nothing."""

    config: RunConfig
    device: torch.device
    precision: hardware.Precision
    tokenizer: Tokenizer
    data: TokenData
    saver: Saver
    reporter: Reporter
    logs: Logs | None
    mirror: DriveMirror | None
    ends_at: float  # `time.monotonic()` by which the last step and its save must have begun

    @property
    def is_first_worker(self) -> bool:
        return self.logs is not None

    @property
    def say(self) -> Say:
        return self.reporter.message

    @property
    def chat_template(self) -> str | None:
        """Of a run that learns answers."""
        return self.data.sidecar.get("chat_template")

    def asked(self, prompt: str) -> str:
        """What the model reads when it is asked to go on from `prompt`."""
        if not self.chat_template:
            return prompt
        special = self.data.sidecar["special_tokens"]
        return render_chat(self.chat_template, [{"role": "user", "content": prompt}], special)

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

    @property
    def drive_step(self) -> int | None:
        """Newest step that is on Drive; 0 for nothing yet, None without a Drive folder."""
        return (self.mirror.copied.step if self.mirror.copied else 0) if self.mirror else None

    def phases_to_do(self) -> list[tuple[int, str]]:
        """(target step, final folder) of each phase that is not done yet; says so when there is none."""
        max_steps, newest = self.config.train.max_steps, self.saver.newest
        phases = {self.total_steps: FINAL_NAMES[1]} | {max_steps: FINAL_NAMES[0]}  # one and the same, or two
        to_do = [
            (at, name)
            for at, name in sorted(phases.items())
            if self.step < at or (self.step == at and newest.folder.name != name)
        ]
        if not to_do:
            more = f"--max_steps {self.step + max_steps} or --continue_steps {self.step}"
            self.say(f"finished: the run is at step {self.step}; ask for more with {more}")
        return to_do

    def save(self, name: str, state: TrainState, model: SmolLM2, optimizer: torch.optim.Optimizer) -> None:
        """Hand everything to the saver as the checkpoint `name`; returns as soon as the copies are made."""
        if not self.is_first_worker:
            return
        config, shape, special = self.config, self.config.model, self.data.sidecar.get("special_tokens")
        state.log_lines, state.config = dict(self.logs.counts), fixed_settings(config)
        tokens = shape.bos_token_id, shape.eos_token_id, shape.pad_token_id, special
        files = weights.model_files(shape) | self.tokenizer.files(shape.max_position_embeddings, *tokens)
        if self.chat_template:
            files["chat_template.jinja"] = self.chat_template.encode()
        files["state.json"] = dump_json(state.to_json())
        moments = moments_by_name(model, optimizer) | rng_tensors(self.device)
        tensors = {"model.safetensors": weights.stored_tensors(model), "optim.safetensors": moments}
        facts = {
            "data_sha256": self.data.sha256,
            "dataset": self.data.sidecar.get("dataset"),
            "tokenizer_sha256": self.tokenizer.sha256,
            "config_sha256": sha256_json(state.config),
            "fingerprint": hardware.fingerprint(self.device, self.precision, config),
            "versions": {"smollm2": __version__, "torch": torch.__version__},
        }
        self.saver.save(name, state.step, files, tensors, facts, state.best.get("step"))

    def report_saves(self) -> None:
        """Tell of saves, and of copies to Drive, that have ended since this was last called."""
        failed = {"save_failed": "saving", "tidying_failed": "removing older checkpoints after"}
        copied = self.mirror.events if self.mirror else ()
        has_news = bool(self.saver.events or copied)
        for events in (self.saver.events, copied):
            while events:
                step, words = events.popleft()
                if what := failed.get(words["event"]):
                    reason = f"{what} step {step} failed ({words['reason']})"
                    self.say(f"{reason}; training goes on, {self.saver.last_good()}")
                self.logs.write(CHECKPOINTS, step, **words)
        if has_news:
            if self.mirror and self.saver.newest:
                self.mirror.submit(self.saver.newest)
            self.reporter.saved(self.step, self.drive_step)


@contextlib.contextmanager
def open_run(config: RunConfig, reporter: Reporter, began: float) -> Iterator[Run]:
    """Open the run that `config` describes; waits for its last save and its last copy in the end. `began`:
    `time.monotonic()` when its minutes began. Raises `UserError`."""
    place, output_dir, device = config.run, Path(config.run.output_dir), hardware.choose_device()
    if not (data := config.data).dataset:
        source_identity(data.chat_file or data.input_file, "chat_file" if data.chat_file else "input_file")
    check_places(place)
    check_workers(place, torch.cuda.device_count() if device.type == "cuda" else 0)
    use_own_gpu(place, device)
    is_first, run, made = is_first_worker(place), None, absent_folders(output_dir)
    with locked_folder(output_dir, locks=is_first):
        try:
            run = _open(config, device, reporter if is_first else Reporter(), is_first, began)
            try:
                yield run
            finally:
                close(run)
        except (UserError, OSError) as error:
            code = getattr(error, "exit_code", None)
            is_bad_start = run is None or (code == UserError.exit_code and run.saver.newest is None)
            if is_first and is_bad_start:  # nothing is left behind by a mistake
                clear(output_dir, made)
            raise


def _open(config: RunConfig, device: torch.device, reporter: Reporter, is_first: bool, began: float) -> Run:
    say, place, output_dir = reporter.message, config.run, Path(config.run.output_dir)
    checkpoint_dir = output_dir / "checkpoints"
    if not is_first:
        wait_until_open(output_dir)
    config = _with_base_model(config)
    train, count = config.train, parameter_count(config.model)
    precision = hardware.choose_precision(train.precision, device)
    check_memory(config, device, precision.autocast_dtype is not None)
    is_anew = place.resume == "never"
    if is_first:
        tidy(output_dir)
    shape = f"context {config.model.max_position_embeddings:,}, RoPE theta {config.model.rope_theta:,.0f}"
    say(f"model: {config.preset}, {count:,} parameters, {shape}")
    is_by_hand = device.type == "cpu" and train.compile is not True
    kernels = "; blocks with a backward pass by hand (cpu_block.py)" * is_by_hand
    say(f"device: {hardware.device_name(device)}; precision {precision.name}: {precision.reason}{kernels}")
    where, way_out = whereabouts(place)
    if place.drive_dir and is_first and not is_anew:
        newest = newest_on_drive(place.drive_dir, checkpoint_dir, say, read_state)
    else:
        newest = newest_usable([] if is_anew else candidates(checkpoint_dir), say, read_state)
    if config.data.chat_file:
        base = place.init_from and weights.resolve(place.init_from)
        fraction = config.data.held_out_fraction
        text = ChatFile(config.data.chat_file, fraction, newest.folder if newest else base)
    else:
        text = open_text(config, newest and newest.facts.get("dataset"))
    tokenizer = _choose_tokenizer(config, text, newest, way_out, say)
    config = _with_token_ids(config, tokenizer, text)
    began_with = origin_name(place.init_from) if place.init_from else None
    state = read_state(newest) if newest else TrainState()
    if newest:
        check_unchanged(state, config, began_with, where, way_out)
    data = _prepare_data(config, text, tokenizer, newest, way_out, say)
    if not (newest or train.micro_batch_size) and device.type == "cuda":
        rows = rows_in_free_memory(config, device, precision)
        say(f"micro-batch: {rows} rows, what free memory holds by arithmetic")
        config = config.model_copy(update={"train": train.model_copy(update={"micro_batch_size": rows})})
    config = _with_compile(config, newest, state, device, precision, say)
    if train.minutes:
        config = _with_steps(config, newest, state, device, precision, data, is_first, began, say)
    train, steps = config.train, config.train.max_steps + config.train.continue_steps
    if note := note_on_passes(steps, train.batch_size * config.data.sequence_length / len(data.train.tokens)):
        say(note)
    run_id = newest.run_id if newest else sha256_json([fixed_settings(config), data.sha256, began_with])[:16]
    saver = Saver(checkpoint_dir, run_id, train.keep_last, newest)
    ends_at = began + 60 * (train.stop_after or math.inf) - 2 * save_seconds(config)
    run = Run(config, device, precision, tokenizer, data, saver, reporter, None, None, ends_at)
    for prompt in train.prompts:  # one that is too long is told now, not in the middle of training
        prompt_ids(SimpleNamespace(config=config.model), tokenizer, run.asked(prompt))
    if is_first:
        if is_anew:  # now that nothing is wrong with what was asked for
            set_aside(output_dir, say)
        if state.step < steps:  # else nothing more will be written
            each = training_bytes(config.model, train.optimizer) + len(tokenizer.raw)
            # besides the last ones: the best, the one being written, and the final ones
            check_space(checkpoint_dir, each, train.keep_last + 2 + bool(train.continue_steps), say)
        replace_durably(output_dir / "config.yaml", config.to_yaml().encode())
        logs = Logs(output_dir / "logs", state.log_lines)
        mirror = DriveMirror(place.drive_dir, say) if place.drive_dir else None
        if mirror and newest:
            mirror.submit(newest)
        run = replace(run, logs=logs, mirror=mirror)
        announce_open(output_dir)
    return run


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
    folder = weights.resolve(source)
    try:
        if (folder / MANIFEST).exists():
            verify(folder, only=weights.MODEL_FILES)
        return RunConfig(**config.model_dump() | {"model": weights.read_config(folder).model_dump()})
    except (CheckpointError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"run.init_from={source}: {reason}") from None
    except ValidationError as error:
        raise ConfigError(f"run.init_from={source}: {problems(error, RunConfig)}") from None


def _choose_tokenizer(
    config: RunConfig, text: Text, newest: Manifest | None, way_out: str, say: Say
) -> Tokenizer:
    """The checkpoint's own, that of `init_from`, or what `data.tokenizer` says."""
    data, base = config.data, config.run.init_from
    training_texts = partial(text.training_texts, BPE_TRAINING_CHARACTERS)
    own = newest.folder if newest else base and weights.resolve(base)
    is_own = bool(own) and data.tokenizer == "auto"
    spec, size = str(own) if is_own else data.tokenizer, data.tokenizer_vocab_size
    tokenizer, reason = choose_tokenizer(spec, config.model.vocab_size, size, training_texts, say)
    if newest and newest.facts.get("tokenizer_sha256") != tokenizer.sha256:
        asked = f"--tokenizer {data.tokenizer} is not the one this run was trained with"
        raise ConfigError(f"{asked}; leave it out, or {way_out}")
    if is_own:
        reason = "the checkpoint's own" if newest else f"that of {base}"
    say(f"tokenizer: {reason}")
    _, lost = tokenizer.not_kept(training_texts())
    if lost:
        cost = "they are not learned, and bits per byte of this run are too good by what they would cost"
        say(f"note: {text.name}: {lost}; {cost}")
    return tokenizer


def _with_token_ids(config: RunConfig, tokenizer: Tokenizer, text: Text) -> RunConfig:
    """One source for each id: what documents begin and end with is what config.json, generation and exports
    say.

    Ids that were given count, where they are entries that can begin or end a document. Those of `init_from`
    may be others; what a file or `--set` names must be such, or `ConfigError` is raised.
    """
    model = config.model
    given = model.model_dump(include={"bos_token_id", "eos_token_id"} & model.model_fields_set)
    is_usable = {"bos_token_id": tokenizer.token, "eos_token_id": lambda i: tokenizer.end_id(i) == i}
    for key, i in [*given.items()]:
        if i is None or is_usable[key](i):
            continue
        if config.run.init_from is None:
            found = f"model.{key}={i} is {tokenizer.token(i)!r} in this tokenizer"
            raise ConfigError(f"{found}; expected the id of a special token")
        del given[key]
    end = tokenizer.end_id(given.get("eos_token_id"))
    if isinstance(text, ChatFile):
        _, end = text.template_and_end(tokenizer, given.get("eos_token_id"))
    begin = given.get("bos_token_id", tokenizer.begin_ids[-1] if tokenizer.begin_ids else end)
    ids = {"bos_token_id": begin, "eos_token_id": end}
    return config.model_copy(update={"model": model.model_copy(update=ids)})


def _prepare_data(
    config: RunConfig, text: Text, tokenizer: Tokenizer, newest: Manifest | None, way_out: str, say: Say
) -> TokenData:
    """Token files of the text; raises `DataError` when the checkpoint was trained on another one."""
    name, end_id = text.name, config.model.eos_token_id
    if end_id is not None and end_id != tokenizer.end_of_text_id:
        end = f"{tokenizer.token(end_id)} (id {end_id})"
        say(f"documents end with {end}, the model's own end, not {END_OF_TEXT}")

    def check(identity: str | None) -> None:
        if newest and newest.facts.get("data_sha256") != identity and not config.run.allow_data_change:
            wrong = f"not the text this run was trained on ({'hash' if identity else 'name'} differs)"
            raise DataError(f"{name} is {wrong}: restore it, --set run.allow_data_change=true, or {way_out}")

    data = text.prepare(tokenizer, end_id, check, say)
    check_length(data, config.data.sequence_length, name)
    unit = "bytes of answers" if "chat_template" in data.sidecar else "bytes"
    (train, n), (val, m) = ((len(part.tokens), part.text_bytes) for part in (data.train, data.val))
    say(f"data: {name}, {n + m:,} {unit}; {train:,} tokens to train on, {val:,} held out ({m:,} {unit})")
    return data


def _with_compile(
    config: RunConfig, newest: Manifest | None, state: TrainState, device: torch.device,
    precision: hardware.Precision, say: Say,
) -> RunConfig:  # fmt: skip
    """`train.compile` settled. A run that has begun stays as it was: other kernels are other bits."""
    train, wanted = config.train, config.train.compile
    if wanted == "auto":
        wanted = device.type == "cuda" and compiling_pays(config)
        if newest:
            was = newest.facts.get("fingerprint", {}).get("compiled")
            wanted = device.type == "cuda" and was == "true"
        if device.type == "cuda":
            why = "as it began" if newest else f"the run is {'long' if wanted else 'short'}"
            say(f"train.compile auto: {'compiled' if wanted else 'not compiled'}, {why}")
    rows = train.batch_size // (config.run.devices * config.run.num_nodes)
    rows = min(state.micro_batch_size or rows, train.micro_batch_size or rows)
    if wanted and (reason := why_not_compiled(config, rows, device, precision)):
        say(f"train.compile: not possible here, so training runs uncompiled ({reason})")
        wanted = False
    return config.model_copy(update={"train": train.model_copy(update={"compile": wanted})})


def _with_steps(
    config: RunConfig, newest: Manifest | None, state: TrainState, device: torch.device,
    precision: hardware.Precision, data: TokenData, is_first: bool, began: float, say: Say,
) -> RunConfig:  # fmt: skip
    """With `--minutes`: as many steps as end in them. A run that has begun keeps its number: it ends with the
    same bits wherever it goes on. One that has ended goes on for `continue_steps`."""
    train = config.train
    if state.step:
        total = state.schedule_total
        say(f"--minutes: this run was planned with {total:,} steps when it began, and keeps them")
        total += train.continue_steps * (newest.folder.name == FINAL_NAMES[0] and state.step == total)
    elif is_first:
        say("--minutes: measuring the speed of this machine ...")
        speed = measure(config, device, precision)
        left = 60 * train.minutes - (time.monotonic() - began)
        total = steps_within(config, speed, len(data.val.tokens), data.val.text_bytes, left)
        say(f"--minutes {train.minutes:g}: {total:,} steps of {speed.step:.3g} s, validations and saves")
    else:  # what the first worker has chosen
        chosen = read_yaml(Path(config.run.output_dir, "config.yaml"))["train"]
        total = int(chosen["max_steps"]) + int(chosen["continue_steps"])
    steps = {"max_steps": max(total - train.continue_steps, 1)}
    return config.model_copy(update={"train": train.model_copy(update=steps)})


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
    if train.compile:
        model.compile_blocks()
    if saver.newest is None:
        state = TrainState(
            schedule_total=run.total_steps,
            micro_batch_size=min(train.micro_batch_size or rows, rows),
            preset=config.preset,
            text=text_name(config.data, run.data.sidecar),
        )
        if source := config.run.init_from:
            folder = weights.resolve(source)
            weights.load_weights(model, weights.read_weights(folder, config.model), str(folder))
            run.say(f"weights: from {source}")
            state.init_from, state.base_model = origin_name(source), published_base(source, folder)
        run.say(f"starting at step 0 of {run.total_steps}")
        return model, state, {}
    folder, state = saver.newest.folder, read_state(saver.newest)
    weights.load_weights(model, weights.read_weights(folder, config.model), str(folder))
    tensors = load_tensors(folder / "optim.safetensors")
    restore_rng({name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}, run.device)
    state.restore_python_rng()
    if run.logs:
        run.logs.write(CHECKPOINTS, state.step, event="resumed", name=folder.name)
    run.say(f"continuing from {folder.name}: step {state.step} of {run.total_steps}")
    _settle_differences(run, state)
    state.micro_batch_size = min(state.micro_batch_size, rows)
    if saver.newest.facts.get("data_sha256") != run.data.sha256:  # scores and passes were another text's
        state.best, state.epoch = {}, TrainState().epoch
    _extend_schedule(run, state)
    return model, state, tensors


def schedule_of(train: TrainConfig, state: TrainState) -> Schedule:
    """The learning rate between the steps that the state names."""
    start, total = state.schedule_start, state.schedule_total
    return Schedule(train.learning_rate, train.warmup_steps, train.decay_fraction, start, total)


def _settle_differences(run: Run, state: TrainState) -> None:
    """Say where an undisturbed run's bits cannot be expected. A micro-batch counts where another one is asked
    for."""
    before = {"micro_batch": str(state.micro_batch_size)} | run.saver.newest.facts.get("fingerprint", {})
    now = hardware.fingerprint(run.device, run.precision, run.config)
    changes = [f"{key}: {before[key]} -> {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
    if now.get("micro_batch", before["micro_batch"]) != before["micro_batch"]:
        state.micro_batch_size = run.config.train.micro_batch_size
    if changes:
        run.say(f"continuing, not bit-exact: {'; '.join(changes)}")
    elif now["deterministic"] == "false":
        run.say("continuing; a GPU repeats its sums bit for bit only with --set train.deterministic=true")


def _extend_schedule(run: Run, state: TrainState) -> None:
    """More or fewer steps than the checkpoint was heading for: say what becomes of the learning rate."""
    total, before, train = run.total_steps, state.schedule_total, run.config.train
    if total == before or state.step >= total:
        return
    if state.step >= before:
        state.schedule_start = state.step
        steps = total - state.step
        cycle = f"a new cycle of {steps} steps begins (warm-up {min(train.warmup_steps, steps // 2)} steps"
        run.say(f"schedule: the finished run had decayed to 0 at step {before}; {cycle}, 0 at step {total})")
    else:
        is_decaying = state.step > schedule_of(train, state).decay_start
        rises = " (the rate rises again: the old decay had begun)" if is_decaying else ""
        run.say(f"schedule: now ends at step {total} instead of {before}{rises}")
    state.schedule_total = total
