# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/02_count_every_parameter.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/02_count_every_parameter.html)

# %% [markdown] id="title"
# # 2 · Count every parameter
#
# You will be able to
# * derive all 134,515,008 parameters of SmolLM2-135M from six numbers, and prove it tensor by tensor;
# * find out from a *wrong* sum what was forgotten;
# * predict memory and arithmetic (KV cache, FLOPs, training memory) before you rent a GPU, and check the prediction by measuring.
#
# The way: first the parameters (guess, ledger, map, a wrong sum, what if: sections 1 to 5), then what they cost (KV cache, FLOPs, memory, a T4: sections 6 to 9).
#
# **Time** about 30 minutes to read, half a minute to run · **hardware** any CPU · **network** none.
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
import time

import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from torch.utils.flop_counter import FlopCounterMode

from smollm2 import SmolLM2, SmolLM2Config, load_config, parameter_table, plots, widgets
from smollm2.model import KVCache
from smollm2.notebook import lesson
from smollm2.parameters import flops_per_token, group_totals, parameter_count

config = SmolLM2Config()
NAMES = ("embedding", "attention", "MLP", "norms", "output head")
COLORS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.BLACK, plots.PINK)
KINDS = dict(zip(NAMES, COLORS, strict=True))
GIB = 2**30
T4_GIB = 14.7  # what PyTorch can use of a T4's 16 GB

# %% [markdown] id="guess"
# ## 1 · Guess first
#
# > *Way:* **guess** → ledger → map → a wrong sum → what if? → KV cache → FLOPs → memory → a T4
#
# The name says 135M: 135 million parameters, the numbers that training changes. Is most of it the vocabulary, attention, or the MLPs? Guess before you count; a number
# you have been wrong about is one you remember.
#
# Six numbers decide everything; the letters are those of notebook 1.

# %% id="six-numbers" tags=["lesson"]
V, C, M = config.vocab_size, config.hidden_size, config.intermediate_size
L, H, K = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
D = config.head_dim  # C / H
print(f"V = {V:,} vocabulary   C = {C} hidden   M = {M:,} MLP features   L = {L} layers")
print(f"H = {H} query heads   K = {K} key/value heads, and D = C / H = {D} numbers a head")

# %% cellView="form" id="predict-mlp" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
share = group_totals(parameter_table(config))["MLP"] / parameter_count(config)
lesson.predict(
    "What share of all parameters sits in the MLPs (in %)?",
    guess, 100 * share, unit="%",
    why="Three matrices of 576 x 1,536 in each layer outweigh everything else: attention "
    "shares heads, and the vocabulary is stored once.",
)  # fmt: skip

# %% [markdown] id="ledger"
# ## 2 · The ledger
#
# > *Way:* guess → **ledger** → map → a wrong sum → what if? → KV cache → FLOPs → memory → a T4
#
# Every parameter sits in a matrix or in the gain of a norm (no layer has a bias). Here is the formula of each, in the order in which data passes.
# A matrix with C inputs and n outputs has C · n numbers. The embedding comes first; the output matrix is the same tensor (*tied*), so it costs nothing more.

# %% id="by-hand" tags=["lesson"]
embedding = V * C
attention = C * H * D + C * K * D + C * K * D + H * D * C  # q, k, v, o
mlp = C * M + C * M + M * C  # gate, up, down
norms = C + C  # the gains before attention and before the MLP
block = attention + mlp + norms
total = embedding + L * block + C  # the last C: the final norm
print(f"block: attention {attention:,} + MLP {mlp:,} + norms {norms:,} = {block:,}")
print(f"embedding {embedding:,} + {L} x {block:,} + {C} = {total:,}")

# %% id="by-hand-check" tags=["check"]
lesson.check("your sum is what the published weights hold", total - 134_515_008)
lesson.check("and what the package computes", total - parameter_count(config))

# %% [markdown] id="ledger-why"
# A sum can be right by luck: two mistakes may cancel. So the package writes the ledger row by row, each with its formula, shape and number. The cell after it
# holds every row against the tensor it speaks of. The model is made on the `meta` device: shapes without memory.

# %% cellView="form" id="rows" tags=["lesson"]
# @title The ledger, row by row { display-mode: "form" }
rows = parameter_table(config)
words = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
words = (*words, "num_key_value_heads", "head_dim")
for row in [*rows[:10], rows[-1]]:
    name, formula = row.name.removeprefix("model.").removesuffix(".weight"), row.formula
    for word, letter in zip(words, "VCMHKD", strict=True):
        formula = formula.replace(word, letter)
    shape = " x ".join(f"{n:,}" for n in row.shape)
    print(f"{name:33} {formula:11} {shape:>12} {row.count:>11,}")
summed = sum(row.count for row in rows)
print(f"{len(rows)} rows; the nine of layer 0 come {L} times. Sum {summed:,}")

# %% id="rows-check" tags=["check"]
with torch.device("meta"):
    model = SmolLM2(config)
tensors = dict(model.named_parameters())
names = {row.name for row in rows}
lesson.true("every tensor has a row, and every row a tensor", names == set(tensors))
wrong = []
for row in rows:
    tensor = tensors[row.name]
    if (tuple(tensor.shape), tensor.numel()) != (row.shape, row.count):
        wrong.append(row.name)
lesson.check("every row has its tensor's shape and number", len(wrong))
lesson.check("the tensors sum to the total", sum(t.numel() for t in tensors.values()) - total)
is_tied = model.lm_head.weight is model.model.embed_tokens.weight
lesson.true("the output matrix is the embedding itself, not a copy", is_tied)

# %% [markdown] id="map"
# ## 3 · A map of the model
#
# > *Way:* guess → ledger → **map** → a wrong sum → what if? → KV cache → FLOPs → memory → a T4
#
# The ledger as a picture: every parameter has the same area. The column on the left is the vocabulary; each of the 30 thin rows is a block. Keys and
# values, thanks to sharing, are slivers, and the norms cannot be seen at all: 1,152 numbers a block. What strikes you most?

# %% cellView="form" id="map-figure" tags=["figure"]
# @title Figure: a map of the model { display-mode: "form" }
fig, ax = plots.figure(7.5, 4.2)
split, words = embedding / total, {"ha": "center", "va": "center", "fontsize": 9}
ax.add_patch(Rectangle((0, 0), split, L, facecolor=KINDS["embedding"], edgecolor="white"))
text = f"embedding\n{embedding:,}\n{split:.1%}"
ax.text(split / 2, L / 2, text, color="white", **words)
for layer in range(L):
    left = split
    for row in rows[1 + 9 * layer : 10 + 9 * layer]:
        width = row.count / block * (1 - split)
        style = {"facecolor": KINDS[next(iter(group_totals([row])))], "lw": 0.4}
        ax.add_patch(Rectangle((left, layer), width, 1, edgecolor="white", **style))
        if layer == 0 and width > 0.02:
            name = row.name.split(".")[-2].removesuffix("_proj")
            ax.text(left + width / 2, -0.4, name, ha="center", va="bottom", fontsize=9)
        left += width
middles = {"attention": attention / block / 2, "MLP": 1 - mlp / block / 2}
for (name, middle), count in zip(middles.items(), (attention, mlp), strict=True):
    text, box = f"{name}\n{L * count / total:.1%}", {"fc": "white", "ec": "none"}
    ax.text(split + middle * (1 - split), L / 2, text, bbox=box, **words)
ax.set(xlim=(0, 1), ylim=(L, -2), yticks=[0.5, 9.5, 19.5, 29.5], yticklabels=[1, 10, 20, 30])
ax.grid(False)
plots.label(ax, "Equal area, equal number of parameters", "share of all parameters", "layer")
alt = "Map: embedding 21.0 %; 30 equal rows for the blocks, in each q, k, v, o "
plots.show(fig, alt + "(19.7 % over all blocks) and gate, up, down (59.2 %).")

# %% id="shares-check" tags=["check"]
totals = group_totals(rows)
for kind, count in totals.items():
    print(f"{kind:10} {count:>11,}  {count / total:7.2%}")
shares = torch.tensor([totals["MLP"] / total, totals["attention"] / total])
lesson.check(
    "MLP share is 59.2 %, attention 19.7 %", shares - torch.tensor([0.592, 0.197]), 1e-3
)

# %% [markdown] id="map-exercise"
# **✎ Exercise**: SmolLM2-360M and 1.7B: which share does the vocabulary have there? Why does tying matter less in large models?
#
# <details><summary>Solution</summary>
#
# 13.0 % and 5.9 %. The vocabulary grows with the width, the blocks with its square.
# ```python
# for preset in ("smollm2-360m", "smollm2-1.7b"):
#     totals = group_totals(parameter_table(load_config(preset).model))
#     print(preset, f"{totals['embedding'] / sum(totals.values()):.1%}")
# ```
# </details>

# %% [markdown] id="wrong-sum"
# ## 4 · A sum that is wrong, and what it tells
#
# > *Way:* guess → ledger → map → **a wrong sum** → what if? → KV cache → FLOPs → memory → a T4
#
# A student's README about a model of this very architecture (the one that this course grew out of) adds up the parts and gets **107,972,928**. The missing
# fifth is then explained away as "other parameters". But a model has no other parameters. Divide what is missing by the number of layers before you guess.

# %% id="wrong-sum-numbers" tags=["lesson"]
claimed = 107_972_928
missing = total - claimed
print(f"missing {missing:,} = {missing / total:.1%} of the model = {L} x {missing / L:,.0f}")
print(f"in one layer: attention {attention:,}; one MLP matrix {C * M:,}; the norms {norms:,}")

# %% cellView="form" id="predict-missing" tags=["predict"]
# @title Your prediction { display-mode: "form" }
forgotten = "?"  # @param ["?", "embed_tokens", "q_proj", "o_proj", "gate_proj", "up_proj"]
lesson.predict(
    "That README lists the embedding, q, k, v, o, the norms, and an MLP of 'up' and 'down'. "
    "Which matrix did it forget (its name in the ledger)?",
    forgotten, "gate_proj",
    why="SwiGLU has three. By chance one is exactly as large as all of attention in a layer: "
    "the number cannot tell them apart, the list can.",
)  # fmt: skip

# %% id="wrong-sum-check" tags=["check"]
gates = sum(row.count for row in rows if "gate_proj" in row.name)
mended = claimed + gates
lesson.check("the wrong sum plus thirty gate_proj matrices is the total", mended - total)
lesson.check("one gate_proj and all of attention have the same size", C * M - attention)

# %% [markdown] id="counterfactual"
# ## 5 · What if?
#
# > *Way:* guess → ledger → map → a wrong sum → **what if?** → KV cache → FLOPs → memory → a T4
#
# Each design choice has a price in parameters. Move the controls:
# * What does untying cost?
# * What do nine key/value heads cost instead of three?
# * How narrow must a 60-layer model be to stay at 135M?
#
# (The MLP keeps its width of 8/3 of the hidden size: three such matrices are as many numbers as the two of width 4 in older models.)


# %% cellView="form" id="counterfactual-widget" tags=["widget", "figure"]
# @title Try it: what if? { display-mode: "form" }
def what_if(heads, width, depth, tied):
    """Bars of SmolLM2-135M and of the model with these choices; heads is 'query:key/value'."""
    query, shared = map(int, heads.split(":"))
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3}
    shape |= {"num_attention_heads": query, "num_key_value_heads": shared}
    other = SmolLM2Config(**shape, num_hidden_layers=depth, tie_word_embeddings=tied)
    fig, ax = plots.figure(7.5, 2.3)
    for y, each in enumerate((other, config)):
        start = 0
        for kind, count in group_totals(parameter_table(each)).items():
            style = {"color": KINDS[kind], "label": None if y else kind}
            style["hatch"] = "//" * (kind == "MLP")  # orange and green are alike to some
            ax.barh(y, count / 1e6, left=start, edgecolor="white", **style)
            start += count / 1e6
        ax.text(start, y, f" {parameter_count(each):,}", va="center", fontsize=9)
    total, usual = parameter_count(other), parameter_count(config)
    ax.set_yticks([0, 1], ["yours", "SmolLM2-135M"])
    ax.set_xlim(0, 1.3 * max(total, usual) / 1e6)
    chosen = f"{depth} layers of width {width}, heads {heads}, {'tied' if tied else 'untied'}"
    plots.label(ax, chosen, "parameters (millions)", "")
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.35), ncols=5, frameon=False)
    return fig, f"{total:,} parameters, {total / usual:.2f} times SmolLM2-135M: {chosen}."


# %% cellView="form" id="counterfactual-show" tags=["widget", "figure"]
# @title Try it: controls { display-mode: "form" }
widgets.explore(
    what_if,
    heads=widgets.choice("heads q:kv", ["9:9", "9:3", "9:1", "12:4"], "9:9"),
    width=widgets.slider("width", 144, 1152, 576, step=72),
    depth=widgets.slider("layers", 1, 60, 30),
    tied=widgets.switch("tied embeddings", True),
)


# %% id="counterfactual-check" tags=["check"]
def count_with(**changes):
    """Parameters of SmolLM2-135M with these fields changed."""
    return parameter_count(SmolLM2Config(**changes))


untied = count_with(tie_word_embeddings=False)
lesson.check("untied, the vocabulary counts twice: 162,826,560", untied - 162_826_560)
many, one = count_with(num_key_value_heads=9), count_with(num_key_value_heads=1)
lesson.check("nine key/value heads (multi-head): 147,786,048", many - 147_786_048)
lesson.check("one key/value head (multi-query): 130,091,328", one - 130_091_328)
deep = count_with(num_hidden_layers=60, hidden_size=432, intermediate_size=1152)
lesson.check("60 layers want a width of 432 (relative)", deep / total - 1, 0.05)

# %% [markdown] id="counterfactual-exercise"
# **✎ Exercise**: design a model of 100 million parameters, within 1 %, with the same vocabulary, tied, and head_dim 64. Prove it with `lesson.check`.
#
# <details><summary>Solution</summary>
#
# For example 20 layers, which leaves the width, and so head_dim, as they are.
# ```python
# lesson.check("100M", count_with(num_hidden_layers=20) / 1e8 - 1, 0.01)
# ```
# </details>

# %% [markdown] id="kv-cache"
# ## 6 · The KV cache: what a conversation weighs
#
# > *Way:* guess → ledger → map → a wrong sum → what if? → **KV cache** → FLOPs → memory → a T4
#
# From here on: what the parameters cost, first while the model writes. It keeps keys and values of every earlier token, in every layer: the **KV cache**. Weights are paid
# once; this is paid per token and per user. It is the [real reason](https://arxiv.org/abs/1911.02150) for sharing heads: 9 → 3 saves 9 % of the parameters, but two thirds of the cache.

# %% cellView="form" id="predict-cache" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
per_token = 2 * L * K * D * 2  # key and value, layers, heads, numbers a head, bytes of bf16
lesson.predict(
    "How many bytes does one token of context cost in bf16 (2 bytes a number)?",
    guess, per_token, unit="bytes",
    why=f"2 (key and value) x {L} layers x {K} heads x {D} numbers x 2 bytes = {per_token:,}.",
)  # fmt: skip

# %% id="cache-check" tags=["check"]
cache = KVCache(config, batch=1, capacity=256, dtype=torch.bfloat16, device="cpu")
measured, long = cache.both.nbytes, 8192 * per_token / 2**20  # keys and values
print(f"cache of 256 tokens: {measured:,} bytes; of 8,192 tokens: {long:.0f} MiB")
lesson.check("predicted bytes are the cache's bytes", measured - 256 * per_token)

# %% cellView="form" id="cache-figure" tags=["figure"]
# @title Figure: the cache against the weights { display-mode: "form" }
fig, ax = plots.figure(7.5, 2.9)
tokens = [2**n for n in range(7, 18)]
names = {9: "9 heads (multi-head)", 3: "3 heads (SmolLM2)", 1: "1 head (multi-query)"}
for number, (heads, name) in enumerate(names.items()):
    size = [n * per_token / K * heads / 2**20 for n in tokens]
    ax.loglog(tokens, size, marker=plots.MARKERS[number], label=name, base=2)
ax.axhline(total * 2 / 2**20, color=plots.BLACK, ls="--", label="all weights in bf16")
ax.set_xticks(tokens[::2], [f"{n:,}" for n in tokens[::2]])
ax.set_yticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
title = "With 3 heads the cache outweighs the model from 11,700 tokens on"
plots.label(ax, title, "context (tokens)", "KV cache (MiB, bf16)", legend=True)
alt = "KV cache in MiB against context: 180 MiB at 8,192 tokens with 3 heads, 540 with 9, 60 "
plots.show(fig, alt + "with 1; the weights, 257 MiB, are passed at 11,700.")

# %% [markdown] id="kv-cache-exercise"
# **✎ Exercise**: how long must a conversation with SmolLM2-1.7B be (32 key/value heads) until its cache outweighs its weights?
#
# <details><summary>Solution</summary>
#
# A token costs 196,608 bytes, so the 3.4 GB of bf16 weights are passed after 17,400 tokens.
# ```python
# big = load_config("smollm2-1.7b").model
# a_token = 2 * big.num_hidden_layers * big.num_key_value_heads * big.head_dim * 2
# print(f"{a_token:,} bytes a token, {2 * parameter_count(big) / a_token:,.0f} tokens")
# ```
# </details>

# %% [markdown] id="flops"
# ## 7 · FLOPs: how much arithmetic is a token?
#
# > *Way:* guess → ledger → map → a wrong sum → what if? → KV cache → **FLOPs** → memory → a T4
#
# A **FLOP** is one addition or multiplication of floating-point numbers. A matrix entry costs two a token, one of each. Training does it three times:
# forward; backward for the weight's own gradient; and backward for the gradient of its input, which the layer before needs for its own weights. So [6 FLOPs a parameter](https://arxiv.org/abs/2001.08361) and token, plus
# attention, which grows with the distance looked back.
#
# PyTorch can count what it executes, even on `meta` tensors that hold no numbers. Do rule and count agree?

# %% id="flops-check" tags=["check"]
length = load_config("smollm2-135m").data.sequence_length  # tokens of a row in training
with torch.device("meta"):
    ids = torch.zeros(1, length, dtype=torch.long)
with FlopCounterMode(display=False) as counter:
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
counted = counter.get_flop_counts()["Global"]  # of each operation of PyTorch
matrices = length * flops_per_token(config, 0)  # looking back 0 tokens: the matrices alone
attending = length * flops_per_token(config, length) - matrices
print(f"one row of {length} tokens, forward and backward, in GFLOP:")
print(f"matrices {matrices / 1e9:.1f}, attention {attending / 1e9:.1f}")
ratio = counted[torch.ops.aten.mm] / matrices  # mm: products of two matrices
lesson.check("6 FLOPs a matrix parameter and token (relative)", ratio - 1, 1e-9)
ratio = counted[torch.ops.aten.bmm] / attending  # bmm: one product for each head
lesson.check("attention: the count is twice the rule (relative)", ratio / 2 - 1, 1e-9)

# %% [markdown] id="flops-note"
# Why twice? Computed plainly, attention multiplies the whole square of scores and throws the future half away. Kernels that do scores, mask and softmax in one go skip
# that half. The rule
# counts useful work alone.

# %% cellView="form" id="flops-figure" tags=["figure"]
# @title Figure: arithmetic a token { display-mode: "form" }
fig, ax = plots.figure(7.5, 2.7)
lengths = [2**n for n in range(7, 16)]
base = [flops_per_token(config, 0) / 1e9] * len(lengths)
extra = [flops_per_token(config, n) / 1e9 - base[0] for n in lengths]
ax.bar(range(len(lengths)), base, color=plots.GREEN, label="matrices: 6 x parameters")
style = {"color": plots.ORANGE, "hatch": "//", "edgecolor": "white"}
ax.bar(range(len(lengths)), extra, bottom=base, label="attention", **style)
ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
title = "Attention costs as much as all matrices from 7,800 tokens on"
plots.label(ax, title, "sequence length (tokens)", "training GFLOP a token", legend=True)
alt = "Training GFLOP a token: 0.81 for the matrices at every length; attention adds 0.05 at "
plots.show(fig, alt + "512, 0.21 at 2,048 and 3.4 at 32,768 tokens.")

# %% [markdown] id="memory"
# ## 8 · Training memory: predict, then measure
#
# > *Way:* guess → ledger → map → a wrong sum → what if? → KV cache → FLOPs → **memory** → a T4
#
# Training holds four fp32 numbers (4 bytes each) for every parameter: the weight, its gradient (how the loss changes with it), and the two averages of the optimizer Adam
# (notebook 4; papers call them its *moments*). That part does not depend on the batch. The rest are **activations**: numbers of the forward pass that the backward pass
# will need.
#
# Half precision (2 bytes a number, but only 2 or 3 digits: notebook 4, section 11) shrinks the activations, not these 16 bytes. An update changes a weight by less than its third
# digit: rounded to three digits, nothing would have changed. And the square of a gradient of 0.0001 would be 0 in fp16. Guess the fixed part first.

# %% cellView="form" id="predict-memory" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
fixed = 16 * total
lesson.predict(
    "Weights, gradients and Adam's state of SmolLM2-135M in fp32: how many GB?",
    guess, fixed / 1e9, unit="GB",
    why=f"4 numbers x 4 bytes x {total:,} = {fixed / 1e9:.2f} GB. A checkpoint leaves the "
    f"gradients out: {12 * total / 1e9:.2f} GB.",
)  # fmt: skip

# %% id="fixed-check" tags=["check"]
nano = load_config("nano").model  # small enough to run here; the bytes a parameter are the same
small = SmolLM2(nano)
optimizer = torch.optim.AdamW(small.parameters())
ids = torch.randint(nano.vocab_size, (2, 64))
small.loss(ids, ids).backward()
optimizer.step()
held = 0
for weight in small.parameters():
    adam = optimizer.state[weight]
    averages = adam["exp_avg"].nbytes + adam["exp_avg_sq"].nbytes
    held += weight.nbytes + weight.grad.nbytes + averages
print(f"held for {parameter_count(nano):,} parameters: {held:,} bytes")
lesson.check("16 bytes a parameter", held / parameter_count(nano) - 16, 1e-9)

# %% [markdown] id="activations"
# Activations need a closer look. Each block keeps, for each token:
#
# * eight vectors of C: three around each of the two norms (what enters it, the same normalized, and that times the gain), the queries, attention's output;
# * keys and values, K/H of such a vector each: grouped-query attention saves here too;
# * four vectors of M: gate, SiLU of gate, up, and their product;
# * 2 + H single numbers (one a norm, one a head), too few to count.
#
# PyTorch tells what it keeps if we hook into it. To see one block alone: measure with two blocks, with one, and subtract.
#
# (This is the plain form, with 1,024 tokens; up to 512 a CPU's attention keeps the softmax's weights, too. Other devices differ a little. Trained on a CPU, a block of this
# project makes some of these numbers a second time and keeps half: `smollm2/cpu_block.py`.)


# %% cellView="form" id="saved-code" tags=["lesson"]
# @title Measure what a forward pass keeps { display-mode: "form" }
def saved_bytes(depth, is_plain=True, length=1024):
    """Bytes that one forward pass keeps for the backward pass, without the model's own."""
    shape = {"num_hidden_layers": depth, "vocab_size": 64, "max_position_embeddings": length}
    net = SmolLM2(SmolLM2Config(**shape)).train(not is_plain)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        # the tensor is held, so that its address stays its own
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        net(torch.zeros(1, length, dtype=torch.long))
    return sum(size for address, (size, _) in kept.items() if address not in own)


# %% id="saved-check" tags=["check"]
predicted = 4 * ((8 + 2 * K / H) * C + 4 * M)  # bytes a token and block, fp32
measured = (saved_bytes(2) - saved_bytes(1)) / 1024
spared = (saved_bytes(2, is_plain=False) - saved_bytes(1, is_plain=False)) / 1024
print(f"one block keeps {measured:,.0f} bytes a token; predicted {predicted:,.0f}")
print(f"in training on a CPU: {spared:,.0f}")
lesson.check("activations are what was predicted (relative)", predicted / measured - 1, 0.005)

# %% [markdown] id="t4"
# ## 9 · What fits on a T4?
#
# > *Way:* guess → ledger → map → a wrong sum → what if? → KV cache → FLOPs → memory → **a T4**
#
# Colab's free GPU, the T4, has about 14.7 GiB to use. Sections 2 and 8 add up to a prediction: the fixed 16 bytes a parameter, plus activations for
# each row of a **micro-batch**, the rows that go through the model at once.
#
# (In half precision activations shrink to 0.6, not 0.5: what the norms keep
# stays fp32. The logits of 49,152 entries would add 0.1 GiB a row, several times over; this project's loss never holds them all, see `smollm2/loss.py`.)

# %% cellView="form" id="predict-t4" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
row_bytes = predicted * L * length
fits = int((T4_GIB * GIB - fixed) / row_bytes)
lesson.predict(
    f"How many rows of {length} tokens fit into one micro-batch of SmolLM2-135M on a T4, "
    "everything in fp32?",
    guess, fits, unit="rows", within=0.25,
    why=f"A row keeps {row_bytes / GIB:.2f} GiB; ({T4_GIB} - {fixed / GIB:.1f}) / "
    f"{row_bytes / GIB:.2f} gives {fits}. The preset takes 8, to be safe.",
)  # fmt: skip


# %% cellView="form" id="t4-figure" tags=["figure"]
# @title Figure: what fits on a T4 { display-mode: "form" }
def training_gib(shape, rows):
    """GiB of each kind that training holds, in fp32."""
    groups = shape.num_key_value_heads / shape.num_attention_heads
    per_layer = 4 * ((8 + 2 * groups) * shape.hidden_size + 4 * shape.intermediate_size)
    activations = per_layer * shape.num_hidden_layers * length * rows / GIB
    weights = 4 * parameter_count(shape) / GIB
    return {"weights": weights, "gradients": weights, "Adam": 2 * weights, "rows": activations}


fig, ax = plots.figure(7.5, 2.8)
presets, needed = ("smollm2-135m", "smollm2-360m", "smollm2-1.7b"), []
for y, preset in enumerate(presets):
    start = 0
    sizes = training_gib(load_config(preset).model, rows=4)
    for color, (name, size) in zip(plots.PALETTE, sizes.items(), strict=False):
        name = f"activations, 4 rows of {length}" if name == "rows" else name
        style = {"color": color, "edgecolor": "white", "hatch": "//" * name.startswith("act")}
        style["hatch"] += ".." * (name == "gradients")  # not by its hue alone
        ax.barh(y, size, left=start, label=None if y else name, **style)
        start += size
    ax.text(start, y, f" {start:.1f} GiB", va="center", fontsize=8.5)
    needed.append(f"{start:.1f}")
ax.axvline(T4_GIB, color=plots.BLACK, ls="--", label=f"T4: {T4_GIB} GiB")
ax.set(yticks=range(3), yticklabels=presets, xlim=(0, 40), ylim=(2.6, -0.6))
title = "135M and 360M train on a T4, 1.7B does not"
plots.label(ax, title, "GPU memory (GiB), everything in fp32", "", legend=True)
alt = f"Training memory in fp32 with 4 rows of {length} tokens: {', '.join(needed)} GiB "
plots.show(fig, alt + f"for 135M, 360M, 1.7B; a T4 has {T4_GIB}.")

# %% [markdown] id="how-long"
# Memory decides whether a model trains at all; FLOPs decide how long. What would the real training, 2 trillion tokens, take on that one T4? (Its data
# sheet says 65 TFLOP/s in fp16; 30 % of that is a guess.)

# %% id="speed" tags=["lesson", "slow"]
ids = torch.randint(nano.vocab_size, (4, 128))
start = time.perf_counter()
small.loss(ids, ids).backward()
seconds = time.perf_counter() - start
speed = ids.numel() * flops_per_token(nano, ids.shape[1]) / seconds
print(f"this machine: {speed / 1e9:.0f} GFLOP/s on a small model")
work = 2e12 * flops_per_token(config, config.max_position_embeddings)  # 2 trillion tokens
years = work / (0.3 * 65e12) / (365 * 86400)
print(f"SmolLM2-135M's training on one T4, at 30 % of 65 TFLOP/s in fp16: {years:.1f} years")

# %% [markdown] id="self-test"
# ## What you can now explain
#
# Six numbers gave all 134,515,008 parameters, and these gave the cache, the arithmetic and the memory.
#
# * Why does 9 → 3 key/value heads save so little of the parameters and so much of the cache?
# * A sum of parts is 20 % short. What do you do before you look for "other parameters"?
# * Which of these depend on the batch size: weights, gradients, Adam's state, activations, KV cache?
#
# <details><summary>Answers</summary>
#
# * k and v are small matrices, used by every token; the cache holds *only* keys and values, so it shrinks by the full factor of three.
# * Divide the gap by the number of layers and compare with the size of each matrix. Then check tensor by tensor.
# * Activations (while training) and KV cache (while generating). The rest is 16 bytes a parameter, whatever the batch.
# </details>

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="next"
# ## Next
#
# The numbers of the model are settled; now what goes into it. [3 · Data and tokens](03_data_and_tokens.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/03_data_and_tokens.ipynb)) shows a token you can see, and why the first loss of an
# untrained model can be predicted to the second digit.
