# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/04_train.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/04_train.html)

# %% [markdown] id="title"
# # 4 · Train, and lose nothing
#
# You will be able to
#
# * write a training loop: accumulation, clipping, AdamW, each equal to the library's; and tell in a minute whether one is sound;
# * say which number format your GPU should compute in, and why;
# * kill a run with no warning, resume it, and get the *same bits* as a run that was never killed (on a GPU with `train.deterministic`, which the drill sets;
#   without it two runs drift apart slowly, from rounding);
# * train SmolLM2-135M in two phases with one live panel, stop it, go on, and find every checkpoint with its hash.
#
# About 35 minutes to read. The run itself: about 3 minutes on two quiet CPU cores (the small `nano` model, on `input.txt`); on a GPU such as Colab's free T4
# the 135M model, on children's stories of the Hub, for 20 minutes or as many as you say. Works offline, with or without Google Drive. **Runtime > Run all** is
# always safe: a second one continues.
#
# Each `?` asks you to guess first: type a number in place of `None` and run that cell again. Each `✔` is a check: the largest difference between
# two things that should be equal, and how much is allowed.

# %% cellView="form" id="setup" tags=["setup"]
# @title Set-up (about 20 s on Colab) { display-mode: "form" }
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = "https://github.com/smollm2-from-scratch/smollm2-from-scratch"
ADDRESS = os.environ.get("SMOLLM2_REPO") or ADDRESS
here = Path(globals().get("__file__", "notebook")).resolve(), Path.cwd().resolve() / "notebook"
clone = Path.cwd().resolve() / "smollm2-from-scratch"
folders = [*(parent for start in here for parent in start.parents), clone]
REPO = next((path for path in folders if (path / "smollm2" / "colab.py").is_file()), None)
if REPO is None:  # a bare notebook, as the Colab badge opens it: fetch the project beside it
    half = clone.with_name(f"{clone.name}.part{os.getpid()}")
    command = ["git", "clone", "--quiet", "--depth", "1", ADDRESS, str(half)]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        reason = f"Could not fetch {ADDRESS}: {fetched.stderr.strip()}"
        raise RuntimeError(f"{reason}. Is the network there? Then run this cell again.")
    REPO = half.rename(clone)
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from smollm2 import colab

colab.install_missing(REPO / "requirements.txt")
report = colab.doctor()

# %% id="imports"
import hashlib
import math
import shutil
import signal
import time

# lets a GPU repeat its sums bit for bit; read when the GPU is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
import numpy as np
import torch

import smollm2
from smollm2 import SmolLM2, Tokenizer, load_config, plots, widgets
from smollm2 import plan as planning
from smollm2.data import BatchOrder, BatchStream, prepare_tokens
from smollm2.dataset import Source
from smollm2.device import choose_device, choose_precision, choose_preset
from smollm2.errors import UserError
from smollm2.logs import CHECKPOINTS, TRAINING, read_log
from smollm2.notebook import lesson
from smollm2.notebook.panel import live_panel
from smollm2.notebook.steadfast import keep_training, kept
from smollm2.optim import Schedule
from smollm2.parameters import parameter_count, training_bytes
from smollm2.progress import Reporter
from smollm2.report import draw_report
from smollm2.sampling import complete
from smollm2.text import documents, read_split

SMOKE = colab.is_smoke()
device = choose_device()
lesson.quiet()

# %% [markdown] id="knobs-text"
# ## 1 · Seven knobs
#
# On a first visit change nothing and go on: sections 3 to 7 explain the words. Later, everything you may want to change:
#
# | knob | what it sets | left as it is |
# |---|---|---|
# | MODEL | a preset: a model and its training settings. `fits` tries the sizes, some seconds each, and takes the largest that the minutes suffice for. `smollm2-10m` wants 10 MB of text or more, `smollm2-30m` 30 MB | `auto`: the 135M on a GPU, nano without one |
# | TEXT | one of the list, a file or folder of yours (txt, jsonl, csv, parquet), or the id of a dataset of the Hub (Hugging Face's collection) | TinyStories on a GPU, else `input.txt` |
# | MINUTES | how long to train. `input.txt` is so small that steps are counted instead: more would only teach it by heart | 20 |
# | STEPS, MORE_STEPS | a run has two phases, the second resumed from the first's file; one curve of the rate is planned for both | four fifths and one fifth of what the minutes, or the preset, give |
# | PROMPT | the beginning that the samples go on from | "Once upon a time" |
# | USE_DRIVE | whether checkpoints are copied to your Google Drive | yes, on Colab |
#
# Which model and which text will be chosen on this machine?

# %% cellView="form" id="knobs" tags=["parameters"]
# @title Seven knobs { display-mode: "form" }
MODEL = "auto"  # @param ["auto", "fits", "nano", "smollm2-10m", "smollm2-30m", "smollm2-135m"]
TEXT = ""  # @param ["input.txt", "TinyStories", "FineWeb-Edu", "Cosmopedia"] {allow-input:true}
MINUTES = 20  # @param {type:"number"}
STEPS = 0  # @param {type:"integer"}
MORE_STEPS = 0  # @param {type:"integer"}
PROMPT = "Once upon a time"  # @param {type:"string"}
USE_DRIVE = True  # @param {type:"boolean"}

# %% cellView="form" id="text" tags=["setup"]
# @title Choose the text { display-mode: "form" }
SETS = {
    "TinyStories": "roneneldan/TinyStories",  # CDLA-Sharing-1.0
    "FineWeb-Edu": "HuggingFaceFW/fineweb-edu:sample-10BT",  # ODC-By
    "Cosmopedia": "HuggingFaceTB/cosmopedia:stories",  # Apache-2.0
}
text = TEXT or ("TinyStories" if device.type == "cuda" else "input.txt")
is_here = any(Path("output").glob(f"*-{text}/data/*/tokens.json"))
if text in SETS and not is_here:
    try:  # does the Hub answer?
        Source(SETS[text], None, Path(), None).files
    except UserError as reason:
        print(f"{text}: {reason}.\nSo: input.txt")
        text = "input.txt"
dataset = None if text == "input.txt" else SETS.get(text, text)
print(f"text: {text}")

# %% [markdown] id="storage-text"
# ## 2 · Where the run is kept
#
# A free runtime can vanish at any second, with its disk. So training always writes to the local disk (fast), and copies every checkpoint to your Google Drive
# if you allow it: each copied file is read back and compared. Colab asks for permission **now**, so that Run all can be left alone afterwards. Refused? The
# run works all the same. What does the banner say about *your* run?

# %% cellView="form" id="storage" tags=["setup"]
# @title Choose the model, and where the run is kept { display-mode: "form" }
fits = MODEL == "fits"
preset, why = planning.preset_that_fits(MINUTES) if fits else choose_preset(MODEL)
print(f"preset: {preset} ({why})")
name = preset if dataset is None else f"{preset}-{Path(text).stem}"  # each text its own run
place = colab.storage(use_drive=USE_DRIVE, output_dir=Path("output") / name)
drive_dir = place.drive_dir / name if place.drive_dir else None

# %% [markdown] id="overfit"
# ## 3 · A training loop you can read
#
# Section 7 calls `smollm2.train`. Here is the same loop bare, in 30 lines without an optimizer class (with AdamW in fp32; nano's own run uses Muon, see section 5). One **update**: run some rows forward and backward, so that
# every weight has a gradient; **clip** the gradients; let **AdamW** change the weights. A sound loop can learn **one** small batch by heart: its loss falls
# nearly to zero. We take nano (seconds on any machine), a tokenizer like its own, and 4 rows of 64 tokens. The loss is the mean of −ln(probability that the model
# gives to the true next token), in *nats*: 0 if it is sure and right, ln V if all V tokens seem equally likely to it. Where does it begin?

# %% id="overfit-batch" tags=["lesson", "check"]
NANO = load_config("nano")
pieces = [piece for piece, _ in documents(read_split(REPO / "input.txt", "train"))]
tokenizer = Tokenizer.train(pieces, NANO.data.tokenizer_vocab_size)
tokens = torch.tensor(tokenizer.encode("\n".join(pieces)))


def rows_at(starts, length):
    """Rows of `length` inputs and one more, so that each has its target: (rows, length + 1)."""
    return torch.stack([tokens[start : start + length + 1] for start in starts]).to(device)


# no two begin with the same token: what follows it could not be right for both
one_batch = rows_at((0, 65, 130, 195), 64)
inputs, targets = one_batch[:, :-1], one_batch[:, 1:]
shape = NANO.model
torch.manual_seed(NANO.train.seed)
model = SmolLM2(shape).to(device)
first = model.loss(inputs, targets).item()
expected = math.log(shape.vocab_size) + shape.hidden_size * shape.initializer_range**2 / 2
likely = "targets not shifted, or a wrong initialisation"
lesson.check("first loss = ln V + σ²/2 (notebook 3)", first - expected, 0.3, likely)
by_hand = model(inputs).flatten(0, 1).log_softmax(-1).gather(1, targets.reshape(-1, 1))
lesson.check("the loss is the mean of -ln(probability)", -by_hand.mean() - first, 1e-4)

# %% [markdown] id="accumulate-text"
# **Accumulation.** A large batch gives a steady gradient, but its activations may not fit into memory. So it goes through in parts. Backward passes *add* to
# `.grad`, and the mean over all rows is the sum of the parts' means, each times its share of the rows. So accumulation equals the large batch: it is the same sum in
# another order. (Here all rows have equally many targets. In notebook 7 they do not: there a part's share is its number of *targets* divided by that of the whole batch.) **Clipping.** One odd batch must not throw the model off: where all gradients together are longer than a limit, one factor shortens
# them all. The direction stays.


# %% id="accumulate" tags=["lesson", "check"]
def backward(model, rows, parts):
    """Gradients of the mean loss of `rows`, which go through in parts; returns that loss."""
    total = 0.0
    for part in rows.chunk(parts):
        loss = model.loss(part[:, :-1], part[:, 1:]) * len(part) / len(rows)  # its share
        loss.backward()  # adds to what .grad holds
        total += loss.item()
    return total


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def clip_factor(gradient, limit):
    return min(1.0, limit / (gradient.norm().item() + 1e-6))


def parted(parts):
    model.zero_grad()
    backward(model, one_batch, parts)
    return gradient(model)


whole, in_four, likely = parted(1), parted(4), "each part needs its share"
lesson.check("4 parts make the gradient of the large batch", whole - in_four, 1e-6, likely)
torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
off = clip_factor(in_four, 0.1) * in_four - gradient(model)
lesson.check("clipping is one factor, PyTorch's", off, 1e-6)

# %% [markdown] id="adamw-text"
# **[AdamW](https://arxiv.org/abs/1711.05101)** remembers two numbers for each weight w. With the new gradient g, and t for the number of the update, one update is:
#
# | | formula | why |
# |---|---|---|
# | 1 average gradient | m = β₁ · m + (1 − β₁) · g | batches disagree: what changes its sign cancels, what stays remains |
# | 2 average square | v = β₂ · v + (1 − β₂) · g² | how large are this weight's gradients usually? |
# | 3 correct the start | m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ) | both begin at 0, so the first values are too small |
# | 4 decay | w = w · (1 − rate · decay) | a weight that no gradient asks for fades, so weights do not grow without need |
# | 5 move | w = w − rate · m̂ / (√v̂ + ε) | divided by its usual size, no weight moves much farther than another |
#
# With β₁ = 0.9 the average reaches back about 1 / (1 − β₁) = 10 updates, with β₂ = 0.95 about 20. A β nearer to 1 remembers longer: steadier, but slower to follow.
#
# The decay, the W, is a step of its own. As a part of g it would be divided by √v̂ in step 5, too. Only matrices decay: the norms' gains are meant to be near 1.


# %% id="adamw" tags=["lesson", "check"]
@torch.no_grad()
def adamw(weight, gradient, memory, *, step, rate, decay, settings):
    """One update of a tensor, in place; `step` counts from 1. The numbers are the table's."""
    beta1, beta2 = settings.adam_beta1, settings.adam_beta2
    memory["m"] = beta1 * memory["m"] + (1 - beta1) * gradient  # 1
    memory["v"] = beta2 * memory["v"] + (1 - beta2) * gradient**2  # 2
    m = memory["m"] / (1 - beta1**step)  # 3
    v = memory["v"] / (1 - beta2**step)
    weight.mul_(1 - rate * decay)  # 4
    weight.sub_(rate * m / (v.sqrt() + settings.adam_eps))  # 5


def new_memory(weight):
    return {"m": torch.zeros_like(weight), "v": torch.zeros_like(weight)}


ADAMW = load_config("nano", **{"train.optimizer": "adamw", "train.learning_rate": 4e-3}).train
given = {"betas": (ADAMW.adam_beta1, ADAMW.adam_beta2), "eps": ADAMW.adam_eps}
theirs = torch.nn.Parameter(torch.randn(5))
mine, memory = theirs.detach().clone(), new_memory(theirs)
optimizer = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, **given)
for step in (1, 2, 3):
    theirs.grad = torch.randn(5)
    optimizer.step()
    adamw(mine, theirs.grad, memory, step=step, rate=0.01, decay=0.1, settings=ADAMW)
likely = "which average is divided by which, and when does the decay come?"
lesson.check("three updates by hand are torch.optim.AdamW's", mine - theirs, 1e-6, likely)


# %% id="loop" tags=["lesson"]
def learn(model, batches, rate, settings, parts=1):
    """One update a batch: the losses, and the size of every gradient in the last update."""
    memories = {weight: new_memory(weight) for weight in model.parameters()}
    losses = []
    for step, rows in enumerate(batches, start=1):
        losses.append(backward(model, rows, parts))  # every weight has its gradient
        gradients = gradient(model)
        factor = clip_factor(gradients, settings.gradient_clip_norm)
        for weight, memory in memories.items():
            clipped = factor * weight.grad
            decay = settings.weight_decay if weight.dim() == 2 else 0.0
            adamw(
                weight, clipped, memory,
                step=step, rate=rate(step - 1), decay=decay, settings=settings,
            )  # fmt: skip
            weight.grad = None
    return losses, gradients.abs().cpu()


torch.manual_seed(ADAMW.seed)
model = SmolLM2(shape).to(device)  # a fresh one, also when this cell runs again
losses, by_heart = learn(model, [one_batch] * 60, lambda step: ADAMW.learning_rate, ADAMW)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}")

# %% [markdown] id="adamw-exercise"
# **✎ Exercise**: set `beta1` to 0 in `adamw`, then `beta2` in its place, and run its cell and the loop's again. Which check fails, and which loop still learns the batch by heart?
#
# <details><summary>Solution</summary>The comparison with `torch.optim.AdamW` fails both times (take it out, to go on). Without β₁ the loop still learns the batch,
# but slowly: 0.2 nats after 60 updates in place of 0.001. Each zigzag counts, nothing cancels. Without β₂ the loss jumps to thousands of nats: where a gradient
# happens to be near zero, the average is divided by next to nothing.</details>

# %% cellView="form" id="overfit-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "One weight has the gradient 0.5 at every update, another 0.001. How many times as far "
    "does AdamW move the first (weight decay aside)?",
    guess, 1, within=0, unit="times",
    why="Each is divided by its own usual size, so both move by the learning rate. That is why "
    "one rate serves embedding, attention and norms.",
)  # fmt: skip

# %% id="overfit-check" tags=["check"]
likely = "a broken loop; do not start a long run"
lesson.check("one batch is learned by heart: its loss is 0", losses[-1], 0.1, likely)
with torch.no_grad():
    wrong = (model(inputs).argmax(-1) != targets).sum()
lesson.check(f"the likeliest token is the right one, at all {targets.numel()} positions", wrong)

# %% id="minute-run" tags=["lesson", "slow"]
# about a minute on two CPU cores: your loop trains nano, each batch in 4 parts
T, B, updates = NANO.data.sequence_length, ADAMW.batch_size, 150
if SMOKE:  # the project's own quick test
    T, B, updates = 64, 4, 12
rate = Schedule(ADAMW.learning_rate, ADAMW.warmup_steps, ADAMW.decay_fraction, 0, updates)
order = BatchOrder(len(tokens), T, B, ADAMW.seed)  # notebook 3, section 7
torch.manual_seed(ADAMW.seed)
own = SmolLM2(shape).to(device)
batches = (rows_at(order.starts(n), T) for n in range(updates))
minute, ordinary = learn(own, batches, rate, ADAMW, parts=4)
print(f"loss {minute[0]:.2f} -> {minute[-1]:.2f} in {updates} updates; it writes:")
written = PROMPT + complete(own, tokenizer, PROMPT, 40, temperature=0.8, top_k=50, seed=1)
print(" ".join(written.split()))

# %% cellView="form" id="minute-figure" tags=["figure"]
# @title Figure: a minute of your loop { display-mode: "form" }
fig, (left, right) = plots.figure(8, 2.8, columns=2)
left.plot(range(1, updates + 1), minute, marker="")
plots.label(left, "Your own loop trains nano", "update", "loss (nats per token)")
right.plot(
    range(1, updates + 1), [rate(n) for n in range(updates)], color=plots.ORANGE, marker=""
)
plots.label(right, "Warm-up, plateau, decay (section 5)", "update", "learning rate")
alt = f"In {updates} updates the loss falls from {minute[0]:.2f} to {minute[-1]:.2f} nats "
plots.show(fig, alt + "per token, while the learning rate rises, stays and falls to zero.")

# %% [markdown] id="dtype"
# ## 4 · Which number format, and why
#
# The usual number, **fp32**, has 32 bits. On a GPU numbers of half the size are several times faster (a T4's data sheet: 8 million million operations a second in fp32, 65 in fp16).
# There are two such formats, **fp16** and **bf16**. Both keep fewer digits: fp32 has about 7, fp16 3, bf16 2. bf16 keeps the range of fp32, fp16 does not. Of the two, a T4's fast matrix units know only fp16. (It *emulates* bf16,
# slowly, which is why `torch.cuda.is_bf16_supported()` says yes there.) Which format does
# this machine get, and how small can a number be in each?

# %% id="dtype-choice" tags=["lesson"]
precision = choose_precision("auto", device)
scaling = "yes" if precision.needs_scaler else "not needed"
print(f"{precision.name}: {precision.reason}; loss scaling: {scaling}")
for name in ("float32", "bfloat16", "float16"):
    facts = torch.finfo(getattr(torch, name))
    smallest = facts.smallest_normal * facts.eps  # a number below smallest_normal loses digits
    print(f"{name:>8}: up to {facts.max:.1e}, all digits down to {facts.tiny:.1e},")
    print(f"          one down to {smallest:.1e}; the number after 1 is 1 + {facts.eps:.2g}")

# %% cellView="form" id="dtype-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "A gradient of 0.00000001 (1e-8) is stored as fp16. Which number is it then?",
    guess, torch.tensor(1e-8).half().item(),
    why="The smallest fp16 number is 6e-8; what is below half of it becomes exactly 0, and "
    "that weight learns nothing.",
)  # fmt: skip

# %% [markdown] id="dtype-scale"
# The cure is [**loss scaling**](https://arxiv.org/abs/1710.03740): multiply the loss by 65,536 before the backward pass, and all gradients grow with it, into fp16's range. Divide in fp32 before
# the update. Should one overflow to infinity, the update is skipped and the scale halved. The weights themselves stay fp32, always.
#
# **Are real gradients small enough to need this?** The figure below looks at the last update of your loop; beside it stand the gradients of the batch that the model knows by
# heart: where the loss is nearly 0, so are they. Which share of an ordinary update's gradients does fp16 blur, and which does it lose?

# %% id="dtype-check" tags=["check"]
scale = 2.0**16
small = torch.tensor([1e-8, 3e-8, 5e-7])
plain, scaled = small.half().float() / small, (small * scale).half().float() / scale / small
lesson.check_fails("fp16 without scaling", lambda: lesson.check("its error", plain - 1, 0.01))
lesson.check("scaled by 65,536, the same gradients survive fp16", scaled - 1, 1e-3)
others = [p for p in model.parameters() if p.dtype != torch.float32]
lesson.check("the model's weights are fp32", len(others))

# %% id="gradients-run" tags=["lesson"]
kinds = {f"update {updates}\nof nano": ordinary, "one batch,\nby heart": by_heart}
limits = torch.finfo(torch.float16).smallest_normal, 2.0**-25  # half of the smallest number
shares = {}
for name, sizes in kinds.items():
    blurred, lost = ((sizes[sizes > 0] < limit).float().mean().item() for limit in limits)
    shares[name] = f"{blurred:.0%} lose digits, {lost:.2%} become 0"
    print(f"{' '.join(name.split())}: in fp16 without scaling {shares[name]}")

# %% cellView="form" id="dtype-figure" tags=["figure"]
# @title Figure: what each format holds { display-mode: "form" }
fig, ax = plots.figure(8, 3.6)
for y, name in enumerate(("float32", "bfloat16", "float16")):
    facts, color = torch.finfo(getattr(torch, name)), plots.PALETTE[y]
    ends = (facts.smallest_normal * facts.eps, facts.smallest_normal, facts.max)
    last, low, high = map(math.log10, ends)
    ax.barh(y, high - low, left=low, height=0.5, color=color)
    ax.barh(y, low - last, left=last, height=0.5, color="white", edgecolor=color, hatch="///")
for y, sizes in enumerate(kinds.values(), start=3):
    counts, edges = np.histogram(sizes[sizes > 0].log10(), bins=60, range=(-16, 2))
    bars = {"width": edges[1] - edges[0], "bottom": y - 0.3, "color": plots.PALETTE[y]}
    ax.bar(edges[:-1], 0.8 * counts / counts.max(), align="edge", **bars)
ax.set_yticks(range(5), ["fp32", "bf16", "fp16", *kinds])
ax.set(xlim=(-16, 6), xticks=range(-16, 7, 2))
title = "What each format can hold (hatched: with fewer digits), and gradients"
plots.label(ax, title, "size of a number (power of ten); bf16 and fp32 go on at both ends", "")
alt = "Gradients against the range of fp16: of an ordinary update of nano "
plots.show(fig, alt + "{}; of a batch known by heart {}.".format(*shares.values()))

# %% [markdown] id="schedule"
# ## 5 · The learning rate, drawn before it is used
#
# **Warm-up, stable, decay** ([MiniCPM](https://arxiv.org/abs/2404.06395)), as [SmolLM2](https://arxiv.org/abs/2502.02737) was trained. The rate *rises* while
# the averages know little yet: full steps would go anywhere. On the *plateau* the model moves fast, but every batch pulls it about. The *fall* to zero lets it
# settle, and the loss drops once more. A cosine curve must know its end from the first step; a plateau goes on for as long as you like, and only the fall needs an end.
#
# SmolLM2's optimizer is AdamW. The preset `nano` takes [**Muon**](https://kellerjordan.github.io/posts/muon/) for the matrices of its blocks. Muon averages the gradient of a whole matrix and then makes all
# its directions equally strong, so that not only the few learn that dominate it. Embedding and norms keep AdamW. Each has its rate; both follow the same curve. The rate is a
# *function of the step*, so a resumed run cannot get it wrong; and both phases of your run share one curve. At which step of the decay is it half of its peak?
#
# **Try it**, below. Move the end of phase one: what happens to the curve? And how much of the peak is lost, on average, if all steps are decay?

# %% cellView="form" id="run-config" tags=["lesson"]
# @title Settings of your run { display-mode: "form" }
TINY = {  # the model of the drills below
    "model.vocab_size": 512, "data.tokenizer_vocab_size": 512, "model.hidden_size": 96,
    "model.intermediate_size": 256, "model.num_hidden_layers": 3, "data.sequence_length": 64,
    "train.batch_size": 8, "train.warmup_steps": 5,
}  # fmt: skip
by_clock = dataset and MINUTES and not (STEPS or SMOKE)
settings = {
    "data.input_file": str(REPO / "input.txt"), "data.dataset": dataset,
    "run.output_dir": str(place.output_dir), "run.drive_dir": drive_dir and str(drive_dir),
    "run.compare_with": "HuggingFaceTB/SmolLM2-135M",
    "train.prompts": (PROMPT, "The", "Why does"),
    "train.minutes": MINUTES if by_clock else None,
    "train.val_max_tokens": 2**14 if SMOKE or dataset else None,
    "data.held_out_fraction": 0.01 if text in SETS else None,  # of 100 MB
}  # fmt: skip
settings |= TINY if SMOKE else {}

# %% id="run-plan" tags=["lesson"]
config = load_config("nano" if SMOKE else preset, **settings)
planned = config.train.max_steps
if by_clock or SMOKE:  # what they buy: some steps are tried
    facts = planning.plan(config, minutes=(MINUTES,), seconds=0 if SMOKE else 4)
    print(planning.table(facts), end="\n\n")
    planned = facts["buys"][0]["steps"]

# %% cellView="form" id="run-steps" tags=["lesson"]
# @title Steps of both phases { display-mode: "form" }
steps, more = (30, 15) if SMOKE else (STEPS or 4 * planned // 5, MORE_STEPS or planned // 5)
total, often = steps + more, max(1, (steps + more) // 8)
settings |= {"train.max_steps": steps, "train.continue_steps": more}
settings |= {"train.sample_every": often, "train.val_every": often}
config = load_config("nano" if SMOKE else preset, **settings)
train = config.train
schedule = Schedule(train.learning_rate, train.warmup_steps, train.decay_fraction, 0, total)
about = "about " if by_clock else ""  # the run itself measures again, and keeps its number
length = config.data.sequence_length
print(f"{about}{steps} + {more} steps of {train.batch_size} x {length} tokens")
muon = f", Muon's {train.muon_learning_rate}" if train.optimizer == "muon" else ""
print(f"peak learning rates: AdamW's {train.learning_rate}{muon}")

# %% cellView="form" id="schedule-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"{schedule.total} steps, the last {train.decay_fraction:.0%} of them decay. At which step "
    "is the rate down to half its peak?",
    guess, (schedule.decay_start + schedule.total) / 2, within=0.03, unit="(step)",
    why=f"The decay begins at step {schedule.decay_start}; half-way from there to the end.",
)  # fmt: skip


# %% id="schedule-check" tags=["check"]
def by_hand(step):
    """The rate of an update, counted from 0."""
    left = (total - step) / (total - schedule.decay_start)  # 1 where the decay begins
    return peak * min((step + 1) / warmup, 1, left)


peak, warmup = train.learning_rate, min(train.warmup_steps, total // 2)
off = [by_hand(step) - schedule(step) for step in range(total)]
lesson.check("rise, plateau and fall by hand are the package's, at every step", off, 1e-12)
lesson.check("the plateau is the peak", schedule(warmup) - peak, 1e-12)
lesson.check("after the last update it is zero", schedule(total), 1e-12)


# %% id="schedule-widget" tags=["widget"]
def draw_schedule(warmup, decay, phase):
    rate = Schedule(peak, warmup, decay / 100, 0, 1000)
    rates = [rate(step) for step in range(1000)]
    fig, ax = plots.figure(8, 2.8)
    ax.plot(rates, marker="")
    ax.axvline(phase, color=plots.ORANGE, linestyle="--", label="the second phase resumes here")
    area = f"{sum(rates) / (1000 * peak):.0%}"
    title = f"Learning rate of 1,000 steps: {area} of the peak on average"
    plots.label(ax, title, "step", "learning rate", legend=True)
    alt = f"The rate rises for {warmup} steps, stays, and falls over the last {decay} %; "
    return fig, alt + f"the mean is {area} of the peak."


widgets.explore(
    draw_schedule,
    warmup=widgets.slider("warm-up steps", 0, 500, warmup, 5),
    decay=widgets.slider("decay (%)", 0, 100, round(100 * train.decay_fraction), 5),
    phase=widgets.slider("phase one ends", 50, 950, 800, 50),
)

# %% [markdown] id="kill"
# ## 6 · Kill it
#
# Many projects can resume. The question is whether the resumed run is **the same run**. Three acts with a tiny model, 30 steps: one run is left alone. A second
# one, in a process of its own, gets `SIGKILL` after step 17: no goodbye, no last save. (A lost runtime takes its disk along as well: section 9.) Then it is resumed here. (About 20 s.)
# Before that, one more run answers another question: does the loop of section 3 do what `smollm2.train` does?
#
# | of a checkpoint | holds | without it |
# |---|---|---|
# | `model.safetensors` | the weights | all is lost |
# | `optim.safetensors` | the optimizer's averages of each weight (AdamW two, Muon one); the states of PyTorch's random generators | the next updates are others; whatever is drawn at random is, too |
# | `state.json` | the step and the data position, the plan of the rate, fp16's loss scale | the next batch and the next rate are others |
# | `tokenizer.json` | the numbers of all tokens | the weights mean nothing |
# | `manifest.json` | the SHA-256 of every file, written last | nobody knows that the rest is whole |

# %% id="kill-smooth" tags=["lesson", "slow"]
DRILL = Path("output/drill")
shutil.rmtree(DRILL, ignore_errors=True)
DRILL.mkdir(parents=True)
(DRILL / "text.txt").write_text("\n".join(pieces[:200]), encoding="utf-8")
OFTEN = {"train.max_steps": 30, "train.save_every": 10, "train.log_every": 1}
OFTEN |= {"train.sample_tokens": 8, "data.input_file": str(DRILL / "text.txt")}


def drill(name, **more):
    """30 steps of a tiny model in output/drill/<name>, a checkpoint every 10."""
    in_order = {"train.deterministic": device.type == "cuda"}  # sums of a GPU, in a fixed order
    place = {"run.output_dir": str(DRILL / name)}
    return load_config("nano", **TINY, **OFTEN, **in_order, **place, **more)


def curve(name):
    """{step: loss} as logged so far."""
    path = DRILL / name / "logs" / TRAINING
    events = read_log(path) if path.exists() else []
    return {int(e["step"]): float(e["train_loss"]) for e in events if "train_loss" in e}


smooth = smollm2.train(drill("smooth"), reporter=Reporter())
begin, end = smooth.losses[0][1], smooth.losses[-1][1]
print(f"left alone: {smooth.step} steps, loss {begin:.3f} -> {end:.3f}")

# %% cellView="form" id="loop-check" tags=["check", "slow"]
# @title Check: your loop and smollm2.train, the same 30 batches { display-mode: "form" }
# is the package's loop yours? The same 30 batches through both, in fp32
plain = {"train.precision": "fp32", "train.optimizer": "adamw", "train.micro_batch_size": 2}
plain["train.learning_rate"] = 1e-3  # at a high rate rounding errors grow quickly
same = drill("plain", **plain)
package = smollm2.train(same, reporter=Reporter())
own_tokenizer = Tokenizer.from_file(package.checkpoint)
place_of = DRILL / "plain" / "data", same.data.held_out_fraction
numbers = prepare_tokens(same.data.input_file, own_tokenizer, *place_of).train.tokens
length, rows, seed = same.data.sequence_length, same.train.batch_size, same.train.seed
stream = BatchStream(numbers, BatchOrder(len(numbers), length, rows, seed), 0)
rate = Schedule(
    same.train.learning_rate, same.train.warmup_steps, same.train.decay_fraction, 0, 30
)
torch.manual_seed(seed)
batches = (stream.batch(n).to(device) for n in range(30))
mine, _ = learn(SmolLM2(same.model).to(device), batches, rate, same.train, parts=rows // 2)
difference = np.array(mine) - np.array([loss for _, loss in package.losses])
allowed = 1e-5 if device.type == "cpu" else 1e-3  # a GPU adds up in another order every time
lesson.check("the 30 losses of your loop are those of smollm2.train", difference, allowed)

# %% cellView="form" id="kill-child" tags=["check", "slow"]
# @title The second run is killed { display-mode: "form" }
shutil.rmtree(DRILL / "killed", ignore_errors=True)  # of an earlier try
(DRILL / "killed.yaml").write_text(drill("killed").to_yaml(), encoding="utf-8")
command = [sys.executable, str(REPO / "colab_train.py"), "--config", DRILL / "killed.yaml"]
with open(DRILL / "killed.txt", "w") as said:
    child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    while child.poll() is None and max(curve("killed"), default=0) < 17:
        time.sleep(0.01)
    child.kill()
    child.wait()
before = curve("killed")
likely = "the run ended by itself: " + (DRILL / "killed.txt").read_text()[-300:]
final = DRILL / "killed" / "checkpoints" / "final_model.ckpt"
lesson.true("the process was killed in mid-run", child.returncode != 0, likely=likely)
lesson.true("it left no final model", not final.exists())
print(f"its log ends at step {max(before)}")

# %% cellView="form" id="kill-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
rows = kept([("here", DRILL / "killed" / "checkpoints")])
whole = [row["step"] for row in rows if row["state"] == "whole"]
newest = max(step for step in whole if step <= max(before))  # also after the resume
lesson.predict(
    f"It was killed after step {max(before)} and saved every 10 steps. At which step will it "
    "resume?",
    guess, newest, within=0.01, unit="(step)",
    why="The newest checkpoint whose every file has the hash in its manifest. A save that the "
    "kill tore apart has no manifest and does not count.",
)  # fmt: skip


# %% id="kill-resume" tags=["lesson"]
class Lines(Reporter):
    """Prints the messages of a run and nothing else."""

    def message(self, text):
        print(text)


resumed = smollm2.train(drill("killed"), reporter=Lines())


# %% id="kill-check" tags=["check"]
def hashes(name):
    """sha256 of weights, optimizer and state at the end of a drill."""
    folder = DRILL / name / "checkpoints" / "final_model.ckpt"
    files = ("model.safetensors", "optim.safetensors", "state.json")
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}


def same_bytes(name):
    """Check every file of a drill against the run that was left alone."""
    likely, expected = "something is missing in the checkpoint", hashes("smooth")
    for file, digest in hashes(name).items():
        title = f"{name}: {file} {digest[:12]} is byte-identical"
        lesson.true(title, digest == expected[file], likely=likely)


logged = [np.array(list(curve(name).values())) for name in ("killed", "smooth")]
lesson.check("all 30 logged losses are those of the run left alone", logged[0] - logged[1])
uninterrupted = dict(smooth.losses)
off = max(abs(loss - uninterrupted[step]) for step, loss in resumed.losses)
lesson.check("in full precision too, from the resumed step on", off)
same_bytes("killed")

# %% cellView="form" id="kill-figure" tags=["figure"]
# @title Figure: killed and resumed { display-mode: "form" }
fig, ax = plots.figure(8, 3.2)
style = {"color": plots.GREY, "linewidth": 6, "alpha": 0.4, "marker": ""}
ax.plot(*zip(*curve("smooth").items(), strict=True), **style, label="left alone")
ax.plot(*zip(*before.items(), strict=True), color=plots.BLUE, label="until it was killed")
style = {"color": plots.RED, "markersize": 6}
ax.plot(*zip(*resumed.losses, strict=True), "x", **style, label="resumed")
ax.axvline(max(before), color=plots.BLACK, linestyle="--", label="killed")
title = "Killed and resumed: the same curve"
plots.label(ax, title, "step", "loss (nats per token)", legend=True)
begins = f"resumed from step {resumed.losses[0][0] - 1}"
alt = f"The run killed after step {max(before)} and {begins} lies exactly on the curve of the "
plots.show(fig, alt + "run left alone.")

# %% [markdown] id="kill-exercise"
# **✎ Exercise**: to resume without the optimizer's averages is a common bug: how would this section notice? Then damage the
# newest checkpoint: change one byte of `output/drill/smooth/checkpoints/final_model.ckpt/optim.safetensors`. What does
# `smollm2.train(drill("smooth"), reporter=Lines())` say, and where does it go on?
#
# <details><summary>Solution</summary>
#
# The first resumed loss would still agree (the weights are right), the second would not: the check of all 30 logged losses fails.
# ```python
# path = Path("output/drill/smooth/checkpoints/final_model.ckpt/optim.safetensors")
# raw = bytearray(path.read_bytes())
# raw[-1] ^= 1
# path.write_bytes(raw)
# ```
# It says "... is not usable: optim.safetensors: sha256 differs from the manifest: damaged; trying the one before", goes back to step 20
# and trains the last ten steps again, to the same bits: `hashes("smooth")` is what it was.
# </details>

# %% [markdown] id="run"
# ## 7 · The real run
#
# Two phases, as on the command line (`python colab_train.py --max_steps N --continue_steps M`): the first ends with `final_model.ckpt`, a **fresh trainer resumes
# from that file** for the second. The panel shows loss, rate, speed, memory, time left, the last safe step here and on Drive, and what the model makes of your
# prompt as it learns. To stop: ■, once. At which step do the samples become words? And does the held-out curve turn up? From there the model would learn its
# text by heart: 135 million weights against the 300,000 tokens of `input.txt` can do that.
# If you press ■, the run finishes its step, saves, and the notebook goes on.
#
# When all is saved, the same held-out bytes go to `gzip`, to `xz`, to counting and, with the network, to the official SmolLM2-135M, which read 2 trillion tokens (a
# minute on a CPU, seconds on a GPU). How near do you get?
#
# **✎ Exercise**, when your run has ended: ask for 100 steps more. Run all once more: the cell below says what to set. What happens to the learning rate?
#
# <details><summary>Solution</summary>A run that had ended had decayed to 0. A new cycle begins: a short warm-up, a plateau, a decay to 0 at the new end; a
# message says so.</details>

# %% id="run-train" tags=["slow", "lesson"]
panel = live_panel(logs=place.output_dir / "logs")
result = keep_training(config, lambda config: smollm2.train(config, reporter=panel))
panel.end()  # shown once more: the last copy to Drive lands after the last step
done = load_config(None, place.output_dir / "config.yaml").train  # with its number of steps
steps, total = done.max_steps, done.max_steps + done.continue_steps

# %% id="run-after"
if result.stopped_by:
    print(f"Stopped at step {result.step} of {total}; saved in {result.checkpoint}.")
    print("To go on, run the training cell again: it continues from there.")
    print("So does Run all, today or tomorrow.")
else:
    print(result.table())
    if not result.losses:
        print("\nNothing was left to train: this run has had all its steps. For more, set")
        print(f"STEPS (section 1) to {result.step}, MORE_STEPS to 100, say, and run all.")

# %% id="run-check" tags=["check"]
logs = place.output_dir / "logs"
history = read_log(logs / TRAINING)
trained = [(int(e["step"]), float(e["train_loss"])) for e in history if "train_loss" in e]
shape = config.model
expected = math.log(shape.vocab_size) + shape.hidden_size * shape.initializer_range**2 / 2
if trained and trained[0][0] == 1:  # logs that were lost with a machine begin later
    likely = "a wrong initialisation, or a tokenizer with fewer entries"
    lesson.check("the first loss is ln V + σ²/2", trained[0][1] - expected, 0.5, likely)
resumes = [event for event in read_log(logs / CHECKPOINTS) if event["event"] == "resumed"]
begun = [int(event["step"]) for event in resumes if event["name"] == "final_model.ckpt"]
if steps + 1 in dict(result.losses):  # phase two began in this session
    lesson.check("phase two resumed from phase one's file", begun[-1] - steps)

# %% cellView="form" id="run-figure" tags=["figure"]
# @title Figure: your run { display-mode: "form" }
plots.show(*draw_report(config, result.references))  # also in the run's folder: report.png

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
            signal.raise_signal(signal.SIGINT)


pretend = DRILL / "pretend-drive"
for folder in (pretend, DRILL / "stopped"):  # of an earlier try
    shutil.rmtree(folder, ignore_errors=True)
with_drive = drill("stopped", **{"run.drive_dir": str(pretend)})
stopped = smollm2.train(with_drive, reporter=PressStop())

# %% id="stop-check" tags=["check"]
by = stopped.stopped_by
lesson.check("train returned, and says which signal stopped it", by - signal.SIGINT)
lesson.check("the step that was under way is saved", stopped.step - 14)
rows = kept([("here", DRILL / "stopped" / "checkpoints"), ("pretend Drive", pretend)])
whole = [row for row in rows if row["step"] == 14 and row["state"] == "whole"]
lesson.check("it is on this machine and on the pretended Drive, whole", 2 - len(whole))

# %% [markdown] id="died"
# ## 9 · "My runtime died"
#
# Open this notebook again, **Runtime > Run all**. That is all: the newest checkpoint, of this machine or of Drive, is found, every byte verified, and the run
# goes on. (Should the old runtime still live, you are told: stop one of the two, they do the same work.) The proof: the tiny run's whole folder is deleted, as if the machine were gone. Only the pretended Drive is left. Are its bytes enough?

# %% id="died-run" tags=["slow", "lesson", "check"]
shutil.rmtree(DRILL / "stopped")
restored = smollm2.train(with_drive, reporter=Lines())
lesson.check("it began where the lost machine had stopped", restored.losses[0][0] - 15)
same_bytes("stopped")

# %% [markdown] id="kept"
# ## 10 · What lies where
#
# A checkpoint is an ordinary Hugging Face folder that also holds the optimizer's state: AdamW keeps two averages for every weight. All are fp32, four bytes
# each, except that Muon, which trains the matrices of nano's blocks, needs only one. How large is a checkpoint of your model?

# %% id="kept-rows" tags=["lesson"]
places = [("this machine", place.output_dir / "checkpoints")]
places += [("Drive", drive_dir)] if drive_dir else []
rows = kept(places)
here = [row for row in rows if row["place"] == "this machine"]
size = max(row["bytes"] for row in here) / 1e6
parameters = parameter_count(config.model)

# %% cellView="form" id="kept-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"The model has {parameters:,} parameters. How many megabytes has one checkpoint?",
    guess, size, unit="MB",
    why="12 bytes per parameter, 8 where Muon trains it. For SmolLM2-135M with AdamW: 1.61 GB, "
    "so Drive gets the newest few only, and a free 15 GB Drive is not filled.",
)  # fmt: skip

# %% id="kept-check" tags=["check"]
for row in rows[:12]:
    facts = f"{row['bytes'] / 1e6:>9.1f} MB  sha256 {row['sha256'][:8]}  {row['state']}"
    print(f"{row['place']:<13}{row['name'][:44]:<45}{facts}")
damaged = [row for row in here if row["state"] != "whole"]
lesson.check("every checkpoint on this machine is whole", len(damaged))
ratio = 1e6 * size / training_bytes(config.model, train.optimizer)
lesson.check("a checkpoint has 8 or 12 bytes per parameter (and a tokenizer)", ratio - 1, 0.1)
print(f"\ntalk to it: {result.table().splitlines()[-1].removeprefix('talk to it').strip()}")

# %% [markdown] id="end"
# **Free the GPU.** Colab counts the hours. When you are done, tick what you want and run this form: *flush* makes Drive write its cache back and unmounts it,
# *free* hands the machine back. Both are off, so that Run all never does it for you.

# %% cellView="form" id="end-form" tags=["parameters"]
# @title Finish { display-mode: "form" }
FLUSH_DRIVE = False  # @param {type:"boolean"}
FREE_MACHINE = False  # @param {type:"boolean"}
if not (FLUSH_DRIVE or FREE_MACHINE):
    print("Nothing to do: all stays as it is.")
elif not colab.is_colab():
    print("This is not Colab: nothing to do.")
else:
    from google.colab import drive, runtime

    if FLUSH_DRIVE:
        drive.flush_and_unmount()  # where that fails, the machine is kept
    if FREE_MACHINE:
        runtime.unassign()

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="self-test"
# ## What you can now explain
#
# <details><summary>The loss of one batch, repeated, stays at 6. Should you try a longer run?</summary>No. A sound loop learns one batch by heart. Look at
# targets, gradients, optimizer.</details>
#
# <details><summary>Why fp16 and not bf16 on a T4, and what does it need?</summary>It has no bf16 units. fp16 lacks range, so the loss is scaled.</details>
#
# <details><summary>What must a checkpoint hold, beside the weights, for a bit-exact resume?</summary>The averages of the optimizer, the step, the data position, random
# states, the schedule's plan, the scaler's state.</details>
#
# <details><summary>nano ends with a training loss near 3.4 and a held-out loss near 3.8. Why do they differ?</summary>Its 900 steps read the same 1.2 MB five
# times, so it knows part of that by heart. Only the held-out text tells what it has learned.</details>
#
# <details><summary>Training 0.3, held out 8 (nats): what happened, and which checkpoint do you publish?</summary>The model knows its text by heart and is nearly
# sure of wrong words elsewhere: too many steps for so little text. Publish the one with the lowest held-out loss; it is always kept, whatever came after.</details>
#
# <details><summary>Why is a checkpoint written under another name first and renamed?</summary>A kill in the middle leaves a folder that nobody mistakes for a whole
# one; the manifest with all hashes comes last.</details>
#
# <details><summary>What do AdamW's betas do, and what does weight decay?</summary>β₁ averages the gradient (direction), β₂ its square (size), each over about 1 / (1 − β) updates;
# decay pulls every matrix towards 0, beside the gradient.</details>
#
# <details><summary>Why a warm-up, a plateau and a decay?</summary>Averages that know little yet make wild steps, so the rate rises. The plateau moves fast and needs no planned end.
# The decay lets the noise of single batches die down: the loss drops once more.</details>
#
# <details><summary>Why does accumulation equal a large batch?</summary>The gradient of a mean is the mean of the gradients: parts, each with its share, add up to the same sum.</details>
#
# ## Next
#
# It writes. What does it think? [5 · Sample and look inside](05_sample_and_look_inside.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/05_sample_and_look_inside.ipynb)) takes the checkpoints of this run.
