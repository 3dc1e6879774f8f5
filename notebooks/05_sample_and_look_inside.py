# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/05_sample_and_look_inside.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/05_sample_and_look_inside.html)

# %% [markdown] id="title"
# # 5 · Sample, and look inside
#
# You will be able to
# * turn a model's scores into text: greedy, temperature, top-k, top-p and min-p, in a few lines each and equal to the package's;
# * check that a KV cache changes no token, and draw what it saves;
# * see where a head looks, what the model would say after each block, and how your own run learned to write.
#
# The way: your model (section 1) → scores, chances, a choice: it writes (2 to 4) → the same chances read a text (5) → writing, made fast (6) → inside: heads and blocks (7)
# → your run through time (8).
#
# **Time** about 35 minutes to read; to run, 1 minute with a run of yours, 1 to 2 more on a CPU without one · **hardware** T4 or any CPU ·
# **network** only for the official model of section 8; offline the comparison is with your own untrained model.
#
# *Runtime → Run all* runs everything. Each `?` asks you to guess first: type a number in place of `None` and run that cell again. Each `✔`
# is a check: the largest difference between two things that should be equal, and how much is allowed.

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

# %% cellView="form" id="imports" tags=["setup"]
# @title Imports { display-mode: "form" }
import math
import time
from itertools import pairwise

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process

from smollm2 import SmolLM2, plots, widgets
from smollm2.device import choose_device
from smollm2.errors import UserError
from smollm2.evaluate import score_tokens
from smollm2.logs import SAMPLES, read_log
from smollm2.notebook import diagrams, lesson, sampler, token_view
from smollm2.notebook.inspect_model import logit_lens, look_inside, token_probabilities
from smollm2.notebook.own_run import own_run
from smollm2.origin import recorded
from smollm2.pretrained import load_model_and_tokenizer
from smollm2.sampling import complete, next_token_probabilities, prompt_ids
from smollm2.text import SEPARATOR, documents, read_split
from smollm2.token_text import percent, piece

SMOKE = colab.is_smoke()
PROMPT = "Once upon a time"
lesson.quiet()

# %% [markdown] id="your-run"
# ## 1 · Your run
#
# > *Way:* **your run** → scores → filters → play → read → cache → inside → through time
#
# This notebook looks at a model that *you* trained: the newest run in the folder `output`, as notebook 4 leaves it, or on your
# Google Drive, if an earlier machine copied it there (Colab asks for permission). Where there is no run, a small one is trained now: 300 steps,
# one to two minutes on a CPU, seconds on a GPU.

# %% cellView="form" id="find-run" tags=["parameters"]
# @title Where to look for your run
USE_DRIVE = True  # @param {type:"boolean"}
place = colab.run_places(USE_DRIVE)
places_on_drive = [place.drive_dir] if place.drive_dir else []

# %% id="load-run" tags=["slow", "lesson"]
checkpoints = own_run(REPO / "input.txt", place.output_dir, places_on_drive, smoke=SMOKE)
model, tokenizer = load_model_and_tokenizer(checkpoints[-1].folder, device=choose_device())
config = model.config
layers, heads = config.num_hidden_layers, config.num_attention_heads
count = sum(p.numel() for p in model.parameters())
print(f"{layers} layers, {heads} heads, vocabulary {config.vocab_size:,}, {count:,} parameters")

# %% [markdown] id="scores"
# ## 2 · From scores to a choice
#
# > *Way:* your run → **scores** → filters → play → read → cache → inside → through time
#
# A model does not write. It gives each token of its vocabulary a score (a **logit**), and something else must choose.
# 1. Divide the scores by a **temperature** T: above 1 makes the choice flatter and more varied, below 1 safer.
# 2. **Softmax** makes probabilities of them: e to the power of each, divided by their sum.
# 3. Draw one token by these probabilities.
#
# Take five tokens: what does T = 0.5 do to the best?

# %% id="temperature-numbers" tags=["lesson"]
five = torch.tensor([2.0, 1.0, 0.5, 0.0, -2.0])
for temperature in (0.5, 1.0, 2.0):
    chances = (five / temperature).softmax(-1)
    print(f"T = {temperature}: ", "  ".join(f"{chance:6.1%}" for chance in chances.tolist()))

# %% cellView="form" id="predict-temperature" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "At T = 1 the best of these five is e^1 = 2.7 times as likely as the second. How many "
    "times at T = 0.5?",
    guess, float(torch.tensor(2.0).exp()), within=0.05,
    why="Scores differ by 1, divided by 0.5 they differ by 2, and e^2 = 7.4. As T goes to 0 "
    "the best takes all: greedy.",
)  # fmt: skip

# %% id="logits" tags=["lesson"]
ids = torch.tensor([prompt_ids(model, tokenizer, PROMPT)], device=model.device)  # (1, T)
with torch.inference_mode():
    logits = model(ids)[0, -1]  # (V,) scores of the token after the prompt
print(f"after '{PROMPT}': {len(logits):,} scores from {logits.min():.1f} to {logits.max():.1f}")

# %% cellView="form" id="loop-figure" tags=["figure"]
# @title Figure: how a token is written { display-mode: "form" }
given, entries = ids.shape[1], f"(V,)\n({len(logits):,},)"
steps = [("text so far:\nids", f"(1, T)\n(1, {given})")]
steps += [("model:\nlogits", f"(1, T, V)\n(1, {given}, {len(logits):,})")]
steps += [("the last\nrow", entries), ("temperature,\nsoftmax", entries)]
steps += [("cut the tail\n(section 3)", entries), ("draw one:\nits id", "one number")]
title = "One token is written; its id joins the text, and all begins again"
alt = "Steps: " + ", ".join(" ".join(step) for step in steps).replace("\n", " ")
plots.show(diagrams.flow(title, steps, [(5, 0)]), f"{alt}; an arrow leads back to the text.")

# %% cellView="form" id="temperature-figure" tags=["figure"]
# @title Figure: a long tail { display-mode: "form" }
fig, ax = plots.figure(7.5, 3)
best = []
for temperature, color in ((0.5, plots.BLUE), (1.0, plots.BLACK), (2.0, plots.ORANGE)):
    chances = next_token_probabilities(logits, temperature).cpu()
    ordered, name = chances.sort(descending=True).values[:200], f"T = {temperature:g}"
    ax.loglog(range(1, len(ordered) + 1), ordered, color=color, markevery=0.1, label=name)
    best.append(f"{percent(ordered[0].item())} at {name}")
title = f"After '{PROMPT}': a few likely tokens and a long tail"
plots.label(ax, title, "rank of the token (1 = likeliest)", "probability", legend=True)
alt = "Probability against rank for three temperatures. The likeliest token has "
plots.show(fig, alt + f"{', '.join(best)}; the lower T, the thinner the tail.")

# %% [markdown] id="filters"
# ## 3 · Cut the tail: top-k, top-p, min-p
#
# > *Way:* your run → scores → **filters** → play → read → cache → inside → through time
#
# Each unlikely token is rare, but there are thousands, and one bad choice spoils the rest of the text. So we cut, and share the probability of what is
# cut among the rest. Three rules for what stays:
# * **top-k**: the k likeliest tokens;
# * [**top-p**](https://arxiv.org/abs/1904.09751): from the likeliest down, until their sum reaches p;
# * [**min-p**](https://arxiv.org/abs/2407.01082): each token with at least min-p times the probability of the likeliest.
#
# Which of them keeps fewer tokens where the model is sure?


# %% id="filters-code" tags=["lesson"]
def keep_top_k(p, k):
    """p (V,) probabilities -> (V,): True where a token stays."""
    ordered = p.sort(descending=True).values
    return p >= ordered[min(k, len(p)) - 1]


def keep_top_p(p, limit):
    ordered, order = p.sort(descending=True, stable=True)  # order: which token stands there
    likelier = ordered.cumsum(-1) - ordered  # the sum of everything likelier
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[likelier < limit]] = True
    return keep


def keep_min_p(p, fraction):
    return p >= fraction * p.max()


# %% cellView="form" id="predict-top-p" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
fifths = torch.tensor([0.50, 0.25, 0.15, 0.07, 0.03])
lesson.predict(
    "Probabilities 50, 25, 15, 7, 3 %. How many tokens does top-p = 0.8 keep?",
    guess, int(keep_top_p(fifths, 0.8).sum()), within=0,
    why="50 + 25 = 75 % is not yet 80 %, so the third stays too: the set *reaches* p, it need "
    "not stop below.",
)  # fmt: skip


# %% cellView="form" id="filters-beside" tags=["lesson"]
# @title Three filters on the same random scores { display-mode: "form" }
def differences(name, keep, value, warper):
    """What our filter, the package's and transformers' make of 50 random distributions."""
    for row in 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)):
        mine = row.masked_fill(~keep(row.softmax(-1), value), -torch.inf).softmax(-1)
        yield mine - next_token_probabilities(row, **{name: value})
        yield mine - warper(value)(None, row[None])[0].softmax(-1)


# %% cellView="form" id="filters-check" tags=["check"]
# @title Check: each filter equals the package's and transformers' { display-mode: "form" }
filters = (
    ("top_k", keep_top_k, 20, logits_process.TopKLogitsWarper),
    ("top_p", keep_top_p, 0.8, logits_process.TopPLogitsWarper),
    ("min_p", keep_min_p, 0.1, logits_process.MinPLogitsWarper),
)
likely = "is the token that crosses the limit kept, and the rest made to sum to 1 again?"
for name, *rest in filters:
    off = torch.stack(list(differences(name, *rest)))
    lesson.check(f"{name} equals the package's and transformers'", off, 1e-6, likely)

# %% [markdown] id="write"
# Now everything is there: read the ids, take the last scores, divide, softmax, cut, draw, append, and again. This loop is all of writing.


# %% id="write-code" tags=["lesson"]
@torch.inference_mode()
def write(ids, new, temperature=0.8, p=0.9):
    """ids (1, T) -> (1, T + new)."""
    for _ in range(new):
        scores = model(ids)[0, -1].float()  # (V,) of the next token
        chances = (scores / temperature).softmax(-1)
        chances = chances * keep_top_p(chances, p)  # 0 where it is cut
        drawn = chances.multinomial(1)  # makes the rest sum to 1 by itself
        ids = torch.cat((ids, drawn[None]), dim=1)
    return ids


print(" ".join(tokenizer.decode(write(ids, 30)[0].tolist()).split()))

# %% cellView="form" id="filters-figure" tags=["figure"]
# @title Figure: what each filter keeps { display-mode: "form" }
fig, ax = plots.figure(7.5, 3)
ax.margins(y=0.12)
falling = torch.linspace(0, -1, 60)  # 60 scores in a straight line, steep or flat
models = {"a sure model": 40 * falling, "an unsure model": 4 * falling}
rules = {"top-k 20": (keep_top_k, 20), "top-p 0.9": (keep_top_p, 0.9)}
rules["min-p 0.1"] = (keep_min_p, 0.1)
alt = "Tokens kept of 60."
for number, (name, scores) in enumerate(models.items()):
    kept = [int(keep(scores.softmax(-1), value).sum()) for keep, value in rules.values()]
    style = {"color": plots.PALETTE[number], "hatch": "//" * number, "edgecolor": "white"}
    drawn = ax.bar([x + 0.4 * number for x in range(3)], kept, 0.38, label=name, **style)
    ax.bar_label(drawn)
    told = (f"{rule} keeps {n}" for rule, n in zip(rules, kept, strict=True))
    alt += f" For {name} {', '.join(told)}."
ax.set_xticks([0.2, 1.2, 2.2], list(rules))
title = "Only top-k ignores how sure the model is"
plots.label(ax, title, "", "tokens kept of 60", legend=True)
plots.show(fig, alt)

# %% [markdown] id="filters-exercise"
# **✎ Exercise**: write `keep_typical(p, n)`: the n tokens whose −log p lies nearest to the entropy (the mean of −log p). When does it remove the likeliest token?
#
# <details><summary>Solution</summary>
#
# `nearest = (-p.log() - entropy).abs().argsort()[:n]` with `entropy = -(p * p.log()).sum()`, then `torch.zeros_like(p, dtype=bool).index_fill(0, nearest, True)`. It removes the likeliest where much of the probability lies elsewhere:
# of 0.4 and five times 0.12 (entropy 1.64; −log p 0.92 and 2.12), n = 5 keeps the five. A sure model, 0.9 and a hundred times 0.001, keeps its best.
# </details>

# %% [markdown] id="sampler"
# ## 4 · Play
#
# > *Way:* your run → scores → filters → **play** → read → cache → inside → through time
#
# **Write** streams text; the same seed with more new tokens goes on from there. Every setting moves the bars at once. Grey bars are what the model believes,
# blue ones what the next token is drawn from. The darker a word, the less likely the model itself found it.
#
# Try temperature 0 (greedy: always the likeliest), then 1.5, then 1.5 with min-p 0.1. What is the price of each? To stop early, interrupt (■ in Jupyter,
# *Runtime → Interrupt execution* in Colab): the text stays.

# %% cellView="form" id="sampler-widget" tags=["widget", "figure"]
# @title Try it: play { display-mode: "form" }
panel = sampler.show(model, tokenizer, prompt=PROMPT, new_tokens=40)

# %% id="sampler-check" tags=["check"]
options = {"temperature": 0.8, "top_p": 0.9}
texts = [complete(model, tokenizer, PROMPT, 30, seed=seed, **options) for seed in (3, 3, 4)]
print(f"seed 3: {texts[0][:80]!r}\nseed 4: {texts[2][:80]!r}")
lesson.true("the same seed writes the same text", texts[0] == texts[1])
nearly = complete(model, tokenizer, PROMPT, 30, temperature=1e-9, seed=5)
greedy = complete(model, tokenizer, PROMPT, 30, temperature=0.0)
lesson.true("a tiny temperature is greedy", nearly == greedy)

# %% [markdown] id="sampler-exercise"
# **✎ Exercise**: batch the prompts: call `model.generate` with two copies of `ids` and temperature 1. Why do the rows differ although the seed is the same?
#
# <details><summary>Solution</summary>
#
# `model.generate(ids.repeat(2, 1), 20, temperature=1.0, seed=1)`: one generator serves both rows, one after the other, so they get different random numbers.
# </details>

# %% [markdown] id="surprise"
# ## 5 · What surprises the model
#
# > *Way:* your run → scores → filters → play → **read** → cache → inside → through time
#
# So far the probabilities wrote a text. They can read one as well. Below is a piece of the **held-out** text, the end of `input.txt` that *your* training did not see;
# each token has the colour of the probability it got. Where is it darker: where a word begins, or where it goes on?

# %% cellView="form" id="surprise-view" tags=["figure"]
# @title Figure: what surprises it { display-mode: "form" }
held_out = [text for text, _ in documents(read_split(REPO / "input.txt", "val"))]
passage = held_out[1][:300].rsplit(" ", 1)[0]
read = torch.tensor([prompt_ids(model, tokenizer, passage)], device=model.device)
chances = token_probabilities(model, read)[0]
plots.show_html(*token_view.coloured(tokenizer, read[0].tolist(), [None, *chances.tolist()]))

# %% id="surprise-check" tags=["check"]
with torch.inference_mode():
    loss = model.loss(read[:, :-1], read[:, 1:])  # what training minimises
off = -chances.log().mean() - loss
lesson.check("the mean of -log(probability) is the training loss", off, 1e-4)

# %% cellView="form" id="surprise-words" tags=["lesson"]
# @title Measured: where words begin, and where they go on { display-mode: "form" }
words = [piece(tokenizer, i) for i in read[0].tolist()]
begins, goes_on = [], []  # numbers of the tokens that begin a word, or go on with one
for i, (before, word) in enumerate(pairwise(words)):
    if word[0] == "·" and word[-1].isalpha():
        begins.append(i)
    elif before[-1].isalpha() and word[0].isalpha():
        goes_on.append(i)
for name, where in (("begins", begins), ("goes on with", goes_on)):
    bits = -chances[where].log2().mean()
    print(f"a token that {name} a word costs {bits:.1f} bits on average ({len(where)} tokens)")
hardest = chances.argsort()[:3].tolist()
print("hardest:", ", ".join(f"'{words[i + 1]}' (1 in {1 / chances[i]:,.0f})" for i in hardest))

# %% [markdown] id="cache"
# ## 6 · The KV cache: read everything once
#
# > *Way:* your run → scores → filters → play → read → **cache** → inside → through time
#
# `write` reads the whole text again for each new token. To choose token 101, attention compares the query of token 100 with the keys of tokens 1 to 100, and mixes their values.
# All but the last of these keys and values were computed before, and nothing changes them, for the mask hides later tokens. Keep them, and each step reads **one**
# new token instead of all. The price is memory (notebook 2, section 6).
#
# But is the answer still the same? `greedily` does both: with a cache it reads only the newest token, without one everything.

# %% cellView="form" id="predict-cache" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
tokens_read = sum(range(10, 110))
lesson.predict(
    "10 tokens of prompt, 100 to write, no cache: how many tokens does the network read in "
    "all?",
    guess, tokens_read, unit="tokens",
    why=f"10 + 11 + ... + 109 = {tokens_read:,}; with a cache 10 for the prompt and 99 more: "
    "109. Without it the work grows with the square of the length.",
)  # fmt: skip


# %% id="cache-loop" tags=["lesson"]
@torch.inference_mode()
def greedily(ids, new, cached):
    """The `new` likeliest tokens after ids (1, T), one by one, and the chances of each step."""
    cache = model.new_cache(1, ids.shape[1] + new) if cached else None
    read, tokens, chances = ids, [], []
    for _ in range(new):
        scores = model(read, cache)[0, -1].float()  # (V,)
        best = scores.argmax().view(1, 1)
        ids = torch.cat((ids, best), dim=1)
        read = best if cached else ids
        tokens.append(best)
        chances.append(scores.softmax(-1))
    return torch.cat(tokens), torch.stack(chances)  # (new, 1), (new, V)


# %% id="cache-check" tags=["check"]
written, kept_chances = greedily(ids, 40, cached=True)
again, all_chances = greedily(ids, 40, cached=False)
off, likely = kept_chances - all_chances, "do RoPE's angles start at the token's real position?"
lesson.check("every probability is the same with and without cache", off, 1e-4, likely)
lesson.check("and so are the 40 greedy tokens", written - again, 0, likely)

# %% cellView="form" id="cache-steps" tags=["widget", "figure"]
# @title Try it: the cache, step by step { display-mode: "form" }
given = ids.shape[1]
spelled = [piece(tokenizer, i) for i in [*ids[0].tolist(), *written[:7].flatten().tolist()]]
cache_words = [word.replace("<|endoftext|>", "start") for word in spelled]


def cache_step(step):
    """Each step as a row: whose keys and values are computed, whose lie in the cache."""
    fig, axes = plots.figure(9, 3, columns=2, sharey=True)
    computed = {"no cache": 0, "KV cache": 0}
    for ax, name in zip(axes, computed, strict=True):
        for row, column in ((r, c) for r in range(step + 1) for c in range(given + r)):
            is_new = name == "no cache" or row == 0 or column == given + row - 1
            computed[name] += is_new
            style = {"color": plots.SKY, "hatch": "///", "edgecolor": "white"}
            ax.barh(row, 0.9, left=column, **{"color": plots.ORANGE} if is_new else style)
        ax.set_xticks(
            [c + 0.45 for c in range(len(cache_words))],
            cache_words,
            rotation=60,
            parse_math=False,
        )
        ax.set(xlim=(0, len(cache_words)), ylim=(7.6, -0.6), yticks=range(8))
        ax.grid(False)
        title = f"{name}: {computed[name]} computed so far"
        plots.label(ax, title, "token", "step" if name == "no cache" else "")
    fig.suptitle("filled: computed in this step; hatched: kept in the cache", fontsize=10)
    told = " and ".join(f"with {name} {total}" for name, total in computed.items())
    alt = "Filled boxes are computed in that step, hatched ones lie in the cache. "
    return fig, f"{alt}Up to step {step}: {told} keys and values a head."


widgets.explore(cache_step, step=widgets.slider("step", 0, 7, 4))


# %% cellView="form" id="cache-code" tags=["lesson"]
# @title Measure one more token { display-mode: "form" }
@torch.inference_mode()
def milliseconds(length, use_cache, repeats=5):
    """The time of one more token behind `length`; the fastest try, as other work disturbs."""
    text, best = torch.randint(config.vocab_size, (1, length), device=model.device), math.inf
    for _ in range(repeats):
        cache = model.new_cache(1, length + 1)
        model(text[:, :-1], cache)[0, -1, 0].item()  # what is known already; waits for a GPU
        start = time.perf_counter()
        scores = model(text[:, -1:], cache) if use_cache else model(text)
        scores[0, -1, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 1000 * best


# %% id="cache-times" tags=["lesson", "slow"]
lengths = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n <= config.max_position_embeddings]
milliseconds(16, True)  # warm up
times = {use: [milliseconds(n, use) for n in lengths] for use in (True, False)}
for n, quick, slow in zip(lengths, times[True], times[False], strict=True):
    print(f"behind {n:4} tokens: {quick:6.1f} ms with the cache, {slow:6.1f} ms without")

# %% cellView="form" id="cache-figure" tags=["figure"]
# @title Figure: one more token { display-mode: "form" }
fig, ax = plots.figure(7.5, 3)
plain, quick = times[False], times[True]
ax.plot(lengths, plain, "s-", color=plots.ORANGE, label="no cache: read everything again")
ax.plot(lengths, quick, "o-", color=plots.BLUE, label="KV cache: read one token")
ax.set_ylim(0)
ratio, longest = plain[-1] / quick[-1], lengths[-1]
title = f"One more token behind {longest}: {ratio:.0f} times as fast with the cache"
plots.label(ax, title, "tokens already there", "milliseconds", legend=True)
alt = f"Time of one more token against the length: behind {longest} tokens {quick[-1]:.1f} ms "
plots.show(fig, alt + f"with the cache, {ratio:.1f} times that without.")

# %% [markdown] id="attention"
# ## 7 · Look inside
#
# > *Way:* your run → scores → filters → play → read → cache → **inside** → through time
#
# **Heads.** Attention is the one place where positions talk. The fast kernel (PyTorch's `scaled_dot_product_attention`) never shows its probabilities, so
# `smollm2.notebook.inspect_model` computes them again beside it, from the same weights. First: is what we look at really what the model does?
#
# Then move the sliders: each row is a token, and shows how its attention is spread over the tokens before it. Which head reads the token just before?

# %% id="attention-check" tags=["check"]
look = "The king opened the door, and the king"
seen = torch.tensor([prompt_ids(model, tokenizer, look)], device=model.device)
inside = look_inside(model, seen)
names = [piece(tokenizer, i).replace("<|endoftext|>", "start") for i in seen[0].tolist()]
shape = tuple(inside.attention[0].shape)
print(f"{len(names)} tokens; attention of a layer: {shape} = (batch, heads, query, key)")
attention = torch.stack(inside.attention)
with torch.inference_mode():
    lesson.check("the logits are the model's own", inside.logits - model(seen))
lesson.check("each row of each head sums to 1", attention.sum(-1) - 1, 1e-5)

# %% id="attention-beside" tags=["check"]
settings = {"dtype": torch.float32, "attn_implementation": "eager"}  # which shows attention
library = AutoModelForCausalLM.from_pretrained(checkpoints[-1].folder, **settings)
with torch.inference_mode():
    theirs = library.to(model.device).eval()(seen, output_attentions=True).attentions
off, likely = attention - torch.stack(theirs), "which key head does a query head read?"
lesson.check("attention equals transformers', all layers and heads", off, 1e-4, likely)


# %% cellView="form" id="attention-widget" tags=["widget", "figure"]
# @title Try it: one head { display-mode: "form" }
def one_head(layer, head):
    weights = inside.attention[layer][0, head].cpu()
    fig, ax = plots.figure(6.5, 4.6)
    most = weights[1:].max().item()  # the first token has itself alone to read
    picture = ax.imshow(weights, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    fig.colorbar(picture, ax=ax, label="share of attention (first row left out)")
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    ax.set_yticks(ticks, names, fontsize=8, parse_math=False)
    ax.grid(False)
    title = f"layer {layer}, head {head}: each row reads the columns"
    plots.label(ax, title, "... reads this one", "this token ...")
    share, target = weights[-1].max(-1)
    alt = (
        f"Attention of layer {layer}, head {head}: the last token '{names[-1]}' looks most at "
    )
    return fig, alt + f"'{names[target]}' (position {target}, {percent(share.item())})."


widgets.explore(
    one_head,
    layer=widgets.slider("layer", 0, layers - 1, layers // 2),
    head=widgets.slider("head", 0, heads - 1, 0),
)

# %% [markdown] id="habits"
# **Habits.** Looking at heads one by one is fun and proves nothing. Measure instead: how much of its attention does each head spend on the token itself, on the one
# just before, and on the very first?
#
# In many models the first gets most although it says nothing: a head with nothing to do must look *somewhere*, since
# its row sums to 1. This is called an [**attention sink**](https://arxiv.org/abs/2309.17453). Does yours have one?

# %% cellView="form" id="habits-shares" tags=["lesson"]
# @title Measure the habits of every head { display-mode: "form" }
rows = attention[:, 0, :, 2:].cpu()  # (L, H, T - 2, T): those with two tokens before them
at = torch.arange(2, len(names))
columns = {"itself": at, "the one before": at - 1, "the first": 0 * at}
habits = {name: rows[:, :, at - 2, column].mean(-1) for name, column in columns.items()}
even = (1 / (at + 1)).mean()  # a head that spreads its attention evenly over all tokens so far
found = []
for name, shares in habits.items():
    layer, head = divmod(int(shares.argmax()), heads)
    found.append(f"on {name} most in layer {layer}, head {head}: {shares.max():.0%}")
print("\n".join(found), f"\n(spread evenly it would be {even:.0%} on each)")

# %% cellView="form" id="habits-figure" tags=["figure"]
# @title Figure: habits of heads { display-mode: "form" }
fig, axes = plots.figure(8.5, 1.4 + 0.2 * min(layers, 30), columns=3, sharey=True)
most = max(shares.max().item() for shares in habits.values())
for ax, (name, shares) in zip(axes, habits.items(), strict=True):
    picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(0, heads, 1 if heads < 12 else 4))
    plots.label(ax, f"on {name}", "head", "layer" if name == "itself" else "")
fig.colorbar(picture, ax=axes, label="mean share")
alt = f"Mean attention of each head, by layer: {'; '.join(found)}. "
plots.show(fig, alt + f"Spread evenly it would be {even:.0%} on each.")

# %% [markdown] id="lens"
# **Blocks: the logit lens.** Every block adds to the same running vector, so the model's last step (norm, output matrix) can be applied after *any* block: what would
# it say if it stopped there? First a check and your guess.
#
# In the figure each column is a position, each row a block; the word is the best guess so far, the colour how sure it is. Row 0, the embedding alone, mostly repeats
# the token just read: the output matrix *is* the embedding (notebook 1). (Early blocks may also use directions that the output matrix was not made for: read the
# first rows with care.)
#
# <details><summary>Go deeper: odd words in row 0, such as <code>a9</code>, a lone byte</summary>
#
# Such an entry hardly occurs in the training text. A likely reason: training pushed its row away from every answer and never towards one,
# so it grew long, and wins where a rarer token's own row is short. The numbers below count them.
# </details>

# %% id="lens-check" tags=["check"]
lens = logit_lens(model, inside.hidden)[:, 0].cpu()  # (L + 1, T, V)
off = lens[-1] - inside.logits[0].float().softmax(-1).cpu()
lesson.check("after the last block the lens shows the model's own answer", off, 1e-6)

# %% cellView="form" id="predict-lens" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
guesses = logit_lens(model, look_inside(model, read).hidden)[:, 0].argmax(-1)  # (L + 1, T)
agreement = (guesses == guesses[-1]).float().mean(-1).tolist()  # with the model's last word
first = next(block for block, share in enumerate(agreement) if share >= 0.5)
lesson.predict(
    f"Your model has {layers} blocks. After how many of them is, for at least half of the "
    "passage's tokens, the final answer already the best guess?",
    guess, first, within=0, unit="blocks",
    why=f"After {first}, {agreement[first]:.0%} are there; one block before the end "
    f"{agreement[-2]:.0%}. The rest is decided in the last block.",
)  # fmt: skip

# %% cellView="form" id="lens-words" tags=["lesson"]
# @title The guesses in numbers { display-mode: "form" }
shown = [*range(0, layers, -(-layers // 8)), layers]  # at most nine rows
columns = range(max(0, len(names) - 9), len(names))
sureness, best = lens[shown][:, columns].max(-1)
texts = [text for text, _ in documents(read_split(REPO / "input.txt", "train"))]
trained_on = torch.tensor([i for row in tokenizer.encode_batch(texts) for i in row])
known = torch.bincount(trained_on, minlength=config.vocab_size) > 0
odd = guesses[0][guesses[0] != read[0]].cpu()  # where row 0 does not repeat its token
lengths = model.lm_head.weight.detach().cpu().norm(dim=1)
long, usual = lengths[~known].mean(), lengths[known].mean()
print(f"row 0 says another token at {len(odd)} of the passage's {read.shape[1]} places,")
print(f"at {int((~known[odd]).sum())} of them one that input.txt never holds")
print(f"(the rows of those not in it are {long:.1f} long on average, all others {usual:.1f})")
there = ", ".join(f"block {block} {agreement[block]:.0%}" for block in shown)
print(f"share of the passage's final answers already there:\n  {there}")

# %% cellView="form" id="lens-figure" tags=["figure"]
# @title Figure: the logit lens { display-mode: "form" }
fig, ax = plots.figure(9, 1.2 + 0.34 * len(shown))
scale = sureness[1:].max().item()  # row 0 repeats the token and is nearly sure of it
picture = ax.imshow(sureness, cmap="Blues", vmin=0, vmax=scale, aspect="auto")
style = {"ha": "center", "va": "center", "fontsize": 8, "parse_math": False}
for row in range(len(shown)):
    for column in range(len(columns)):
        word = piece(tokenizer, int(best[row, column]))[:9]
        color = "white" if sureness[row, column] > 0.7 * scale else "black"
        ax.text(column, row, word, color=color, **style)
fig.colorbar(picture, ax=ax, label="its probability", extend="max")
ax.set_xticks(range(len(columns)), [names[i] for i in columns], parse_math=False)
ax.set_yticks(range(len(shown)), shown)
ax.grid(False)
title = "What it would say next, if it stopped after this block"
plots.label(ax, title, "having read up to", "block (0 = embedding)")
told = f"'{piece(tokenizer, int(best[-1, -1]))}' with {percent(sureness[-1, -1].item())}"
alt = f"Best next token after each block for the last {len(columns)} positions; at the end, "
plots.show(fig, alt + f"after '{names[-1]}', the model says {told}.")

# %% [markdown] id="habits-exercise"
# **✎ Exercise**: switch off one head: in a copy of the model set its `head_dim` columns of `o_proj.weight` to zero, and score the passage again. Which head costs most?
#
# <details><summary>Solution</summary>
#
# `import copy`; for each head in turn `other = copy.deepcopy(model)`, then
# `other.model.layers[layer].self_attn.o_proj.weight.data[:, head * D : (head + 1) * D] = 0` with `D = config.head_dim`, and
# `-token_probabilities(other, read).log2().sum()`. Often a head of the first layer costs most, and several cost almost nothing.
# </details>

# %% [markdown] id="time"
# ## 8 · Your run through time, and the official model
#
# > *Way:* your run → scores → filters → play → read → cache → inside → **through time**
#
# Every checkpoint is a whole model. Give each the same prompt and the same seed, and slide through your own run. A run keeps its newest checkpoints only,
# but its log also holds what the earlier ones wrote. What comes first: spelling, words, or sense?
#
# (**Bits per byte** is the sum of −log₂ of the probabilities of a text's tokens, divided by its bytes: less is better, and
# models with different tokenizers can be compared. Notebooks 3 and 6 have more.)

# %% id="time-code" tags=["lesson", "slow"]
eight = held_out[1:9]
end = config.eos_token_id or 0
sample = [i for text in eight for i in [*tokenizer.encode(text), end]]
sample_bytes = sum(len((text + SEPARATOR).encode()) for text in eight)


def moment(step, model):
    """What the model of one step writes, believes and scores."""
    model, block = model.to(choose_device()), min(128, config.max_position_embeddings)
    score = score_tokens(model, sample, sample_bytes, block_length=block)
    with torch.inference_mode():
        logits = model(ids)[0, -1].cpu()
    text = complete(model, tokenizer, PROMPT, 30, temperature=0.8, top_k=50, seed=7)
    return {"step": step, "bits": score.bits_per_byte, "logits": logits, "text": PROMPT + text}


# %% id="time-moments" tags=["lesson", "slow"]
state = recorded(checkpoints[0].folder)
torch.manual_seed(state["config"]["train"]["seed"])
start = None if state.get("init_from") else SmolLM2(config)  # step 0: what the seed drew
moments = [moment(0, start)] if start else []
moments += [moment(c.step, SmolLM2.from_pretrained(c.folder)) for c in checkpoints]

# %% cellView="form" id="time-texts" tags=["lesson"]
# @title What it wrote at each step { display-mode: "form" }
rows = {m["step"]: (f"{m['bits']:.2f} bits per byte", m["text"]) for m in moments}
last = checkpoints[-1].folder
for log in (last.parent.parent / "logs" / SAMPLES, last / SAMPLES):  # the second: on Drive
    for event in read_log(log) if log.is_file() else []:
        if int(event["step"]) < checkpoints[0].step:  # the first prompt of each step
            text = event["prompt"] + event["text"]
            rows.setdefault(int(event["step"]), ("from the log", text))
for step in sorted(rows)[-20:]:
    print(f"step {step:6}  {rows[step][0]:18}  {' '.join(rows[step][1].split())[:68]}")

# %% id="time-check" tags=["check"]
lesson.check("the last moment is the model above", moments[-1]["logits"] - logits.cpu(), 1e-4)
if start:
    saved = moments[0]["bits"] - moments[-1]["bits"]
    print(f"from step 0 to the end your run saved {saved:.2f} bits per byte")
    lesson.true("your run learned: it needs fewer bits than at step 0", saved > 0)


# %% cellView="form" id="time-widget" tags=["widget", "figure"]
# @title Try it: through time { display-mode: "form" }
def one_moment(moment):
    m = moments[moment]
    step, bits, words = m["step"], m["bits"], " ".join(m["text"].split())
    fig, (left, right) = plots.figure(8.5, 3.2, columns=2)
    every = [x["bits"] for x in moments]
    left.plot([x["step"] for x in moments], every, color=plots.BLUE, marker="o")
    left.plot(step, bits, "D", color=plots.RED, markersize=9)
    left.set_ylim(0, 1.1 * max(every))
    title = f"step {step}: {bits:.2f} bits per byte"
    plots.label(left, title, "optimizer step", "bits per byte, held out")
    chances, best = m["logits"].float().softmax(-1).topk(8)
    right.barh(range(8), chances, color=plots.BLUE)
    right.set_yticks(
        range(8), [f"'{piece(tokenizer, int(i))}'" for i in best], parse_math=False
    )
    right.invert_yaxis()
    right.set_xlim(0, max(0.3, chances[0].item()))
    plots.label(right, f"after '{PROMPT}'", "probability of the next token", "")
    fig.suptitle(words[:95], x=0.02, ha="left", fontsize=10, parse_math=False)
    return fig, f"At step {step} ({bits:.2f} bits per byte) the model writes: {words}"


last = len(moments) - 1
widgets.explore(one_moment, moment=widgets.slider("moment of the run", 0, last, last))

# %% cellView="form" id="official" tags=["slow", "lesson"]
# @title Load the official model, or an early one of yours { display-mode: "form" }
try:
    name = "HuggingFaceTB/SmolLM2-135M"
    other, other_tokenizer = load_model_and_tokenizer(name, device=model.device)
    other_name = "the official SmolLM2-135M (2 trillion tokens)"
except UserError as reason:
    print(f"{reason}.\nSo: beside your own model, as early as there is one.")
    other = (start or SmolLM2.from_pretrained(checkpoints[0].folder)).to(model.device)
    other_tokenizer, other_name = tokenizer, f"your model at step {moments[0]['step']}"

# %% id="official-beside" tags=["lesson"]
settings = {"temperature": 0.8, "top_p": 0.9, "seed": 2}
pairs = {"yours": (model, tokenizer), other_name: (other, other_tokenizer)}
for prompt in (PROMPT, "The capital of France is"):
    for name, (each, its_tokenizer) in pairs.items():
        text = complete(each, its_tokenizer, prompt, 30, **settings)
        print(f"{name}: {prompt}{' '.join(('|' + text).split())[:90]}\n")  # | written from here

# %% cellView="form" id="official-figure" tags=["figure"]
# @title Figure: beside the official model { display-mode: "form" }
fig, ax = plots.figure(7.5, 2)
costs, size = {}, len(passage.encode())
for name, (each, its_tokenizer) in pairs.items():
    row = torch.tensor([prompt_ids(each, its_tokenizer, passage)], device=each.device)
    costs[name] = float(-token_probabilities(each, row).log2().sum()) / size
drawn = ax.barh(list(costs), list(costs.values()), color=[plots.BLUE, plots.ORANGE])
ax.bar_label(drawn, fmt="%.2f", padding=3)
ax.set_xlim(0, 1.15 * max(costs.values()))
plots.label(ax, f"The {size} bytes of section 5 (less is better)", "bits per byte", "")
told = ", ".join(f"{name} {value:.2f}" for name, value in costs.items())
plots.show(fig, f"Bits per byte for one held-out passage: {told}.")

# %% [markdown] id="time-exercise"
# **✎ Exercise**: train a small run with early checkpoints (one to two minutes on a CPU) and slide through it as in section 8. At which step do words appear?
#
# <details><summary>Solution</summary>
#
# In section 1 put `checkpoints = own_run(REPO / "input.txt", "early")` in place of the first line. Run that cell, the one in section 2 that makes `ids`, and
# section 8 again. Its checkpoints are those of steps 50 to 300, beside step 0.
# </details>

# %% [markdown] id="self-test"
# ## What you can now explain
#
# You can make a model write and say why it wrote this: the scores, the rule that cut them, the head that looked back, the block that decided.
#
# * Why does min-p keep many tokens at one place and two at another, although its setting is the same?
# * Why may the cache be dropped at any moment without changing the text (but for rounding)?
# * Why can the output matrix be applied after block 3 at all?
#
# <details><summary>Answers</summary>
#
# * Its limit is a fraction of the best probability: where the best is weak, much of the rest reaches it.
# * It holds only what can be computed again from the tokens: keys and values of positions that no longer change, because nothing looks ahead.
# * Every block adds to the same running vector, always of the same *width*, and the final norm makes its size the same: so the output matrix can read it after any block.
# </details>

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="next"
# ## Next
#
# It writes, and you know how. How good is it, in one number that no tokenizer can bend, and how do others get it?
# [6 · Evaluate and share](06_evaluate_and_share.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/06_evaluate_and_share.ipynb))
