"""A save and a retention sweep in a process without torch: what `test_commit.py` kills at every system call.

python -m tests.commit_child FOLDER SCENARIO
"""

import sys
from pathlib import Path

from smollm2.checkpoint import FINAL_NAMES, Manifest, commit, prune, step_name
from smollm2.files import remove_leftovers

FINAL = FINAL_NAMES[0]
NEW_STEP = 40

# scenario -> (folder that is saved, [(folder, step) that were there before])
SCENARIOS = {
    "a save, and the oldest goes": (
        step_name(40),
        [(step_name(10), 10), (step_name(20), 20), (step_name(30), 30)],
    ),
    "the same step again, the only one": (step_name(40), [(step_name(40), 40)]),
    "a final folder replaces the last step": (FINAL, [(step_name(30), 30), (step_name(40), 40)]),
    "a final folder moves the older one aside": (FINAL, [(FINAL, 20), (step_name(40), 40)]),
    "the same final folder again": (FINAL, [(FINAL, 40)]),
}


def contents(step: int) -> dict:
    """Files of a pretended checkpoint, determined by its step; the tensor files are written in several pieces."""

    def tensor_file(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for part in range(3):
                if file.write(bytes([step, part]) * 2000) != 4000:
                    raise OSError(28, "No space left on device")

    small = ("config.json", "state.json", "tokenizer.json")
    named = {name: f"{name} of step {step}".encode() for name in small}
    return named | {"model.safetensors": tensor_file, "optim.safetensors": tensor_file}


def save(folder: Path, name: str, step: int) -> Manifest:
    return commit(folder, name, contents(step), "run", step, {})


def save_and_prune(folder: Path, scenario: str) -> None:
    remove_leftovers(folder)
    prune(folder, 3, None, save(folder, SCENARIOS[scenario][0], NEW_STEP))


if __name__ == "__main__":
    save_and_prune(Path(sys.argv[1]), sys.argv[2])
