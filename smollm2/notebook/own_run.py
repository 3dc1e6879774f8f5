"""The reader's own run: its checkpoints from first to last, or a small run made now where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..checkpoint import MANIFEST, Manifest, read_manifest, verify
from ..config import RunConfig
from ..drive_errors import explain
from ..errors import CheckpointError
from ..origin import recorded
from ..settings import load_config
from ..weights import MODEL_FILES
from .panel import live_panel

SMALL = "small"  # the run made here: a folder of its own, so that it never stands in the way of notebook 04's
PLACES = [f"{folders}*.ckpt/{MANIFEST}" for folders in ("", "*/", "*/checkpoints/")]
ONE_MINUTE = {"max_steps": 300, "save_every": 50, "val_every": 100, "val_max_tokens": 16384, "keep_last": 20}
SECONDS = {"max_steps": 40, "save_every": 8, "val_max_tokens": 2048, "batch_size": 4, "warmup_steps": 5}
Place = str | Path


def own_checkpoints(folders: Iterable[Place], say: Callable[[str], None] = print) -> list[Manifest]:
    """The verified checkpoints of the run that was saved to last, one a step, oldest first; perhaps none.

    Looks for `*.ckpt` in each folder, in its subfolders (`checkpoints/`), and in the `checkpoints/` of those.
    What one folder has is not read from the next. What is damaged or out of reach is named and left out.
    """
    found: list[tuple[float, Manifest]] = []
    for folder in folders:
        try:
            files = sorted(file for place in PLACES for file in Path(folder).glob(place))
        except OSError as error:
            say(f"{folder}: out of reach ({explain(error)})")
            continue
        for file in files:
            try:
                found.append((saved_at(file.parent), read_manifest(file.parent)))
            except (CheckpointError, OSError) as error:
                say(f"{file.parent.name}: left out ({error})")
    newest_first = sorted(found, key=lambda pair: pair[0], reverse=True)
    for run_id in dict.fromkeys(manifest.run_id for _, manifest in newest_first):
        by_step: dict[int, Manifest] = {}
        for _, manifest in found:
            if manifest.run_id == run_id and manifest.step not in by_step:
                try:
                    by_step[manifest.step] = verify(manifest.folder, only=MODEL_FILES)
                except (CheckpointError, OSError) as error:
                    say(f"{manifest.folder.name}: left out ({error})")
        if by_step:
            return [by_step[step] for step in sorted(by_step)]
    return []


def saved_at(folder: Path) -> float:
    """Seconds since 1970."""
    return (folder / MANIFEST).stat().st_mtime


def small_run(input_file: Place, output_dir: Place = "output", smoke: bool = False) -> RunConfig:
    """The `nano` preset for a minute on a CPU (`smoke`: seconds), with checkpoints along the way."""
    train = ONE_MINUTE | (SECONDS if smoke else {})
    settings = {"data.input_file": str(input_file), "run.output_dir": str(Path(output_dir) / SMALL)}
    return load_config("nano", **settings, **{f"train.{name}": value for name, value in train.items()})


def own_run(input_file: Place, output_dir: Place = "output", others=(), smoke=False) -> list[Manifest]:
    """`own_checkpoints` of `output_dir` and `others`; where there are none, of a `small_run` trained now."""
    folders = [output_dir, *others]
    checkpoints = own_checkpoints(folders)
    if not checkpoints:
        from ..training import train  # Lightning takes seconds to import: only where it is needed

        config = small_run(input_file, output_dir, smoke)
        print(f"no run of yours is here yet: training a small one, {config.train.max_steps} steps ...")
        train(config, live_panel(Path(config.run.output_dir) / "logs"))
        checkpoints = own_checkpoints(folders)
    first, last = checkpoints[0], checkpoints[-1]
    saved = time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(saved_at(last.folder)))
    steps = f"steps {first.step} to {last.step}, the last saved {saved}"
    print(f"your run: {len(checkpoints)} checkpoints, {steps}, in {last.folder.parent}")
    return checkpoints


def best_seen(checkpoints: list[Manifest]) -> Manifest:
    """Of a run's checkpoints that of its best validation; the last one where that was not noted or kept."""
    step = recorded(checkpoints[-1].folder).get("best", {}).get("step")
    return next((checkpoint for checkpoint in checkpoints if checkpoint.step == step), checkpoints[-1])
