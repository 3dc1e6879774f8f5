# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/01_build_the_model.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/01_build_the_model.html)

# %% [markdown] id="title"
# # 1 · Build the model
#
# You will be able to
# * write every part of SmolLM2 in a few lines of PyTorch: RMSNorm, RoPE, grouped-query attention, SwiGLU, and around them block and model;
# * prove that each part equals this project's and that of Hugging Face's transformers, number by number;
# * find a bug in a transformer by looking at *where* two models begin to differ.
#
# > **You need**, and no more:
# > * Python, and PyTorch's tensors (their shapes, `@`, `.mean(-1)`) and `nn.Module`;
# > * sine and cosine; variance, the mean of the squared distances from the mean, and its root, the standard deviation (here: *spread*);
# > * what a matrix product is, and that the dot product of two vectors is large when they point the same way;
# > * **softmax**: e to the power of each number, divided by the sum of all. It makes shares that add up to 1; the largest number gets most.
#
# **Time** about 60 minutes with the four parts you write, 1 minute to run · **hardware** any CPU · **network** only for the official weights of section 9;
# without it the same lesson runs on a small local model.
#
# **How to read it.** *Runtime → Run all* runs everything.
# * Each `?` asks you to guess first: type a number in place of `None` and run that cell again.
# * Each `✔` is a check: the largest difference between two things that should be equal, and how much of it rounding may cause (the tolerance). A check
#   that fails stops the notebook.
# * Four cells say **Your turn**: write the body, run it and the two cells after it. The check names the likely mistake. What you write stays in use to the end.
#   Where a body is left empty, the given answer takes over.
# * Folded cells hold figures, answers and checks. The model's own code is in sight, but for those four bodies.
# * The first cell of a section draws a **map** of the model (`here`). Its dark boxes are what the section is about.

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
import tempfile

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama as theirs  # transformers' model

import smollm2.model as ours  # this project's model, to compare with
from smollm2 import SmolLM2, SmolLM2Config, plots, widgets
from smollm2.errors import UserError
from smollm2.notebook import diagrams, lesson  # lesson: the checks ✔ and the questions ?
from smollm2.notebook.diagrams import here, show_tables  # the map; tables of numbers
from smollm2.tokenizer import Tokenizer
from smollm2.weights import resolve

torch.set_printoptions(precision=2, sci_mode=False)
lesson.quiet()

# %% [markdown] id="skeleton"
# ## 1 · The whole first, then its parts
#
# A **token** is a piece of text from a fixed list, the vocabulary. SmolLM2 cuts *Gravity is the force that* into `Gra|vity| is| the| force| that` and reads the numbers
# 22007, 6463, 314, 260, 3075, 338 (notebook 3 makes such cuts). A **parameter** is a number that training sets. All that a model knows lies in its parameters.
# **SmolLM2-135M** is Hugging Face's small language model of 2024. It has 134,515,008 parameters and a vocabulary of 49,152 pieces, and learned from 2 trillion tokens.
#
# A language model reads text as such numbers, the **token ids**. At every position it gives one score for each entry of its vocabulary: the **logits**. The
# entry with the highest score is its guess at the next token. Between ids and logits lies a short chain:
#
# | step | what it does | shape after it | section |
# |---|---|---|---|
# | token ids | B rows of text, T tokens in each | (B, T) | |
# | embedding | looks up a vector of C numbers for each token, its **running vector** | (B, T, C) | 2 |
# | a **block**, 30 times: norm, attention, add; | each token collects from the tokens before it, | (B, T, C) | 3 to 6 |
# | norm, MLP, add | and works on what it has collected | (B, T, C) | 7 |
# | norm, embedding again | compares each running vector with all V entries of the vocabulary | (B, T, V) | 2, 3 |
#
# Sections 2 to 7 write the parts, section 8 puts them together, section 9 loads the official weights into the result.
#
# The map below is this table as a picture. The two lines over the block are its additions: the running vector goes past a norm and a part, and at the **+** it meets
# what the part has made of it.
#
# We begin with a **skeleton**: the whole chain, with placeholders that do nothing. So something runs from the first minute, and each part
# has a place to go. It is small: our widths are an eighth of SmolLM2's; 9 query heads and 3 key/value heads stay (section 6).

# %% id="config" tags=["lesson"]
here()  # the map
full = SmolLM2Config()
small = {"vocab_size": 512, "hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 3}
tiny = SmolLM2Config(**small, max_position_embeddings=128)
meaning = {
    "vocab_size": "V, entries of the vocabulary",
    "hidden_size": "C, numbers of a running vector",
    "num_hidden_layers": "L, blocks",
    "num_attention_heads": "H, query heads (section 6)",
    "num_key_value_heads": "K, key/value heads (section 6)",
    "head_dim": "D, numbers of a head",
    "intermediate_size": "features of the MLP (section 7)",
}
print(f"{'':19} {'SmolLM2-135M':>12}  here")
for name, words in meaning.items():
    print(f"{name:19} {getattr(full, name):12,} {getattr(tiny, name):5}  {words}")


# %% id="skeleton-code" tags=["lesson"]
class Placeholder(nn.Module):
    """Stands where a part will be: gives back what it gets."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return x


class Skeleton(nn.Module):
    def __init__(self, config, block=Placeholder, norm=Placeholder):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # (V, C)
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        self.norm = norm(config)

    def forward(self, ids):  # (B, T)
        x = self.embed_tokens(ids)  # (B, T, C)
        for layer in self.layers:
            x = layer(x)  # (B, T, C)
        return self.norm(x) @ self.embed_tokens.weight.T  # (B, T, V)


# %% id="skeleton-run" tags=["check"]
torch.manual_seed(0)
ids = torch.randint(tiny.vocab_size, (2, 10))  # 2 rows of 10 tokens, drawn at random
logits = Skeleton(tiny)(ids)
print("ids", tuple(ids.shape), "-> logits", tuple(logits.shape))
right = logits.shape == (2, 10, tiny.vocab_size)
lesson.true("one score per vocabulary entry, at every position", right)

# %% [markdown] id="tying"
# ## 2 · Embedding, and the same matrix again at the end
#
# An embedding is a table: row *i* is the vector of token *i*. Looking up a row is the same as multiplying by a **one-hot** vector: zeros, and a single 1 at *i*.
# The next cell checks that.
#
# The last line of the skeleton multiplies by the *transposed* table. A token's logit is then the dot product of its row with the running vector: high where
# both point the same way. At both ends a row stands for one token, so one table can serve twice. This is called
# [**tying**](https://arxiv.org/abs/1608.05859). What is learned about a token where it is read then helps where it is written, and in that paper the loss fell with fewer
# parameters. The price: one row has to serve two purposes. How many parameters does it save?

# %% id="embedding-check" tags=["check"]
here("embedding")
table = nn.Embedding(tiny.vocab_size, tiny.hidden_size)
one_hot = F.one_hot(ids, tiny.vocab_size).float()  # (B, T, V), a single 1 in each row
product = one_hot @ table.weight  # (B, T, C)
lesson.check("a look-up is a product with a one-hot vector", table(ids) - product)

# %% cellView="form" id="predict-tying" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
share = full.vocab_size * full.hidden_size
lesson.predict(
    "How many parameters does tying save in SmolLM2-135M (in millions)?",
    guess, share / 1e6, unit="million",
    why=f"{full.vocab_size:,} rows x {full.hidden_size} = {share:,}. Without tying there would "
    "be a second table of that size.",
)  # fmt: skip

# %% [markdown] id="rmsnorm"
# ## 3 · RMSNorm: keep the direction, drop the size
#
# Thirty blocks add to the same running vector, twice each. Nothing keeps it from growing, and what reads it would have to cope with any size: a softmax, for one, gives
# nearly everything to the largest of large numbers (section 6). So every part reads the vector through a norm: it divides it by its **root mean square**. The direction stays, the size becomes 1.
#
# Then a learned **gain**, one number a dimension, makes a dimension louder or quieter where that helps. (The older LayerNorm also subtracts the mean.
# [RMSNorm](https://arxiv.org/abs/1910.07467) saves that and learns as well.)
#
# First five numbers: what is left of 3 and 4? Then write it for whole batches.

# %% id="rmsnorm-numbers" tags=["lesson"]
here("norm")
x = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0])
mean_square = x.square().mean()  # (9 + 16) / 5
root = mean_square.sqrt()
print(f"mean square {mean_square:.2f}, its root {root:.2f}; divided:", x / root)
lesson.check("after dividing, the mean square is 1", (x / root).square().mean() - 1, 1e-6)


# %% id="rmsnorm-turn" tags=["exercise"]
class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))  # the gain, 1 at first
        self.eps = config.rms_norm_eps  # keeps the all-zero vector from dividing by zero

    def forward(self, x):
        """x (B, T, C) -> (B, T, C). Divide each vector by the root of (mean square + eps),
        where the mean is over its C numbers; then multiply by the gain."""
        raise NotImplementedError  # Your turn: replace this line


# %% cellView="form" id="rmsnorm-code" tags=["solution"]
# @title An answer: open it after your own { display-mode: "form" }
def forward(self, x):
    size = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()  # (B, T, 1)
    return self.weight * x / size


RMSNorm.forward = lesson.yours_or(forward, RMSNorm.forward)

# %% cellView="form" id="rmsnorm-check" tags=["check", "figure"]
# @title Check it, and a figure: one size after the norm { display-mode: "form" }
sizes = torch.logspace(-2, 2, 10)  # ten tokens, very different in size
x = (1 + torch.randn(2, 10, tiny.hidden_size)) * sizes[:, None]
gain = torch.rand(tiny.hidden_size)
mine, package = RMSNorm(tiny), ours.RMSNorm(tiny.hidden_size, tiny.rms_norm_eps)
library = theirs.LlamaRMSNorm(tiny.hidden_size, tiny.rms_norm_eps)
for norm in (mine, package, library):
    norm.weight.data = gain
square = x.square().mean(-1, keepdim=True)
mistakes = {
    "the mean in place of the mean square": gain * x / x.mean(-1, keepdim=True),
    "the root is missing": gain * x / (square + mine.eps),
    "one mean of all tokens together: it needs dim=-1": gain * x / x.square().mean().sqrt(),
    "the mean was subtracted: that is LayerNorm": F.layer_norm(x, gain.shape, gain),
    "eps outside the root": gain * x / (square.sqrt() + mine.eps),
    "the gain is missing": package(x) / gain,
}
lesson.judge("RMSNorm equals the package's", mine(x), package(x), mistakes)
lesson.check("RMSNorm equals transformers'", mine(x) - library(x), 1e-5)
lesson.check("zeros stay zeros (no NaN)", mine(torch.zeros_like(x)))

fig, ax = plots.figure(7.5, 2.8)
before, after = x[0], RMSNorm(tiny)(x)[0].detach()
ax.semilogy(before.square().mean(-1).sqrt(), "s", color=plots.ORANGE, label="before")
ax.semilogy(after.square().mean(-1).sqrt(), "o", color=plots.BLUE, label="after RMSNorm")
plots.label(ax, "One size after the norm", "token (position)", "root mean square", legend=True)
low, high = before.square().mean(-1).sqrt().aminmax()
alt = f"Root mean square of ten tokens: from {low:.2f} to {high:.0f} before RMSNorm, "
plots.show(fig, alt + "all close to 1 after it.")

# %% [markdown] id="attention"
# ## 4 · Attention, by numbers
#
# Embedding, norm and MLP treat each token alone. Attention is the one place where tokens pass something on. From its own vector each token makes three more:
# * a **query**: what do I look for?
# * a **key**: what can I be found by?
# * a **value**: what do I hand over?
#
# In *the cat slept because it was tired*, the query of *it* asks "which animal?", the key of *cat* answers "here", and its value brings what *cat* means. In three steps:
# 1. The dot product of a query and a key is a **score**.
# 2. Softmax turns the scores of a token into **weights**: shares that add up to 1.
# 3. The token receives all values, mixed by these weights.
#
# The lower row of the map is the inside of attention. This section takes the dark boxes, section 5 RoPE, section 6 the rest.
#
# Here are three tokens, with queries and keys of two numbers and values of one. In the scores and weights a row is a token that asks, a column one that is asked.
# Which token does each row read most?

# %% id="attention-numbers" tags=["lesson"]
here("scores", "mask", "softmax", "mix")
q = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 2.0]])  # a query for each of three tokens
k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # their keys
v = torch.tensor([[10.0], [20.0], [60.0]])  # their values
scores = q @ k.T  # (3, 3); row: who asks, column: who is asked
weights = scores.softmax(-1)  # each row sums to 1

tokens = ["token 1", "token 2", "token 3"]
steps = {
    "queries": q, "keys, transposed": k.T, "scores": scores,
    "weights": weights, "values": v, "output": weights @ v,
}  # fmt: skip
signs = ["@", "=", "softmax\n→", "@", "="]
show_tables("Attention of three tokens, no mask yet", steps, signs, tokens, tokens)

# %% [markdown] id="attention-mask"
# Tokens 1 and 2 find tokens 1 and 3, whose keys are equal; token 3 mostly reads token 2. The output is the mix: token 1 receives
# 0.42 · 10 + 0.16 · 20 + 0.42 · 60 = 32.67.
#
# **The causal mask.** But token 1 has read token 3, which comes later. Training grades all positions of a row at once: position *t* must name token *t + 1*, which
# stands in the same row. Without a mask it would simply read it there. When writing, where there is no future yet, the model would be lost.
# (The grade is the **loss**: −ln p, where p is the probability that the model gave to the true next token, as a mean over all positions.
# If p is 0.9, 0.5 and 0.1, then −ln p is 0.11, 0.69 and 2.30, and the loss 1.03. Training lowers it.)
#
# So the scores of later tokens become −∞ *before* the softmax. e to the power of −∞ is 0: their weight is exactly 0.
#
# Then we swap the first two tokens: does the third one's output change?

# %% id="attention-masked" tags=["lesson", "check"]
future = torch.ones(3, 3).triu(1).bool()  # True above the diagonal: who is asked comes later
masked = scores.masked_fill(future, -torch.inf)
weights = masked.softmax(-1)
steps = {
    "scores": scores, "masked": masked,
    "weights": weights, "values": v, "output": weights @ v,
}  # fmt: skip
show_tables("The same, masked", steps, ["mask\n→", "softmax\n→", "@", "="], tokens, tokens)
lesson.check("the future has no weight", weights[future])

# the first two tokens change places: what does the third one receive now?
swapped = (q[2] @ k[[1, 0, 2]].T).softmax(-1) @ v[[1, 0, 2]]
lesson.check("the order of the past changes nothing", swapped - weights[2] @ v, 1e-4)

# %% [markdown] id="rope"
# ## 5 · RoPE: position as a rotation
#
# A dot product does not know where a token stands: to the word that follows, *dog bites* and *bites dog* are the same. (Several layers with a mask can
# [work the order out](https://arxiv.org/abs/2203.16634), but that costs layers.)
#
# [RoPE](https://arxiv.org/abs/2104.09864) (rotary position embedding) turns queries and keys before they are compared, and needs no parameters.
# 1. A query of SmolLM2 has 64 numbers (section 6; 8 in our small model). Take them in 32 pairs. A pair is an arrow in the plane, like the hand of a clock.
# 2. Turn each arrow by an angle: position × speed of the pair.
# 3. The first pair is fast, one radian a token. The last one hardly moves. `rope_theta` sets how slow: the larger it is, the longer
#    the contexts in which the slowest arrow does not come round.
#
# The next cell makes the angles. How slow is the slowest pair?


# %% id="rope-code" tags=["lesson"]
here("RoPE")


def rope_angles(config):
    """cos and sin of position x speed, each (positions, head_dim / 2)."""
    pair = torch.arange(config.head_dim // 2)
    speed = config.rope_theta ** (-2 * pair / config.head_dim)  # radians a token, 1 for pair 0
    position = torch.arange(config.max_position_embeddings).float()
    angle = torch.outer(position, speed)  # (positions, pairs)
    return angle.cos(), angle.sin()


# %% cellView="form" id="predict-rope" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
turn_once = 2 * torch.pi  # radians
slowest = turn_once * full.rope_theta ** (1 - 2 / full.head_dim)  # tokens, of the slowest pair
lesson.predict(
    "The fastest hand needs 2π = 6.3 tokens for a turn. How many does the slowest of the "
    f"{full.head_dim // 2} need (rope_theta = {full.rope_theta:,.0f})?",
    guess, slowest, unit="tokens", within=0.25,
    why=f"2π · θ^(62/64) = {slowest:,.0f}, far longer than the context of "
    f"{full.max_position_embeddings:,}: slow pairs say 'near or far', fast ones 'how far "
    "exactly'.",
)  # fmt: skip

# %% cellView="form" id="rope-figure" tags=["figure"]
# @title Figure: clock hands { display-mode: "form" }
fig, axes = plots.figure(7.5, 2.9, columns=3)
full_cos, full_sin = rope_angles(full)
for ax, pair in zip(axes, (0, 6, 16), strict=True):
    tips = torch.stack((full_cos[:8, pair], full_sin[:8, pair]), dim=-1).tolist()
    for position, (x, y) in enumerate(tips):
        ax.plot([0, x], [0, y], color=plots.BLUE, alpha=0.25 + 0.09 * position, marker="")
        if pair < 16 or position == 3:  # the last hands lie on one another
            name = position if pair < 16 else "0-7"
            ax.annotate(name, (1.2 * x, 1.2 * y), ha="center", va="center", fontsize=8)
    ax.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    title = f"pair {pair}: {full_sin[1, pair].asin():.2f} rad"
    plots.label(ax, title, "first number of the pair", "" if pair else "second number")
title = "Each token turns a pair by its own angle; the number at a tip is the position"
fig.suptitle(title, fontsize=10)
alt = "Clock hands at positions 0 to 7: pair 0 turns 1 radian a token, pair 6 about 0.18, "
plots.show(fig, alt + "pair 16 only 0.01 and seems to stand.")


# %% id="rope-turn" tags=["exercise"]
def rotate(x, cos, sin):
    """Turn x (..., T, D) by its positions; cos and sin are (T, D/2).

    A pair (a, b), turned by an angle, is (a cos - b sin, a sin + b cos). Which numbers form a
    pair is a convention. SmolLM2's weights expect i and i + D/2: x[..., 0] with x[..., D/2].
    """
    raise NotImplementedError  # Your turn: replace this line


# %% cellView="form" id="rope-answer" tags=["solution"]
# @title An answer: open it after your own { display-mode: "form" }
def turn(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def pair_neighbours(x, cos, sin):  # a classic mistake; section 10 meets it again
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


rotate = lesson.yours_or(turn, rotate)

# %% cellView="form" id="rope-check" tags=["check"]
# @title Check it { display-mode: "form" }
cos, sin = rope_angles(tiny)
q, k = torch.randn(2, 1, 9, 128, tiny.head_dim)  # twice (batch, heads, positions, head_dim)
turned, expected = rotate(q, cos, sin), ours.apply_rope(q, *ours.rope_tables(tiny))
twice = [torch.cat((t, t), -1)[None] for t in (cos, sin)]  # transformers keeps both halves
from_library, _ = theirs.apply_rotary_pos_emb(q, k, *twice)
a, b = q.chunk(2, dim=-1)
neighbours = pair_neighbours(q, cos, sin)
mistakes = {
    "neighbours are paired: a pair is number i and number i + D/2": neighbours,
    "turned backwards: check both signs": turn(q, cos, -sin),
    "the minus sign is missing": torch.cat((a * cos + b * sin, a * sin + b * cos), -1),
    "the two halves of the result are swapped": expected.roll(tiny.head_dim // 2, -1),
    "cos and sin are swapped": turn(q, sin, cos),
}
lesson.judge("RoPE equals the package's", turned, expected, mistakes)
lesson.check("RoPE equals transformers'", turned - from_library, 1e-5)
lesson.check("a rotation keeps lengths", turned.norm(dim=-1) - q.norm(dim=-1), 1e-4)

# %% [markdown] id="rope-relative"
# **The point of it.** Turn a query at position *m* and a key at position *n*. Each arrow keeps its length, and the angle between the two changes by *m − n* steps. A dot
# product is made of lengths and angles between, and the score of 64 numbers is the sum over their 32 pairs. So it depends on *m − n* alone. The model learns "three tokens back" once, for the whole context.
# (Older models *added* a learned vector for each position. Their scores hold terms in *m* and in *n* alone, so "three back" has to be learned at every place.)
#
# The next cell gives every position the same query and the same key, turns both, and takes all dot products. Look at the three printed scores: all have *m − n* = 2.
# Then move *m* and *n* by the same amount: what turns on the left, and what stays on the right?

# %% id="rope-relative-check" tags=["check"]
query, key = torch.randn(2, tiny.head_dim)
cos, sin = rope_angles(tiny)  # (128, D / 2) each
queries = rotate(query.expand(128, -1), cos, sin)  # the same query at 128 positions
rope_scores = queries @ rotate(key.expand(128, -1), cos, sin).T  # the score of each (m, n)
for m, n in (5, 3), (50, 48), (120, 118):
    print(f"score of (m, n) = ({m}, {n}): {rope_scores[m, n]:.4f}")
off = rope_scores[1:, 1:] - rope_scores[:-1, :-1]  # (m, n) against (m - 1, n - 1)
lesson.check("the score depends on m - n alone", off, 1e-4)

# %% cellView="form" id="rope-widget" tags=["widget", "figure"]
# @title Try it: only the distance counts { display-mode: "form" }
PAIR = [0, tiny.head_dim // 2]  # the first pair of numbers


def rope_view(m, n):
    """A query at m and a key at n, as their first pair, and the score over all distances."""
    fig, (left, right) = plots.figure(7.5, 2.9, columns=2, width_ratios=[1, 2])
    pair = (query, m, plots.BLUE, "query"), (key, n, plots.ORANGE, "key")
    for vector, at, color, name in pair:
        tip = rotate(vector, cos[at], sin[at])[PAIR].tolist()
        arrow = {"arrowstyle": "-|>", "color": color, "lw": 2}
        left.annotate("", tip, (0, 0), arrowprops=arrow)
        left.plot([], [], color=color, marker="", label=f"{name} at {at}")
    reach = 1.2 * max(vector[PAIR].norm().item() for vector in (query, key))
    left.set(xlim=(-reach, reach), ylim=(-1.6 * reach, reach), aspect="equal")
    left.legend(loc="lower center", frameon=False)
    plots.label(left, "the first pair", "first number", "second number")
    distance, score = list(range(-40, 41)), rope_scores[m, n].item()
    curve = [rope_scores[max(d, 0), max(-d, 0)].item() for d in distance]
    right.plot(distance, curve, color=plots.GREY, marker="")
    right.plot(m - n, score, "o", color=plots.RED, markersize=9, label=f"score {score:.2f}")
    right.set_ylim(min(curve) - 0.5, max(curve) + 2.5)
    title = "all pairs: only the distance counts"
    plots.label(right, title, "m - n (tokens)", "dot product", legend=True)
    alt = f"Query at {m}, key at {n}: score {score:.2f}, "
    return fig, alt + f"read off one curve over the distance m - n = {m - n}."


widgets.explore(
    rope_view,
    m=widgets.slider("query position m", 0, 40, 12),
    n=widgets.slider("key position n", 0, 40, 7),
)

# %% [markdown] id="gqa"
# ## 6 · Grouped-query attention: nine ask, three answer
#
# **From one head to many.** One token may look for several things at once. So attention happens several times side by side. Each time is a **head**: it
# compares its own part of the queries with its own part of the keys. In SmolLM2 nine heads ask, each with a query of 64 numbers (8 in our small model).
#
# Below, each of three tokens has four numbers, here both its query and its key. Cut in halves they make two heads. Do both heads find the same tokens alike?

# %% id="heads-numbers" tags=["lesson", "check"]
here("heads", "share", "÷ √D")
rows = torch.tensor([[1.0, 0, 0, 2], [0, 1, 2, 0], [1, 1, 0, 0]])  # (T, 4)
halves = rows.unflatten(-1, (2, 2)).transpose(0, 1)  # (T, 2 heads, 2) -> (2 heads, T, 2)
scores = halves @ halves.mT  # (2 heads, T, T): a table for each head, from one @

steps = {
    "4 numbers": rows, "head 0": halves[0], "head 1": halves[1],
    "scores of head 0": scores[0], "scores of head 1": scores[1],
}  # fmt: skip
show_tables("From one head to two", steps, ["cut\n→", "", "q @ k\n→", ""], tokens, tokens)
lesson.check("one uncut head would see only their sum", scores.sum(0) - rows @ rows.T)

# %% [markdown] id="gqa-share"
# Head 0 finds tokens 1 and 3 alike; head 1 does not.
#
# **Sharing.** While a model writes, the keys and values of all earlier tokens stay in memory. So SmolLM2 has 9 query heads, but only 3 key/value heads:
# three neighbours share one. (In quality it costs [little](https://arxiv.org/abs/2305.13245).) Before scores are computed, `repeat_interleave` repeats each
# key head for the query heads that read it: 3 become 9. Who shares with whom, and what does it save?

# %% cellView="form" id="predict-kv" tags=["predict"]
# @title Your predictions { display-mode: "form" }
head = None  # @param {type:"raw"}
guess = None  # @param {type:"raw"}
lesson.predict(
    "Query heads are 0 to 8, key/value heads 0 to 2. Which of these does query head 4 read?",
    head, 1, within=0, why="Neighbours share: 0, 1, 2 read head 0, and 3, 4, 5 read head 1.",
)  # fmt: skip
kv_heads, stored = full.num_key_value_heads, 2 * full.num_key_value_heads * full.head_dim
lesson.predict(
    "How many numbers, keys and values together, must one layer of SmolLM2-135M remember for "
    "each token it has read?",
    guess, stored, within=0,
    why=f"A key and a value of {full.head_dim} numbers in each of {kv_heads} heads: {stored}. "
    f"Nine heads would need {3 * stored:,}.",
)  # fmt: skip

# %% id="share-numbers" tags=["lesson"]
key_heads = torch.tensor([0, 1, 2])
shared = key_heads.repeat_interleave(3)  # each three times, then the next
in_turn = key_heads.repeat(3)  # all in turn: a classic mistake, which section 10 meets again
names = ["repeat_interleave", "repeat: wrong"]
columns = [f"query head {number}" for number in range(9)]
table = {"the key/value head that each query head reads": torch.stack((shared, in_turn))}
show_tables("Who shares with whom", table, [], names, columns)

# %% [markdown] id="gqa-scale"
# **Dividing by √D.** D is `head_dim`, 64. A score is a sum of D products. If the numbers in them are independent and of spread 1, the sum has spread √D: 8.
# From such scores softmax gives nearly everything to one token. A small change of a score then changes nothing, so there is nothing to learn from.
# Divided by √D, the scores have spread 1.
#
# Below, one query meets five keys, all of 64 random numbers. How large is the largest weight, with and without the division?

# %% id="scale-numbers" tags=["lesson", "check"]
torch.manual_seed(4)
asks, answers = torch.randn(1, 64), torch.randn(5, 64)  # one query, five keys
raw = asks @ answers.T  # (1, 5)
scores = torch.cat((raw, raw / 64**0.5))
table, names = {"scores": scores, "weights": scores.softmax(-1)}, ["as they are", "÷ √64"]
show_tables("One query, five keys of 64 numbers", table, ["softmax\n→"], names)

many = (torch.randn(1000, 64) * torch.randn(1000, 64)).sum(-1)  # 1,000 scores
lesson.check("their spread is about 8 (relative)", many.std() / 8 - 1, 0.1)

# %% [markdown] id="gqa-attend"
# **All of it.** You write `attend`: section 4 for a batch with heads, with the sharing and the division.
#
# The class after it is the rest of attention. Three matrices make queries, keys and values, and each is cut into heads. Queries and keys are turned.
# A fourth matrix, `o_proj`, mixes what the heads found.


# %% id="attention-turn" tags=["exercise"]
def attend(q, k, v):
    """q (B, H, T, D), k and v (B, K, T, D), where q and k are rotated already -> (B, H, T, D).

    1. Repeat every key and value head H / K times: heads 0 0 0 1 1 1 2 2 2.
    2. Scores: queries times keys, divided by √D.     3. The future becomes −∞: `.triu(1)`.
    4. Softmax makes weights of them.                 5. Mix the values by these weights.
    """
    raise NotImplementedError  # Your turn: replace this line


# %% cellView="form" id="attention-steps" tags=["solution"]
# @title An answer: open it after your own { display-mode: "form" }
def given(q, k, v):
    H, T, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (B, H, T, D) each
    scores = q @ k.mT / D**0.5  # (B, H, T, T)
    future = torch.ones(T, T, device=q.device).triu(1).bool()  # who is asked comes later
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ v  # (B, H, T, D)


attend = lesson.yours_or(given, attend)

# %% cellView="form" id="attend-check" tags=["check"]
# @title Check it { display-mode: "form" }
queries = 2 * torch.randn(2, 9, 10, tiny.head_dim)
keys, values = torch.randn(2, 2, 3, 10, tiny.head_dim)
mix = F.scaled_dot_product_attention  # PyTorch's own
k9, v9 = (x.repeat_interleave(3, dim=1) for x in (keys, values))
in_turn = mix(queries, keys.repeat(1, 3, 1, 1), values.repeat(1, 3, 1, 1), is_causal=True)
scores, past = queries @ k9.mT / tiny.head_dim**0.5, torch.ones(10, 10).tril().bool()
mistakes = {
    "heads repeated as 0 1 2 0 1 2: use repeat_interleave": in_turn,
    "the division by √D is missing": mix(queries, k9, v9, is_causal=True, scale=1.0),
    "no mask: it sees the future": mix(queries, k9, v9),
    "masked after the softmax: the weights sum to less than 1": (
        scores.softmax(-1).tril() @ v9
    ),
    "softmax over the queries: it belongs to the last dimension": (
        scores.masked_fill(~past, -torch.inf).softmax(-2) @ v9
    ),
}
right = mix(queries, keys, values, is_causal=True, enable_gqa=True)
lesson.judge("attention mixes as PyTorch's own", attend(queries, keys, values), right, mistakes)


# %% id="attention-code" tags=["lesson"]
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        cos, sin = rope_angles(config)
        self.register_buffer("cos", cos, persistent=False)  # moves with the model, is not saved
        self.register_buffer("sin", sin, persistent=False)

    def split(self, x):  # (B, T, heads * D) -> (B, heads, T, D)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x):  # (B, T, C)
        q = self.split(self.q_proj(x))  # (B, H, T, D)
        k = self.split(self.k_proj(x))  # (B, K, T, D)
        v = self.split(self.v_proj(x))  # (B, K, T, D)
        T = x.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]
        found = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, D)
        return self.o_proj(found.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, C)


# %% cellView="form" id="attention-check" tags=["check", "figure"]
# @title Check it, and a figure: shapes through attention { display-mode: "form" }
mine, package = Attention(tiny), ours.Attention(tiny, layer=0)
hf_config = LlamaConfig.from_dict(tiny.to_hf_dict())
hf_config._attn_implementation = "sdpa"
library = theirs.LlamaAttention(hf_config, layer_idx=0)
for other in (package, library):
    other.load_state_dict(mine.state_dict())
x = torch.randn(2, 10, tiny.hidden_size)
from_package = package(x, cos[:10], sin[:10])
angles = [t[:, :10] for t in twice]
from_library = library(x, position_embeddings=angles, attention_mask=None)[0]
likely = "the order of heads and numbers in `split`"
lesson.check("attention equals the package's", mine(x) - from_package, 1e-5, likely)
lesson.check("attention equals transformers'", mine(x) - from_library, 1e-5, likely)
changed = x.clone()
changed[:, 6:] = torch.randn(2, 4, tiny.hidden_size)  # another future from position 6 on
lesson.check("positions 0 to 5 do not see the future", (mine(x) - mine(changed))[:, :6])

H, D = full.num_attention_heads, full.head_dim
full_size = {"B": 1, "T": 10, "C": full.hidden_size, "H": H, "D": D, "H·D": H * D}
names = "x", "q_proj", "unflatten", "transpose", "scores\nwith k", "weights\n@ v"
names += "transpose,\nflatten", "o_proj"
shapes = "B, T, C", "B, T, H·D", "B, T, H, D", "B, H, T, D", "B, H, T, T", "B, H, T, D"
shapes += "B, T, H·D", "B, T, C"
sizes = [tuple(full_size[letter] for letter in shape.split(", ")) for shape in shapes]
steps = [(n, f"({a})\n{b}") for n, a, b in zip(names, shapes, sizes, strict=True)]
K = full.num_key_value_heads
title = f"Shapes through attention, at SmolLM2's size (10 tokens; k and v have {K} heads)"
alt = ", ".join(f"{name} ({shape})" for name, shape in zip(names, shapes, strict=True))
plots.show(diagrams.flow(title, steps), f"{title}: {alt}.".replace("\n", " "))

# %% [markdown] id="swiglu"
# **✎ Exercise**: give your `attend` a window, so that a position sees itself and only the 4 before it. (If you left it empty,
# change the answer.) Which line changes, and what shows that you are right?
#
# <details><summary>Solution</summary>
#
# The line of the mask. Change position 0: position 5 and all after it stay exactly equal. (The checks against the package now fail, as they should.)
# ```python
# future = torch.ones(T, T, dtype=torch.bool)  # True: hidden
# future = future.triu(1) | future.tril(-5)
# ```
# ```python
# x = torch.randn(1, 10, tiny.hidden_size)  # in a cell below the class Attention
# y, attention = x.clone(), Attention(tiny)
# y[:, 0] += 1
# lesson.check("a window of 5", (attention(x) - attention(y))[:, 5:])
# ```
# </details>
#
# ## 7 · SwiGLU: a gate on every feature
#
# Attention moves information between positions. The MLP (multi-layer perceptron: matrices with a curve between them) works on each position alone, with three matrices:
# * `up` makes 1,536 features of the 576 numbers;
# * `gate` decides, for each feature, how much of it passes: near 0 shuts it off, a large value enlarges it;
# * `down` brings the features back to 576 numbers.
#
# The gate's curve is **SiLU**, x · sigmoid(x): almost 0 far below zero, almost x far above.
#
# Older MLPs had two matrices, four times as wide as the model. Three of 8/3 (1,536 = 8/3 · 576) hold as many numbers. [Trained alike](https://arxiv.org/abs/2002.05202),
# the gated one learned better; the paper offers no reason.


# %% id="swiglu-turn" tags=["exercise"]
here("MLP")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C): SiLU of the gate, times up, all through down."""
        raise NotImplementedError  # Your turn: replace this line


# %% cellView="form" id="swiglu-answer" tags=["solution"]
# @title An answer: open it after your own { display-mode: "form" }
def forward(self, x):
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MLP.forward = lesson.yours_or(forward, MLP.forward)

# %% cellView="form" id="swiglu-check" tags=["check", "figure"]
# @title Check it, and a figure: the gate's curve { display-mode: "form" }
mine, package, library = MLP(tiny), ours.MLP(tiny), theirs.LlamaMLP(hf_config)
for other in (package, library):
    other.load_state_dict(mine.state_dict())
x = 3 * torch.randn(2, 10, tiny.hidden_size)
gate, up, down = mine.gate_proj(x), mine.up_proj(x), mine.down_proj
mistakes = {
    "gate and up are swapped: SiLU belongs to the gate": down(gate * F.silu(up)),
    "sigmoid in place of SiLU, which is x · sigmoid(x)": down(gate.sigmoid() * up),
    "added: the gate multiplies": down(F.silu(gate) + up),
    "SiLU of the product: it belongs to the gate alone": down(F.silu(gate * up)),
    "no gate: that is the MLP with two matrices": down(F.silu(up)),
}
lesson.judge("SwiGLU equals the package's", mine(x), package(x), mistakes)
lesson.check("SwiGLU equals transformers'", mine(x) - library(x), 1e-5)

fig, ax = plots.figure(7.5, 2.6)
t = torch.linspace(-6, 6, 121)
ax.plot(t, F.silu(t), color=plots.BLUE, marker="", label="SiLU(x) = x · sigmoid(x)")
ax.plot(t, t.relu(), "--", color=plots.ORANGE, marker="", label="ReLU(x), for comparison")
title = "The gate's curve is smooth and dips to -0.28"
plots.label(ax, title, "gate input x", "gate output", legend=True)
alt = "SiLU against its input from -6 to 6: near zero on the left, lowest -0.28 at x = -1.28, "
plots.show(fig, alt + "close to x on the right; ReLU for comparison.")

# %% [markdown] id="whole"
# ## 8 · The block, and the whole model
#
# All parts are written; where you wrote them, yours are in use. A **block** adds to each running vector what attention found, then what the MLP made of it. Both read
# through a norm of their own.
#
# Then the skeleton of section 1 gets blocks and norms in place of its placeholders, and the weights of the package's model. Does it give the same logits? And how many
# parameters has it at full size?

# %% id="block-code" tags=["lesson"]
here("block")


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x):  # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


# %% id="whole-check" tags=["check"]
package = SmolLM2(tiny)
model = Skeleton(tiny, Block, RMSNorm)
model.load_state_dict(package.model.state_dict())  # raises unless names and shapes agree
lesson.check("the whole model equals the package's", model(ids) - package(ids), 1e-4)

with torch.device("meta"):  # shapes without memory
    real = Skeleton(full, Block, RMSNorm)
total = sum(weight.numel() for weight in real.parameters())
lesson.true(f"at full size {total:,} parameters, as SmolLM2-135M", total == 134_515_008)


# %% [markdown] id="plus"
# **Why the plus?** We leave it out, in 30 fresh blocks. What goes wrong?
# * **Forward**, attention is a mean over tokens. After 30 means of means, nothing tells the tokens of a row apart. The plus lets each keep what it was.
# * **Backward**: training changes each weight by its **gradient**, which says how much the loss changes when that weight changes a little. Gradients are
#   computed from the last block back to the first. The plus carries them past a block as they are. Without it each block multiplies what comes back.
#
# Very unequal gradients are bad: a rate that suits one block leaves another as it is, or throws it off. How unequal do 30 such factors make the first block and the last?


# %% id="plus-check" tags=["lesson", "check"]
class NoPlus(Block):
    def forward(self, x):
        x = self.self_attn(self.input_layernorm(x))
        return self.mlp(self.post_attention_layernorm(x))


for kind in (Block, NoPlus):
    x = torch.randn(2, 10, tiny.hidden_size)  # (B, T, C)
    for _ in range(30):
        x = kind(tiny)(x)  # a fresh block with random weights
    x = F.normalize(x, dim=-1)  # each vector gets length 1
    others = ~torch.eye(10, dtype=torch.bool)  # not a token with itself
    cosine = (x @ x.mT)[:, others].mean()
    print(f"{kind.__name__:6}: average cosine of two tokens of a row {cosine:.4f}")
lesson.check("without the plus, all tokens of a row are alike", cosine - 1, 1e-3)

# %% cellView="form" id="plus-figure" tags=["figure"]
# @title Figure: the gradient of each block, with and without the plus { display-mode: "form" }
deep, told = tiny.model_copy(update={"num_hidden_layers": 30}), []
fig, ax = plots.figure(7.5, 2.8)
looks = (Block, plots.BLUE, "with the plus"), (NoPlus, plots.ORANGE, "without")
for offset, (kind, color, name) in zip((-0.2, 0.2), looks, strict=True):
    model = Skeleton(deep, kind, RMSNorm)
    logits, following = model(ids)[:, :-1], ids[:, 1:]  # each token, and the next one
    F.cross_entropy(logits.flatten(0, 1), following.flatten()).backward()  # of the loss
    pulls = [layer.mlp.down_proj.weight.grad.norm().item() for layer in model.layers]
    at = [number + offset for number in range(1, 31)]
    ax.bar(at, pulls, 0.4, color=color, label=name)
    told.append(f"{pulls[0] / pulls[-1]:,.0f} times the last one's {name}")
ax.set(yscale="log", ylim=(1, None), xlim=(0, 31))
title = "How strongly the loss pulls at each block (its down_proj)"
plots.label(ax, title, "block", "size of the gradient", legend=True)
alt = "Size of down_proj's gradient in 30 fresh blocks. The first block's is "
plots.show(fig, alt + ", ".join(told) + ".")

# %% [markdown] id="official"
# **✎ Exercise**: let `Block.forward` add the MLP first, attention second. Which check fails, and at which layer does the
# chart of section 9 jump?
#
# <details><summary>Solution</summary>
#
# *the whole model equals the package's* fails, and the chart jumps at layer 1: the embedding (layer 0) is still the same.
# ```python
# x = x + self.mlp(self.post_attention_layernorm(x))  # in Block.forward
# return x + self.self_attn(self.input_layernorm(x))
# ```
# </details>
#
# ## 9 · The official weights in this model
#
# Names and shapes agree, so the published weights fit into the classes above. If a single detail were different, the numbers would differ, and mostly the text would be
# nonsense. The reference is transformers' model (`library`), reading the same folder as the package's (`package`). We compare the running vector after every layer, then
# the logits, then 12 tokens that both write.
#
# Online the next cell loads SmolLM2-135M (270 MB), whose `rope_theta` is 100,000: after pre-training (the long first training, on plain text) it learned longer
# contexts. Offline it makes a small model with random weights and the same 9:3 heads.

# %% cellView="form" id="load" tags=["setup", "slow"]
# @title Load the weights into two models { display-mode: "form" }
here()
try:
    source = resolve("HuggingFaceTB/SmolLM2-135M")
    tokenizer = Tokenizer.from_file(source)
    prompt = tokenizer.encode("Gravity is the force that")
except UserError as reason:
    print(f"{reason}.\nSo: a small local model, same lesson. Its prompt is made of bytes.")
    source, tokenizer = tempfile.mkdtemp(), None
    torch.manual_seed(2)
    wild = {"num_hidden_layers": 8, "initializer_range": 0.3}  # so that every layer matters
    SmolLM2(tiny.model_copy(update=wild)).save_pretrained(source)
    prompt = list(b"Gravity is the force that")
library = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
package = SmolLM2.from_pretrained(source)
config, official_ids = package.config, torch.tensor([prompt])
greedy_rules = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
greedy_rules |= {"max_new_tokens": 12, "attention_mask": torch.ones_like(official_ids)}
count = sum(p.numel() for p in package.parameters())
layers, theta = config.num_hidden_layers, f"{config.rope_theta:,.0f}"
print(f"{layers} layers, theta {theta}, {count:,} parameters; prompt of {len(prompt)} tokens")


# %% id="layers-code" tags=["lesson"]
@torch.no_grad()
def hidden_states(model, ids):
    """The running vector after the embedding and after each block; as in transformers, the
    last one stands behind the final norm."""
    x = [model.embed_tokens(ids)]
    for layer in model.layers:
        x.append(layer(x[-1]))
    x[-1] = model.norm(x[-1])
    return x


def gap(x, reference):
    """Largest difference, relative to the largest value."""
    return lesson.largest(x - reference) / lesson.largest(reference)


# %% id="layers-check" tags=["check"]
# From the folded cell: `package` and `library`, the package's model and transformers' with
# the same weights; their `config`; `official_ids` (1, T), the prompt.
model = Skeleton(config, Block, RMSNorm)
model.load_state_dict(package.model.state_dict())
my_states = hidden_states(model, official_ids)
logits, reference = model(official_ids), library(official_ids, output_hidden_states=True)
gaps = [gap(x, y) for x, y in zip(my_states, reference.hidden_states, strict=True)]
lesson.check("every layer equals transformers' (relative)", max(gaps), 1e-4)
lesson.check("the logits equal transformers' (relative)", gap(logits, reference.logits), 1e-4)

# %% cellView="form" id="layers-figure" tags=["figure"]
# @title Figure: layer by layer { display-mode: "form" }
fig, ax = plots.figure(7.5, 2.8)
name = "this model against transformers (0 drawn as 1e-9)"
ax.semilogy([max(value, 1e-9) for value in gaps], color=plots.BLUE, marker="o", label=name)
ax.axhline(1e-4, color=plots.RED, ls="--", label="tolerance")
ax.set_ylim(5e-10, max(1e-3, 3 * max(gaps)))
title = "Layer by layer: rounding, nothing else"
plots.label(ax, title, "layer (0 = embedding)", "max|difference|, relative", legend=True)
alt = "Relative difference after each layer: at most {:.0e}, against a tolerance of 1e-4."
plots.show(fig, alt.format(max(gaps)))

# %% id="greedy-check" tags=["check"]
my_ids = official_ids
with torch.no_grad():
    for _ in range(12):
        best = model(my_ids)[:, -1:].argmax(-1)  # (1, 1): the likeliest next token
        my_ids = torch.cat((my_ids, best), dim=1)  # it joins the text
print(tokenizer.decode(my_ids[0].tolist()) if tokenizer else my_ids[0, -12:].tolist())
# greedy_rules, from the folded cell: 12 tokens, always the likeliest
its_ids = library.generate(official_ids, **greedy_rules)
lesson.true("the 12 greedy tokens are transformers'", torch.equal(my_ids, its_ids))

# %% [markdown] id="bugs"
# **✎ Exercise**: build the loaded model again with a tenth of its `rope_theta`. Where does the chart jump now, and which
# position never differs?
#
# <details><summary>Solution</summary>
#
# At layer 1, the first that turns anything. Position 0 agrees in every layer: it sees only itself.
# ```python
# theta = {"rope_theta": config.rope_theta / 10}
# other = Skeleton(config.model_copy(update=theta), Block, RMSNorm)
# other.load_state_dict(model.state_dict())
# pairs = list(zip(hidden_states(other, official_ids), reference.hidden_states))
# print("every layer", [f"{gap(a, b):.0e}" for a, b in pairs])
# print("position 0 ", [f"{gap(a[:, 0], b[:, 0]):.0e}" for a, b in pairs])
# ```
# </details>
#
# ## 10 · Bug hunt
#
# Three colleagues wrote attention too. Their code runs, has the right shapes, and even trains. (The first two would do in a model that was trained
# that way from the start; with SmolLM2's weights they are wrong.) Each made one classic mistake:
# * in `q`: RoPE pairs neighbours instead of halves;
# * in `shared k`: heads repeated as 0 1 2 0 1 2 … instead of 0 0 0 1 1 1 …;
# * in `scores`: no division by √head_dim.
#
# The chart compares each with the right one, step by step. Before a mistake all numbers agree. Who did what?


# %% cellView="form" id="bugs-figure" tags=["lesson", "figure"]
# @title Figure: three colleagues, and where each begins to differ { display-mode: "form" }
here("RoPE", "share", "÷ √D")


def all_steps(x, rotate=rotate, share=lambda x: x.repeat_interleave(3, 1), D=tiny.head_dim):
    q, k, v = (attention.split(project(x)) for project in projections)
    step = {"q": rotate(q, *turns), "k": rotate(k, *turns)}
    step["shared k"] = share(step["k"])
    step["scores"] = step["q"] @ step["shared k"].mT / D**0.5
    step["weights"] = step["scores"].masked_fill(future, -torch.inf).softmax(-1)
    return step | {"output": step["weights"] @ share(v)}


attention, x = Attention(tiny), torch.randn(2, 10, tiny.hidden_size)
projections = (attention.q_proj, attention.k_proj, attention.v_proj)
turns, future = (attention.cos[:10], attention.sin[:10]), torch.ones(10, 10).triu(1).bool()
mistakes = [{"share": lambda x: x.repeat(1, 3, 1, 1)}, {"D": 1}, {"rotate": pair_neighbours}]
order = torch.randperm(3, generator=torch.Generator().manual_seed(9)).tolist()  # who did what
right_steps, first, names = all_steps(x), {}, ("Ada", "Bo", "Cy")
wrong = {n: all_steps(x, **mistakes[i]) for n, i in zip(names, order, strict=True)}
fig, ax = plots.figure(7.5, 2.8)
for number, (name, steps) in enumerate(wrong.items()):
    apart = {step: lesson.largest(steps[step] - right_steps[step]) for step in right_steps}
    first[name] = next(step for step in apart if apart[step] > 1e-6)
    at = [x + 0.06 * (number - 1) for x in range(len(apart))]
    style = {"color": plots.PALETTE[number], "marker": plots.MARKERS[number]}
    ax.semilogy(at, [max(value, 1e-8) for value in apart.values()], **style, label=name)
ax.set_xticks(range(len(right_steps)), right_steps)
title = "Where does each one begin to differ? (0 is drawn as 1e-8)"
plots.label(ax, title, "step of attention", "max|difference|", legend=True)
begins = ", ".join(f"{name}'s first differs at '{step}'" for name, step in first.items())
plots.show(fig, f"Steps {', '.join(right_steps)} against the correct attention: {begins}.")

# %% cellView="form" id="predict-bugs" tags=["predict", "check"]
# @title Your prediction, and a check: each mistake is found { display-mode: "form" }
ada = "?"  # @param ["?", "q", "shared k", "scores"]
bo = "?"  # @param ["?", "q", "shared k", "scores"]
cy = "?"  # @param ["?", "q", "shared k", "scores"]
guesses = {"Ada": ada, "Bo": bo, "Cy": cy}
for name, step in first.items():
    question = f"Where is {name}'s mistake: q, shared k or scores?"
    lesson.predict(question, guesses[name], step, why=f"Before '{step}' all numbers agree.")

for name, steps in wrong.items():
    off = steps["output"] - right_steps["output"]
    lesson.check_fails(f"{name}'s bug", lambda off=off: lesson.check("attention", off, 1e-5))
off = attention(x) - attention.o_proj(right_steps["output"].transpose(1, 2).flatten(2))
lesson.check("and without a mistake the check passes", off, 1e-5)
lesson.score()

# %% [markdown] id="init"
# ## 11 · Go deeper: how it starts
#
# SmolLM2's matrices begin as random numbers. Their spread is 1/24, which is 1/√C for its C of 576: a product with C inputs then neither blows a vector up nor shrinks it.
# (One number, `initializer_range`, serves all matrices, so it does not fit each exactly. `down_proj` has 8/3 · C inputs; alone it would make its input 1.6 times as large.
# And notebook 4's small `nano`, with C = 192, keeps 1/24.)
#
# Two matrices of each block, `o_proj` and `down_proj`, write to the running vector, and they start
# **smaller**, divided by √(2L), where L is the number of blocks. Why?
# * L blocks add 2L times to the same vector.
# * Random additions add up their *variances*: 2L of spread s have together the spread s·√(2L).
# * Divided by √(2L), all of them together weigh as much as one, however deep the model.
#
# Attention and MLP do not see that growth: a norm stands before each. But the running vector itself has it: in one that has grown large, the token's own embedding and every later
# addition count for less.
# GPT-2 began this, with the same factor. It is done once, here; from then on training decides. The figure shows 30 fresh blocks with and without the factor.


# %% id="init-code" tags=["lesson"]
here("o_proj", "MLP")


def initialise(model, config, factor):
    """Normal numbers; those of what writes to the running vector are multiplied by factor."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:  # the gains of the norms stay 1
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = config.initializer_range * (factor if writes else 1)
            nn.init.normal_(weight, std=spread)


# %% cellView="form" id="init-figure" tags=["check", "figure"]
# @title Check: the package's start; figure: 30 fresh blocks { display-mode: "form" }
mine, package = Skeleton(tiny, Block, RMSNorm), SmolLM2(tiny)
torch.manual_seed(1)
package.initialize()
torch.manual_seed(1)
initialise(mine, tiny, factor=(2 * tiny.num_hidden_layers) ** -0.5)
pairs = zip(mine.parameters(), package.parameters(), strict=True)
off = max(lesson.largest(p - q) for p, q in pairs)
lesson.check("the start is the package's, number by number", off)


def sizes(factor):
    """The root mean square of the running vector over 30 blocks of a fresh model."""
    wide = {"num_hidden_layers": 31, "initializer_range": tiny.hidden_size**-0.5}
    config = tiny.model_copy(update=wide)
    fresh = Skeleton(config, Block, RMSNorm)
    initialise(fresh, config, factor)
    states = torch.stack(hidden_states(fresh, ids)[:-1])  # (31, B, T, C); the 32nd is normed
    return states.square().mean((1, 2, 3)).sqrt()


plain, scaled = sizes(1), sizes(60**-0.5)
gained = [(x[-1] ** 2 - x[0] ** 2).item() for x in (plain, scaled)]  # variance, by 60 additions
print(f"60 additions gain a variance of {gained[0]:.1f}, scaled {gained[1]:.3f}")
lesson.check("scaled, they gain about a 60th (relative)", gained[0] / gained[1] / 60 - 1, 0.3)

fig, ax = plots.figure(7.5, 2.7)
ax.plot(plain, color=plots.ORANGE, marker="s", label="every matrix alike")
ax.plot(scaled, color=plots.BLUE, marker="o", label="o_proj, down_proj divided by √60")
ax.set_ylim(0)
title = "A fresh model of 30 blocks: who writes 60 times must write quietly"
plots.label(ax, title, "after block (0 = embedding)", "root mean square", legend=True)
alt = f"Size of the running vector over 30 blocks: from {plain[0]:.2f} to {plain[-1]:.2f} "
plots.show(fig, f"{alt}with every matrix alike, to {scaled[-1]:.2f} with two divided by √60.")

# %% [markdown] id="self-test"
# ## What you can now explain
#
# You have a model of 134,515,008 parameters, written part by part: an embedding that is used twice, and blocks in which each token looks back (attention), works (MLP)
# and adds. It equals transformers' in every layer.
#
# * Section 5 gave every position the same query and key. Why was the score matrix in that experiment constant along its diagonals?
# * Why does `repeat` in place of `repeat_interleave` give the right shapes and wrong answers?
# * What would break if the mask came after the softmax?
# * Why do `o_proj` and `down_proj` start smaller than the other matrices?
# * What does the plus around attention and MLP keep?
#
# <details><summary>Answers</summary>
#
# * Both vectors are turned by angles proportional to their positions; a dot product sees only the difference of the angles.
# * Query heads 0, 1, 2 were trained to read key head 0. `repeat` gives them heads 0, 1, 2: three heads exist either way, only in another order.
# * The weights left to the past would no longer sum to 1, and how much is missing would tell each position about its future.
# * They write to the running vector, 2L times in all. Variances add up, so each is divided by √(2L): together they weigh as much as one.
# * Each token's own vector: attention alone is a mean, and a mean of means makes all tokens of a row the same. And on the way back, the size of the gradient.
# </details>
#
# ## Next
#
# You have built it; now account for it. [2 · Count every parameter](02_count_every_parameter.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/02_count_every_parameter.ipynb)) predicts, then proves,
# where each of the 134,515,008 parameters sits, what they cost in memory and time, and what a wrong sum forgot.
