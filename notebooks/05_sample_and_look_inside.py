# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/05_sample_and_look_inside.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a>

# %% [markdown] id="title"
# # 5 · Sample, and look inside
#
# You will be able to
# * turn a model's scores into text: greedy, temperature, top-k, top-p and min-p, written by you and equal to the package's;
# * prove that a KV cache changes no token, and draw what it saves;
# * see where a head looks, what the model would say after each block, and how your own run learned to write.
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

# %% id="imports" tags=["setup"]
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from smollm2 import SmolLM2, plots, widgets
from smollm2.device import choose_device
from smollm2.errors import UserError
from smollm2.evaluate import score_tokens
from smollm2.logs import SAMPLES, read_log
from smollm2.model import KVCache
from smollm2.notebook import lesson, token_view
from smollm2.notebook.inspect_model import logit_lens, look_inside, token_probabilities
from smollm2.notebook.own_run import own_run, untrained
from smollm2.pretrained import load_model_and_tokenizer
from smollm2.sampling import complete, next_token_probabilities, prompt_ids, stream
from smollm2.text import SEPARATOR, documents, read_split

SMOKE = colab.is_smoke()
PROMPT = "Once upon a time"
lesson.quiet()

# %% [markdown] id="your-run"
# ## 1 · Your run
#
# This notebook looks at a model that *you* trained: the newest run in the folder `output`, as notebook 4 leaves it. Tick the box to look on your
# Google Drive too (Colab asks for permission). Where there is no run, a small one is trained now: 300 steps, one to two minutes on a CPU, seconds on a GPU.

# %% cellView="form" id="find-run" tags=["parameters"]
# @title Where to look for your run
USE_DRIVE = False  # @param {type:"boolean"}
place = colab.storage(use_drive=USE_DRIVE)
places_on_drive = [place.drive_dir] if place.drive_dir else []

# %% id="load-run" tags=["slow", "lesson"]
checkpoints = own_run(REPO / "input.txt", place.output_dir, places_on_drive, smoke=SMOKE)
model, tokenizer = load_model_and_tokenizer(checkpoints[-1].folder, device=choose_device())
config = model.config
print(f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, vocabulary {config.vocab_size:,}, {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown] id="scores"
# ## 2 · From scores to a choice
#
# A model does not write. It gives each token of its vocabulary a score (a **logit**), and something else must choose. Softmax makes
# probabilities of the scores: e to the power of each, divided by their sum. Dividing the scores by a **temperature** T first makes the choice bolder
# (T above 1) or safer (T below 1). Take five tokens: what does T = 0.5 do to the best?

# %% id="temperature-numbers" tags=["lesson"]
five = torch.tensor([2.0, 1.0, 0.5, 0.0, -2.0])
for temperature in (0.5, 1.0, 2.0):
    chances = (five / temperature).softmax(-1)
    print(f"T = {temperature}: ", "".join(f"{token_view.percent(p):>9}" for p in chances.tolist()))

# %% cellView="form" id="predict-temperature" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "At T = 1 the best of these five is e^1 = 2.7 times as likely as the second. How many times at T = 0.5?",
    guess, float(torch.tensor(2.0).exp()), within=0.05,
    why="Scores differ by 1, divided by 0.5 they differ by 2, and e^2 = 7.4. As T goes to 0 the best takes all: greedy.",
)  # fmt: skip

# %% id="logits" tags=["lesson"]
ids = torch.tensor([prompt_ids(model, tokenizer, PROMPT)], device=model.device)
with torch.inference_mode():
    logits = model(ids)[0, -1]  # (V,) scores of the token after the prompt
print(f"after '{PROMPT}': {len(logits):,} scores from {logits.min():.1f} to {logits.max():.1f}")

# %% id="temperature-figure" tags=["figure"]
fig, ax = plots.figure(7.5, 3)
best = []
for temperature, color, marker in ((0.5, plots.BLUE, "o"), (1.0, plots.BLACK, "s"), (2.0, plots.ORANGE, "^")):
    ordered = next_token_probabilities(logits, temperature).sort(descending=True).values[:200].cpu()
    ax.loglog(range(1, len(ordered) + 1), ordered, color=color, marker=marker, markevery=0.1, label=f"T = {temperature:g}")
    best.append(f"{token_view.percent(ordered[0].item())} at T = {temperature:g}")
plots.label(ax, f"After '{PROMPT}': a few likely tokens and a long tail", "rank of the token (1 = likeliest)", "probability", legend=True)
plots.show(fig, alt=f"Probability against rank for three temperatures. The likeliest token has {', '.join(best)}; the lower T, the thinner the tail.")

# %% [markdown] id="filters"
# ## 3 · Cut the tail: top-k, top-p, min-p
#
# Each unlikely token is rare, but there are thousands, and one bad choice spoils the rest of the text. So we cut, and share the probability of what is
# cut among the rest. **top-k** keeps the k likeliest tokens. **top-p** goes down from the likeliest until their sum reaches p. **min-p** keeps each token
# with at least min-p times the probability of the likeliest. Which of them keeps fewer tokens where the model is sure?


# %% id="filters-code" tags=["lesson"]
def keep_top_k(p, k):  # p (V,) -> which tokens stay
    return p >= p.sort(descending=True).values[min(k, len(p)) - 1]


def keep_top_p(p, limit):
    order = p.argsort(descending=True, stable=True)
    before = p[order].cumsum(-1) - p[order]  # the probability of everything likelier
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[before < limit]] = True
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
    why="50 + 25 = 75 % is not yet 80 %, so the third stays too: the set *reaches* p, it need not stop below.",
)  # fmt: skip


# %% id="filters-beside" tags=["lesson"]
def differences(name, keep, value, warper):
    """What our filter, the package's and transformers' make of 50 random distributions: ours minus theirs."""
    for row in 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)):
        mine = row.masked_fill(~keep(row.softmax(-1), value), -torch.inf).softmax(-1)
        yield mine - next_token_probabilities(row, **{name: value})
        yield mine - warper(value)(None, row[None])[0].softmax(-1)


# %% id="filters-check" tags=["check"]
filters = ("top_k", keep_top_k, 20, TopKLogitsWarper), ("top_p", keep_top_p, 0.8, TopPLogitsWarper), ("min_p", keep_min_p, 0.1, MinPLogitsWarper)
likely = "is the token that crosses the limit kept, and the rest made to sum to 1 again?"
for name, *rest in filters:
    lesson.check(f"{name} equals the package's and transformers'", torch.stack(list(differences(name, *rest))), 1e-6, likely)

# %% id="filters-figure" tags=["figure"]
fig, ax = plots.figure(7.5, 3)
counts = {}
sure, unsure = (torch.linspace(0, -1, 60) * steep for steep in (40, 4))  # 60 scores that fall in a straight line, steep or flat
rules = {"top-k 20": (keep_top_k, 20), "top-p 0.9": (keep_top_p, 0.9), "min-p 0.1": (keep_min_p, 0.1)}
for number, (shape, name, hatch) in enumerate(((sure, "a sure model", ""), (unsure, "an unsure model", "//"))):
    kept = [int(keep(shape.softmax(-1), value).sum()) for keep, value in rules.values()]
    counts[name] = ", ".join(f"{rule} keeps {n}" for rule, n in zip(rules, kept, strict=True))
    drawn = ax.bar([x + 0.4 * number for x in range(3)], kept, 0.38, color=plots.PALETTE[number], hatch=hatch, edgecolor="white", label=name)
    ax.bar_label(drawn)
ax.set_xticks([0.2, 1.2, 2.2], list(rules))
plots.label(ax, "Only top-k ignores how sure the model is", "", "tokens kept of 60", legend=True)
plots.show(fig, alt="Tokens kept of 60. " + "; ".join(f"{name}: {kept}" for name, kept in counts.items()) + ".")

# %% [markdown] id="sampler"
# ## 4 · Play
#
# **Write** streams text, **Go on** continues it; every setting moves the bars at once. Grey bars are what the model believes, blue ones what the next token
# is drawn from. The darker a word, the less likely the model itself found it. Try temperature 0 (greedy: always the likeliest), then 1.5, then 1.5 with
# min-p 0.1. What is the price of each? To stop early, press the notebook's interrupt button (■): the text stays. Below the panel: what it shows untouched.

# %% id="sampler-widget" tags=["widget", "figure"]
panel = widgets.sampler(model, tokenizer, prompt=PROMPT, new_tokens=40)

# %% id="sampler-check" tags=["check"]
options = {"temperature": 0.8, "top_p": 0.9}
texts = [complete(model, tokenizer, PROMPT, 30, seed=seed, **options) for seed in (3, 3, 4)]
print(f"seed 3: {texts[0][:80]!r}\nseed 4: {texts[2][:80]!r}")
lesson.check("the same seed writes the same text", texts[0] != texts[1])
nearly, greedy = (complete(model, tokenizer, PROMPT, 30, temperature=t, seed=5) for t in (1e-9, 0.0))
lesson.check("a tiny temperature is greedy", nearly != greedy)

# %% [markdown] id="surprise"
# ## 5 · What surprises the model
#
# The same probabilities can read a text instead of writing one. Below is a piece of the **held-out** text, the end of `input.txt` that no training saw;
# each token has the colour of the probability it got. Where is it darker: where a word begins, or where it goes on?

# %% id="surprise-view" tags=["figure"]
held_out = [text for text, _ in documents(read_split(REPO / "input.txt", "val"))]  # each a whole piece
passage = held_out[1][:300].rsplit(" ", 1)[0]
read = torch.tensor([prompt_ids(model, tokenizer, passage)], device=model.device)
chances = token_probabilities(model, read)[0]
markup, twin = token_view.coloured(tokenizer, read[0].tolist(), [None, *chances.tolist()])
plots.show_html(markup + token_view.legend(), f"{twin}\n{token_view.LEGEND}")

# %% id="surprise-check" tags=["check"]
with torch.inference_mode():
    loss = model.loss(read[:, :-1], read[:, 1:])  # what training minimises
lesson.check("the mean of -log(probability) is the training loss", -chances.log().mean() - loss, 1e-4)

# %% id="surprise-words" tags=["lesson"]
pieces = [token_view.piece(tokenizer, i) for i in read[0].tolist()]
begins = [i for i, piece in enumerate(pieces[1:]) if piece[0] == "·" and piece[-1].isalpha()]
goes_on = [i for i, piece in enumerate(pieces[1:]) if piece[0].isalpha() and pieces[i][-1].isalpha()]  # pieces[i] stands before pieces[1:][i]
for name, where in (("begins", begins), ("goes on with", goes_on)):
    print(f"a token that {name} a word costs {-chances[where].log2().mean():.1f} bits on average ({len(where)} tokens)")
print("hardest:", ", ".join(f"'{pieces[i + 1]}' (1 in {1 / chances[i]:,.0f})" for i in chances.argsort()[:3].tolist()))

# %% [markdown] id="cache"
# ## 6 · The KV cache: read everything once
#
# To choose token 101, attention compares the query of token 100 with the keys of tokens 1 to 100, and mixes their values. All but the last of these keys and
# values were computed before, to choose token 100, and nothing changes them. Keep them, and each step reads **one** new token instead of all. But is
# the answer still the same?

# %% cellView="form" id="predict-cache" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
tokens_read = sum(range(10, 110))
lesson.predict(
    "10 tokens of prompt, 100 to write, no cache: how many tokens does the network read in all?",
    guess, tokens_read, within=0.1, unit="tokens",
    why=f"10 + 11 + ... + 109 = {tokens_read:,}; with a cache 10 for the prompt and 99 more: 109. Without it the work grows with the square of the length.",
)  # fmt: skip

# %% id="cache-check" tags=["check"]
new = 40
with_cache = list(stream(model, ids, new, seed=1, stop_ids=()))
without = list(stream(model, ids, new, seed=1, stop_ids=(), use_cache=False))
gaps = [(a.softmax(-1) - b.softmax(-1)).abs().max().item() for (_, a), (_, b) in zip(with_cache, without, strict=True)]
likely = "do the new token's RoPE angles start at its real position?"
lesson.check("every probability is the same with and without cache", max(gaps), 1e-4, likely)
written, again = (torch.stack([token for token, _ in steps]) for steps in (with_cache, without))
lesson.check(f"and so are the {new} greedy tokens", written - again, 0, likely)


# %% id="cache-code" tags=["lesson"]
@torch.inference_mode()
def milliseconds(length, use_cache, repeats=5):
    """The time of one more token behind `length` tokens; the fastest of a few tries, so that other work does not count."""
    text = torch.randint(config.vocab_size, (1, length), device=model.device)
    best = float("inf")
    for _ in range(repeats):
        cache = KVCache(config, 1, length + 1, torch.float32, model.device)
        model(text[:, :-1], cache)  # what is known already
        start = time.perf_counter()
        (model(text[:, -1:], cache) if use_cache else model(text))[0, -1, 0].item()  # .item() waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 1000 * best


# %% id="cache-times" tags=["lesson", "slow"]
lengths = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n <= config.max_position_embeddings]
milliseconds(16, True)  # warm up
times = {use: [milliseconds(n, use) for n in lengths] for use in (True, False)}
for n, quick, slow in zip(lengths, times[True], times[False], strict=True):
    print(f"behind {n:4} tokens: {quick:6.1f} ms with the cache, {slow:6.1f} ms without")

# %% id="cache-figure" tags=["figure"]
fig, ax = plots.figure(7.5, 3)
ax.plot(lengths, times[False], color=plots.ORANGE, marker="s", label="no cache: read everything again")
ax.plot(lengths, times[True], color=plots.BLUE, marker="o", label="KV cache: read one token")
ax.set_ylim(0)
ratio = times[False][-1] / times[True][-1]
plots.label(ax, f"One more token behind {lengths[-1]}: {ratio:.0f} times as fast with the cache", "tokens already there", "milliseconds", legend=True)
plots.show(fig, alt=f"Time of one more token against the length: behind {lengths[-1]} tokens {times[True][-1]:.1f} ms with the cache, {ratio:.1f} times that without.")

# %% [markdown] id="attention"
# ## 7 · Look inside
#
# Attention is the one place where positions talk. The fast kernel (PyTorch's `scaled_dot_product_attention`) never shows its probabilities, so
# `smollm2.notebook.inspect_model` computes them again beside it, from the same weights. First: is what we look at really what the model does? Then move the
# sliders: each row is a token, and shows how its attention is spread over the tokens before it. Which head reads the token just before?

# %% id="attention-check" tags=["check"]
look = "The king opened the door, and the king"
seen = torch.tensor([prompt_ids(model, tokenizer, look)], device=model.device)
inside = look_inside(model, seen)
names = [token_view.piece(tokenizer, i).replace("<|endoftext|>", "start") for i in seen[0].tolist()]
print(f"{len(names)} tokens; attention of a layer: {tuple(inside.attention[0].shape)} = (batch, heads, query, key)")
with torch.inference_mode():
    lesson.check("the logits are the model's own", inside.logits - model(seen))
lesson.check("each row of each head sums to 1", torch.stack(inside.attention).sum(-1) - 1, 1e-5)

# %% id="attention-beside" tags=["check"]
library = AutoModelForCausalLM.from_pretrained(checkpoints[-1].folder, dtype=torch.float32, attn_implementation="eager").to(model.device).eval()
with torch.inference_mode():
    theirs = library(seen, output_attentions=True).attentions
lesson.check("attention equals transformers', all layers and heads", torch.stack(inside.attention) - torch.stack(theirs), 1e-4, "which key head does a query head read?")


# %% id="attention-widget" tags=["widget", "figure"]
def one_head(layer, head):
    weights = inside.attention[layer][0, head].cpu()
    fig, ax = plots.figure(6.5, 4.6)
    picture = ax.imshow(weights, cmap="Blues", vmin=0, vmax=weights[1:].max().item(), aspect="auto")  # the first has itself alone to read
    fig.colorbar(picture, ax=ax, label="share of attention")
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=90, fontsize=8, parse_math=False)
    ax.set_yticks(ticks, names, fontsize=8, parse_math=False)
    ax.grid(False)
    plots.label(ax, f"layer {layer}, head {head}: each row reads the columns", "... reads this one", "this token ...")
    target = weights[-1].argmax().item()
    seen_most = f"'{names[target]}' (position {target}, {token_view.percent(weights[-1, target].item())})"
    return fig, f"Attention of layer {layer}, head {head}: the last token '{names[-1]}' looks most at {seen_most}."


layers, heads = config.num_hidden_layers, config.num_attention_heads
_ = widgets.explore(one_head, layer=widgets.slider("layer", 0, layers - 1, layers // 2), head=widgets.slider("head", 0, heads - 1, 0))

# %% [markdown] id="habits"
# Looking at heads one by one is fun and proves nothing. Measure instead: how much of its attention does each head spend on the token itself, on the one
# just before, and on the very first? In many models the first gets most although it says nothing: a head with nothing to do must look *somewhere*, since
# its row sums to 1. This is called an **attention sink**. Does yours have one?

# %% id="habits-shares" tags=["lesson"]
stacked = torch.stack(inside.attention)[:, 0, :, 2:].cpu()  # (L, H, T - 2, T): rows with a token before the one before
at = torch.arange(2, len(names))
habits = {name: stacked[:, :, at - 2, key].mean(-1) for name, key in (("itself", at), ("the one before", at - 1), ("the first", 0 * at))}
even = (1 / (at + 1)).mean()  # a head that spreads its attention evenly over all tokens so far
most = {name: divmod(int(share.argmax()), heads) for name, share in habits.items()}
found = [f"on {name} most in layer {layer}, head {head}: {habits[name].max():.0%}" for name, (layer, head) in most.items()]
print("\n".join(found), f"\n(spread evenly it would be {even:.0%} on each)")

# %% id="habits-figure" tags=["figure"]
fig, axes = plots.figure(8.5, 1.4 + 0.2 * min(layers, 30), columns=3, sharey=True)
for ax, (name, share) in zip(axes, habits.items(), strict=True):
    picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=max(float(x.max()) for x in habits.values()), aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(0, heads, 1 if heads < 12 else 4))
    plots.label(ax, f"on {name}", "head", "layer" if name == "itself" else "")
fig.colorbar(picture, ax=axes, label="mean share")
plots.show(fig, alt=f"Mean attention of each head, by layer: {'; '.join(found)}. Spread evenly it would be {even:.0%} on each.")

# %% [markdown] id="lens"
# **The logit lens.** Every block adds to the same running vector, so the model's last step (norm, output matrix) can be applied after *any* block: what would
# it say if it stopped there? First a check and your guess. In the figure each column is a position, each row a block; the word is the best guess so far,
# the colour how sure it is. Row 0, the embedding alone, mostly repeats the token just read: the output matrix *is* the embedding (notebook 1). Where it shows
# something odd, such as `a9`, a lone byte, that entry never occurs in the training text. Training pushed its row away from every answer and never towards one,
# so it grew long, and wins where a rarer token's own row is short.

# %% id="lens-check" tags=["check"]
lens = logit_lens(model, inside.hidden)[:, 0].cpu()  # (L + 1, T, V)
lesson.check("after the last block the lens shows the model's own answer", lens[-1] - inside.logits[0].float().softmax(-1).cpu(), 1e-6)

# %% cellView="form" id="predict-lens" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
guesses = logit_lens(model, look_inside(model, read).hidden)[:, 0].argmax(-1)  # (L + 1, T) the best after each block, in section 5's passage
agreement = (guesses == guesses[-1]).float().mean(-1).tolist()  # with what the model says in the end
first = next(block for block, share in enumerate(agreement) if share >= 0.5)
lesson.predict(
    f"Your model has {layers} blocks. After how many of them is, for at least half of the passage's tokens, the final answer already the best guess?",
    guess, first, within=0, unit="blocks",
    why=f"After {first}, {agreement[first]:.0%} are there; one block before the end {agreement[-2]:.0%}. The rest is decided in the last block.",
)  # fmt: skip

# %% id="lens-words" tags=["lesson"]
shown = list(range(0, layers + 1, max(1, -(-layers // 8))))  # at most nine rows
shown += [layers] if shown[-1] != layers else []
columns = range(max(0, len(names) - 9), len(names))
sureness, best = lens[shown][:, columns].max(-1)
scale = sureness[1:].max().item()  # row 0 repeats the token and is nearly sure of it
texts = [text for text, _ in documents(read_split(REPO / "input.txt", "train"))]
known = torch.bincount(torch.tensor([i for row in tokenizer.encode_batch(texts) for i in row]), minlength=config.vocab_size) > 0
odd = guesses[0][guesses[0] != read[0]].cpu()  # where row 0 does not repeat its token
long, usual = (model.lm_head.weight.detach().cpu().norm(dim=1)[which].mean() for which in (~known, known))
print(f"row 0 says another token at {len(odd)} of the passage's {read.shape[1]} places, at {int((~known[odd]).sum())} of them one the training text never holds")
print(f"(the rows of those never seen are {long:.1f} long on average, all others {usual:.1f})")
print("share of the passage's final answers already there:\n  " + ", ".join(f"block {block} {agreement[block]:.0%}" for block in shown))

# %% id="lens-figure" tags=["figure"]
fig, ax = plots.figure(9, 1.2 + 0.34 * len(shown))
picture = ax.imshow(sureness, cmap="Blues", vmin=0, vmax=scale, aspect="auto")
for row in range(len(shown)):
    for column in range(len(columns)):
        word = token_view.piece(tokenizer, int(best[row, column]))[:9]
        color = "white" if sureness[row, column] > 0.55 * scale else "black"
        ax.text(column, row, word, ha="center", va="center", fontsize=8, color=color, parse_math=False)
fig.colorbar(picture, ax=ax, label="its probability", extend="max")
ax.set_xticks(range(len(columns)), [names[i] for i in columns], parse_math=False)
ax.set_yticks(range(len(shown)), shown)
ax.grid(False)
plots.label(ax, "What it would say next, if it stopped after this block", "having read up to", "block (0 = embedding)")
told = f"'{token_view.piece(tokenizer, int(best[-1, -1]))}' with {token_view.percent(sureness[-1, -1].item())}"
plots.show(fig, alt=f"Best next token after each block for the last {len(columns)} positions; at the end, after '{names[-1]}', the model says {told}.")

# %% [markdown] id="time"
# ## 8 · Your run through time, and the official model
#
# Every checkpoint is a whole model. Give each the same prompt and the same seed, and slide through your own run. A run keeps its newest checkpoints only,
# but its log also holds what the earlier ones wrote. What comes first: spelling, words, or sense?


# %% id="time-code" tags=["lesson", "slow"]
sample = [i for text in held_out[1:9] for i in [*tokenizer.encode(text), config.eos_token_id or 0]]  # eight held-out pieces
sample_bytes = sum(len((text + SEPARATOR).encode()) for text in held_out[1:9])


def moment(step, model):
    """What the model of one step writes, believes and scores."""
    model = model.to(choose_device())
    score = score_tokens(model, sample, sample_bytes, block_length=min(128, config.max_position_embeddings))
    with torch.inference_mode():
        logits = model(ids)[0, -1].cpu()
    text = complete(model, tokenizer, PROMPT, 30, temperature=0.8, top_k=50, seed=7)
    return {"step": step, "bits": score.bits_per_byte, "logits": logits, "text": PROMPT + text}


# %% id="time-moments" tags=["lesson", "slow"]
start = untrained(checkpoints[0])
moments = [moment(0, start)] if start else []
moments += [moment(c.step, SmolLM2.from_pretrained(c.folder)) for c in checkpoints]

# %% id="time-texts" tags=["lesson"]
last = checkpoints[-1].folder
log = next((logs / SAMPLES for logs in (last.parent.parent / "logs", last) if (logs / SAMPLES).is_file()), None)  # on Drive it lies beside the weights
rows = {m["step"]: (f"{m['bits']:.2f} bits per byte", m["text"]) for m in moments}
for row in read_log(log) if log else []:
    if int(row["step"]) < checkpoints[0].step:
        rows.setdefault(int(row["step"]), ("from the log", row["prompt"] + row["text"]))  # of each step the first prompt
for step in sorted(rows)[-20:]:
    print(f"step {step:6}  {rows[step][0]:18}  {' '.join(rows[step][1].split())[:68]}")

# %% id="time-check" tags=["check"]
lesson.check("the last moment is the model above", moments[-1]["logits"] - logits.cpu(), 1e-4)
if start:
    saved = moments[0]["bits"] - moments[-1]["bits"]
    print(f"from step 0 to the end your run saved {saved:.2f} bits per byte")
    lesson.check("your run learned: it needs fewer bits than at step 0", saved <= 0)


# %% id="time-widget" tags=["widget", "figure"]
def one_moment(moment):
    m = moments[moment]
    fig, (left, right) = plots.figure(8.5, 3.2, columns=2)
    left.plot([x["step"] for x in moments], [x["bits"] for x in moments], color=plots.BLUE, marker="o")
    left.plot(m["step"], m["bits"], "D", color=plots.RED, markersize=9)
    left.set_ylim(0, 1.1 * max(x["bits"] for x in moments))
    plots.label(left, f"step {m['step']}: {m['bits']:.2f} bits per byte", "optimizer step", "bits per byte, held out")
    chances, best = m["logits"].float().softmax(-1).topk(8)
    right.barh(range(8), chances, color=plots.BLUE)
    right.set_yticks(range(8), [f"'{token_view.piece(tokenizer, int(i))}'" for i in best], parse_math=False)
    right.invert_yaxis()
    right.set_xlim(0, max(0.3, chances[0].item()))
    plots.label(right, f"after '{PROMPT}'", "probability of the next token", "")
    words = token_view.visible(m["text"].encode()).replace("·", " ")
    fig.suptitle(words[:95] + ("…" if len(words) > 95 else ""), x=0.02, ha="left", fontsize=10, parse_math=False)
    return fig, f"At step {m['step']} ({m['bits']:.2f} bits per byte) the model writes: {words}"


_ = widgets.explore(one_moment, moment=widgets.slider("moment of the run", 0, len(moments) - 1, len(moments) - 1))

# %% id="official" tags=["slow", "lesson"]
try:
    other, other_tokenizer = load_model_and_tokenizer("HuggingFaceTB/SmolLM2-135M", device=model.device)
    other_name = "the official SmolLM2-135M (2 trillion tokens)"
except UserError as reason:
    print(f"{reason}.\nSo: beside your own model, as early as there is one.")
    other = (start or SmolLM2.from_pretrained(checkpoints[0].folder)).to(model.device)
    other_tokenizer, other_name = tokenizer, f"your model at step {moments[0]['step']}"

# %% id="official-beside" tags=["lesson"]
settings = {"temperature": 0.8, "top_p": 0.9, "seed": 2}
pairs = {"yours": (model, tokenizer), other_name: (other, other_tokenizer)}
for prompt in (PROMPT, "The capital of France is"):  # printed before the bar |, what the model wrote behind it
    for name, (each, its_tokenizer) in pairs.items():
        text = complete(each, its_tokenizer, prompt, 30, **settings)
        print(f"{name}: {prompt}{' '.join(('|' + text).split())[:90]}\n")

# %% id="official-figure" tags=["figure"]
fig, ax = plots.figure(7.5, 2)
costs = {}
for name, (each, its_tokenizer) in pairs.items():
    row = torch.tensor([prompt_ids(each, its_tokenizer, passage)], device=each.device)
    costs[name] = float(-token_probabilities(each, row).log2().sum()) / len(passage.encode())
ax.bar_label(ax.barh(list(costs), list(costs.values()), color=[plots.BLUE, plots.ORANGE]), fmt="%.2f", padding=3)
ax.set_xlim(0, 1.15 * max(costs.values()))
plots.label(ax, f"The {len(passage.encode())} bytes of section 5 (less is better)", "bits per byte", "")
plots.show(fig, alt="Bits per byte for one held-out passage: " + ", ".join(f"{name} {value:.2f}" for name, value in costs.items()) + ".")

# %% [markdown] id="self-test"
# ## What you can now explain
#
# * Why does min-p keep many tokens at one place and two at another, although its setting is the same?
# * Why may the cache be dropped at any moment without changing the text?
# * Why can the output matrix be applied after block 3 at all?
#
# <details><summary>Answers</summary>
#
# * Its limit is a fraction of the best probability: where the best is weak, much of the rest reaches it.
# * It holds only what can be computed again from the tokens: keys and values of positions that no longer change, because nothing looks ahead.
# * Every block adds to the same running vector of the same size; the last layer reads that vector, whoever wrote to it last.
# </details>

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="exercises"
# ## Exercises
#
# 1. Write `keep_typical(p, n)`: the n tokens whose −log p lies nearest to the entropy (the mean of −log p). When does it remove the likeliest token?
# 2. Batch the prompts: call `model.generate` with two copies of `ids` and temperature 1. Why do the rows differ although the seed is the same?
# 3. Switch off one head: in a copy of the model set its `head_dim` columns of `o_proj.weight` to zero, and score the passage again. Which head costs most?
# 4. Train a small run with early checkpoints (one to two minutes on a CPU) and slide through it as in section 8. At which step do words appear?
#
# <details><summary>Solutions</summary>
#
# 1. `(-p.log() - entropy).abs().argsort()[:n]` with `entropy = -(p * p.log()).sum()`. It removes the likeliest where much of the probability lies elsewhere:
#    of 0.4 and five times 0.12 (entropy 1.64; −log p 0.92 and 2.12), n = 5 keeps the five. A sure model, 0.9 and a hundred times 0.001, keeps its best.
# 2. `model.generate(ids.repeat(2, 1), 20, temperature=1.0, seed=1)`: one generator serves both rows, one after the other, so they get different random numbers.
# 3. `import copy`; for each head in turn `other = copy.deepcopy(model)`, then
#    `other.model.layers[layer].self_attn.o_proj.weight.data[:, head * D : (head + 1) * D] = 0` with `D = config.head_dim`, and
#    `-token_probabilities(other, read).log2().sum()`. Often a head of the first layer costs most, and several cost almost nothing.
# 4. In section 1 put `checkpoints = own_run(REPO / "input.txt", "early")` in place of the first line. Run that cell, the one in section 2 that makes `ids`, and
#    section 8 again. Its checkpoints are those of steps 50 to 300, beside step 0.
# </details>

# %% [markdown] id="next"
# ## Next
#
# It writes, and you know how. How good is it, in one number that no tokenizer can bend, and how do others get it?
# [6 · Evaluate and share](06_evaluate_and_share.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/06_evaluate_and_share.ipynb))
