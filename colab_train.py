"""Train SmolLM2 from scratch: `python colab_train.py`.

Alone it trains on `input.txt`: the 135M preset on a GPU, `nano` on a CPU. Run again it continues where it
stopped. The walk to the first optimizer step: this file -> smollm2/training.py (the loop) -> run.py (folder,
resume) -> data.py (batches) -> model.py (network, loss) -> optim.py (update).
"""

import os
import sys
import time

BEGAN = time.monotonic()  # minutes count from here

FLAGS = {
    "input_file": ("data.input_file", str, "text to train on (default input.txt)"),
    "output_dir": ("run.output_dir", str, "where checkpoints and logs go (default output)"),
    "max_steps": ("train.max_steps", int, "optimizer steps of the first phase"),
    "continue_steps": ("train.continue_steps", int, "further steps, resumed from the first phase's file"),
    "minutes": ("train.minutes", float, "as many steps as end within this many minutes, start-up included"),
    "stop_after": ("train.stop_after", float, "save and leave after this many minutes, at whatever step"),
    "drive_dir": ("run.drive_dir", str, "a second place for checkpoints, e.g. a mounted Google Drive folder"),
    "resume": ("run.resume", str, "auto (default): continue what is there; never: move it aside, start anew"),
    "seed": ("train.seed", int, "seed of weights and data order"),
    "tokenizer": ("data.tokenizer", str, "auto (default), a Hub id, or the path of a tokenizer.json"),
    "dataset": ("data.dataset", str, "ID[:CONFIG][@SPLIT] of the Hub, a folder, a file, or A=0.7,B=0.3"),
    "chat_file": ("data.chat_file", str, "conversations (.jsonl with messages) whose answers are learned"),
    "devices": ("run.devices", int, "GPUs or processes on this machine"),
    "num_nodes": ("run.num_nodes", int, "machines (with torchrun or SLURM)"),
}
AUTOMATIC = ("nano", "smollm2-135m")  # what `--preset auto` chooses among: on a CPU, on a GPU


def prepare(argv: list[str] | None):
    """The configuration and the function that trains with it. Nothing is written here."""
    from smollm2.errors import ArgumentParser, ConfigError

    parser = ArgumentParser(description="Train SmolLM2 from scratch; run it again to continue.")
    presets = "auto, nano, smollm2-10m, -30m, -135m, -360m or -1.7b"
    parser.add_argument("--preset", default="auto", help=presets)
    parser.add_argument("--config", metavar="FILE.yaml", help="sections model, data, train, run")
    repeated = {"dest": "overrides", "action": "append", "default": [], "metavar": "key=value"}
    parser.add_argument("--set", help="e.g. train.learning_rate=1e-3", **repeated)
    for name, (_, kind, text) in FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    args = parser.parse_args(argv)
    print("SmolLM2 from scratch: loading PyTorch ...", flush=True)

    from smollm2.settings import check_asked_once, load_config, read_yaml

    asked = args.preset
    if asked == "auto" and args.config is not None:
        asked = read_yaml(args.config).get("preset") or "auto"
    flags = {dotted: getattr(args, name) for name, (dotted, _, _) in FLAGS.items()}
    check_asked_once(args.overrides, flags)
    configs, mistakes = {}, []
    for preset in AUTOMATIC if asked == "auto" else (asked,):  # what is too long for nano may fit the 135M
        try:
            configs[preset] = load_config(preset, args.config, args.overrides, **flags)
        except ConfigError as error:
            mistakes.append(error)
    if not configs:  # mistakes are told before torch is imported
        raise mistakes[0]

    from smollm2.device import choose_preset

    preset, why = choose_preset(asked)
    print(f"preset: {preset} ({why})", flush=True)
    if preset not in configs:
        raise mistakes[0]

    from smollm2.training import train

    return with_shipped_text(configs[preset]), train


def with_shipped_text(config):
    """Called from another folder: the `input.txt` beside this program, where none was named or is there."""
    shipped = os.path.join(os.path.dirname(os.path.abspath(__file__)), "input.txt")
    data = config.data
    is_chosen = "input_file" in data.model_fields_set or data.dataset or data.chat_file
    if is_chosen or os.path.exists(data.input_file) or not os.path.exists(shipped):
        return config
    print(f"text: {shipped}, which lies beside this program: no {data.input_file} is here", flush=True)
    return config.model_copy(update={"data": data.model_copy(update={"input_file": shipped})})


def main(argv: list[str] | None = None) -> int:
    from smollm2.signals import leaving_at_once

    with leaving_at_once():
        config, train = prepare(argv)
    result = train(config, began=BEGAN)

    from smollm2.distributed import is_first_worker
    from smollm2.signals import OUT_OF_TIME

    if is_first_worker(config.run):
        print(f"\n{result.table()}")
    return 128 + result.stopped_by if result.stopped_by not in (None, OUT_OF_TIME) else 0


if __name__ == "__main__":
    from smollm2.errors import run_command

    sys.exit(run_command(main))
