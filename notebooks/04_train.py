# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/04_train.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a>

# %% [markdown] id="title"
# # 4 · Train, and lose nothing
#
# You will be able to
#
# * tell in a minute whether a training loop is sound: first loss, one batch learned by heart;
# * say which number format your GPU should compute in, and why;
# * kill a run with no warning, resume it, and get the *same bits* as a run that was never killed;
# * train SmolLM2-135M in two phases with one live panel, stop it, go on, and find every checkpoint with its hash.
#
# About 20 minutes to read. The run itself: about 3 minutes on two quiet CPU cores (the small `nano` model); on a GPU such as Colab's free T4 it is the 135M
# model, which nobody has timed there yet: the panel tells after a few steps. Works offline, with or without Google Drive. **Runtime > Run all** is always
# safe: a second one continues.
#
# Each `?` asks you to guess first: type a number in place of `None` and run that cell again. Each `✔` is a check: the largest difference between
# two things that should be equal, and how much is allowed.

# %% cellView="form" id="setup" tags=["setup"]
# @title Set-up (about 20 s on Colab) { display-mode: "form" }
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = os.environ.get("SMOLLM2_REPO") or "https://github.com/smollm2-from-scratch/smollm2-from-scratch"
here = [Path(globals().get("__file__", "notebook")).resolve(), Path.cwd().resolve() / "notebook"]
clone = Path.cwd().resolve() / "smollm2-from-scratch"
folders = [*(parent for start in here for parent in start.parents), clone]
REPO = next((folder for folder in folders if (folder / "smollm2" / "colab.py").is_file()), None)
if REPO is None:  # a bare notebook, as the Colab badge opens it: fetch the project beside it
    half = clone.with_name(f"{clone.name}.part{os.getpid()}")
    fetched = subprocess.run(["git", "clone", "--quiet", "--depth", "1", ADDRESS, str(half)], capture_output=True, text=True)
    if fetched.returncode:
        raise RuntimeError(f"Could not fetch {ADDRESS}: {fetched.stderr.strip()}. Is the network there? Then run this cell again.")
    REPO = half.rename(clone)
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from smollm2 import colab

colab.install_missing(REPO / "requirements.txt")
report = colab.doctor()

# %% id="imports"
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # lets a GPU repeat its sums bit for bit; read when the GPU is first used
import numpy as np
import torch

import smollm2
from smollm2 import SmolLM2, Tokenizer, load_config, plots, widgets
from smollm2.device import choose_device, choose_precision, choose_preset
from smollm2.logs import CHECKPOINTS, TRAINING, read_log
from smollm2.notebook import lesson
from smollm2.notebook.panel import LivePanel
from smollm2.notebook.steadfast import keep_training, kept
from smollm2.optim import Schedule, make_optimizer, set_learning_rate
from smollm2.parameters import parameter_count
from smollm2.progress import Reporter
from smollm2.text import documents, read_split, split_bytes

SMOKE = colab.is_smoke()
device = choose_device()
lesson.quiet()

# %% [markdown] id="knobs-text"
# ## 1 · Six knobs
#
# Everything you may want to change. A **preset** is a model and its training settings. A run has two phases: `STEPS` steps, then `MORE_STEPS` that
# continue it, as one does when the first were not enough. `0` leaves it to the preset: four fifths of its steps, then the last fifth. `TEXT` is a path to a
# text file of yours; empty means `input.txt`. Which preset will `auto` choose on this machine?

# %% cellView="form" id="knobs" tags=["parameters"]
# @title Six knobs { display-mode: "form" }
PRESET = "auto"  # @param ["auto", "nano", "smollm2-135m", "smollm2-360m"]
STEPS = 0  # @param {type:"integer"}
MORE_STEPS = 0  # @param {type:"integer"}
TEXT = ""  # @param {type:"string"}
PROMPT = "Once upon a time"  # @param {type:"string"}
USE_DRIVE = True  # @param {type:"boolean"}

# %% id="chosen"
preset, why = choose_preset(PRESET)
text = Path(TEXT) if TEXT else REPO / "input.txt"
NANO = load_config("nano")
print(f"preset: {preset} ({why})\ntext: {text.name}, {sum(split_bytes(text)):,} bytes")

# %% [markdown] id="storage-text"
# ## 2 · Where the run is kept
#
# A free runtime can vanish at any second, with its disk. So training always writes to the local disk (fast), and copies every checkpoint to your Google Drive
# if you allow it: each copied file is read back and compared. Colab asks for permission **now**, so that Run all can be left alone afterwards. Refused? The
# run works all the same. What does the banner say about *your* run?

# %% id="storage" tags=["setup"]
place = colab.storage(use_drive=USE_DRIVE, output_dir=Path("output") / preset)
drive_dir = place.drive_dir / preset if place.drive_dir else None

# %% [markdown] id="overfit"
# ## 3 · One batch, learned by heart
#
# Before hours of training, one minute of doubt. A sound model and loop can learn **one** small batch by heart: its loss must fall to zero. If not,
# something is broken: targets, gradients, optimizer. We take the layers of nano (same code, seconds on any machine), a tokenizer of 512 entries, and 4 rows of
# 64 tokens. Where does the loss begin?

# %% id="overfit-batch" tags=["lesson"]
pieces = [piece for piece, _ in islice(documents(read_split(REPO / "input.txt", "train")), 200)]
tokenizer = Tokenizer.train(pieces, 512)
tokens = torch.tensor(tokenizer.encode(pieces[0]))
rows = torch.stack([tokens[start : start + 65] for start in (0, 64, 128, 192)]).to(device)  # (4, 64 + 1)
inputs, targets = rows[:, :-1], rows[:, 1:]
shape = NANO.model.model_copy(update={"vocab_size": tokenizer.vocab_size})

# %% id="overfit-first" tags=["check"]
torch.manual_seed(NANO.train.seed)
model = SmolLM2(shape).to(device)
first = model.loss(inputs, targets)
expected = math.log(shape.vocab_size) + shape.hidden_size * shape.initializer_range**2 / 2
lesson.check("first loss = ln V + σ²/2 (notebook 3)", first.item() - expected, 0.3, likely="targets not shifted, or a wrong initialisation")

# %% id="overfit-loop" tags=["lesson"]
optimizer = make_optimizer(model, NANO.train)
set_learning_rate(optimizer, NANO.train.learning_rate)
losses, gradients = [], []
for _ in range(60):
    optimizer.zero_grad()
    loss = model.loss(inputs, targets)
    loss.backward()
    sizes = torch.cat([p.grad.flatten() for p in model.parameters()]).abs().cpu()
    gradients = [*gradients[:1], sizes[sizes > 0]]  # those of the first and of the latest update, for section 4
    torch.nn.utils.clip_grad_norm_(model.parameters(), NANO.train.gradient_clip_norm)
    optimizer.step()
    losses.append(loss.item())

# %% cellView="form" id="overfit-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "60 updates on the same 256 tokens: after how many is the loss below 1 nat per token?",
    guess,
    answer=next(step for step, loss in enumerate(losses, start=1) if loss < 1),
    within=0.25,
    unit="updates",
    why="AdamW moves every weight by about the learning rate, however small its gradient; and 1.7 million weights have only 256 tokens to learn.",
)

# %% id="overfit-check" tags=["check"]
lesson.check("one batch is learned by heart: its loss is 0", losses[-1], 0.1, likely="a broken loop; do not start a long run")
with torch.no_grad():
    wrong = int((model(inputs).argmax(-1) != targets).sum())
lesson.check(f"the most likely token is the right one, at all {targets.numel()} positions", wrong)

# %% id="overfit-figure" tags=["figure"]
fig, ax = plots.figure(7.5, 3)
ax.semilogy(range(1, 61), losses, markevery=5)
ax.axhline(math.log(shape.vocab_size), color=plots.GREY, linestyle="--", label=f"ln {shape.vocab_size}: knows nothing")
ax.axhline(1, color=plots.ORANGE, linestyle=":", label="1 nat per token")
plots.label(ax, "One batch, 60 times: learned by heart", "update", "loss (nats per token)", legend=True)
plots.show(fig, alt=f"On one batch the loss falls from {losses[0]:.2f} to {losses[-1]:.3f} nats per token within 60 updates.")

# %% [markdown] id="dtype"
# ## 4 · Which number format, and why
#
# On a GPU, numbers of half the size are several times faster. **bf16** keeps the range of the usual fp32 and gives up digits; **fp16** keeps more digits and
# gives up range. A T4 has units for fp16 only (it *emulates* bf16, slowly, which is why `torch.cuda.is_bf16_supported()` says yes there). Which format does
# this machine get, and how small can a number be in each?

# %% id="dtype-choice" tags=["lesson"]
precision = choose_precision("auto", device)
print(f"{precision.name}: {precision.reason}; loss scaling: {'yes' if precision.needs_scaler else 'not needed'}")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    facts = torch.finfo(dtype)
    smallest = facts.smallest_normal * facts.eps  # below smallest_normal a number loses digits, one after the other
    print(f"{str(dtype)[6:]:>9}: up to {facts.max:.1e}, all digits down to {facts.tiny:.1e}, one down to {smallest:.1e}; next after 1: 1 + {facts.eps:.2g}")

# %% cellView="form" id="dtype-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "A gradient of 0.00000001 (1e-8) is stored as fp16. Which number is it then?",
    guess,
    answer=torch.tensor(1e-8).half().item(),
    why="The smallest fp16 number is 6e-8; what is below half of it becomes exactly 0, and that weight learns nothing.",
)

# %% [markdown] id="dtype-scale"
# The cure is **loss scaling**: multiply the loss by 65,536 before the backward pass, and all gradients grow with it, into fp16's range. Divide in fp32 before
# the update. Should one overflow to infinity, the update is skipped and the scale halved. The weights themselves stay fp32, always. Are the gradients of
# section 3 small enough to need this?

# %% id="dtype-check" tags=["check"]
scale = 2.0**16
small = torch.tensor([1e-8, 3e-8, 5e-7])
lesson.check_fails("fp16 without scaling", lambda: lesson.check("relative error", small.half().float() / small - 1, 0.01, likely="gradients vanish"))
lesson.check("scaled by 65,536, the same gradients survive fp16", (small * scale).half().float() / scale / small - 1, 1e-3)
lesson.check("the model's weights are fp32", sum(p.dtype != torch.float32 for p in model.parameters()))

# %% id="dtype-figure" tags=["figure"]
fig, ax = plots.figure(8, 3.6)
formats = [("fp32", torch.float32, plots.GREY), ("bf16", torch.bfloat16, plots.BLUE), ("fp16", torch.float16, plots.ORANGE)]
for y, (_, dtype, colour) in enumerate(formats):
    facts = torch.finfo(dtype)
    last, low, high = (math.log10(value) for value in (facts.smallest_normal * facts.eps, facts.smallest_normal, facts.max))
    ax.barh(y, high - low, left=low, height=0.5, color=colour)
    ax.barh(y, low - last, left=last, height=0.5, color="white", edgecolor=colour, hatch="///")
for y, sizes, colour in ((3, gradients[0], plots.SKY), (4, gradients[-1], plots.GREEN)):
    counts, edges = np.histogram(sizes.log10(), bins=60, range=(-16, 2))
    ax.bar(edges[:-1], 0.8 * counts / counts.max(), width=edges[1] - edges[0], bottom=y - 0.3, align="edge", color=colour)
ax.set_yticks(range(5), [name for name, *_ in formats] + ["gradients,\n1st update", "gradients,\n60th update"])
ax.set_xlim(-16, 6)
ax.set_xticks(range(-16, 7, 2))
plots.label(ax, "What each format can hold (hatched: with fewer digits)", "size of a number (power of ten); bf16 and fp32 go on at both ends", "")
vanish, blurred = ((gradients[-1] < limit).float().mean().item() for limit in (3e-8, torch.finfo(torch.float16).smallest_normal))
alt = f"First gradients lie well inside fp16; of those of the 60th update {blurred:.0%} lie where fp16 loses digits and {vanish:.0%} become 0."
plots.show(fig, alt=alt)
print(f"60th update, in fp16 without scaling: {blurred:.0%} of all gradients lose digits, {vanish:.0%} become 0")

# %% [markdown] id="schedule"
# ## 5 · The learning rate, drawn before it is used
#
# **Warm-up, stable, decay**, as SmolLM2 was trained: a linear rise while AdamW's averages settle, a long plateau, a linear fall to zero. The rate is a
# *function of the step*, so a resumed run cannot get it wrong; and both phases of your run share one curve. At which step of the decay is it half of its peak?

# %% id="run-config" tags=["lesson"]
TINY = {  # the model of the drills below
    "model.vocab_size": 512, "data.tokenizer_vocab_size": 512, "model.hidden_size": 96, "model.intermediate_size": 256, "model.num_hidden_layers": 3,
    "data.sequence_length": 64, "train.batch_size": 8, "train.warmup_steps": 5,
}  # fmt: skip
fifth = load_config(preset).train.max_steps // 5
steps, more = (30, 15) if SMOKE else (STEPS or 4 * fifth, MORE_STEPS or fifth)
settings = {"data.input_file": str(text), "run.output_dir": str(place.output_dir), "run.drive_dir": drive_dir and str(drive_dir)}
settings |= {"train.max_steps": steps, "train.continue_steps": more, "train.prompts": (PROMPT, "The", "Why does")}
settings |= {"train.sample_every": max(1, (steps + more) // 8), "train.val_every": max(1, (steps + more) // 8), "train.val_max_tokens": 2**14 if SMOKE or TEXT else None}
config = load_config("nano", **settings | TINY) if SMOKE else load_config(preset, **settings)
train = config.train
schedule = Schedule(train.learning_rate, train.warmup_steps, train.decay_fraction, 0, steps + more)
print(f"{steps} + {more} steps of {train.batch_size} x {config.data.sequence_length} tokens, peak learning rate {train.learning_rate}")

# %% cellView="form" id="schedule-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"{steps + more} steps, the last {train.decay_fraction:.0%} of them decay. At which step is the rate down to half its peak?",
    guess,
    answer=(schedule.decay_start + steps + more) / 2,
    within=0.03,
    unit="(step)",
    why=f"The decay begins at step {schedule.decay_start}; half-way from there to the end.",
)

# %% id="schedule-check" tags=["check"]
lesson.check(f"the first of {train.warmup_steps} warm-up steps has 1/{train.warmup_steps} of the peak", schedule(0) - train.learning_rate / train.warmup_steps, 1e-12)
lesson.check("the plateau is the peak", schedule(train.warmup_steps) - train.learning_rate, 1e-12)
lesson.check("after the last update it is zero", schedule(steps + more), 1e-12)

# %% [markdown] id="schedule-widget-text"
# **Try it.** Move the end of phase one: what happens to the curve? And how much of the peak is lost, on average, if all steps are decay?

# %% id="schedule-widget" tags=["widget"]
def draw_schedule(warmup, decay, phase):
    rate = Schedule(train.learning_rate, warmup, decay / 100, 0, 1000)
    rates = [rate(step) for step in range(1000)]
    fig, ax = plots.figure(8, 2.8)
    ax.plot(rates, marker="")
    ax.axvline(phase, color=plots.ORANGE, linestyle="--", label="the second phase resumes here")
    area = sum(rates) / (1000 * train.learning_rate)
    plots.label(ax, f"Learning rate of 1,000 steps: {area:.0%} of the peak on average", "step", "learning rate", legend=True)
    return fig, f"The rate rises for {warmup} steps, stays, and falls over the last {decay} %; the mean is {area:.0%} of the peak."


decay = round(100 * train.decay_fraction)
widgets.explore(
    draw_schedule,
    warmup=widgets.slider("warm-up steps", 0, 500, train.warmup_steps, 5),
    decay=widgets.slider("decay (%)", 0, 100, decay, 5),
    phase=widgets.slider("phase one ends", 50, 950, 800, 50),
)

# %% [markdown] id="kill"
# ## 6 · Kill it
#
# Many projects can resume. The question is whether the resumed run is **the same run**. Three acts with a tiny model, 30 steps: one run is left alone. A second
# one, in a process of its own, gets `SIGKILL` after step 17: no goodbye, no last save, exactly what a lost runtime looks like. Then it is resumed here. (About 20 s.)

# %% id="kill-smooth" tags=["lesson", "slow"]
shutil.rmtree("output/drill", ignore_errors=True)
Path("output/drill").mkdir(parents=True)
Path("output/drill/text.txt").write_text("\n".join(pieces), encoding="utf-8")


def drill(name, **more):
    """30 steps of a tiny model in output/drill/<name>, a checkpoint every 10; on a GPU with sums in a fixed order."""
    often = {"train.max_steps": 30, "train.save_every": 10, "train.log_every": 1, "train.sample_tokens": 8, "train.deterministic": device.type == "cuda"}
    return load_config("nano", **TINY, **often, **{"data.input_file": "output/drill/text.txt", "run.output_dir": f"output/drill/{name}"}, **more)


def curve(name):
    """{step: loss} as logged so far."""
    path = Path("output/drill") / name / "logs" / TRAINING
    return {int(e["step"]): float(e["train_loss"]) for e in read_log(path) if "train_loss" in e} if path.exists() else {}


smooth = smollm2.train(drill("smooth"), reporter=Reporter())
print(f"left alone: {smooth.step} steps, loss {smooth.losses[0][1]:.3f} -> {smooth.losses[-1][1]:.3f}")

# %% id="kill-child" tags=["check", "slow"]
Path("output/drill/killed.yaml").write_text(drill("killed").to_yaml(), encoding="utf-8")
with open("output/drill/killed.txt", "w") as said:
    command = [sys.executable, str(REPO / "colab_train.py"), "--config", "output/drill/killed.yaml"]
    child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    while child.poll() is None and max(curve("killed"), default=0) < 17:
        time.sleep(0.01)
    child.kill()
    child.wait()
before = curve("killed")
likely = "the run ended by itself: " + Path("output/drill/killed.txt").read_text()[-300:]
lesson.check("the process was killed by signal 9 in mid-run", child.returncode + signal.SIGKILL, likely=likely)
lesson.check("it left no final model", Path("output/drill/killed/checkpoints/final_model.ckpt").exists())
print(f"its log ends at step {max(before)}")

# %% cellView="form" id="kill-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
rows = kept([("here", "output/drill/killed/checkpoints")])
lesson.predict(
    f"It was killed after step {max(before)} and saved every 10 steps. At which step will it resume?",
    guess,
    answer=max(row["step"] for row in rows if row["state"] == "whole"),
    within=0.01,
    unit="(step)",
    why="The newest checkpoint whose every file has the hash in its manifest. A save that the kill tore apart has no manifest and does not count.",
)

# %% id="kill-resume" tags=["lesson"]
class Lines(Reporter):
    """Prints the messages of a run and nothing else."""

    def message(self, text):
        print(text)


resumed = smollm2.train(drill("killed"), reporter=Lines())

# %% id="kill-check" tags=["check"]
def hashes(name):
    """sha256 of weights, optimizer and state at the end of a drill."""
    folder = Path("output/drill") / name / "checkpoints" / "final_model.ckpt"
    files = ("model.safetensors", "optim.safetensors", "state.json")
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}


after = curve("killed")
lesson.check("all 30 logged losses are those of the run left alone", np.array(list(after.values())) - np.array(list(curve("smooth").values())))
uninterrupted = dict(smooth.losses)
lesson.check("in full precision too, from the resumed step on", max(abs(loss - uninterrupted[step]) for step, loss in resumed.losses))
for file, digest in hashes("killed").items():
    lesson.check(f"{file} {digest[:12]} is byte-identical", digest != hashes("smooth")[file], likely="something is missing in the checkpoint")

# %% id="kill-figure" tags=["figure"]
fig, ax = plots.figure(8, 3.2)
ax.plot(*zip(*curve("smooth").items(), strict=True), color=plots.GREY, linewidth=6, alpha=0.4, marker="", label="left alone")
ax.plot(*zip(*before.items(), strict=True), color=plots.BLUE, label="until it was killed")
ax.plot(*zip(*resumed.losses, strict=True), color=plots.RED, marker="x", linestyle="", markersize=6, label="resumed")
ax.axvline(max(before), color=plots.BLACK, linestyle="--", label="SIGKILL")
plots.label(ax, "Killed and resumed: the same curve", "step", "loss (nats per token)", legend=True)
begins = resumed.losses[0][0]
plots.show(fig, alt=f"The run killed after step {max(before)} and resumed from step {begins - 1} lies exactly on the curve of the run left alone.")

# %% [markdown] id="run"
# ## 7 · The real run
#
# Two phases, as on the command line (`python colab_train.py --max_steps N --continue_steps M`): the first ends with `final_model.ckpt`, a **fresh trainer resumes
# from that file** for the second. The panel shows loss, rate, speed, memory, time left, the last safe step here and on Drive, and what the model makes of your
# prompt as it learns. To stop: ■, once. At which step do the samples become words? And when does the held-out curve turn up? From there the model learns its
# text by heart: 135 million weights against 300,000 tokens can do that.

# %% id="run-train" tags=["slow", "lesson"]
panel = LivePanel(logs=place.output_dir / "logs")
result = keep_training(config, lambda config: smollm2.train(config, reporter=panel))
panel.refresh()  # the last copy to Drive lands after the last step

# %% [markdown] id="run-after-text"
# If you pressed ■, the run finished its step, saved, and this notebook simply goes on. What now?

# %% id="run-after"
if result.stopped_by:
    print(f"Stopped at step {result.step} of {steps + more}; saved in {result.checkpoint}.")
    print("To go on, run the training cell again: it continues from there. So does Run all, today or tomorrow.")
else:
    print(result.table())
    if not result.losses:
        print(f"\nNothing was left to train: this run has had all its steps. For more, set MORE_STEPS (section 1) to {more + 100}, say, and run all.")

# %% id="run-check" tags=["check"]
history = read_log(place.output_dir / "logs" / TRAINING)
trained = [(int(e["step"]), float(e["train_loss"])) for e in history if "train_loss" in e]
scored = [(int(e["step"]), float(e["val_loss"])) for e in history if "val_loss" in e]
shape = config.model
expected = math.log(shape.vocab_size) + shape.hidden_size * shape.initializer_range**2 / 2
if trained and trained[0][0] == 1:  # logs that were lost with a machine begin later
    lesson.check("the first loss is ln V + σ²/2", trained[0][1] - expected, 0.5, likely="a wrong initialisation, or a tokenizer with fewer entries")
events = [e for e in read_log(place.output_dir / "logs" / CHECKPOINTS) if e["event"] == "resumed" and e["name"] == "final_model.ckpt"]
if steps + 1 in dict(result.losses):  # phase two began in this session
    lesson.check("phase two resumed from phase one's file, at its last step", int(events[-1]["step"]) - steps)

# %% id="run-figure" tags=["figure"]
fig, ax = plots.figure(8, 3.2)
ax.plot(*zip(*trained, strict=True), marker="", label="training")
ax.plot(*zip(*scored, strict=True), color=plots.ORANGE, marker="D", label="held out")
lowest = min(scored, key=lambda point: point[1])
ax.plot(*lowest, "o", color=plots.RED, markersize=10, markerfacecolor="none", label=f"lowest, at step {lowest[0]}: the one to publish")
ax.axvline(steps, color=plots.GREY, linestyle="--", label="second phase begins")
plots.label(ax, f"Your run: {config.preset}", "step", "loss (nats per token)", legend=True)
ends = [f"{name} {points[-1][1]:.2f} at step {points[-1][0]}" for name, points in (("training", trained), ("held out", scored)) if points]
plots.show(fig, alt=f"Loss in nats per token: {trained[0][1]:.2f} at step {trained[0][0]}; in the end {', '.join(ends)}; held out it was lowest at step {lowest[0]}.")

# %% [markdown] id="stop"
# ## 8 · The stop button stops gracefully
#
# ■ sends the process an **interrupt** (`SIGINT`), the same signal as Ctrl-C. Training catches it: the step is finished, a checkpoint written, `train` returns. A
# second ■ stops at once. Since nobody presses it during Run all, this cell presses it itself, after step 14, in a tiny run that copies to a folder which plays
# Google Drive. At which step is the checkpoint?

# %% id="stop-run" tags=["slow", "lesson"]
class PressStop(Lines):
    """Prints messages, and presses the stop button after step 14."""

    def step(self, step, loss, learning_rate, tokens_per_second):
        if step == 14:
            os.kill(os.getpid(), signal.SIGINT)


settings = {"run.drive_dir": "output/drill/pretend-drive"}
stopped = smollm2.train(drill("stopped", **settings), reporter=PressStop())

# %% id="stop-check" tags=["check"]
lesson.check("train returned, and says which signal stopped it", stopped.stopped_by - signal.SIGINT)
lesson.check("the step that was under way is saved", stopped.step - 14)
rows = kept([("here", "output/drill/stopped/checkpoints"), ("pretend Drive", "output/drill/pretend-drive")])
lesson.check("it is on this machine and on the pretended Drive, whole", 2 - sum(row["step"] == 14 and row["state"] == "whole" for row in rows))

# %% [markdown] id="died"
# ## 9 · "My runtime died"
#
# Open this notebook again, **Runtime > Run all**. That is all: the newest checkpoint, of this machine or of Drive, is found, every byte verified, and the run
# goes on. (A run claims its Drive folder, so that no two write there at once. If the old runtime died less than five minutes ago, its claim is still fresh: the
# notebook waits for it to end.) The proof: the tiny run's whole folder is deleted, as if the machine were gone. Only the pretended Drive is left. Are its bytes enough?

# %% id="died-run" tags=["slow", "lesson"]
shutil.rmtree("output/drill/stopped")
restored = smollm2.train(drill("stopped", **settings), reporter=Lines())

# %% id="died-check" tags=["check"]
lesson.check("it began where the lost machine had stopped", restored.losses[0][0] - 15)
for file, digest in hashes("stopped").items():
    lesson.check(f"stopped, lost, restored: {file} {digest[:12]} is byte-identical", digest != hashes("smooth")[file])

# %% [markdown] id="kept"
# ## 10 · What lies where
#
# A checkpoint is an ordinary Hugging Face folder that also holds the optimizer's state: AdamW keeps two averages for every weight. All are fp32, four bytes
# each. How large is a checkpoint of your model?

# %% id="kept-rows" tags=["lesson"]
places = [("this machine", place.output_dir / "checkpoints")] + ([("Drive", drive_dir)] if drive_dir else [])
rows = kept(places)
size = max(row["bytes"] for row in rows if row["place"] == "this machine") / 1e6
parameters = parameter_count(config.model)

# %% cellView="form" id="kept-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"The model has {parameters:,} parameters. How many megabytes has one checkpoint?",
    guess,
    answer=size,
    within=0.1,
    unit="MB",
    why="12 bytes per parameter. For SmolLM2-135M: 1.61 GB, so Drive gets the newest few only, and a free 15 GB Drive is not filled.",
)

# %% id="kept-check" tags=["check"]
for row in rows[:12]:
    print(f"{row['place']:<13}{row['name'][:44]:<46}{row['bytes'] / 1e6:>9.1f} MB  weights sha256 {row['sha256'][:8]}  {row['state']}")
here = [row for row in rows if row["place"] == "this machine"]
lesson.check("every checkpoint on this machine is whole", sum(row["state"] != "whole" for row in here))
lesson.check("a checkpoint has 12 bytes per parameter (and a tokenizer)", size / (12e-6 * parameters) - 1, 0.05)
print(f"\ntalk to it: {result.table().splitlines()[-1].removeprefix('talk to it').strip()}")

# %% [markdown] id="end"
# **Free the GPU.** Colab counts the hours. When you are done, tick what you want and run this form: *flush* makes Drive write its cache back and unmounts it,
# *free* hands the machine back. Both are off, so that Run all never does it for you.

# %% cellView="form" id="end-form" tags=["parameters"]
# @title Finish { display-mode: "form" }
FLUSH_DRIVE = False  # @param {type:"boolean"}
FREE_MACHINE = False  # @param {type:"boolean"}
colab.finish(FLUSH_DRIVE, FREE_MACHINE)

# %% [markdown] id="self-test"
# ## What you can now explain
#
# <details><summary>The loss of one batch, repeated, stays at 6. Should you try a longer run?</summary>No. A sound loop learns one batch by heart. Look at
# targets, gradients, optimizer.</details>
#
# <details><summary>Why fp16 and not bf16 on a T4, and what does it need?</summary>It has no bf16 units. fp16 lacks range, so the loss is scaled.</details>
#
# <details><summary>What must a checkpoint hold, beside the weights, for a bit-exact resume?</summary>Both averages of the optimizer, the step, the data position, random
# states, the schedule's plan, the scaler's state.</details>
#
# <details><summary>nano ends with a training loss near 3.9 and a held-out loss near 4.3. Why do they differ?</summary>Its 800 steps read the same 1.2 MB five
# times, so it knows part of that by heart. Only the held-out text tells what it has learned.</details>
#
# <details><summary>Training 0.3, held out 8 (nats): what happened, and which checkpoint do you publish?</summary>The model knows its text by heart and is nearly
# sure of wrong words elsewhere: too many steps for so little text. Publish the one with the lowest held-out loss; it is always kept, whatever came after.</details>
#
# <details><summary>Why is a checkpoint written under another name first and renamed?</summary>A kill in the middle leaves a folder that nobody mistakes for a whole
# one; the manifest with all hashes comes last.</details>

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="exercises"
# ## Exercises
#
# 1. Damage the newest checkpoint of the drill: change one byte of `output/drill/smooth/checkpoints/final_model.ckpt/optim.safetensors`. What does
#    `smollm2.train(drill("smooth"), reporter=Lines())` say, and where does it go on?
# 2. To resume without the optimizer's averages is a common bug. How would section 6 notice?
# 3. When your run has ended, ask for 100 steps more: section 5 printed two numbers of steps; set `MORE_STEPS` to the second plus 100 and run all. What happens
#    to the learning rate?
#
# <details><summary>Solutions</summary>
#
# 1. Change a byte with `path = Path("output/drill/smooth/checkpoints/final_model.ckpt/optim.safetensors")`, `raw = bytearray(path.read_bytes())`, `raw[-1] ^= 1`,
#    `path.write_bytes(raw)`. It says "... is not usable: optim.safetensors: sha256 differs from the manifest: damaged; trying the one before", goes back to step 20
#    and trains the last ten steps again, to the same bits: `hashes("smooth")` is what it was.
# 2. The first resumed loss would still agree (the weights are right), the second would not: the check of all 30 logged losses fails.
# 3. A run that had ended had decayed to 0. A new cycle begins: a short warm-up, a plateau, a decay to 0 at the new end; a message says so.
#
# </details>

# %% [markdown] id="next"
# ## Next
#
# It writes. What does it think? [5 · Sample and look inside](05_sample_and_look_inside.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/05_sample_and_look_inside.ipynb)) takes the checkpoints of this run.
