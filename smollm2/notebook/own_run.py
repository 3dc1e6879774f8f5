"""The reader's own run: its checkpoints from the first to the last, or a small run made now where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..checkpoint import MANIFEST, Manifest, verify
from ..config import RunConfig
from ..errors import CheckpointError
from ..model import SmolLM2
from ..origin import recorded
from ..progress import Reporter
from ..settings import load_config, read_yaml
from ..weights import MODEL_FILES, read_config

SMALL = "small"  # the run made here: a folder of its own, so that it never stands in the way of notebook 04's
PLACES = ("*.ckpt", "*/*.ckpt", "*/checkpoints/*.ckpt")
SMOKE = {
    "model.vocab_size": 512, "data.tokenizer_vocab_size": 512, "model.hidden_size": 96, "model.intermediate_size": 256, "model.num_hidden_layers": 4,
    "data.sequence_length": 64, "train.batch_size": 8, "train.max_steps": 40, "train.save_every": 8, "train.warmup_steps": 5, "train.val_every": 20,
    "train.val_max_tokens": 2048,
}  # fmt: skip


def own_checkpoints(folders: Iterable[str | Path], say: Callable[[str], None] = print) -> list[Manifest]:
    """The verified checkpoints of the run that was saved to last, one a step, oldest first; empty where there is none.

    Looks for `*.ckpt` in each folder, in its subfolders (`checkpoints/`), and in the `checkpoints/` of those. A damaged one is named and left out.
    """
    found: dict[str, dict[int, Manifest]] = {}
    newest: dict[str, float] = {}
    for path in (path for folder in folders for place in PLACES for path in sorted(Path(folder).glob(place))):
        try:
            manifest = verify(path, only=MODEL_FILES)
        except (CheckpointError, OSError) as error:
            say(f"{path.name}: left out ({error})")
            continue
        found.setdefault(manifest.run_id, {})[manifest.step] = manifest
        newest[manifest.run_id] = max(newest.get(manifest.run_id, 0.0), (path / MANIFEST).stat().st_mtime)
    if not found:
        return []
    run = found[max(newest, key=newest.get)]
    return [run[step] for step in sorted(run)]


def small_run(input_file: str | Path, output_dir: str | Path = "output", smoke: bool = False) -> RunConfig:
    """The `nano` preset for a minute on a CPU (`smoke`: a few seconds), with checkpoints along the way to look at later."""
    settings = {
        "train.max_steps": 300,
        "train.save_every": 50,
        "train.val_every": 100,
        "train.val_max_tokens": 16384,
        "train.keep_last": 20,
    }
    settings |= {
        "train.sample_every": 10**6,
        "data.input_file": str(input_file),
        "run.output_dir": str(Path(output_dir) / SMALL),
    }
    return load_config("nano", **settings | (SMOKE if smoke else {}))


class FewLines(Reporter):
    """One line for each validation: enough to see that it learns."""

    def start(self, step: int, total: int, tokens_per_step: int) -> None:
        print(
            f"no run of yours is here yet: training a small one, {total} steps of {tokens_per_step:,} tokens ...",
            flush=True,
        )

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        print(f"step {step}: {bits_per_byte:.3f} bits per byte on the held-out text", flush=True)


def own_run(
    input_file: str | Path,
    output_dir: str | Path = "output",
    others: Iterable[str | Path] = (),
    smoke: bool = False,
) -> list[Manifest]:
    """`own_checkpoints` of `output_dir` and `others`; where there are none, of a `small_run` trained now."""
    folders = [output_dir, *others]
    checkpoints = own_checkpoints(folders)
    if not checkpoints:
        from ..training import train

        train(small_run(input_file, output_dir, smoke), FewLines())
        checkpoints = own_checkpoints(folders)
    last = checkpoints[-1]
    print(
        f"your run: {len(checkpoints)} checkpoints, steps {checkpoints[0].step} to {last.step}, the last in {last.folder}"
    )
    return checkpoints


def best_seen(checkpoints: list[Manifest]) -> Manifest:
    """Of a run's checkpoints that of its best validation; the last one where that is none of them, or was never noted."""
    step = (recorded(checkpoints[-1].folder).get("best") or {}).get("step")
    return next((checkpoint for checkpoint in checkpoints if checkpoint.step == step), checkpoints[-1])


def untrained(checkpoint: Manifest) -> SmolLM2 | None:
    """The model of step 0 of the run: what its seed drew before the first update. None where it began from other weights."""
    state = recorded(checkpoint.folder)
    train = (state.get("config") or {}).get("train") or {}
    settings = (
        checkpoint.folder.resolve().parent.parent / "config.yaml"
    )  # early checkpoints do not say where their run began
    began_from = state.get("init_from") or (
        (read_yaml(settings).get("run") or {}).get("init_from") if settings.is_file() else None
    )
    if began_from or "seed" not in train:
        return None
    torch.manual_seed(train["seed"])
    return SmolLM2(read_config(checkpoint.folder)).eval()
