# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/03_data_and_tokens.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/03_data_and_tokens.html)

# %% [markdown] id="title"
# # 3 · Data and tokens
#
# You will be able to
#
# * see what a token is, and train the tokenizer that makes them, in a second;
# * turn a text into rows of inputs and targets, and prove that nothing is lost or shifted wrongly;
# * say what the very first loss of a language model must be, before computing it;
# * name the rows of batch 12,345 without drawing those before it;
# * compare models that use different tokenizers, in bits per byte.
#
# The way: text → tokens (sections 1 to 3) → a file of numbers (4) → rows (5) → a first loss (6) → an order of batches (7) → a fair measure, bits per byte (8).
#
# About 20 minutes to read, 1 minute to run. Any CPU, no GPU, no Drive. Works offline; online it also fetches SmolLM2's own tokenizer (2 MB).
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

# %% cellView="form" id="imports" tags=["setup"]
# @title Imports { display-mode: "form" }
import json
import math
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers

from smollm2 import SmolLM2, SmolLM2Config, Tokenizer, load_config, plots, widgets
from smollm2.data import BatchOrder, BatchStream, prepare_tokens
from smollm2.errors import UserError
from smollm2.evaluate import compression_bits_per_byte, score_tokens
from smollm2.notebook import diagrams, lesson
from smollm2.text import documents, read_split, split_bytes
from smollm2.tokenizer import END_OF_TEXT, SMOLLM2_TOKENIZER, load_tokenizer

# %% [markdown] id="text"
# ## The text, and what is held out
#
# The text is `input.txt`: about 1,100 short pieces (stories, explanations, dialogues, some verse), with a line `<|endoftext|>` between two of them. The last tenth is
# **held out**: nothing that learns here, not even the tokenizer, ever sees it. So it can tell later what was learned and what is only known by heart.
#
# It is the end of the file, not lines from everywhere, so that no piece but the one at the cut lies on both sides. (Choosing is learning, too: settings that are tried
# until the held-out figure is lowest fit that text a little, and the figure flatters. So this project's own settings were chosen on a part of the training text.) Of a large
# text a hundredth is enough: of a text from the Hub notebook 4 holds out one document in a hundred.
#
# **nano** is the project's small model, a SmolLM2 that a laptop can train. Its settings (vocabulary, row length, batch) are the numbers used below.

# %% id="text-code" tags=["lesson"]
TEXT = REPO / "input.txt"
NANO = load_config("nano")
pieces = [piece for piece, _ in documents(read_split(TEXT, "train"))]
held_out = "".join(read_split(TEXT, "val"))
print(f"{len(pieces):,} pieces to learn from. The first begins: {pieces[0][:60]!r}")

# %% id="split-check" tags=["check"]
train_bytes, val_bytes = split_bytes(TEXT)
missing = TEXT.stat().st_size - train_bytes - val_bytes
lesson.check("the two splits together are the whole file", missing, likely="a cut character")
share = val_bytes / (train_bytes + val_bytes)
lesson.check("the held-out share is a tenth", share - NANO.data.held_out_fraction, 1e-5)

# %% [markdown] id="token"
# ## 1 · A token you can see
#
# > *Way:* text → **tokens** → file → rows → loss
#
# The network multiplies numbers; it cannot read. One number per *letter* makes rows long. One per *word* leaves no number for a word it never met.
# A **token** is the compromise: frequent letter sequences get a number of their own, rare words are spelt in pieces. Which sequences are frequent is
# learned from the text, by the **tokenizer**; all that it has a number for is its **vocabulary**.
#
# Into how many tokens will the sentence in the next cell fall?

# %% id="token-train" tags=["lesson"]
tokenizer = Tokenizer.train(pieces, NANO.data.tokenizer_vocab_size)
sentence = "The printer made a slip, and in 1984 six singers sang unbelievably."
ids = tokenizer.encode(sentence)
print(f"a tokenizer of {tokenizer.vocab_size:,} entries")
print(f"the sentence has {len(sentence.split())} words and {len(sentence)} characters")

# %% cellView="form" id="token-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "Into how many tokens does the sentence fall?",
    guess, len(ids), unit="tokens",
    why="Common words are one token, together with the blank before them; every digit stands "
    "alone; 'unbelievably' is rare and falls apart.",
)  # fmt: skip

# %% cellView="form" id="token-figure" tags=["figure"]
# @title Figure: tokens { display-mode: "form" }
fig = diagrams.token_strip(tokenizer, ids, f"{len(ids)} tokens: text (· is a blank) and id")
alt = f"The sentence cut into {len(ids)} boxes, each with its text and its number; "
plots.show(fig, alt + "a blank belongs to the word after it.")

# %% [markdown] id="token-back-text"
# Nothing may be lost on the way. The tokenizer is **byte-level**: all 256 bytes are entries, so any text in any script can be written, if need be
# byte by byte. What does that cost for a script it has never seen?

# %% id="token-back" tags=["check"]
texts = ["naïve café", "Ωμέγα", "日本語", "🙂🙃", sentence, "  two  blanks\n\n\ttab"]
wrong = [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text]
for text in texts[:4]:
    print(f"{len(text.encode()):>3} bytes -> {len(tokenizer.encode(text)):>2} tokens  {text}")
name = f"decode(encode(text)) is the text, for {len(texts)} texts from English to emoji"
lesson.check(name, len(wrong), likely="a byte without an entry")

# %% [markdown] id="token-widget-text"
# **Try it.** Type a text, and choose how many entries the vocabulary has. With 257 entries there is one for each byte and one for
# `<|endoftext|>`: pure spelling. The endings `ing`, `ers` and `ly` are tokens from 512 entries on. From which size on is `six` a single token?

# %% id="token-widget" tags=["widget"]
SIZES = [257, 512, 1024, 2048, 4096, 8192]
tokenizers = {size: Tokenizer.train(pieces, size) for size in SIZES}


def show_tokens(text, entries):
    ids = tokenizers[entries].encode(text)
    title = f"{entries:,} entries: {len(text.encode())} bytes are {len(ids)} tokens"
    more = " (the first 150)" if len(ids) > 150 else ""
    fig = diagrams.token_strip(tokenizers[entries], ids[:150], title + more)
    return fig, f"{title}, drawn as boxes with text and id{more}."


widgets.explore(
    show_tokens,
    text=widgets.text("text", sentence),
    entries=widgets.choice("entries", SIZES, 512),
)

# %% [markdown] id="bpe"
# ## 2 · Train a tokenizer yourself
#
# > *Way:* text → **tokens: who learns them?** → file → rows → loss
#
# **[Byte-pair encoding](https://arxiv.org/abs/1508.07909)** (BPE) repeats two steps:
# 1. find the pair of neighbours that occurs most often;
# 2. make it one new entry. This is a **merge**.
#
# Of equally frequent pairs, the one with the oldest entries wins; letters are numbered by the alphabet.
#
# Take *low* (5 times), *lower* (2), *slow* (1) and *newest* (4). `l o` and `o w` both occur eight times: which is merged first, and what does the second merge see?


# %% id="bpe-code" tags=["lesson"]
def best_pair(words, number):
    """The most frequent pair of neighbours; of equals, the one with the oldest entries."""
    counts = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times

    def rank(pair):
        return -counts[pair], number[pair[0]], number[pair[1]]

    return min(counts, key=rank)


def merge(word, pair):
    """The word with every occurrence of `pair`, from the left, replaced by its union."""
    out = []
    for entry in word:
        if out and (out[-1], entry) == pair:
            out[-1] += entry
        else:
            out.append(entry)
    return tuple(out)


# %% id="bpe-tiny" tags=["lesson"]
words = {tuple("low"): 5, tuple("lower"): 2, tuple("slow"): 1, tuple("newest"): 4}
number = {letter: n for n, letter in enumerate("elnorstw")}  # the oldest entries
for _ in range(4):
    pair = best_pair(words, number)
    words = {merge(word, pair): times for word, times in words.items()}
    number["".join(pair)] = len(number)  # the new entry
    print(f"merge {pair[0]!r} + {pair[1]!r}:", "  ".join(" ".join(word) for word in words))

# %% [markdown] id="bpe-real-text"
# `l o` came first, as the older pair; after it, `o w` is gone, and the second merge sees `lo w`.
#
# **The same two functions on real text.** It is first cut into words, digits and signs, for no merge may cross from one into the next. A blank stays with the
# word after it and is written `Ġ`: here every byte needs a sign that can be seen. The package lets the `tokenizers` library do this, in Rust. Do both
# learn the same merges, in the same order?
#
# (To **encode** a new text, cut it in the same way, spell each word in bytes, and apply the learned merges in the order in which
# they were learned. Nothing is counted any more; what no merge joins stays as it is.)

# %% cellView="form" id="bpe-cut" tags=["lesson"]
# @title Cut 150 pieces into words, as the library does { display-mode: "form" }
sample = "".join(pieces[:150])  # enough for 40 merges
digits = pre_tokenizers.Digits(individual_digits=True)
cut = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
counts = Counter(word for word, _ in cut.pre_tokenize_str(sample))
print(f"{len(counts):,} words; the most frequent:", counts.most_common(5))

# %% id="bpe-real" tags=["check"]
words = {tuple(word): times for word, times in counts.items()}
alphabet = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]  # and all 256 bytes
number = {entry: n for n, entry in enumerate(alphabet)}
mine = []
for _ in range(40):
    pair = best_pair(words, number)
    words = {merge(word, pair): times for word, times in words.items()}
    number["".join(pair)] = len(number)
    mine.append(list(pair))
print("the first merges:", "  ".join("".join(pair) for pair in mine[:16]))

library = json.loads(Tokenizer.train([sample], len(number)).raw)["model"]["merges"]
likely = "another rule for equally frequent pairs"
lesson.true("40 merges learned here equal the library's, in order", mine == library, likely)

# %% [markdown] id="bpe-real-text-exercise"
# **✎ Exercise**: rewrite `rank` so that of equally frequent pairs the *last* one wins, and run section 2 again. How many of the 40 merges differ from the library's? How
# many with `pieces[:10]` in place of `pieces[:150]`?
#
# <details><summary>Solution</summary>
#
# It returns `-counts[pair], -number[pair[0]], -number[pair[1]]`, and `sum(a != b for a, b in zip(mine, library))` counts. With 150 pieces none of the 40 differs: frequent
# pairs hardly ever tie. With 10 pieces counts are small, some tie, and the check fails: about ten merges stand at another place. So a rule that rarely matters still has
# to be the same.
# </details>

# %% [markdown] id="size"
# ## 3 · How many entries?
#
# > *Way:* text → **tokens: how many kinds?** → file → rows → loss
#
# More entries, fewer tokens: the network reads the same text in fewer positions. But every entry needs a row in the embedding, and a rare entry is seen
# too seldom to be learned. The step from 257 to 512 entries halves the number of tokens. What does the step from 4,096 to 8,192 bring?

# %% id="size-code" tags=["lesson"]
held_out_bytes = len(held_out.encode())
bytes_per_token = {n: held_out_bytes / len(tokenizers[n].encode(held_out)) for n in SIZES}
for size in (257, 512, 4096):
    print(f"{size:>5,} entries: {bytes_per_token[size]:.2f} bytes per token")
print("(with 257 a little above 1, because <|endoftext|>, 13 bytes, is one token)")

# %% cellView="form" id="size-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
gained = bytes_per_token[8192] / bytes_per_token[4096] - 1
lesson.predict(
    "How many bytes does a token hold, on average, with 8,192 entries (held-out text)?",
    guess, bytes_per_token[8192], within=0.03, unit="bytes per token",
    why=f"Twice the entries, {gained:.0%} more bytes: what is added now are rare words. Only a "
    "far larger text fills 49,152 entries.",
)  # fmt: skip

# %% cellView="form" id="size-figure" tags=["figure"]
# @title Figure: what entries bring and cost { display-mode: "form" }
fig, (left, right) = plots.figure(9, 3.2, columns=2)
names, entries = [f"{size:,}" for size in SIZES], "entries of the vocabulary"
few, many = bytes_per_token[257], bytes_per_token[8192]
left.plot(names, list(bytes_per_token.values()))
title = f"What more entries bring, up to {many:.2f} ..."
plots.label(left, title, entries, "bytes per token (held out)")
width = SmolLM2Config().hidden_size
right.plot(names, [size * width / 1e6 for size in SIZES], color=plots.ORANGE, marker="s")
title = f"... and cost, at SmolLM2's width {width}"
plots.label(right, title, entries, "embedding (million parameters)")
alt = f"Bytes per token rise from {few:.2f} at 257 entries to {many:.2f} at 8,192, "
plots.show(fig, alt + "ever more slowly; the embedding doubles each time.")

# %% [markdown] id="real"
# SmolLM2 uses 49,152 entries, learned from a far larger text than ours: prose, code and mathematics. Online, the next cell shows how it cuts the same
# sentence. Offline it says so, and nothing below needs it.

# %% id="real-code" tags=["lesson"]
try:
    official, where = load_tokenizer(SMOLLM2_TOKENIZER)
    size = held_out_bytes / len(official.encode(held_out))
    print(f"{where}: {official.vocab_size:,} entries, {size:.2f} bytes per token (held out)")
    print([official.decode([i]) for i in official.encode(sentence)])
except UserError as error:
    print(f"Skipped ({type(error).__name__}): the lesson goes on with our own tokenizer.")

# %% [markdown] id="disk"
# ## 4 · Tokens on disk
#
# > *Way:* text → tokens → **file** → rows → loss
#
# Tokenising during training would waste time and make the order of batches hard to repeat. So it is done once: all ids go, one after the other, into a
# flat file of 16-bit numbers. Training maps that file into memory, so that only the rows it asks for are read. How large is it, compared with the text?

# %% id="disk-code" tags=["lesson"]
tokens = prepare_tokens(TEXT, tokenizer, "output/lesson-3", NANO.data.held_out_fraction)
for name, part in (("train", tokens.train), ("val", tokens.val)):
    size = (tokens.folder / f"{name}.bin").stat().st_size
    kept = f"{len(part.tokens):>7,} tokens of {part.tokens.dtype}, {size:>7,} bytes on disk"
    print(f"{name}.bin: {kept}, for {part.text_bytes:>9,} bytes of text")

# %% id="disk-check" tags=["check"]
size = (tokens.folder / "train.bin").stat().st_size
lesson.check("two bytes per token, no header", size - 2 * len(tokens.train.tokens))
back = tokenizer.decode(tokens.val.tokens).replace(END_OF_TEXT, END_OF_TEXT + "\n")
likely = "a document border lost or doubled"
lesson.true("held-out tokens decode to the text, byte for byte", back == held_out, likely)
largest = max(tokenizer.vocab_size, SmolLM2Config().vocab_size) - 1
likely = "a vocabulary for more than 16 bits"
lesson.true("the largest id fits 16 bits, here and in SmolLM2", largest < 2**16, likely)

# %% id="disk-speed" tags=["lesson"]
start = time.perf_counter()
tokenizer.encode_batch(pieces)
speed = train_bytes / (time.perf_counter() - start)
days = 1e12 / speed / 86400
print(f"tokenised {speed / 1e6:.1f} MB a second: 1 TB of web text would take {days:.0f} days")

# %% [markdown] id="rows"
# ## 5 · Rows, packed and shifted
#
# > *Way:* text → tokens → file → **rows** → loss
#
# Every row is a window of T + 1 tokens. The first T are the **inputs**, the last T the **targets**: at each position the model must say the next token. So
# one row with T = 128 holds 128 exercises. Tiny numbers first: what is the target of the first position?

# %% id="rows-tiny" tags=["lesson"]
row = np.arange(10, 17)  # seven token ids: T = 6
inputs, targets = row[:-1], row[1:]
print("inputs ", inputs)
print("targets", targets)

# %% [markdown] id="rows-real-text"
# Now real rows: B of them make a **batch**. Read the two printed lines: the second is the first, one token later.
#
# A shift by zero is the classic mistake: the model would copy its input, reach a loss near 0 and write nonsense. The folded checks would
# notice; to prove it, the last one plants that mistake.

# %% id="rows-code" tags=["lesson"]
T, B = NANO.data.sequence_length, NANO.train.batch_size
order = BatchOrder(len(tokens.train.tokens), T, B, seed=NANO.train.seed)  # section 7
batch = BatchStream(tokens.train.tokens, order, position=0).batch(0)  # (B, T + 1)
inputs, targets = batch[:, :-1], batch[:, 1:]  # (B, T) each
for name, rows in ("inputs ", inputs), ("targets", targets):
    words = [tokenizer.decode([i]) for i in rows[0, :8].tolist()]
    print(name, tuple(rows.shape), "the first row begins:", words)

# %% cellView="form" id="rows-check" tags=["check"]
# @title Check: windows of the file, shifted by one { display-mode: "form" }
flat = np.stack([tokens.train.tokens[s : s + T + 1] for s in order.starts(0)]).astype(np.int64)
lesson.check(f"{B} rows of {T} + 1 tokens are windows of the flat file", batch.numpy() - flat)
likely = "shifted by zero or by two"
right, wrong = (inputs[:, 1:] - each[:, :-1] for each in (targets, inputs))
lesson.check("targets are the inputs, one token later", right, likely=likely)


def copied():
    lesson.check("targets = inputs", wrong, 0, likely)


lesson.check_fails("a shift by zero", copied)

# %% cellView="form" id="shapes-figure" tags=["figure"]
# @title Figure: from text to a loss { display-mode: "form" }
steps = [
    ("text", f"{train_bytes:,}\nbytes"),
    ("tokens", f"(N,)\n({len(tokens.train.tokens):,},)"),
]
steps += [("rows of\nT + 1", f"(B, T + 1)\n{tuple(batch.shape)}")]
steps += [("inputs:\nall but the last", f"(B, T)\n{tuple(inputs.shape)}")]
steps += [("model:\nlogits", f"(B, T, V)\n{(*inputs.shape, tokenizer.vocab_size)}")]
steps += [("loss against\nthe targets", "one number")]
alt = "Shapes: " + ", ".join(" ".join(step) for step in steps).replace("\n", " ")
fig = diagrams.flow(
    "From text to a loss; the targets, all but the first, go round", steps, [(2, 5)]
)
plots.show(fig, f"{alt}. The targets go past the model to the loss.")

# %% [markdown] id="pack"
# **Padding or packing?** Pieces differ in length, rows do not. **Padding** would give each piece a row of its own and fill it up with a token that teaches nothing.
# **Packing** lets the pieces follow each other, with `<|endoftext|>` between them. (Attention may look across the border; that token is the only sign of something
# new, and the model learns to heed it.) How much would padding waste here?

# %% id="pack-code" tags=["lesson"]
lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(pieces)]  # + 1: its <|endoftext|>
groups = [lengths[i : i + B] for i in range(0, len(lengths) - B + 1, B)]
computed = sum(B * max(group) for group in groups)  # each batch is as wide as its longest piece
padding = 1 - sum(map(sum, groups)) / computed
print(f"pieces have {min(lengths)} to {max(lengths)} tokens, {np.mean(lengths):.0f} on average")

# %% cellView="form" id="pack-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"{B} pieces make a batch, a row each, all rows as wide as the longest. What per cent of "
    "all positions is padding?",
    guess, 100 * padding, within=0.15, unit="%",
    why=f"The longest of {B} sets the width for all of them. With packing the waste is zero; "
    "the price is that a row may begin in mid-piece.",
)  # fmt: skip

# %% cellView="form" id="pack-figure" tags=["figure"]
# @title Figure: padded and packed { display-mode: "form" }
first, width = lengths[:B], max(lengths[:B])  # the first pieces, padded and packed
starts = np.cumsum([0, *first])  # of each piece in the packed stream
row = load_config("smollm2-135m").data.sequence_length  # nano's are shorter than most pieces
padded = [(piece, piece, 0, size) for piece, size in enumerate(first)]
packed = [
    (piece, y, max(starts[piece] - y * row, 0), min(starts[piece + 1] - y * row, row))
    for piece in range(B)
    for y in range(starts[piece] // row, (starts[piece + 1] - 1) // row + 1)
]
empty, rows = f"{1 - sum(first) / (B * width):.0%}", packed[-1][1] + 1
titles = f"Padded: {empty} of it teaches nothing", f"Packed into rows of {row}: nothing is lost"
fig, axes = plots.figure(9, 0.9 + 0.22 * B, columns=2, sharey=True)
for ax, title, bars in zip(axes, titles, (padded, packed), strict=True):
    for piece, y, left, right in bars:
        tint = diagrams.TINTS[piece % len(diagrams.TINTS)]
        ax.barh(y, right - left, 0.8, left, color=tint, edgecolor="black")
        if right - left > width / 16:  # wide enough for its number
            ax.text((left + right) / 2, y, str(piece + 1), ha="center", va="center", fontsize=8)
    ax.set_yticks(range(B), [f"row {y}" for y in range(B)])
    ax.set(xlim=(0, max(width, row)), ylim=(B - 0.4, -0.6))  # one scale: areas can be compared
    ax.grid(False)
    plots.label(ax, title, "position in the row (token)", "")
alt = f"{B} pieces in rows as wide as the longest, {width} tokens: {empty} is padding. "
plots.show(fig, alt + f"Packed, they fill {rows} rows of {row}, a black edge between two.")

# %% [markdown] id="first"
# ## 6 · The first loss, before the first step
#
# > *Way:* text → tokens → file → rows → **loss**
#
# The loss of a token is −ln p, where p is the chance that the model gave it; its unit, for the natural logarithm, is the **nat**. The loss of a batch is the mean over its
# tokens.
#
# A model that has learned nothing should give each of the V entries the same chance, 1/V. Its loss, $-\ln(1/V) = \ln V$, is known in advance; a start far from it means a
# bug. SmolLM2 has V = 49,152. What is ln V?
#
# The cell after the guess makes the loss in three steps. It also prints the **perplexity**, e to the loss, which papers like: the model is as unsure as if so many
# tokens were equally likely.

# %% cellView="form" id="first-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "Which loss, in nats per token, has a uniform guess over SmolLM2's 49,152 entries?",
    guess, math.log(SmolLM2Config().vocab_size), within=0.01, unit="nats",
    why="ln 49,152 = 10.80. In bits: log2 49,152 = 15.6, which is why an id fits into 16.",
)  # fmt: skip

# %% id="first-loss" tags=["check"]
torch.manual_seed(0)
model, V = SmolLM2(NANO.model), NANO.model.vocab_size
with torch.no_grad():
    p = model(inputs).softmax(-1)  # (B, T, V): of each entry, its chance to come next
    right = p.gather(-1, targets[..., None])  # (B, T, 1): of the token that did come
    loss = -right.log().mean()
    package = model.loss(inputs, targets)
lesson.check("softmax, -ln p, mean: that is the package's loss", loss - package, 1e-4)
print(f"untrained nano model, V = {V:,}: ln V = {math.log(V):.3f}, measured {loss:.3f}")
print(f"perplexity {loss.exp():,.0f}: as unsure as among so many equally likely tokens")

# %% [markdown] id="first-why"
# Close, yet too high, and so for every seed. Why? A fresh network is not quite uniform: its logits z are small random numbers.
# * If they are spread like a bell curve of variance σ², then the large ones among them take probability from the true token, and $\ln \sum e^{z}$ is larger than ln V by **σ²/2**.
# * The last norm gives the numbers of each vector the size 1, so a vector of *width* numbers is √width long. The embedding, which is also the output, is drawn with the standard deviation *init* (1/24 here). So σ = init · √width.
#
# Does this finer prediction hold for other vocabularies?


# %% id="first-sizes" tags=["lesson"]
def first_loss(config, rows=16, time=64):
    """(measured, ln V + sigma^2 / 2) of an untrained model on random tokens."""
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, time + 1))
    with torch.no_grad():
        measured = SmolLM2(config).loss(ids[:, :-1], ids[:, 1:]).item()
    variance = config.hidden_size * config.initializer_range**2
    return measured, math.log(config.vocab_size) + variance / 2


entries = [1024, 4096, 16384, 49152]
results = [first_loss(NANO.model.model_copy(update={"vocab_size": size})) for size in entries]
smol = first_loss(SmolLM2Config(num_hidden_layers=1))  # 1 of SmolLM2-135M's 30: the same σ

# %% id="first-check" tags=["check"]
gaps, likely = np.array([m - p for m, p in results]), "wrong initialisation or shift"
lesson.check("first loss = ln V + σ²/2 for four vocabularies", gaps, 0.08, likely)
lesson.check("the same at SmolLM2's width and vocabulary", smol[0] - smol[1], 0.08)
print(f"ln 49,152 = {math.log(49152):.1f}; SmolLM2, with σ = 1/24 · √576 = 1: {smol[1]:.1f}")

# %% cellView="form" id="first-figure" tags=["figure"]
# @title Figure: the first loss { display-mode: "form" }
fig, ax = plots.figure(7.5, 3.4)
small, large = NANO.model.hidden_size, SmolLM2Config().hidden_size
measured, predicted = zip(*results, strict=True)
ax.semilogx(entries, np.log(entries), "--", color=plots.GREY, marker="", label="ln V (uniform)")
style = {"color": plots.BLUE, "marker": ""}
ax.semilogx(entries, predicted, **style, label=f"ln V + σ²/2, width {small}")
ax.semilogx(entries, measured, "o", color=plots.ORANGE, label=f"measured, width {small}")
style = {"color": plots.BLACK, "markersize": 14, "label": f"ln V + σ²/2, width {large}"}
ax.semilogx(entries[-1], smol[1], "_", **style)
ax.semilogx(entries[-1], smol[0], "D", color=plots.RED, label=f"measured, width {large}")
ax.set_xticks(entries, [f"{size:,}" for size in entries], minor=False)
ax.minorticks_off()
title = "The first loss is known before the first step"
plots.label(ax, title, "entries of the vocabulary V", "loss (nats per token)", legend=True)
alt = f"First losses lie on ln V + sigma squared / 2; at V = {entries[-1]:,}: "
plots.show(fig, alt + f"{measured[-1]:.2f} at width {small}, {smol[0]:.2f} at {large}.")

# %% [markdown] id="order"
# ## 7 · The order of batches is a function
#
# > *Way:* text → tokens → file → **rows: which, when?** → loss
#
# Most training loops shuffle with a stateful loader: to know batch 12,345 you must draw all those before it, and after a crash you hope. Here the rows of
# batch *n* (counted from 0) are a **pure function of (seed, n)**, for a given token file and given T and B. Nothing that was drawn before counts, nor how many workers share
# the batch, so any machine gets the same one. A run that died after 5,000 steps asks for batch 5,000 and goes on. An **epoch** is one walk through the whole text; each has an
# order of its own.

# %% id="order-code" tags=["lesson"]
train = tokens.train.tokens
again = BatchOrder(len(train), T, B, seed=NANO.train.seed)
print("the rows of batch 12,345 begin at tokens", *again.starts(12345)[:5], "...")
print(f"one epoch has {order.rows_per_epoch:,} rows of {T} tokens; a batch has {B}")

# %% cellView="form" id="order-check" tags=["check"]
# @title Check: backwards, once each, in two halves { display-mode: "form" }
walked = [BatchOrder(len(train), T, B, NANO.train.seed).starts(n) for n in range(40)]
asked = np.array([again.starts(n) for n in reversed(range(40))][::-1])
lesson.check("batches 39, 38, ... asked backwards are those walked forwards", asked - walked)
epoch = sorted(order.row_start(n) for n in range(order.rows_per_epoch))
lesson.check("an epoch visits every row once, without overlap", np.diff(epoch) - T)
halves = [BatchStream(train, order, 0, rank, world_size=2).batch(3) for rank in range(2)]
together = torch.stack(halves, dim=1).flatten(0, 1)  # row 0 of worker 0, row 0 of worker 1, ...
whole = BatchStream(train, order, 0).batch(3)
lesson.check("two workers' halves are the one-worker batch", together - whole)

# %% cellView="form" id="order-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
steps = NANO.train.max_steps
lesson.predict(
    f"After how many batches of {B} rows has the model seen all {len(train):,} training "
    "tokens once?",
    guess, order.rows_per_epoch / B, within=0.05, unit="batches",
    why=f"{B} x {T} = {B * T:,} tokens a batch. The {steps:,} steps of the nano preset are "
    f"{order.epoch_of(steps):.1f} epochs.",
)  # fmt: skip

# %% cellView="form" id="order-figure" tags=["figure"]
# @title Figure: the order of batches { display-mode: "form" }
fig, ax = plots.figure(9, 3.2)
per_epoch = order.rows_per_epoch // B
looks = ((0, plots.BLUE, ".", "epoch 1"), (per_epoch, plots.ORANGE, "+", "epoch 2"))
for first, color, marker, name in looks:
    points = [(n, s / 1000) for n in range(first, first + per_epoch) for s in order.starts(n)]
    ax.plot(*zip(*points, strict=True), marker, markersize=3, color=color, label=name)
ax.axvline(per_epoch, color=plots.GREY)
title = f"Where the rows of each batch begin: epoch 2 starts at batch {per_epoch}"
plots.label(ax, title, "batch number n", "position in the text (1,000 tokens)")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=3, frameon=False)
alt = f"Row starts of {2 * per_epoch} batches scatter evenly over the whole text; "
plots.show(fig, alt + "epoch 2 has another order than epoch 1.")

# %% [markdown] id="order-exercise"
# **✎ Exercise**: give `BatchOrder` another seed. How many rows does batch 0 share with the old one? What did you expect?
#
# <details><summary>Solution</summary>
#
# `set(BatchOrder(len(train), T, B, 1).starts(0)) & set(order.starts(0))` is almost always empty: two draws of 16 rows from
# about 2,600, and the cut into rows begins at another token besides.
# </details>

# %% [markdown] id="bpb"
# ## 8 · Bits per byte
#
# > *Way:* text → tokens → file → rows → **loss: of what?**
#
# Loss is counted per *token*, and tokens differ: longer tokens mean fewer, harder guesses. So the losses, and the perplexities, of two tokenizers cannot be compared.
# Bits per **byte** can: all nats of a text, divided by ln 2 (that makes bits), divided by its bytes.
#
# $$\text{bits per byte} = \frac{\text{nats of all tokens}}{\ln 2 \cdot \text{bytes of the text}}$$
#
# A byte has 8 bits; how many does the untrained model need?

# %% id="bpb-check" tags=["check"]
part = tokens.val.tokens[:1024].astype(np.int64)
part_bytes = len(tokenizer.decode(part).encode())
score = score_tokens(model, part, part_bytes, block_length=T)
before = np.concatenate(([NANO.model.bos_token_id], part[:-1]))  # the token before each
with torch.no_grad():
    logits = model(torch.tensor(before).view(-1, T)).flatten(0, 1)
nats = F.cross_entropy(logits, torch.tensor(part), reduction="sum").item()
gap = nats / (math.log(2) * part_bytes) - score.bits_per_byte
lesson.check("bits per byte by hand equal the package's", gap, 1e-4, "log2 and ln mixed up")
print(f"untrained: {score.loss:.2f} nats per token, {score.bits_per_byte:.2f} bits per byte")
print("(not 8, for the tokenizer has learned already)")

# %% [markdown] id="unigram"
# Now the simplest model there is, the **unigram**: it knows how often each token occurs, and nothing else. Six tokenizers, six losses. Nats per token and
# bits per byte disagree about which one is best: how?


# %% id="unigram-code" tags=["check"]
def unigram(tokenizer):
    """(nats per token, bits per byte), held out, of token frequencies seen in 400 pieces."""
    seen = np.concatenate(tokenizer.encode_batch(pieces[:400]))
    counts = np.bincount(seen, minlength=tokenizer.vocab_size) + 1  # never seen: not impossible
    guessed = np.array(tokenizer.encode(held_out))
    nats = -np.log(counts / counts.sum())[guessed].sum()
    return nats / len(guessed), nats / (math.log(2) * held_out_bytes)


unigrams = [unigram(tokenizers[size]) for size in SIZES]
packed = compression_bits_per_byte(TEXT, "val", NANO.data.held_out_fraction)
size = NANO.data.tokenizer_vocab_size
nats, bits = unigrams[SIZES.index(size)]
gap = bits - nats / math.log(2) / bytes_per_token[size]
lesson.check("bits per byte = nats per token / ln 2 / bytes per token", gap, 1e-9)
print(f"{size:,} entries: {nats:.2f} nats per token, {bits:.2f} bits per byte")

# %% cellView="form" id="unigram-predict" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    "A packer like gzip also predicts text, in its way. How many bits per byte does gzip -9 "
    "need for the held-out text (8: not packed)?",
    guess, packed["gzip -9"], unit="bits per byte",
    why="Well below half: English is predictable. The nano model of the next notebook needs "
    "about 1.74 after three minutes, on text it never saw.",
)  # fmt: skip

# %% cellView="form" id="unigram-figure" tags=["figure"]
# @title Figure: per token and per byte { display-mode: "form" }
fig, (left, right) = plots.figure(9, 3.4, columns=2)
entries = "entries of the vocabulary"
left.plot(names, [nats for nats, _ in unigrams])
plots.label(left, "Per token, more entries look worse", entries, "loss (nats per token)")
right.plot(names, [bits for _, bits in unigrams], label="token frequencies")
for (name, bits), style in zip(packed.items(), ("--", ":"), strict=True):
    right.axhline(bits, color=plots.GREY, linestyle=style, label=f"{name}: {bits:.2f}")
plots.label(right, "Per byte, they are better", entries, "bits per byte", legend=True)
nats, bits = unigrams[-1]
alt = f"From 257 to 8,192 entries nats per token rise to {nats:.1f} while bits per byte fall "
plots.show(fig, alt + f"to {bits:.2f}; gzip: {packed['gzip -9']:.2f}.")

# %% [markdown] id="bpb-exercise"
# **✎ Exercise**: a model has 1.9 bits per byte on a text of 3.1 bytes per token. What is its loss in nats per token?
#
# <details><summary>Solution</summary>
#
# 1.9 bits · ln 2 · 3.1 bytes = 4.08 nats per token.
# </details>

# %% [markdown] id="self-test"
# ## What you can now explain
#
# You can follow a text all the way: cut into tokens, stored once, read as shifted rows in an order that needs no memory, and scored so that tokenizers can be compared.
#
# <details><summary>Why does "unbelievably" become several tokens and "the" one?</summary>Merges are learned from frequency: " the" is one
# of the first, " t" + "he"; the rare word never earned an entry of its own.</details>
#
# <details><summary>Why must the tokenizer not see the held-out text?</summary>Its entries are learned. Entries fitted to the held-out words would shorten
# exactly the text on which you measure.</details>
#
# <details><summary>The loss is 0.01 after 50 steps. What is the first suspicion?</summary>Targets that are not shifted: the model copies its input.</details>
#
# <details><summary>Your first loss is 14 with V = 49,152. Is that fine?</summary>No: ln V + σ²/2 is 11.3. The logits are too wide: look at the
# initialisation, or for a factor that is applied twice.</details>
#
# <details><summary>Model A: 3.2 nats per token. Model B, another tokenizer: 3.6. Which is better?</summary>Unknown. Ask for bits per byte.</details>
#
# <details><summary>A model has a perplexity of 20. What is its loss, and what do you need to compare it with another?</summary>ln 20 = 3.0 nats per token. You need the
# bytes per token of both tokenizers: bits per byte = 3.0 / ln 2 / bytes per token.</details>

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="next"
# ## Next
#
# These batches, the model of notebook 1, and a run that survives being killed: [4 · Train](04_train.ipynb)
# ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/04_train.ipynb)).
