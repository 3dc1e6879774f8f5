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
# * kill a run with no warning, resume it, and get the *same bits* as a run that was never killed;
# * train SmolLM2-135M with a live panel, stop it, go on, and find every checkpoint with its hash;
# * say which number format your GPU should compute in, and why.
#
# The way: a place to keep it (section 1) → loss (2) → one update (3) → loop (4) → learning rate (5) → kill and resume (6) → your run (7) → stop and lose it (8, 9) → what is
# kept (10) → deeper: number formats (11).
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

# %% id="imports" tags=["setup"]
# What this notebook uses. The words after # say what for.
import math
import shutil  # to delete folders
import signal  # the stop button sends one
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # GPU sums that repeat
import numpy as np
import torch
from safetensors.torch import load_file, save_file  # named tensors in a file

import smollm2
from smollm2 import SmolLM2, Tokenizer, load_config, plots, widgets  # notebooks 1 and 3
from smollm2 import plan as planning  # how many steps your minutes buy
from smollm2.data import BatchOrder, BatchStream, prepare_tokens  # which rows, and when
from smollm2.dataset import Source  # a text of the Hub
from smollm2.device import choose_device, choose_precision, choose_preset  # GPU or CPU?
from smollm2.errors import UserError  # what a person can mend
from smollm2.logs import CHECKPOINTS, TRAINING, read_log  # what a run wrote down
from smollm2.notebook import diagrams, lesson  # colours; checks and guesses
from smollm2.notebook.drive_fallback import keep_training, kept  # kept: a list of checkpoints
from smollm2.notebook.panel import live_panel  # a run's curves while it runs
from smollm2.optim import Schedule  # the learning rate of each step
from smollm2.parameters import parameter_count, training_bytes  # notebook 2
from smollm2.progress import Reporter  # is told what a run does; this one is silent
from smollm2.report import draw_report  # its curves when it has ended
from smollm2.sampling import complete  # goes on with a text
from smollm2.text import documents, read_split  # its pieces; what is held out

SMOKE, device = colab.is_smoke(), choose_device()  # SMOKE: the project's quick test, all shrunk
lesson.quiet()

# %% [markdown] id="knobs-text"
# ## 1 · Where to keep it
#
# > *Way:* **place** → loss → update → loop → rate → kill → your run → stop → lose → keep → number formats
#
# A free runtime can vanish at any second, with its disk. So training writes a **checkpoint** now and then: all that it needs to go on. It goes to the local disk, which is
# fast. If you allow it, a copy goes to your Google Drive, and is read back and compared. Colab asks for permission **now**, so that Run all can be left alone afterwards.
# Refused? The run works all the same.
#
# The figure: what is left after which failure? The banner above it: where are *your* runs kept? Which model is trained on which text is chosen later, in section 7.

# %% cellView="form" id="storage" tags=["parameters", "setup", "figure"]
# @title One knob: your Drive; and a figure of what survives { display-mode: "form" }
USE_DRIVE = True  # @param {type:"boolean"}
place = colab.storage(use_drive=USE_DRIVE, output_dir=Path("output"))
DRILL = place.output_dir / "drill"  # for the tiny runs of sections 6, 8 and 9
shutil.rmtree(DRILL, ignore_errors=True)
DRILL.mkdir(parents=True)

drive = "Google Drive\n(in use)" if place.drive_dir else "Google Drive\n(not in use now)"
failures = {  # is it left in each place?
    "the process is killed:\nit goes on from the disk": (False, True, True),
    "the machine is lost:\nanother goes on from Drive": (False, False, True),
    "Drive is lost:\nit trains on without": (True, True, False),
}
fig, ax = plots.figure(9, 3)
style = {"ha": "center", "va": "center", "fontsize": 9}
for x, head in enumerate(("memory of\nthe process", "disk of\nthis machine", drive)):
    ax.text(x, 0, head, bbox={"boxstyle": "round,pad=0.5", "facecolor": "#cfe6f5"}, **style)
    for y, stays in enumerate(failures.values(), start=1):
        ax.barh(y, 0.7, 0.7, x - 0.35, color="#cdebdf" if stays[x] else "#444444")
        words, color = ("✔ stays", "black") if stays[x] else ("✘ is gone", "white")
        ax.text(x, y, words, color=color, **style)
for x, words in ((0.5, "saves"), (1.5, "copies,\nreads back")):
    ax.annotate("", (x + 0.24, 0), (x - 0.24, 0), arrowprops={"arrowstyle": "-|>"})
    ax.text(x, -0.4, words, **style)
ax.set(xlim=(-0.5, 2.5), ylim=(3.5, -0.8), xticks=[], yticks=(1, 2, 3), yticklabels=failures)
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plots.label(ax, "A checkpoint's way, and what a failure leaves of it", "", "").grid(False)
alt = "Checkpoints go from memory to disk to Drive. A killed process leaves disk and Drive, "
plots.show(fig, alt + "a lost machine Drive alone, a lost Drive this machine.")

# %% [markdown] id="overfit"
# ## 2 · The loss: where does a model begin?
#
# > *Way:* place → **loss** → update → loop → rate → kill → your run → stop → lose → keep → number formats
#
# Training lowers one number, the **loss**. It comes about in four steps:
#
# 1. At each position the model gives every token of its vocabulary a number, a **logit**.
# 2. **Softmax** makes probabilities of them: e to the power of each, divided by the sum of all.
# 3. Only one of them counts: the probability p that the *true* next token got. The loss of the position is −ln p, in *nats*.
# 4. The loss of a batch is the mean over all its positions.
#
# First by hand: two positions, and a vocabulary of three tokens. Which position costs more?

# %% id="loss-tiny" tags=["lesson", "check"]
logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])  # (2, 3): positions, tokens
truth = torch.tensor([1, 2])  # which token comes next in truth: number 1, then number 2
chances = logits.softmax(-1)  # (2, 3): each row adds up to 1
for p, true in zip(chances, truth, strict=True):
    print(p.numpy().round(2), f"token {true}: p = {p[true]:.2f}, -ln p = {-p[true].log():.2f}")
# gather takes these p of all rows at once: of each, the one in the column that `truth` names
picked = chances.gather(-1, truth[:, None])  # (2, 1); [:, None] makes `truth` a column, too
loss = -picked.log().mean()
lesson.check(
    f"their mean, the loss, is {loss:.2f}: what PyTorch calls cross_entropy",
    loss - torch.nn.functional.cross_entropy(logits, truth),
    1e-6,
)

# %% [markdown] id="loss-text"
# Now real text and a real model: nano (seconds on any machine), with a tokenizer like its own, and **one** small batch of 4 rows of 64 tokens. The inputs are all tokens of a
# row but the last, the targets all but the first: each position has to name the token after it (notebook 3). A part of the text is **held out**, never trained on (of
# `input.txt` the last 10 %): only its loss tells what a model has learned, and what it merely knows by heart.
#
# A model that thinks all V tokens equally likely gives each 1 / V: its loss is ln V, here ln 2,048 = 7.62. Where does a fresh model begin: above, at, or below?

# %% id="overfit-batch" tags=["lesson"]
NANO = load_config("nano")
shape = NANO.model  # widths, layers, heads, vocabulary
pieces = [piece for piece, _ in documents(read_split(REPO / "input.txt", "train"))]
tokenizer = Tokenizer.train(pieces, NANO.data.tokenizer_vocab_size)
tokens = torch.tensor(tokenizer.encode("\n".join(pieces)))
print(f"{len(tokens):,} tokens, {tokenizer.vocab_size:,} different ones")


def rows_at(starts, length):
    """Rows of `length` inputs and one more, so that each has its target: (rows, length + 1)."""
    rows = [tokens[start : start + length + 1] for start in starts]
    return torch.stack(rows).to(device)  # the GPU, where there is one


# no two begin with the same token: what follows it could not be right for both
one_batch = rows_at((0, 65, 130, 195), 64)
inputs, targets = one_batch[:, :-1], one_batch[:, 1:]  # (4, 64) each

# %% id="overfit-loss" tags=["lesson", "check"]
torch.manual_seed(NANO.train.seed)
model = SmolLM2(shape).to(device)
first = model.loss(inputs, targets).item()
log_chances = model(inputs).log_softmax(-1)  # (4, 64, V): softmax, and ln of it
picked = log_chances.gather(-1, targets[..., None])  # (4, 64, 1): the targets' ln p
lesson.check("the loss is the mean of -ln p", -picked.mean() - first, 1e-4)
print(f"first loss {first:.2f}, ln V = {math.log(shape.vocab_size):.2f}")
lesson.check(
    "a fresh model knows nothing: its loss is ln V and a little more",
    # why a little more: "Go deeper", below the figure
    first - math.log(shape.vocab_size) - shape.hidden_size * shape.initializer_range**2 / 2,
    0.1,
    likely="targets not shifted, or a wrong initialisation",
)

# %% cellView="form" id="loss-figure" tags=["figure"]
# @title Figure: which position names which token, and what that costs { display-mode: "form" }
fig, (left, right) = plots.figure(9, 3.2, columns=2, width_ratios=[3, 2])
words = [tokenizer.decode([number]).replace(" ", "·") for number in one_batch[0, :8].tolist()]
style = {"ha": "center", "va": "center", "fontsize": 9, "family": "monospace", "clip_on": True}
for x in range(8):
    for y, column in ((1, x), (0, x - 1)):  # as an input, and one place earlier as a target
        tint = diagrams.TINTS[x % 5]
        left.barh(y, 0.9, 0.5, column - 0.45, color=tint, edgecolor=plots.GREY)
        left.text(column, y, words[x], **style)
    left.annotate("", (x, 0.27), (x, 0.73), arrowprops={"arrowstyle": "-|>"})
    left.plot((x - 0.15, x - 0.85), (0.73, 0.27), ":", color=plots.GREY, marker="")
for x, chance in enumerate(picked[0, :7, 0].exp().tolist()):
    left.text(x, -0.5, f"{chance:.5f}", **style | {"fontsize": 8})
left.set_yticks((1, 0, -0.5), ["input", "target", "p of the target"])
left.set(xlim=(-0.5, 6.5), ylim=(-0.7, 1.3))
left.grid(False)
plots.label(left, "Each position has to name the token after it", "position in the row", "")
p = np.linspace(1e-4, 1, 2000)
right.plot(p, -np.log(p), marker="")
right.plot(math.exp(-first), first, "*", color=plots.RED, markersize=13, clip_on=False)
right.annotate(f"fresh model: {first:.2f}", (0.05, first), va="center")
for p in (0.1, 0.5):
    right.plot(p, -math.log(p), "o", color=plots.BLUE)
    right.annotate(f"p = {p}: {-math.log(p):.2f}", (p + 0.02, 0.15 - math.log(p)))
right.set(xlim=(0, 1), ylim=(0, 9))
plots.label(right, "Sure and right costs nothing", "p of the target", "loss, -ln p (nats)")
alt = "Each input names the token after it. The curve -ln p falls steeply, to 0 at p = 1; "
plots.show(fig, alt + f"the fresh model begins at its left end, at {first:.2f} nats.")

# %% [markdown] id="loss-deeper"
# A fresh model begins a little *above* ln V: that is worse than to know nothing.
#
# <details><summary>Go deeper: why above, and by how much?</summary>
#
# Fresh logits are not all equal. They are random, with some spread **σ**, and the large ones among them take probability from the true token. How much? The softmax divides by
# the sum of all eˣ, and the mean of eˣ for a normal x of spread σ is e to the power of σ²/2. So the loss is **ln V + σ²/2**.
#
# And σ? A logit is a sum of 192 products: a normed number (size 1) times a number of the table (spread 1/24). Taken as independent, σ² = 192 / 24² = 0.33. So the loss is
# 7.62 + 0.17 = 7.79. Section 7 holds your own run to it.
# </details>

# %% [markdown] id="accumulate-text"
# ## 3 · One update: gradient, clipping, AdamW
#
# > *Way:* place → loss → **update** → loop → rate → kill → your run → stop → lose → keep → number formats
#
# An update lowers the loss a little, in three steps. We write each and compare it with PyTorch's. Section 4 puts them into a loop.
#
# **1 Accumulation.** A backward pass gives every weight its **gradient**: how the loss changes with it. A large batch gives a steady gradient, but may not fit into memory. So it
# goes through in parts. Backward passes *add* to `.grad`. The mean over all rows is the sum of the parts' means, each times its share of the rows. (Here all rows have equally
# many targets. In notebook 7 they do not: there a part's share is counted in *targets*.)


# %% id="accumulate" tags=["lesson", "check"]
def backward(model, rows, parts):
    """Gradients of the mean loss of `rows`, which go through in parts; returns that loss."""
    total = 0.0
    for part in rows.chunk(parts):
        loss = model.loss(part[:, :-1], part[:, 1:]) * len(part) / len(rows)  # its share
        loss.backward()  # adds to what .grad holds
        total += loss.item()
    return total


def all_gradients(model):
    """The gradients of all weights, one after the other."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


found = {}
for parts in (1, 4):
    model.zero_grad()
    backward(model, one_batch, parts)
    found[parts] = all_gradients(model)
lesson.check(
    "4 parts make the gradient of the large batch",
    found[1] - found[4],
    1e-6,
    likely="each part needs its share",
)

# %% [markdown] id="clip-text"
# **2 Clipping.** One odd batch must not throw the model off. Take the gradients of all weights as one long vector. Where its length (its **norm**) is above a limit, one factor
# shortens them all. The direction stays.


# %% id="clip" tags=["lesson", "check"]
def clip_factor(g, limit):
    """What to multiply the gradients g with; 1 where they are not longer than `limit`."""
    return min(1.0, limit / (g.norm().item() + 1e-6))


clipped = clip_factor(found[4], 0.1) * found[4]
torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
lesson.check("clipping is one factor, PyTorch's", clipped - all_gradients(model), 1e-6)

# %% [markdown] id="adamw-text"
# **3 [AdamW](https://arxiv.org/abs/1711.05101)** remembers two numbers for each weight w. With the new gradient g, and t for the number of the update, one update is:
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
# ε is tiny: it keeps a division by 0 away.
#
# The decay, the W, is **decoupled**: a step of its own, that takes the same share of every weight. As a part of g it would be divided by √v̂ in step 5, too: weights with large
# gradients would hardly decay, those with small ones far too much. All matrices decay, the embedding among them; the norms' gains do not: they are meant to be near 1.
#
# The figure after the check follows one weight of nano through 24 batches. Its gradient jumps about. Does the weight?


# %% id="adamw" tags=["lesson"]
def new_memory(weight):
    return {"m": torch.zeros_like(weight), "v": torch.zeros_like(weight)}


@torch.no_grad()
def adamw(weight, g, memory, step, rate, decay, settings):
    """One update of a tensor, in place; `step` counts from 1. The numbers are the table's."""
    beta1, beta2 = settings.adam_beta1, settings.adam_beta2
    memory["m"] = beta1 * memory["m"] + (1 - beta1) * g  # 1
    memory["v"] = beta2 * memory["v"] + (1 - beta2) * g**2  # 2
    m = memory["m"] / (1 - beta1**step)  # 3
    v = memory["v"] / (1 - beta2**step)
    weight.mul_(1 - rate * decay)  # 4
    weight.sub_(rate * m / (v.sqrt() + settings.adam_eps))  # 5


# nano's settings, but with AdamW for all weights (in section 7 Muon updates the matrices)
ADAMW = load_config("nano", **{"train.optimizer": "adamw", "train.learning_rate": 4e-3}).train


# %% id="adamw-check" tags=["check"]
its_weights = torch.nn.Parameter(torch.randn(5))  # five weights
my_weights, memory = its_weights.detach().clone(), new_memory(its_weights)
optimizer = torch.optim.AdamW(
    [its_weights],
    lr=0.01,
    weight_decay=0.1,
    betas=(ADAMW.adam_beta1, ADAMW.adam_beta2),
    eps=ADAMW.adam_eps,
)
for step in (1, 2, 3):
    its_weights.grad = torch.randn(5)
    optimizer.step()
    adamw(my_weights, its_weights.grad, memory, step, 0.01, 0.1, ADAMW)
lesson.check(
    "three updates by hand are torch.optim.AdamW's",
    my_weights - its_weights,
    1e-6,
    likely="which average is divided by which, and when does the decay come?",
)

# %% cellView="form" id="adamw-figure" tags=["figure"]
# @title Figure: 24 updates of one weight, number by number { display-mode: "form" }
torch.manual_seed(1)
fresh, path = SmolLM2(shape).to(device), []
memories = {weight: new_memory(weight) for weight in fresh.parameters()}
table, spot = fresh.model.embed_tokens.weight, (tokenizer.encode(",")[0], 3)
for t in range(1, 25):
    rows = rows_at(torch.randint(len(tokens) - 65, (4,)).tolist(), 64)  # each time others
    fresh.zero_grad()
    backward(fresh, rows, 1)
    factor = clip_factor(all_gradients(fresh), ADAMW.gradient_clip_norm)
    for weight, memory in memories.items():
        adamw(weight, factor * weight.grad, memory, t, 1e-3, ADAMW.weight_decay, ADAMW)
    m = memories[table]["m"][spot] / (1 - ADAMW.adam_beta1**t)
    root = (memories[table]["v"][spot] / (1 - ADAMW.adam_beta2**t)) ** 0.5
    path.append(list(map(float, (table.grad[spot], factor, m, root, table.data[spot]))))
g, factor, m, root, values = np.array(path).T
t = np.arange(1, 25)
fig, (top, middle, low) = plots.figure(9, 5.6, rows=3, sharex=True)
top.bar(t, g, color="#bbbbbb", label="g")
top.bar(t, factor * g, 0.4, color=plots.BLUE, label="g, clipped")
top.plot(t, m, color=plots.BLACK, marker="", linewidth=2, label=r"$\hat m$")
top.plot(t, root, "--", color=plots.RED, marker="", label=r"$\sqrt{\hat v}$")
top.set_xlim(0, 29)  # room for the legend
middle.bar(t, -m / root, color=plots.BLUE)
low.plot(t, values)
plots.label(top, "A noisy gradient; rows 1 to 3 of the table", "", "gradient", legend=True)
plots.label(middle, r"Row 5, the move: $-\hat m\,/\sqrt{\hat v}$", "", "learning rates")
plots.label(low, "The weight (row 4 takes 0.001 · 0.3 of it each time)", "update", "weight")
alt = f"The gradient changes sign ({g.min():.2f} to {g.max():.2f}), its average hardly; a move "
plots.show(fig, alt + f"has {abs(m / root).max():.2f} learning rates at most.")

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

# %% [markdown] id="loop-text"
# ## 4 · A training loop you can read
#
# > *Way:* place → loss → update → **loop** → rate → kill → your run → stop → lose → keep → number formats
#
# The loop is section 3, again and again: gradient, clipping, AdamW. `batches` are its rows, `rate` says how far update number *step* goes.
#
# Is it sound? A sound loop can learn **one** small batch by heart: after 60 updates on the same 4 rows the loss is nearly 0.


# %% id="loop" tags=["lesson"]
def learn(model, batches, rate, settings, parts=1, memories=None, done=0):
    """One update for each of the batches, after `done` others; returns their losses."""
    if memories is None:
        memories = {weight: new_memory(weight) for weight in model.parameters()}
    losses = []
    for step, rows in enumerate(batches, start=done + 1):
        losses.append(backward(model, rows, parts))  # now every weight has its gradient
        factor = clip_factor(all_gradients(model), settings.gradient_clip_norm)
        for weight, memory in memories.items():
            clipped = factor * weight.grad
            decay = settings.weight_decay if weight.dim() == 2 else 0.0  # matrices alone
            adamw(weight, clipped, memory, step, rate(step - 1), decay, settings)
            weight.grad = None  # or the next update would add to it
    return losses


def steady(step):
    """The same rate for every update; section 5 has a better one."""
    return ADAMW.learning_rate


# %% id="overfit-check" tags=["check"]
torch.manual_seed(ADAMW.seed)
model = SmolLM2(shape).to(device)
losses = learn(model, [one_batch] * 60, steady, ADAMW)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}")
found_all = (model(inputs).argmax(-1) == targets).all()  # (4, 64) tokens
lesson.true("the likeliest token is the right one, at all 256 positions", found_all)
likely = "a broken loop; do not start a long run"
lesson.check("one batch is learned by heart: its loss is 0", losses[-1], 0.1, likely)

# %% [markdown] id="adamw-exercise"
# **✎ Exercise**: set `beta1` to 0 in `adamw`, then `beta2` in its place, and run its cell, the check after it and section 4 again. Which check fails, and which loop still
# learns the batch by heart? The figure below shows all three loops.
#
# <details><summary>Solution</summary>The comparison with `torch.optim.AdamW` fails both times (take it out, to go on). Without β₁ the loop still learns the batch,
# but slowly: 0.2 nats after 60 updates in place of 0.001. Each zigzag counts, nothing cancels. Without β₂ the loss jumps to thousands of nats: where a gradient
# happens to be near zero, the average is divided by next to nothing.</details>

# %% cellView="form" id="heart-figure" tags=["figure"]
# @title Figure: one batch by heart, with AdamW whole and broken { display-mode: "form" }
fig, ax = plots.figure(8, 3)
ax.semilogy(range(1, 61), losses, color=plots.BLUE, label="AdamW")
for beta, look, color in ((1, "^-", plots.ORANGE), (2, "x-", plots.BLACK)):
    torch.manual_seed(ADAMW.seed)
    tried = learn(
        SmolLM2(shape).to(device),
        [one_batch] * 60,
        steady,
        ADAMW.model_copy(update={f"adam_beta{beta}": 0.0}),
    )
    ax.semilogy(range(1, 61), tried, look, color=color, label=f"beta {beta} = 0")
plots.label(ax, "One batch, 60 times", "update", "loss (nats, log scale)", legend=True)
plots.show(
    fig,
    f"AdamW brings the loss of one batch from {losses[0]:.1f} to {losses[-1]:.3f} nats; "
    "without beta 1 it falls slowly, without beta 2 it jumps up.",
)

# %% [markdown] id="schedule"
# ## 5 · The learning rate, and a minute of training
#
# > *Way:* place → loss → update → loop → **rate** → kill → your run → stop → lose → keep → number formats
#
# How far should an update go? **Warm-up, stable, decay** ([MiniCPM](https://arxiv.org/abs/2404.06395)), as [SmolLM2](https://arxiv.org/abs/2502.02737) was trained:
# * the rate *rises* while AdamW's averages know little yet: at the first update m̂ / √v̂ is +1 or −1, so every weight would move a whole rate on the word of one batch;
# * on the *plateau* the model moves fast, but every batch pulls it about;
# * the *fall* to zero lets it settle, and the loss drops once more.
#
# Many use a cosine curve in its place, which must know its end from the first step. A plateau goes on for as long as you like, and only the fall needs an end: SmolLM2's
# was the last 20 % of the steps; short runs such as nano's did best with the last 70 % (tried on a part of the training text: `docs/log.md`). The rate is a *function of the step*, so a resumed run cannot get it wrong.
#
# **Try it.** Your run (section 7) stops once, and then goes on from its file: two phases, but one curve. Move the end of phase one: what happens to the curve? And how much of the peak is lost, on average, if
# all steps are decay?


# %% cellView="form" id="schedule-widget" tags=["widget"]
# @title Figure: warm-up, stable, decay; and a rate of your own { display-mode: "form" }
def draw_schedule(warmup, decay, phase):
    curve = Schedule(1.0, warmup, decay / 100, 0, 1000)
    rates = np.array([curve(step) for step in range(1000)])
    fig, ax = plots.figure(8, 2.8)
    ends = 0, min(warmup, 500), max(min(warmup, 500), curve.decay_start), 1000
    looks = ("warm-up", plots.SKY), ("stable", "#e6e6e6"), ("decay", plots.ORANGE)
    for (name, tint), left, right in zip(looks, ends[:-1], ends[1:], strict=True):
        ax.fill_between(
            range(left, right), rates[left:right], color=tint, alpha=0.6, label=name
        )
    ax.plot(rates, color=plots.BLACK, marker="")
    ax.axvline(phase, color=plots.BLUE, linestyle="--", label="phase two resumes")
    title = f"1,000 steps: {rates.mean():.0%} of the peak on average"
    plots.label(ax, title, "step", "learning rate (1 = its peak)", legend=True)
    alt = f"The rate rises for {warmup} steps, stays, and falls over the last {decay} %; "
    return fig, alt + f"the mean is {rates.mean():.0%} of the peak."


widgets.explore(
    draw_schedule,
    warmup=widgets.slider("warm-up steps", 0, 500, 100, 5),
    decay=widgets.slider("decay (%)", 0, 100, 20, 5),
    phase=widgets.slider("phase one ends", 50, 950, 800, 50),
)

# %% id="schedule-check" tags=["lesson", "check"]
updates = 12 if SMOKE else 150
peak, warmup = ADAMW.learning_rate, updates // 4
decay_start = updates - round(ADAMW.decay_fraction * updates)


def by_hand(step):
    """The rate of an update, counted from 0."""
    return peak * min(
        (step + 1) / warmup,  # rises
        1,  # stays
        (updates - step) / (updates - decay_start),  # falls: 1 at its start, 0 after the last
    )


theirs = Schedule(peak, warmup, ADAMW.decay_fraction, 0, updates)
lesson.check(
    "your rate is the package's at every step, and zero after the last",
    [by_hand(step) - theirs(step) for step in range(updates)] + [by_hand(updates)],
    1e-12,
)

# %% cellView="form" id="schedule-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"{updates} steps, the last {ADAMW.decay_fraction:.0%} of them decay. At which step "
    "is the rate down to half its peak?",
    guess, (decay_start + updates) / 2, within=0.03, unit="(step)",
    why=f"The decay begins at step {decay_start}; half-way from there to the end.",
)  # fmt: skip

# %% id="minute-run" tags=["lesson", "slow"]
# Your loop, with your rate, trains nano on real text: 150 batches, each in 4 parts, about a
# minute on two CPU cores. Then it goes on with a text. How many of its words are real ones?
T, B = (64, 4) if SMOKE else (NANO.data.sequence_length, ADAMW.batch_size)
order = BatchOrder(len(tokens), T, B, ADAMW.seed)  # notebook 3, section 7
batches = [rows_at(order.starts(n), T) for n in range(updates)]
torch.manual_seed(ADAMW.seed)
own = SmolLM2(shape).to(device)
minute = learn(own, batches, by_hand, ADAMW, parts=4)
written = complete(own, tokenizer, "Once upon a time", 40, temperature=0.8, top_k=50, seed=1)
print(
    f"loss {minute[0]:.2f} -> {minute[-1]:.2f} in {updates} updates; it writes:",
    " ".join(f"Once upon a time{written}".split()),
    sep="\n",
)

# %% cellView="form" id="minute-figure" tags=["figure"]
# @title Figure: a minute of your loop { display-mode: "form" }
fig, ax = plots.figure(8, 2.8)
steps, rates = range(1, updates + 1), [by_hand(n) / peak for n in range(updates)]
ax.fill_between(steps, rates, color=plots.ORANGE, alpha=0.4, label="rate (1 = its peak)")
ax.plot(steps, minute, color=plots.BLUE, marker="", label="loss")
plots.label(ax, "Your loop trains nano", "update", "loss (nats per token)", legend=True)
ax.set_ylim(bottom=0)
alt = f"In {updates} updates the loss falls from {minute[0]:.2f} to {minute[-1]:.2f} nats "
plots.show(fig, alt + "per token, while the learning rate rises, stays and falls to zero.")

# %% [markdown] id="kill"
# ## 6 · Kill it
#
# > *Way:* place → loss → update → loop → rate → **kill** → your run → stop → lose → keep → number formats
#
# ### Your own save and load
#
# What must be saved, so that your loop can go on as if nothing had happened? The weights, both averages of each, the number of updates, and the state of the random numbers.
# Below, `save` writes them into one file and `load` reads them back.
#
# The check: three updates, and a save. Then one model simply goes on; another, with weights of its own, reads the file. Are updates 4 to 6 the same?


# %% id="own-save" tags=["lesson"]
def save(path, model, memories, done):
    """Write all that a run needs to go on after `done` updates."""
    held = {"done": torch.tensor(done), "random": torch.get_rng_state()}
    for name, weight in model.named_parameters():
        held[name] = weight.detach()
        held[f"{name}.m"] = memories[weight]["m"]
        held[f"{name}.v"] = memories[weight]["v"]
    save_file(held, path)  # safetensors: named tensors, and nothing that could run


def load(path, model):
    """Fill `model` from the file; returns its optimizer's memories, and the updates done."""
    held, memories = load_file(path, device=str(device)), {}
    for name, weight in model.named_parameters():
        weight.data = held[name]
        m, v = held[f"{name}.m"], held[f"{name}.v"]
        memories[weight] = {"m": m, "v": v}
    torch.set_rng_state(held["random"].cpu())
    return memories, held["done"].item()


# %% id="own-resume" tags=["check"]
stays, reads = SmolLM2(shape).to(device), SmolLM2(shape).to(device)  # different weights
averages = {weight: new_memory(weight) for weight in stays.parameters()}
learn(stays, [one_batch] * 3, steady, ADAMW, memories=averages)
save(DRILL / "own.safetensors", stays, averages, done=3)  # DRILL: output/drill
went_on = learn(stays, [one_batch] * 3, steady, ADAMW, memories=averages, done=3)
averages, so_far = load(DRILL / "own.safetensors", reads)
resumed_own = learn(reads, [one_batch] * 3, steady, ADAMW, memories=averages, done=so_far)
lesson.check(
    "updates 4 to 6 from the file are those without a stop",
    np.subtract(went_on, resumed_own),
    0.0 if device.type == "cpu" else 1e-3,  # a GPU adds up in another order every time
)

# %% [markdown] id="kill-acts"
# `smollm2.train` is your loop with saving, logs and a panel. Its checkpoint holds what your file holds, and more:
#
# | of a checkpoint | holds | without it |
# |---|---|---|
# | `model.safetensors` | the weights | all is lost |
# | `optim.safetensors` | the optimizer's averages of each weight; the states of PyTorch's random generators | the next updates are others; whatever is drawn at random is, too |
# | `state.json` | the step, the place in the data, the plan of the rate, all settings (and, in fp16, the scale of section 11) | the next batch and the next rate are others |
# | `tokenizer.json` | the numbers of all tokens | the weights mean nothing |
# | `manifest.json` | the **SHA-256** of every file, a short number that any change of the file changes; written last | nobody knows that the rest is whole |
#
# A checkpoint is written under another name and renamed when whole. A damaged one is passed over for the one before. What becomes too old is deleted.
#
# ### The package's run, killed
#
# Many projects can resume. The question is whether the resumed run is **the same run**. Three acts with a tiny model, 30 steps (about 20 s):
# 1. One run is left alone.
# 2. A second one, in a process of its own, gets `SIGKILL` after step 17: no goodbye, no last save. (A lost machine takes its disk along as well: section 9.)
# 3. It is resumed here, from its newest checkpoint, and compared with the first, byte by byte.

# %% id="kill-smooth" tags=["lesson", "slow"]
TINY = {  # smaller than nano: seconds a run
    "model.vocab_size": 512, "data.tokenizer_vocab_size": 512, "model.hidden_size": 96,
    "model.intermediate_size": 256, "model.num_hidden_layers": 3, "data.sequence_length": 64,
    "train.batch_size": 8, "train.warmup_steps": 5,
}  # fmt: skip
(DRILL / "text.txt").write_text("\n".join(pieces[:200]), encoding="utf-8")


def drill(name, **more):
    """Settings of a run of 30 steps in output/drill/<name>; `more`: what else to set."""
    run = {
        "run.output_dir": str(DRILL / name),
        "data.input_file": str(DRILL / "text.txt"),
        "train.max_steps": 30,
        "train.save_every": 10,
        "train.log_every": 1,
        "train.sample_tokens": 8,
        "train.deterministic": device.type == "cuda",  # else its last bits differ
    }
    return load_config("nano", **TINY, **run, **more)


smooth = smollm2.train(drill("smooth"), reporter=Reporter())  # Reporter: prints nothing
print(f"left alone: {smooth.step} steps, the last at a loss of {smooth.losses[-1][1]:.3f}")

# %% cellView="form" id="loop-check" tags=["check", "slow"]
# @title Check: your loop and smollm2.train, the same 30 batches { display-mode: "form" }
plain = {"train.precision": "fp32", "train.optimizer": "adamw", "train.micro_batch_size": 2}
plain["train.learning_rate"] = 1e-3  # at a high rate rounding errors grow quickly
same = drill("plain", **plain)
package = smollm2.train(same, reporter=Reporter())
own_tokenizer = Tokenizer.from_file(package.checkpoint)
place_of = DRILL / "plain" / "data", same.data.held_out_fraction
numbers = prepare_tokens(same.data.input_file, own_tokenizer, *place_of).train.tokens
length, rows, seed = same.data.sequence_length, same.train.batch_size, same.train.seed
stream = BatchStream(numbers, BatchOrder(len(numbers), length, rows, seed), 0)
its_rate = Schedule(
    same.train.learning_rate, same.train.warmup_steps, same.train.decay_fraction, 0, 30
)
torch.manual_seed(seed)
batches = [stream.batch(n).to(device) for n in range(30)]
mine = learn(SmolLM2(same.model).to(device), batches, its_rate, same.train, parts=rows // 2)
difference = np.array(mine) - np.array([loss for _, loss in package.losses])
allowed = 1e-5 if device.type == "cpu" else 1e-3  # a GPU adds up in another order every time
lesson.check("the 30 losses of your loop are those of smollm2.train", difference, allowed)


# %% cellView="form" id="kill-child" tags=["check", "slow"]
# @title The second run is killed { display-mode: "form" }
def curve(name):
    """{step: loss} as logged so far."""
    path = DRILL / name / "logs" / TRAINING
    events = read_log(path) if path.exists() else []
    return {int(e["step"]): float(e["train_loss"]) for e in events if "train_loss" in e}


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
def same_bytes(name):
    """Check the files at the end of a run against those of the run left alone."""
    for file in ("model.safetensors", "optim.safetensors", "state.json"):
        here, there = (DRILL / run / "checkpoints/final_model.ckpt" for run in (name, "smooth"))
        same = (here / file).read_bytes() == (there / file).read_bytes()
        lesson.true(f"{name}: {file} is byte-identical", same, "missing in the checkpoint?")


# curve: the logged losses of a run, from the folded cell above
off = np.subtract(list(curve("killed").values()), list(curve("smooth").values()))
lesson.check("all 30 logged losses are those of the run left alone", off)
full = dict(smooth.losses)
off = [loss - full[step] for step, loss in resumed.losses]
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
# and trains the last ten steps again, to the same bits: `same_bytes("killed")` passes as before.
# </details>

# %% [markdown] id="run"
# ## 7 · The real run
#
# > *Way:* place → loss → update → loop → rate → kill → **your run** → stop → lose → keep → number formats
#
# **What to train.** On a first visit change nothing. Later, the six knobs below are all that you need.
#
# <details><summary>What each knob sets</summary>
#
# | knob | what it sets | left as it is |
# |---|---|---|
# | MODEL | a preset: a model and its training settings. `fits` tries the sizes, some seconds each, and takes the largest that the minutes suffice for. `smollm2-10m` wants 10 MB of text or more, `smollm2-30m` 30 MB | `auto`: the 135M on a GPU, nano without one |
# | TEXT | one of the list, a file or folder of yours (txt, jsonl, csv, parquet), or the id of a dataset of the Hub (Hugging Face's collection) | TinyStories on a GPU, else `input.txt` |
# | MINUTES | how long to train. `input.txt` is so small that steps are counted instead: more would only teach it by heart | 20 |
# | STEPS, MORE_STEPS | a run has two phases, the second resumed from the first's file; one curve of the rate is planned for both | four fifths and one fifth of what the minutes, or the preset, give |
# | PROMPT | the beginning that the samples go on from | "Once upon a time" |
# </details>
#
# **How.** Two phases, as on the command line (`python colab_train.py --max_steps N --continue_steps M`): the first ends with `final_model.ckpt`, a **fresh trainer resumes
# from that file** for the second.
#
# **What to look at.** The panel shows loss, rate, speed, memory, time left, the last safe step here and on Drive, and what the model makes of your prompt as it learns. At which
# step do the samples become words? And does the held-out curve turn up? From there the model would learn its text by heart: 135 million weights against the 300,000
# tokens of `input.txt` can do that.
#
# **To stop**, press ■ once: the run finishes its step, saves, and the notebook goes on.

# %% cellView="form" id="knobs" tags=["parameters"]
# @title Six knobs { display-mode: "form" }
MODEL = "auto"  # @param ["auto", "fits", "nano", "smollm2-10m", "smollm2-30m", "smollm2-135m"]
TEXT = ""  # @param ["input.txt", "TinyStories", "FineWeb-Edu", "Cosmopedia"] {allow-input:true}
MINUTES = 20  # @param {type:"number"}
STEPS = 0  # @param {type:"integer"}
MORE_STEPS = 0  # @param {type:"integer"}
PROMPT = "Once upon a time"  # @param {type:"string"}

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
fits = MODEL == "fits"
preset, why = planning.preset_that_fits(MINUTES) if fits else choose_preset(MODEL)
print(f"text: {text}\npreset: {preset} ({why})")
name = preset if dataset is None else f"{preset}-{Path(text).stem}"  # each text its own run
run_dir = place.output_dir / name
drive_dir = place.drive_dir / name if place.drive_dir else None

# %% cellView="form" id="run-config" tags=["lesson"]
# @title Settings and steps of your run { display-mode: "form" }
by_clock = dataset and MINUTES and not (STEPS or SMOKE)
settings = {
    "data.input_file": str(REPO / "input.txt"), "data.dataset": dataset,
    "run.output_dir": str(run_dir), "run.drive_dir": drive_dir and str(drive_dir),
    "run.compare_with": "HuggingFaceTB/SmolLM2-135M",
    "train.prompts": (PROMPT, "The", "Why does"),
    "train.minutes": MINUTES if by_clock else None,
    "train.val_max_tokens": 2**14 if SMOKE or dataset else None,
    "data.held_out_fraction": 0.01 if text in SETS else None,  # of 100 MB
} | (TINY if SMOKE else {})  # fmt: skip
config = load_config("nano" if SMOKE else preset, **settings)
planned = config.train.max_steps
if by_clock or SMOKE:  # what they buy: some steps are tried
    facts = planning.plan(config, minutes=(MINUTES,), seconds=0 if SMOKE else 4)
    print(planning.table(facts), end="\n\n")
    planned = facts["buys"][0]["steps"]
steps, more = (30, 15) if SMOKE else (STEPS or 4 * planned // 5, MORE_STEPS or planned // 5)
total, often = steps + more, max(1, (steps + more) // 8)
settings |= {"train.max_steps": steps, "train.continue_steps": more}
settings |= {"train.sample_every": often, "train.val_every": often}
config = load_config("nano" if SMOKE else preset, **settings)
train = config.train
about = "about " if by_clock else ""  # the run itself measures again, and keeps its number
length = config.data.sequence_length
print(f"{about}{steps} + {more} steps of {train.batch_size} x {length} tokens")
muon = f", Muon's {train.muon_learning_rate}" if train.optimizer == "muon" else ""
print(f"peak learning rates: AdamW's {train.learning_rate}{muon}")

# %% id="run-train" tags=["slow", "lesson"]
# run_dir: this run's folder; keep_training goes on without Drive where Drive does not answer
panel = live_panel(logs=run_dir / "logs")
result = keep_training(config, lambda config: smollm2.train(config, reporter=panel))
panel.end()  # shown once more: the last copy to Drive lands after the last step
done = load_config(None, run_dir / "config.yaml").train  # with its number of steps
steps, total = done.max_steps, done.max_steps + done.continue_steps

# %% cellView="form" id="run-after" tags=["check", "figure"]
# @title Figure: what the run reached; how to go on, and two checks { display-mode: "form" }
if result.stopped_by:
    print(f"Stopped at step {result.step} of {total}; saved in {result.checkpoint}.")
    print("To go on, run the training cell again: it continues from there.")
    print("So does Run all, today or tomorrow.")
else:
    print(result.table())
    if not result.losses:
        print("\nNothing was left to train: this run has had all its steps. For more, set")
        print(f"STEPS (section 7) to {result.step}, MORE_STEPS to 100, say, and run all.")
logs = run_dir / "logs"
history = read_log(logs / TRAINING)
trained = [(int(e["step"]), float(e["train_loss"])) for e in history if "train_loss" in e]
chosen = config.model
expected = math.log(chosen.vocab_size) + chosen.hidden_size * chosen.initializer_range**2 / 2
if trained and trained[0][0] == 1:  # logs that were lost with a machine begin later
    likely = "a wrong initialisation, or a tokenizer with fewer entries"
    lesson.check("the first loss is ln V + σ²/2", trained[0][1] - expected, 0.5, likely)
resumes = [event for event in read_log(logs / CHECKPOINTS) if event["event"] == "resumed"]
begun = [int(event["step"]) for event in resumes if event["name"] == "final_model.ckpt"]
if steps + 1 in dict(result.losses):  # phase two began in this session
    lesson.true("phase two resumed from phase one's file", begun[-1] == steps)

plots.show(*draw_report(config, result.references))  # also in the run's folder: report.png

# %% [markdown] id="run-beside"
# **Beside others.** The lines and the figure above measure others on the same held-out bytes, too: the packers `gzip` and `xz`; counting; and, with the network, the official
# SmolLM2-135M, which read 2 trillion tokens (a minute on a CPU, seconds on a GPU). How near do you get?
# * **Bits per byte** is what all can be compared in: how many bits a byte of the text costs. A packer's are the size of its file; a model's are its nats per token, divided by ln 2
#   (nats to bits) and by the bytes of a token. A loss of 3.8 at 3.12 bytes a token: 3.8 / 0.693 / 3.12 = 1.76.
# * **Counting** is a model without a network: a table of which byte followed the same few bytes before, and how often, in the training text.
#
# <details><summary>Go deeper: nano's optimizer is not AdamW alone</summary>
#
# SmolLM2's optimizer is AdamW. The preset `nano` takes [**Muon**](https://kellerjordan.github.io/posts/muon/) for the matrices of its blocks. Muon averages the gradient of a whole
# matrix and then makes all its directions equally strong, so that not only the few learn that dominate it. Embedding and norms keep AdamW. Each has its rate; both
# follow the same curve.
# </details>
#
# **✎ Exercise**, when your run has ended: ask for 100 steps more. Run all once more: the cell above says what to set. What happens to the learning rate?
#
# <details><summary>Solution</summary>A run that had ended had decayed to 0. A new cycle begins: a short warm-up, a plateau, a decay to 0 at the new end; a
# message says so.</details>

# %% [markdown] id="stop"
# ## 8 · The stop button stops gracefully
#
# > *Way:* place → loss → update → loop → rate → kill → your run → **stop** → lose → keep → number formats
#
# ■ sends the process an **interrupt** (`SIGINT`), the same signal as Ctrl-C. Training catches it: the step is finished, a checkpoint written, `train` returns. A
# second ■ stops at once.
#
# Nobody presses it during Run all, so the next cell presses it itself, after step 14, in a tiny run that copies to a folder which plays
# Google Drive. At which step is the checkpoint?


# %% id="stop-run" tags=["slow", "lesson", "check"]
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
by = stopped.stopped_by
lesson.true("train returned, and says which signal stopped it", by == signal.SIGINT)
lesson.true("the step that was under way is saved", stopped.step == 14)
# kept, the package's list of checkpoints: a row for each, with step, bytes, hash and state
rows = kept([("here", DRILL / "stopped" / "checkpoints"), ("pretend Drive", pretend)])
whole = [row for row in rows if row["step"] == 14 and row["state"] == "whole"]
lesson.true("it is on this machine and on the pretended Drive, whole", len(whole) == 2)

# %% [markdown] id="died"
# ## 9 · "My runtime died"
#
# > *Way:* place → loss → update → loop → rate → kill → your run → stop → **lose** → keep → number formats
#
# Open this notebook again, **Runtime > Run all**. That is all: the newest checkpoint, of this machine or of Drive, is found, every byte verified, and the run
# goes on. (Should the old runtime still live, you are told: stop one of the two, they do the same work.)
#
# The proof: the tiny run's whole folder is deleted, as if the machine were gone. Only the pretended Drive is left. Are its bytes enough?

# %% id="died-run" tags=["slow", "lesson", "check"]
shutil.rmtree(DRILL / "stopped")
restored = smollm2.train(with_drive, reporter=Lines())
first_step = restored.losses[0][0]
lesson.true("it began where the lost machine had stopped", first_step == 15)
same_bytes("stopped")

# %% [markdown] id="kept"
# ## 10 · What lies where
#
# > *Way:* place → loss → update → loop → rate → kill → your run → stop → lose → **keep** → number formats
#
# A checkpoint is an ordinary Hugging Face folder that also holds the optimizer's state: AdamW keeps two averages for every weight. All are fp32, four bytes
# each, except that Muon, which trains the matrices of nano's blocks, needs only one. How large is a checkpoint of your model?

# %% cellView="form" id="kept-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
places = [("this machine", run_dir / "checkpoints")]
places += [("Drive", drive_dir)] if drive_dir else []
kept_rows = kept(places)
here = [row for row in kept_rows if row["place"] == "this machine"]
size = max(row["bytes"] for row in here) / 1e6
parameters = parameter_count(config.model)
guess = None  # @param {type:"raw"}
lesson.predict(
    f"The model has {parameters:,} parameters. How many megabytes has one checkpoint?",
    guess, size, unit="MB",
    why="12 bytes per parameter, 8 where Muon trains it. For SmolLM2-135M with AdamW: 1.61 GB, "
    "so Drive gets the newest few only, and a free 15 GB Drive is not filled.",
)  # fmt: skip

# %% cellView="form" id="kept-check" tags=["check"]
# @title Check: every checkpoint, its size and its hash { display-mode: "form" }
for row in kept_rows[:12]:
    facts = f"{row['bytes'] / 1e6:>9.1f} MB  sha256 {row['sha256'][:8]}  {row['state']}"
    print(f"{row['place']:<13}{row['name'][:44]:<45}{facts}")
damaged = [row for row in here if row["state"] != "whole"]
lesson.true("every checkpoint on this machine is whole", not damaged)
ratio = 1e6 * size / training_bytes(config.model, train.optimizer)
lesson.check("a checkpoint has 8 or 12 bytes per parameter (and a tokenizer)", ratio - 1, 0.1)
print(f"\ntalk to it: {result.table().splitlines()[-1].removeprefix('talk to it').strip()}")

# %% [markdown] id="dtype"
# ## 11 · Go deeper: which number format, and why
#
# > *Way:* place → loss → update → loop → rate → kill → your run → stop → lose → keep → **number formats**
#
# Your loop computed in **fp32**, numbers of 32 bits. On a GPU numbers of half the size are several times faster (a T4's data sheet: 8 million million operations a second in
# fp32, 65 in fp16). There are two such formats:
# * **bf16** keeps the range of fp32, and about 2 digits (fp32 has 7);
# * **fp16** keeps 3 digits, but not the range.
#
# Of the two, a T4's fast matrix units know only fp16. (It *emulates* bf16, slowly, which is why `torch.cuda.is_bf16_supported()` says yes there.) Which format
# does this machine get, and how small can a number be in each?

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
# the update. Should one overflow to infinity, the update is skipped and the scale halved. bf16 has the range of fp32, so it needs no scale. The weights themselves stay
# fp32, always.
#
# **Are real gradients small enough to need this?** The figure looks at the next update of your loop; beside it stand the gradients of the batch that the model knows by
# heart: where the loss is nearly 0, so are they. Which share of an ordinary update's gradients does fp16 blur, and which does it lose?

# %% id="dtype-check" tags=["check"]
scale = 2.0**16
small = torch.tensor([1e-8, 3e-8, 5e-7])
plain, scaled = small.half().float() / small, (small * scale).half().float() / scale / small
lesson.check_fails("fp16 without scaling", lambda: lesson.check("its error", plain - 1, 0.01))
lesson.check("scaled by 65,536, the same gradients survive fp16", scaled - 1, 1e-3)
others = [p for p in model.parameters() if p.dtype != torch.float32]
lesson.true("the model's weights are fp32", not others)

# %% cellView="form" id="dtype-figure" tags=["figure"]
# @title Figure: what each format holds, and real gradients { display-mode: "form" }
own.zero_grad()
backward(own, rows_at(order.starts(updates), T), 4)  # a batch that it has not seen
model.zero_grad()
backward(model, one_batch, 1)  # the one that it knows by heart
kinds = {f"update {updates + 1}\nof nano": own, "one batch,\nby heart": model}
fig, ax = plots.figure(8, 3.6)
for y, name in enumerate(("float32", "bfloat16", "float16")):
    facts, color = torch.finfo(getattr(torch, name)), plots.PALETTE[y]
    ends = (facts.smallest_normal * facts.eps, facts.smallest_normal, facts.max)
    last, low, high = map(math.log10, ends)
    ax.barh(y, high - low, left=low, height=0.5, color=color)
    ax.barh(y, low - last, left=last, height=0.5, color="white", edgecolor=color, hatch="///")
shares = []
for y, trained in enumerate(kinds.values(), start=3):
    sizes = all_gradients(trained).abs().cpu()
    sizes = sizes[sizes > 0]
    blurred = (sizes < torch.finfo(torch.float16).smallest_normal).float().mean()
    lost = (sizes < 2.0**-25).float().mean()  # half of the smallest number
    shares.append(f"{blurred:.0%} lose digits, {lost:.2%} become 0")
    counts, edges = np.histogram(sizes.log10(), bins=60, range=(-16, 2))
    bars = {"width": edges[1] - edges[0], "bottom": y - 0.3, "color": plots.PALETTE[y]}
    ax.bar(edges[:-1], 0.8 * counts / counts.max(), align="edge", **bars)
    ax.text(1, y, shares[-1].replace(", ", ",\n"), va="center", fontsize=9)
ax.set_yticks(range(5), ["fp32", "bf16", "fp16", *kinds])
ax.set(xlim=(-16, 6), xticks=range(-16, 7, 2))
title = "What each format can hold (hatched: with fewer digits), and gradients in fp16"
plots.label(ax, title, "size of a number (power of ten); bf16 and fp32 go on at both ends", "")
alt = "Gradients against the range of fp16: of an ordinary update of nano "
plots.show(fig, alt + "{}; of a batch known by heart {}.".format(*shares))

# %% [markdown] id="self-test"
# ## What you can now explain
#
# You have written a loop that trains, and have seen that the package's is the same; you have killed, stopped and lost a run and got its bytes back.
#
# <details><summary>The loss of one batch, repeated, stays at 6. Should you try a longer run?</summary>No. A sound loop learns one batch by heart. Look at
# targets, gradients, optimizer.</details>
#
# <details><summary>What must a checkpoint hold, beside the weights, for a bit-exact resume?</summary>The averages of the optimizer, the step, the data position, random
# states, the schedule's plan, the scaler's state, and the settings that the batches depend on: seed, rows, length, and the SHA-256 of the token file. The bits are the same
# where the sums are: on the same kind of processor with as many threads, on a GPU with `train.deterministic`. Elsewhere the run goes on just as well, but its last digits differ.
# </details>
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
# <details><summary>Why fp16 and not bf16 on a T4, and what does it need?</summary>It has no bf16 units. fp16 lacks range, so the loss is scaled.</details>
#
# ## Next
#
# It writes. What does it think? [5 · Sample and look inside](05_sample_and_look_inside.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/05_sample_and_look_inside.ipynb)) takes the checkpoints of this run.
#
# **Free the GPU.** Colab counts the hours. When you are done, tick what you want and run this form: *flush* makes Drive write its cache back and unmounts it,
# *free* hands the machine back. Both are off, so that Run all never does it for you.

# %% cellView="form" id="end-form" tags=["parameters", "check"]
# @title Your score; and finish { display-mode: "form" }
FLUSH_DRIVE = False  # @param {type:"boolean"}
FREE_MACHINE = False  # @param {type:"boolean"}
lesson.score()
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
