# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/06_evaluate_and_share.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/06_evaluate_and_share.html)

# %% [markdown] id="title"
# # 6 · Evaluate and share
#
# You will be able to
# * measure a language model in bits per byte, and compare it with a compressor, with counting, and with other people's models;
# * export it to the format everyone reads, and prove that nothing changed on the way;
# * make it four times smaller by hand, and say what that costs; tell a base model from an Instruct model;
# * read a model card critically, publish your own, and choose what to do next.
#
# **Time** about 35 minutes to read; to run, 1 minute with a run of yours, 1 to 2 more on a CPU without one · **hardware** any CPU (only the optional
# fine-tuning of section 11 needs a GPU) · **network** only to score or fine-tune the official model and to publish; everything else runs offline.
#
# *Runtime → Run all* runs everything, and publishes nothing. Each `?` asks you to guess first: type a number in place of `None` and run that cell again.
# Each `✔` is a check: the largest difference between two things that should be equal, and how much is allowed.

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
import gzip
import hashlib
import json
import math
from collections import Counter
from copy import deepcopy

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from smollm2 import SmolLM2, load_config, plots, train, widgets
from smollm2.chat_data import CHATML, default_template, encode_conversation
from smollm2.conversation import render_chat
from smollm2.device import choose_device
from smollm2.errors import UserError
from smollm2.evaluate import compression_bits_per_byte, score_file
from smollm2.export import export
from smollm2.ngram import NGram
from smollm2.notebook import lesson
from smollm2.notebook.inspect_model import token_probabilities
from smollm2.notebook.own_run import best_seen, own_run
from smollm2.notebook.panel import live_panel
from smollm2.origin import trained_with
from smollm2.pretrained import load_model_and_tokenizer
from smollm2.sampling import complete, prompt_ids
from smollm2.text import documents, read_split
from smollm2.token_text import spelled, visible

SMOKE = colab.is_smoke()
TEXT = REPO / "input.txt"
lesson.quiet()

# %% [markdown] id="your-run"
# ## Your run
#
# As in notebook 5: the newest run in the folder `output` or on your Google Drive is measured. Where there is none, a small one is
# trained now: 300 steps, one to two minutes on a CPU.

# %% cellView="form" id="find-run" tags=["parameters"]
# @title Where to look for your run
USE_DRIVE = True  # @param {type:"boolean"}
place = colab.run_places(USE_DRIVE)
places_on_drive = [place.drive_dir] if place.drive_dir else []

# %% id="load-run" tags=["slow", "lesson"]
checkpoints = own_run(TEXT, place.output_dir, places_on_drive, smoke=SMOKE)
checkpoint = checkpoints[-1].folder
model, tokenizer = load_model_and_tokenizer(checkpoint, device=choose_device())
train_bytes = "".join(read_split(TEXT, "train")).encode()
held_out = "".join(read_split(TEXT, "val")).encode()
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
print(f"{len(train_bytes):,} bytes to learn from, {len(held_out):,} held out")

# %% [markdown] id="bits"
# ## 1 · One number for every model
#
# The training loss is in nats *per token*, and a token is whatever the tokenizer says. A model with longer tokens has a higher loss and may still be better.
# (The same holds for perplexity, e to the loss.)
# Bytes are the same for everybody. So: what would it cost to send this text to somebody who has the same model? What has probability p costs −log₂ p bits
# (the fewer, the less surprising), and a nat is 1 / ln 2 = 1.44 bits.

# %% id="bits-numbers" tags=["lesson"]
for p in (1.0, 0.5, 0.25, 1 / 256):
    print(f"probability {p:.4f} costs {math.log2(1 / p):g} bits")
loss, tokens, size = 3.0, 100, 400  # a made-up model: 3 nats a token, 100 tokens for 400 bytes
bits = loss * tokens / math.log(2) / size
print(f"{loss} nats a token, {size / tokens:g} bytes a token: {bits:.3f} bits per byte")

# %% cellView="form" id="predict-bits" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "Another model cuts the same 400 bytes into 200 tokens and has a loss of 1.5 nats a token. "
    "How many bits per byte?",
    guess, 1.5 * 200 / math.log(2) / 400, within=0.01, unit="bits per byte",
    why="Half the loss, twice the tokens: just as good a model. Losses of different tokenizers "
    "cannot be compared, bits per byte can.",
)  # fmt: skip

# %% [markdown] id="compressors"
# ## 2 · The neighbours: compressors
#
# A compressor is a language model too: what it can predict it need not store. `gzip` knows only pieces repeated within the last 32 KiB; `xz` looks back
# through the whole file. Both start from nothing, while a trained model has read nine times as much text before: it should beat them easily. How far below 8
# bits, the size of an uncompressed byte, do they get?

# %% id="compressors-check" tags=["check"]
packed = compression_bits_per_byte(TEXT, "val")
for name, bits in packed.items():
    print(f"{name:8} {bits:.3f} bits per byte")
mine = 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)
lesson.check("gzip -9 by hand needs what the package says", mine - packed["gzip -9"], 1e-9)
lesson.true("and it loses nothing", gzip.decompress(gzip.compress(held_out, 9)) == held_out)

# %% [markdown] id="counting"
# ## 3 · The honest rival: counting
#
# How often did *e* follow *th* in the training text? Divide by how often *th* occurred: a model, and it has read what yours has read (if that was `input.txt`). But what if a context
# never occurred, or only once? Blend with the shorter context. How much? Witten and Bell (1991): where many *different* bytes followed, a new one is likely. So the
# shorter context's opinion counts like as many sightings as there were different next bytes.
# What must hold for every context, seen or not?


# %% id="counting-code" tags=["lesson"]
def chance(text, context, symbol):
    """P(symbol | context), by counting in `text`; a rare context leans on the shorter one."""
    shorter = chance(text, context[1:], symbol) if context else 1 / 256
    k = len(context)  # bytes; n-gram people call k + 1 the order
    after = Counter(text[i + k] for i in range(len(text) - k) if text[i : i + k] == context)
    if not after:
        return shorter
    return (after[symbol] + len(after) * shorter) / (after.total() + len(after))


# %% id="counting-check" tags=["check"]
small = train_bytes[:3000]
ngram = NGram(small, order=4)  # the package's, counted once with numpy
likely = "who gets the share of the unseen?"
for context in (b"", b"th", b"the", b"qzx"):
    by_hand = np.array([chance(small, context, symbol) for symbol in range(256)])
    name, total = f"after {context.decode()!r} all 256 probabilities sum to 1", by_hand.sum()
    lesson.check(name, total - 1, 1e-9, likely)
    off = by_hand - ngram.probabilities(context)
    lesson.check("  and they equal the package's", off, 1e-12)

# %% cellView="form" id="predict-order" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
ngram = NGram(train_bytes, order=8)
orders = {order: float(ngram.bits(held_out, order).mean()) for order in range(1, 9)}
best_order = min(orders, key=orders.get)
lesson.predict(
    "Longer contexts know more but are seen more rarely. With which order (bytes of context "
    "+ 1, from 1 to 8) does counting do best here?",
    guess, best_order, within=0,
    why="A longer context was seen fewer times, so its counts are mostly chance, and they "
    "outweigh the better ones of the shorter. (One never seen does no harm. And chosen on this "
    "text, the order flatters counting a little.)",
)  # fmt: skip


# %% cellView="form" id="counting-widget" tags=["widget", "figure"]
# @title Try it: counting { display-mode: "form" }
def counted(order, context):
    """Left: all orders on the held-out text. Right: what counting expects after `context`."""
    fig, (left, right) = plots.figure(8.5, 3, columns=2)
    left.plot(list(orders), list(orders.values()), color=plots.BLUE, marker="o")
    left.plot(order, orders[order], "D", color=plots.RED, markersize=9)
    left.set_ylim(0)
    needs = f"{orders[order]:.2f} bits per byte"
    title = f"order {order}: {needs}"
    plots.label(left, title, "order (bytes of context + 1)", "bits per byte, held out")
    chances = ngram.probabilities(context.encode(), order)
    best = np.argsort(chances)[::-1][:8]
    names = [f"'{visible(bytes([b]))}'" for b in best]
    right.barh(range(8), chances[best], color=plots.BLUE)
    right.set_yticks(range(8), names, family="monospace", parse_math=False)
    right.invert_yaxis()
    end = visible(context.encode())[-12:]
    plots.label(right, "the next byte", f"probability after '{end}'", "")
    alt = f"Order {order} needs {needs}; after '{context}' it expects {names[0]} "
    return fig, alt + f"with probability {chances[best[0]]:.2f}."


widgets.explore(
    counted,
    order=widgets.slider("order", 1, 8, best_order),
    context=widgets.text("context", "Once upon a t"),
)

# %% [markdown] id="yours"
# ## 4 · Your model
#
# Now yours, on the same bytes, every token scored once. Minutes of training against pure counting on the same text: who wins? A very small run may
# well lose. That is worth knowing: a loss curve that falls proves only that something falls.

# %% cellView="form" id="predict-yours" tags=["predict", "slow"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
block = trained_with(checkpoint).sequence_length
score = score_file(model, tokenizer, TEXT, "val", block_length=block)
rival = orders[best_order]
lesson.predict(
    f"Counting needs {rival:.2f} bits per byte. How many does your model need?",
    guess, score.bits_per_byte, within=0.05, unit="bits per byte",
    why=f"That is {score.bits_per_byte / rival:.2f} times what counting needs. A network "
    "shares what it learned between contexts that counting keeps apart.",
)  # fmt: skip

# %% id="yours-check" tags=["check"]
print(f"yours: {score.loss:.3f} nats a token, {score.bits_per_byte:.3f} bits per byte")
print(f"({score.tokens:,} tokens, {score.bytes:,} bytes)")
bits = score.loss * score.tokens / math.log(2) / score.bytes
lesson.check("bits per byte follow from the loss", bits - score.bits_per_byte, 1e-6)
lesson.check("all held-out bytes are counted", score.bytes - len(held_out))

# %% [markdown] id="best"
# **The last or the best?** A run also keeps the checkpoint that scored best on the held-out text. Where that is not the last one, the run went on for too long
# and learned its text by heart. Publish whichever needs fewer bits here; the rest of this notebook takes that one. (Strictly, what was chosen *on* this text is flattered by it: a
# third text, used once, would be fair. One choice of a few flatters little, a hundred trials would not.)

# %% id="best-score" tags=["slow", "lesson"]
best, last, others = best_seen(checkpoints), checkpoints[-1].step, {}
if best.step == last:
    print(f"the last checkpoint, step {last}, is also the best that is kept")
else:
    model_then = load_model_and_tokenizer(best.folder, device=model.device)[0]
    then, now = score_file(model_then, tokenizer, TEXT, "val", block_length=block), score
    print(f"bits per byte: {then.bits_per_byte:.3f} at step {best.step},")
    print(f"{now.bits_per_byte:.3f} at step {last}, the last")
    if then.bits_per_byte < now.bits_per_byte:
        others = {f"yours, too late (step {last})": now.bits_per_byte}
        checkpoint, model, score = best.folder, model_then, then

# %% id="official" tags=["slow", "lesson"]
official, name = None, "HuggingFaceTB/SmolLM2-135M"
try:
    other, other_tokenizer = load_model_and_tokenizer(name, device=model.device)
    limit = 4096 if model.device.type == "cpu" else None  # tokens: all would take minutes
    options = {"block_length": 1024, "max_tokens": limit}
    official = score_file(other, other_tokenizer, TEXT, "val", **options).bits_per_byte
    part = f", on the first {limit:,} tokens" if limit else ""
    print(f"official SmolLM2-135M: {official:.3f} bits per byte{part}")
except UserError as reason:
    print(f"{reason}.\nSo: the picture below goes without the official model.")

# %% id="all-rows" tags=["lesson"]
rows = {"no model": 8.0, "counting (order 1)": orders[1], **packed}
rows |= {f"counting (order {best_order})": orders[best_order]}
rows |= {"YOURS": score.bits_per_byte, **others}
if official:
    rows["SmolLM2-135M, official" + (" (beginning)" if limit else "")] = official
rows = dict(sorted(rows.items(), key=lambda row: -row[1]))

# %% cellView="form" id="all-figure" tags=["figure"]
# @title Figure: everybody on the same text { display-mode: "form" }
fig, ax = plots.figure(7.5, 0.9 + 0.32 * len(rows))
colors = [plots.ORANGE if name == "YOURS" else plots.BLUE for name in rows]
drawn = ax.barh(list(rows), list(rows.values()), color=colors)
ax.bar_label(drawn, fmt="%.2f", padding=3)
ax.invert_yaxis()
ax.set_xlim(0, 9)
title = "The same held-out text, in bits per byte (less is better)"
plots.label(ax, title, "bits per byte", "")
told = ", ".join(f"{name} {value:.2f}" for name, value in rows.items())
plots.show(fig, f"Bits per byte on the held-out text: {told}.")

# %% [markdown] id="where"
# **Where** does each of the two win? Take one passage, share each token's bits out evenly among its bytes, and add up yours minus counting's as we read. The
# curve falls where your model is better and rises where counting is.

# %% id="where-bits" tags=["check"]
passage = [text for text, _ in documents([held_out.decode()])][1]  # its first whole piece
start = prompt_ids(model, tokenizer, "")  # what stands before every text
ids = [*start, *tokenizer.encode(passage)][: block + 1]  # as long as the rows of its training
chances = token_probabilities(model, torch.tensor([ids], device=model.device))[0]
bits = -chances.log2().cpu().numpy()
sizes = np.array([len(spelled(tokenizer, i)) for i in ids[1:]])  # the first id was given
counted_bits = ngram.bits(passage.encode()[: sizes.sum()], best_order)
per_byte = np.repeat(bits / sizes, sizes)[: len(counted_bits)]  # some add a blank in front
lesson.check("no byte was lost on the way to bytes", len(per_byte) - len(counted_bits))

# %% cellView="form" id="where-figure" tags=["figure"]
# @title Figure: where each wins { display-mode: "form" }
fig, ax = plots.figure(7.5, 3)
gained = np.cumsum(per_byte - counted_bits)
ax.plot(gained, color=plots.BLUE, marker="")
ax.axhline(0, color=plots.GREY, ls="--", marker="")
title = "Your model against counting, byte by byte"
plots.label(ax, title, "bytes read", "bits: yours minus counting's")
winner = "yours" if gained[-1] < 0 else "counting"
alt = f"Running difference in bits, your model minus counting, over {len(gained)} bytes; "
plots.show(fig, alt + f"it ends at {gained[-1]:+.0f} bits, {winner} is ahead.")

# %% [markdown] id="where-exercise"
# **✎ Exercise**: blend: give each byte the mean of both probabilities, your model's and counting's. Is the blend better than
# either? Then score your model with `block_length=16`: what does it lose, and what does that say about the context it uses?
#
# <details><summary>Solution</summary>
#
# Compare the means of `per_byte`, `counted_bits` and `-np.log2((2.0**-per_byte + 2.0**-counted_bits) / 2)`. Often better: they are wrong in different places, and the mean
# of two distributions never costs more than 1 bit above the better one. (A rough figure: your model's bits were shared out evenly among bytes.)
# `score_file(model, tokenizer, TEXT, "val", block_length=16)`: each block starts without a past; the difference is what longer context is worth.
# </details>

# %% [markdown] id="published"
# ## 5 · Published figures, and how to read them
#
# The card of SmolLM2-135M (trained on 2 trillion tokens) lists how often it answers questions rightly, measured with `lighteval`, **zero-shot**: without
# examples in the prompt (GSM8K: with five). A bar alone says nothing: of four answers one is right by luck every fourth time, and luck itself varies.
# First your guess: how much?

# %% cellView="form" id="predict-luck" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
questions = 1267  # WinoGrande's validation set; each has two answers
standard_error = 100 * math.sqrt(0.5 * 0.5 / questions)
lesson.predict(
    f"Answer WinoGrande's {questions:,} questions by flipping a coin. By how many points (per "
    "cent) will you typically miss 50 %: the standard error?",
    guess, standard_error, unit="points",
    why=f"√(0.5 · 0.5 / {questions}) = {standard_error:.1f} points. A result less than two of "
    "them above luck may be luck.",
)  # fmt: skip

# %% id="published-table" tags=["lesson", "check"]
# task: (SmolLM2-135M, its predecessor SmolLM-135M, luck), in per cent; from the model card
CARD = {
    "HellaSwag": (42.1, 41.2, 25), "ARC (average)": (43.9, 42.4, 25), "PIQA": (68.4, 68.4, 50),
    "MMLU (cloze)": (31.5, 30.2, 25), "CommonsenseQA": (33.9, 32.7, 20),
    "WinoGrande": (51.3, 51.3, 50), "OpenBookQA": (34.6, 34.0, 25), "TriviaQA": (4.1, 4.3, 0),
    "GSM8K": (1.4, 1.0, 0),
}  # fmt: skip
print("task           SmolLM2  SmolLM  luck  above luck")
for task, (new, old, luck) in CARD.items():
    print(f"{task:14} {new:7.1f} {old:7.1f} {luck:5} {new - luck:11.1f}")
new, _, luck = CARD["WinoGrande"]
name = f"WinoGrande, {new - luck:.1f} points above luck, is within one standard error"
lesson.true(f"{name} ({standard_error:.1f})", new - luck <= standard_error)

# %% cellView="form" id="published-figure" tags=["figure"]
# @title Figure: published figures { display-mode: "form" }
fig, ax = plots.figure(7.5, 3.4)
at = np.arange(len(CARD))
new, old, luck = np.array(list(CARD.values())).T
ax.barh(at - 0.2, new, 0.38, color=plots.BLUE, label="SmolLM2-135M, 2 T tokens")
style = {"color": plots.SKY, "hatch": "//", "edgecolor": "white"}
ax.barh(at + 0.2, old, 0.38, label="SmolLM-135M, 0.6 T tokens", **style)
ax.plot(luck, at, "|", color=plots.RED, markersize=20, markeredgewidth=3, label="luck")
ax.set_yticks(at, list(CARD))
ax.invert_yaxis()
ax.set_xlim(0, 100)
gain = f"{(new - old).mean():+.1f} points"
title = f"SmolLM2 beside SmolLM: {gain} on average"
plots.label(ax, title, "per cent right, from the model card", "", legend=True)
some = ("HellaSwag", "PIQA", "WinoGrande", "GSM8K")
told = ", ".join(f"{task} {CARD[task][0]} % (luck {CARD[task][2]})" for task in some)
alt = f"Nine benchmarks of SmolLM2-135M: {told}; on average {gain} beside SmolLM-135M, "
plots.show(fig, alt + "which read 0.6 trillion tokens.")

# %% [markdown] id="judge"
# SmolLM2 read three times as many tokens, and of another mixture: which of the two brought the points, the card cannot tell.
#
# For a run of minutes these tasks are noise: a model that read a million times less sits at luck on all of them. **Judge your runs by bits per byte on
# held-out text**; they move from the first step on.
#
# ## 6 · Export, and prove it
#
# A checkpoint of this project already is a Hugging Face folder, plus what a resume needs. The export leaves that out and adds a card, a receipt with
# hashes, and settings that transformers 4 and 5 and Ollama read alike. Does the copy still say the same?

# %% id="export" tags=["lesson"]
out = export(checkpoint, Path(place.output_dir) / "export")
for path in sorted(out.iterdir()):
    print(f"{path.stat().st_size:>12,} bytes  {path.name}")


# %% id="export-check" tags=["check"]
def apart(one, other):
    """The largest difference between two models' weights."""
    weights = dict(other.named_parameters())
    return max(lesson.largest(p - weights[name]) for name, p in one.named_parameters())


copy, original = SmolLM2.from_pretrained(out), SmolLM2.from_pretrained(checkpoint)
lesson.check("every weight is the same number", apart(copy, original))
theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
words = torch.tensor([prompt_ids(copy, tokenizer, "Once upon a time there was")])
greedy = {"attention_mask": torch.ones_like(words), "max_new_tokens": 20, "do_sample": False}
with torch.inference_mode():
    gap = (copy(words).softmax(-1) - theirs(words).logits.softmax(-1)).abs()
    mine, other = copy.generate(words, 20), theirs.generate(words, **greedy)
likely = "RoPE theta: is it in config.json in both forms?"
lesson.check("transformers gives the same probabilities", gap, 1e-5, likely)
lesson.check("and writes the same 20 greedy tokens", mine[:, : other.shape[1]] - other)

# %% id="tokenizer-check" tags=["check"]
their_tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
probe = held_out.decode()[:5000] + "\n\n1. First, 2,048 steps — déjà vu.\n"
ids, other = tokenizer.encode(probe), their_tokenizer(probe, add_special_tokens=False)
likely = "AutoTokenizer of transformers 5 cuts digits in another way; use the class that "
likely += "tokenizer_config.json names"
lesson.true("transformers' tokenizer gives the same ids", other.input_ids == ids, likely)
lesson.true("and the same text back", their_tokenizer.decode(ids) == tokenizer.decode(ids))

# %% id="back-check" tags=["check"]
folder = Path(place.output_dir) / "there-and-back"
theirs.save_pretrained(folder)
back = SmolLM2.from_pretrained(folder)
lesson.check("there and back: saved by transformers, read by us", apart(back, original))

# %% [markdown] id="int8"
# ## 7 · Smaller: int8 by hand
#
# To write one token, a model reads every weight once. So fewer bytes are more speed, if a product reads them as they are: on one CPU core
# this project's 135M wrote 1.9 times as fast in int8 as in fp32 (`docs/log.md`). (The cells below turn them back to fp32 first: they show the error, not the speed.) **int8** keeps a whole number from −127 to
# 127 for each weight: one byte in place of four. Each row of a matrix has one **scale**, its largest value divided by 127. Read back, a
# weight is number × scale. Rounding costs at most half a scale. Is that much? (An output adds up hundreds of weights, and the errors, up as often as down, mostly cancel.
# What it costs is measured below for your model. For the official 135M it is not measured yet.)


# %% id="int8-code" tags=["lesson", "check"]
def quantise(matrix, bits=8):
    """(rows, columns) -> whole numbers of the same shape (int8), and a scale (rows, 1)."""
    top = 2 ** (bits - 1) - 1  # 127: as many steps below zero as above
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / top
    return (matrix / scale).round().to(torch.int8), scale


matrix = original.model.layers[0].mlp.up_proj.weight.detach()
numbers, scale = quantise(matrix)
error = numbers * scale - matrix
rows = {"weights": matrix, "numbers": numbers, "read back": numbers * scale}
for name, each in rows.items():
    print(f"{name:10}", "".join(f"{value:>9.4g}" for value in each[0, :7].tolist()))
lesson.true("rounding is off by half a scale at most", (error.abs() / scale).max() <= 0.501)

# %% cellView="form" id="predict-int8" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
usual = [numbers.square().mean().sqrt().item() for numbers in (error, matrix)]
lesson.predict(
    "How large is the usual (root mean square) error, in per cent of the usual weight?",
    guess, 100 * usual[0] / usual[1], within=0.3, unit="%",
    why="The largest of a row is about three times the usual weight, so a scale is 3/127 of "
    "it. Errors spread over ± half a scale: their root mean square is a scale / √12.",
)  # fmt: skip


# %% id="int8-model" tags=["check", "slow"]
def quantised(model, bits=8):
    """A copy whose matrices went through `quantise` and back, and the bytes they then need."""
    small, size = deepcopy(model), 0
    for weight in small.parameters():
        if weight.dim() == 2:  # the norms' gains stay as they are
            numbers, scale = quantise(weight.data, bits)
            weight.data = numbers * scale
            size += numbers.numel() * bits / 8 + scale.nbytes
        else:
            size += weight.nbytes
    return small, size


some = {"block_length": block, "max_tokens": 2048 if SMOKE else 8192}
whole = sum(p.nbytes for p in model.parameters())
costs = {32: (score_file(model, tokenizer, TEXT, "val", **some).bits_per_byte, whole)}
for bits in (8, 5, 4, 3, 2):
    small, size = quantised(model, bits)
    costs[bits] = score_file(small, tokenizer, TEXT, "val", **some).bits_per_byte, size
    print(f"{bits} bits: {size / 1e6:6.2f} MB, {costs[bits][0]:.3f} bits per byte")
lost = costs[8][0] / costs[32][0] - 1
print(f"fp32:   {costs[32][1] / 1e6:6.2f} MB, {costs[32][0]:.3f} bits per byte")
lesson.check("int8 costs less than half a per cent of the bits per byte", lost, 0.005)

# %% cellView="form" id="int8-figure" tags=["figure"]
# @title Figure: what fewer bits cost { display-mode: "form" }
fig, ax = plots.figure(7.5, 2.8)
sizes, bits_needed = zip(*((size / 1e6, bits) for bits, size in costs.values()), strict=True)
ax.plot(sizes, bits_needed, color=plots.BLUE, marker="o")
for bits, (needed, size) in costs.items():
    name = "fp32" if bits == 32 else f"{bits} bits"
    ax.annotate(name, (size / 1e6, needed), (3, 5), textcoords="offset points", fontsize=9)
ax.set(xscale="log", xlim=(0.7 * min(sizes), 1.4 * max(sizes)))
ax.set_xticks(sizes, [f"{size:.1f}" for size in sizes], minor=False)
ax.minorticks_off()
ax.margins(y=0.15)
worst = costs[2][0] / costs[32][0] - 1
title = f"8 bits cost {lost:.3%} of the bits per byte, 2 bits {worst:.0%}"
plots.label(ax, title, "weights (MB)", "bits per byte, held out")
told = ", ".join(f"{bits} bits {needed:.3f}" for bits, (needed, _) in costs.items())
plots.show(fig, f"Bits per byte against the bits of a weight: {told}.")

# %% [markdown] id="gguf-text"
# **GGUF** is the file that llama.cpp and Ollama read. Its `q8_0` is the same idea with a scale for every 32 weights: 34 bytes for 32 weights.
# Then `ollama create my-model -f Modelfile` and `ollama run my-model`, in the folder that the next cell names. (The same from a terminal:
# `python -m smollm2.export --checkpoint FOLDER --out export --gguf q8_0`.)
#
# **✎ Exercise**: give `quantise` one scale for the whole matrix in place of one for each row. What do 8 bits cost then, and 4?
#
# <details><summary>Solution</summary>`scale = matrix.abs().max().expand(len(matrix), 1) / top`. The largest weight of the whole matrix now sets the step of every row. At 8
# bits that still costs little, at 4 much more than before.</details>

# %% id="gguf" tags=["lesson", "check"]
try:
    folder = export(checkpoint, Path(place.output_dir) / "export-gguf", gguf="q8_0")
    gguf_size = (folder / "model-q8_0.gguf").stat().st_size
    print(f"{folder / 'model-q8_0.gguf'}: {gguf_size:,} bytes, beside a Modelfile for Ollama")
    expected = 34 / 32 * sum(p.numel() for p in model.parameters())
    lesson.true("34 bytes for 32 weights, and a vocabulary", gguf_size >= expected)
except UserError as reason:
    print(f"{reason}.\nSo: no GGUF here; everything else runs.")

# %% [markdown] id="card"
# ## 8 · The card
#
# A model without a card is a file of numbers. The export wrote one from the run's own log: nothing in it is typed by hand, and what the log does not know
# is left out. Read it as a stranger would: what was it trained on, for how long, how good is it, what must it not be used for? Which of these answers is
# missing, so that you must write it before you publish?

# %% id="card-show" tags=["lesson"]
card = (out / "README.md").read_text(encoding="utf-8")
body = card.split("---\n", 2)[2]  # above it stands what the Hub's search reads
beginning = body.split("![")[0].split("## Use")[0]  # without the picture and the usage
told = f"{beginning}## Limits{body.split('## Limits')[1]}".replace("# ", "#### ")
plots.show_html(told, told, kind="text/markdown")

# %% id="card-check" tags=["check"]
receipt = json.loads((out / "export.json").read_text(encoding="utf-8"))
parameters = f"{sum(p.numel() for p in copy.parameters()):,} parameters"
lesson.true("the card names the true number of parameters", parameters in card)
changed = []
for name, entry in receipt["files"].items():
    if hashlib.sha256((out / name).read_bytes()).hexdigest() != entry["sha256"]:
        changed.append(name)
lesson.check("every file has the hash that the receipt says", len(changed))

# %% [markdown] id="card-exercise"
# **✎ Exercise**: add 1e-3 to one weight of the exported `model.safetensors`. Which checks of sections 6 and 8 notice, and which cannot?
#
# <details><summary>Solution</summary>
#
# ```python
# from safetensors.torch import load_file, save_file
#
# file = out / "model.safetensors"
# tensors = load_file(file)
# tensors["model.norm.weight"][0] += 1e-3
# save_file(tensors, file, metadata={"format": "pt"})
# ```
# Run the checks again, not the export. *every weight is the same number* and the hash notice. The probabilities cannot: both programs read the same
# changed file, and still agree.
# </details>

# %% [markdown] id="share"
# ## 9 · Share it (only if you want to)
#
# To publish: make a token with *write* permission at huggingface.co/settings/tokens, put it into Colab's key panel (left edge) as `HF_TOKEN` and switch on *Notebook access*
# (elsewhere: `hf auth login` in a terminal).
# Then tick the box, write `your-name/your-model`, and run the cell. Before you do: is the training text yours to publish from? Does the card say what it is?

# %% cellView="form" id="push" tags=["parameters"]
# @title Publish on the Hugging Face Hub
PUBLISH = False  # @param {type:"boolean"}
REPOSITORY = "your-name/my-first-smollm2"  # @param {type:"string"}
size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
if not PUBLISH:
    print(f"Nothing is published. With the box ticked, {size:.1f} MB would go to")
    print(f"huggingface.co/{REPOSITORY}.")
else:
    from huggingface_hub import HfApi

    token = None  # what `hf auth login` or HF_TOKEN says
    if colab.is_colab():
        from google.colab import userdata

        token = userdata.get("HF_TOKEN")  # not printed, not saved
    api = HfApi(token=token)
    address = api.create_repo(REPOSITORY, exist_ok=True)
    api.upload_folder(repo_id=REPOSITORY, folder_path=out, commit_message="Export")
    print(f"published: {address}")

# %% [markdown] id="instruct"
# ## 10 · Base and Instruct: why yours does not answer
#
# A **base** model continues: after "What is gravity?" it may well write the next question of a quiz. **SmolLM2-135M-Instruct** answers. It has the same network, the
# same shapes, the same number of parameters; its weights went on learning from the base's ([paper](https://arxiv.org/abs/2502.02737)): first conversations (supervised fine-tuning), then pairs of a
# better and a worse answer (preference optimisation). What is new is a *form*. A **chat template** writes, between special tokens, who speaks. The model learns to
# speak when it is its turn, and a token that ends a turn stops the writing. Which tokens should the loss count?

# %% id="instruct-form" tags=["lesson", "check"]
talk = [{"role": "user", "content": "What is gravity?"}]
answer = "Gravity pulls everything down."
print(render_chat(CHATML, talk))  # as the Instruct model reads it; it writes what comes next
talk.append({"role": "assistant", "content": answer})
template, end_id = default_template(tokenizer)  # your tokenizer may know no <|im_start|>
names = {"eos_token": tokenizer.token(end_id)}
ids, _ = encode_conversation(tokenizer, talk, template, names)
# a token that is read and not graded is kept as ~id, which is -id - 1; ~ gives the id back
print("read only:", tokenizer.decode([~i for i in ids if i < 0]))
learned = tokenizer.decode([i for i in ids if i >= 0])
print("learned:  ", learned)
lesson.true("only the answer and its end are learned", learned == answer + names["eos_token"])

# %% id="instruct-beside" tags=["lesson", "slow"]
try:
    for name in ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        other, other_tokenizer = load_model_and_tokenizer(name, device=model.device)
        is_chat = name.endswith("Instruct")
        asked = render_chat(CHATML, talk[:1]) if is_chat else talk[0]["content"]
        print(f"{name}: {complete(other, other_tokenizer, asked, 40, temperature=0.0)}\n")
except UserError as reason:
    print(f"{reason}.\nSo: online, this cell shows what both make of the same question.")

# %% [markdown] id="next"
# ## 11 · Where to go next
#
# * **More text, not more steps.** `input.txt` read a fifth time teaches little. The rule of 20 tokens a parameter ([Chinchilla](https://arxiv.org/abs/2203.15556)) makes 2.7 billion tokens for
#   135M; the official model read 2,000 billion. A first step, 2 GB of web text read once, on any GPU; killed and started again, it continues:
#   ```
#   python colab_train.py --preset smollm2-135m --dataset HuggingFaceFW/fineweb-edu \
#     --set data.dataset_tokens=500000000 --set data.held_out_fraction=0.001 --max_steps 60000
#   ```
# * **Start from the official weights**: fine-tuning, a few steps at a low rate. The form below does it where there is a GPU; with a text of yours it is
#   ```
#   python colab_train.py --preset smollm2-135m --set run.init_from=HuggingFaceTB/SmolLM2-135M \
#     --input_file mine.txt --max_steps 100 \
#     --set train.learning_rate=1e-4 --set train.warmup_steps=10
#   ```
# * **Watch it learn.** Notebook [4 · Train](04_train.ipynb) ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/04_train.ipynb)) shows a run in a panel.
# * **Make it answer.** [7 · Make it useful in ten minutes](07_make_it_useful.ipynb)
#   ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/07_make_it_useful.ipynb)): the loss on the answers of section 10, trained.

# %% cellView="form" id="fine-tune" tags=["parameters", "slow"]
# @title Fine-tune the official SmolLM2-135M on input.txt (a GPU and the network: 270 MB)
FINE_TUNE = False  # @param {type:"boolean"}
BASE = "HuggingFaceTB/SmolLM2-135M"
folder = Path(place.output_dir) / "fine-tuned"
tuned = {"run.init_from": BASE, "run.output_dir": str(folder), "data.input_file": str(TEXT)}
tuned |= {"train.max_steps": 100, "train.warmup_steps": 10, "train.learning_rate": 1e-4}
tuned |= {"train.val_every": 25, "train.keep_last": 1}
if SMOKE or not FINE_TUNE:
    print("Nothing is fine-tuned. With the box ticked, 100 steps start from the official")
    print("weights, and are scored before and after.")
elif model.device.type != "cuda":
    print("Nothing is fine-tuned: 100 steps of 135M take two CPU cores about an hour.")
    print("Choose a runtime with a GPU.")
else:
    try:
        config = load_config("smollm2-135m", **tuned)
        base = load_model_and_tokenizer(BASE, device=model.device)
        before = score_file(*base, TEXT, "val", block_length=config.data.sequence_length)
        after = train(config, live_panel(logs=folder / "logs"))
        print(f"bits per byte, held out: {before.bits_per_byte:.3f} before,")
        print(f"{after.bits_per_byte:.3f} after {after.step} steps, in {after.checkpoint}")
        print("It is your newest run now: notebook 5 looks inside it, this one exports it.")
    except UserError as reason:
        print(f"{reason}.\nSo: nothing is fine-tuned.")

# %% [markdown] id="self-test"
# ## What you can now explain
#
# * Why can two losses in nats a token not be compared, and bits per byte can?
# * Why is counting with long contexts worse than with middle ones, although it knows more?
# * Which of the nine published figures say something about a 135M model, and which are luck?
# * What does int8 cost, and what does it bring? How does an Instruct model differ from its base?
#
# <details><summary>Answers</summary>
#
# * A token is a different piece of text for each tokenizer; a byte is the same for all.
# * They were seen only a few times, and what a few sightings say is mostly chance. (One never seen leaves the word to the shorter context.)
# * HellaSwag, ARC, PIQA, CommonsenseQA and OpenBookQA lie well above luck, MMLU somewhat. WinoGrande is luck; GSM8K and TriviaQA are near zero.
# * A quarter of fp32's bytes, and so faster writing; rounding of less than one per cent of a weight, less than half a per cent of the bits per byte.
#   An Instruct model has the same network. Its weights learned on from conversations: a form, whose turn it is, when to stop.
# </details>

# %% id="score" tags=["check"]
lesson.score()
