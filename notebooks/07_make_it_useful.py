# ---
# jupyter:
#   accelerator: GPU
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] id="view-in-github"
# <a href="https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/07_make_it_useful.ipynb" target="_parent"><img src="https://colab.research.google.com/assets/colab-badge.svg" alt="Open In Colab"/></a> · [read it with its outputs](https://smollm2-from-scratch.github.io/smollm2-from-scratch/07_make_it_useful.html)

# %% [markdown] id="title"
# # 7 · Make it useful in ten minutes
#
# You will be able to
# * write a conversation in the form that a chat model reads, and say which of its tokens are learned;
# * compute the loss on the answers alone by hand, and prove it equal to the package's and to transformers';
# * turn a base model into one that answers, measure what that changed, and take it to Ollama.
#
# **Time** about 25 minutes to read; to run, about 3 minutes on a CPU with a run of yours (1 to 2 more without one), under 10 on a T4 with the official weights (planned, not timed yet) ·
# **hardware** T4 or any CPU · **network** only for the official weights; offline your own run learns to answer.
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

# %% id="imports" tags=["setup"]
import json
import random
from html import escape

import ipywidgets
import torch
from transformers import AutoModelForCausalLM

from smollm2 import load_config, plots, train, widgets
from smollm2.chat_data import CHATML, PLAIN, ChatFile, encode_conversation, read_conversations
from smollm2.conversation import Conversation, chat_template, render_chat
from smollm2.device import choose_device
from smollm2.errors import UserError
from smollm2.evaluate import score_tokens
from smollm2.export import export
from smollm2.logs import TRAINING, read_log
from smollm2.loss import inputs_and_targets
from smollm2.notebook import diagrams, lesson
from smollm2.notebook.own_run import own_run
from smollm2.notebook.panel import live_panel
from smollm2.pretrained import load_model_and_tokenizer
from smollm2.sampling import SamplingOptions
from smollm2.token_text import piece
from smollm2.weights import resolve

SMOKE = colab.is_smoke()
TEXT, OFFICIAL = REPO / "input.txt", "HuggingFaceTB/SmolLM2-135M"
lesson.quiet()

# %% [markdown] id="base"
# ## 1 · The weights to begin with
#
# A **base model** continues text. It has read much, but nobody taught it that a question wants an answer. That is what this notebook adds. `auto` takes the official
# SmolLM2-135M where there is a GPU and the network, and else your own newest run, as notebooks 5 and 6 do. Where there is none, a small one is trained
# now: 300 steps, one to two minutes on a CPU.

# %% cellView="form" id="find-base" tags=["parameters"]
# @title Which weights
BASE = "auto"  # @param ["auto", "official", "own run"]
USE_DRIVE = True  # @param {type:"boolean"}
device = choose_device()
is_official = BASE == "official" or (BASE == "auto" and device.type == "cuda")
place = colab.Storage(Path("output"), None) if is_official else colab.run_places(USE_DRIVE)
places_on_drive = [place.drive_dir] if place.drive_dir else []

# %% id="load-base" tags=["slow", "lesson"]
if is_official:
    try:
        source, name, base = OFFICIAL, "official", resolve(OFFICIAL)
    except UserError as reason:
        print(f"{reason}.\nSo: your own run learns to answer.")
        is_official = False
if not is_official:
    own = own_run(TEXT, place.output_dir, places_on_drive, smoke=SMOKE)[-1]
    source, name, base = str(own.folder), f"{own.run_id[:6]}-{own.step}", own.folder
model, tokenizer = load_model_and_tokenizer(base, device=device)
print(f"{source}: {sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown] id="template"
# ## 2 · A chat template
#
# A model reads one row of tokens. A conversation is a list of messages, each with a **role**. The **chat template** turns the one into the other; it is a small program that
# travels with the model. SmolLM2-Instruct uses **ChatML**: two tokens that occur nowhere else mark where a turn begins and ends. What must the text end
# in, when it is the model's turn to write?

# %% id="template-texts" tags=["lesson"]
talk = [
    {"role": "user", "content": "What comes after 12?"},
    {"role": "assistant", "content": "After 12 comes 13."},
    {"role": "user", "content": "And after 13?"},
]
print(render_chat(CHATML, talk))


# %% id="template-check" tags=["check"]
def chatml(messages):
    """The same by hand: messages -> text, up to where the answer begins."""
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


lesson.true("ChatML by hand is the template's text", chatml(talk) == render_chat(CHATML, talk))

# %% id="template-own" tags=["lesson"]
chats = ChatFile(str(TEXT), held_out=0.1, model_folder=base)
template, end_id = chats.template_and_end(tokenizer, model.config.eos_token_id)
names = {"eos_token": tokenizer.token(end_id)}
if template == PLAIN:  # a tokenizer that was trained here knows no <|im_start|>
    print("Your tokenizer has no tokens for turns: plain words stand in their place.\n")
text = render_chat(template, talk, names)
print(text)

# %% id="template-tokens" tags=["check"]
ids = tokenizer.encode(text)
print(f"{len(ids)} tokens:", " ".join(piece(tokenizer, i) for i in ids))
lesson.true("text -> tokens -> text loses nothing", tokenizer.decode(ids) == text)

# %% cellView="form" id="predict-form" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
three = talk[:3]  # more is said further down
empty = [{"role": said["role"], "content": ""} for said in three]
form, whole = (
    len(tokenizer.encode(render_chat(template, each, names))) for each in (empty, three)
)
lesson.predict(
    f"These {whole} tokens hold three messages. How many would three empty ones need: the "
    "form alone?",
    guess, form, unit="tokens",
    why="Each turn pays for its marks; short messages are half form.",
)  # fmt: skip

# %% [markdown] id="masked"
# ## 3 · Loss on the answers alone
#
# The training step stays what it was: predict the next token. But the user's words are not for the model to write, so we do not grade them. Every token is **read**; only
# the answers' tokens, and the token that ends each, are **targets**. All others get the target −100, which the loss leaves out. What would a model do that never
# learned the end token?

# %% id="masked-conversation" tags=["lesson"]
talk.append({"role": "assistant", "content": "After 13 comes 14."})
row, _ = encode_conversation(tokenizer, talk, template, names)
ids = [~i if i < 0 else i for i in row.tolist()]  # ~id marks what is read and not learned
learned = [i >= 0 for i in row.tolist()]
print("read:   ", repr(tokenizer.decode([~i for i in row.tolist() if i < 0])))
print("learned:", repr(tokenizer.decode([i for i in row.tolist() if i >= 0])))

# %% cellView="form" id="predict-learned" tags=["predict"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
lesson.predict(
    f"Two questions, two answers, {len(ids)} tokens: how many per cent of them are learned?",
    guess, 100 * sum(learned) / len(ids), within=0.15, unit="%",
    why="The rest is read only. So a batch of conversations teaches less than it costs, and "
    "the loss is the mean over the answers' tokens, however many a batch holds.",
)  # fmt: skip


# %% cellView="form" id="mask-figure" tags=["figure"]
# @title Figure: what is read, what is learned { display-mode: "form" }
def masked(row):
    """Tokens as boxes, darker where they are learned; and a caption."""
    ids, tints = [], []
    for i in row[:90]:
        ids.append(~i if i < 0 else i)
        tints.append("#f0ab2e" if i >= 0 else "#eeeeee")  # not by the hue alone
    count = sum(i >= 0 for i in row[:90])
    told = f"{len(ids)} tokens are read, {count} of them learned (darker, orange)"
    return diagrams.token_strip(tokenizer, ids, told, tints), f"A conversation: {told}."


plots.show(*masked(row.tolist()))

# %% id="masked-by-hand" tags=["lesson"]
targets = [i if is_learned else -100 for i, is_learned in zip(ids, learned, strict=True)][1:]
with torch.inference_mode():
    log_p = model(torch.tensor([ids[:-1]], device=device))[0].log_softmax(-1)  # (T - 1, V)
costs = [-log_p[at, i].item() for at, i in enumerate(ids[1:])]  # nats, for each next token
answers = [cost for cost, target in zip(costs, targets, strict=True) if target != -100]
by_hand = sum(answers) / len(answers)
print(f"mean over all {len(costs)} targets: {sum(costs) / len(costs):.3f} nats a token")
print(f"mean over the {len(answers)} of the answers: {by_hand:.3f}")

# %% id="masked-check" tags=["check"]
inputs, wanted = inputs_and_targets(torch.tensor(row.tolist(), device=device)[None])
likely = "are the targets shifted by one, and is the end of the answer among them?"
lesson.check("inputs are the tokens", inputs[0].cpu() - torch.tensor(ids[:-1]))
lesson.check("targets by hand", wanted[0].cpu() - torch.tensor(targets), 0, likely)
with torch.inference_mode():
    loss = model.loss(inputs, wanted).item()
lesson.check("the mean over answers is the package's loss", by_hand - loss, 1e-4, likely)

# %% id="masked-transformers" tags=["check"]
theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
labels = torch.tensor([[-100, *targets]])  # transformers shifts them itself
with torch.inference_mode():
    other = theirs(input_ids=torch.tensor([ids]), labels=labels).loss.item()
lesson.check("and transformers'", other - loss, 1e-4, likely)

# %% [markdown] id="masked-exercise"
# **✎ Exercise**: change one word of the first *question* and compute the loss again. Its tokens are no targets: may the loss change?
#
# <details><summary>Solution</summary>It changes. The question's tokens are not graded, but the answers are predicted from them. Reading and being graded are two things.
# Through this reading, gradients flow to the question's embeddings, too.</details>

# %% [markdown] id="data"
# ## 4 · Conversations to learn from
#
# Two sets are at hand. **short questions** are written by the next cell: 4,160 of counting, adding and comparing. Their answers are short and right or wrong, so even a
# model of minutes can show that it learned. **input.txt** becomes pairs: *Tell me the story called …* or *Explain: …*, and the piece. It suits the official weights. Or give
# the path of **your own** `.jsonl`: in each line `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`, as many sets of
# the Hub have it.

# %% cellView="form" id="find-data" tags=["parameters"]
# @title Which conversations
CHAT = "auto"  # @param ["auto", "short questions", "input.txt"] {allow-input: true}


# %% id="short-questions" tags=["lesson"]
def short_questions():
    """(question, answer): no knowledge, only form and digits."""
    for n in range(1000):
        yield f"What comes after {n}?", f"After {n} comes {n + 1}."
    for a in range(1, 41):
        for b in range(1, 41):
            yield f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
            if a != b:
                yield f"Which is more, {a} or {b}?", f"{max(a, b)} is more than {min(a, b)}."


pairs = list(short_questions())
random.Random(0).shuffle(pairs)  # the last tenth will be held out
short = Path(place.output_dir) / "short-questions.jsonl"
short.parent.mkdir(parents=True, exist_ok=True)
with short.open("w", encoding="utf-8") as file:
    for question, answer in pairs:
        user = {"role": "user", "content": question}
        said = {"role": "assistant", "content": answer}
        file.write(json.dumps({"messages": [user, said]}) + "\n")

# %% id="read-data" tags=["lesson"]
kind = ("input.txt" if is_official else "short questions") if CHAT == "auto" else CHAT
path = {"short questions": short, "input.txt": TEXT}.get(kind, Path(kind))
chats = ChatFile(str(path), held_out=0.1, model_folder=base)
data = chats.prepare(tokenizer, end_id, lambda identity: None, print)
conversations = list(read_conversations(path))
held_out = conversations[-max(1, round(0.1 * len(conversations))) :]


def first(messages, role):
    """The first thing that `role` says."""
    return next((m["content"] for m in messages if m["role"] == role), "")


for messages in held_out[:3]:
    print(f"{first(messages, 'user')!r}\n    {first(messages, 'assistant')[:80]!r}")


# %% cellView="form" id="data-widget" tags=["widget", "figure"]
# @title Try it: held-out conversations { display-mode: "form" }
def one_conversation(number):
    row, _ = encode_conversation(tokenizer, held_out[number], template, names)
    return masked(row.tolist())


top = min(20, len(held_out)) - 1
widgets.explore(one_conversation, number=widgets.slider("conversation", 0, top, 0))

# %% [markdown] id="train"
# ## 5 · Train
#
# One run like every other: it begins with your weights and fresh averages of AdamW, saves, resumes when you run the cell again, and holds the last tenth of the
# conversations back. Only the text differs, and the loss counts the answers alone. The rate is lower than from scratch, for there is something to lose. The same
# from a terminal:
# ```
# python colab_train.py --preset smollm2-135m --chat_file mine.jsonl \
#   --set run.init_from=HuggingFaceTB/SmolLM2-135M --set train.learning_rate=3e-4 --max_steps 90
# ```

# %% cellView="form" id="knobs" tags=["parameters"]
# @title How long (None: 90 steps of the official weights, 300 of your own run)
STEPS = None  # @param {type:"raw"}
RATE = None  # @param {type:"raw"}
steps = STEPS or (90 if is_official else 40 if SMOKE else 300)
rate = RATE or (3e-4 if is_official else 2e-3)

# %% id="train-config" tags=["lesson"]
asked = [first(messages, "user") for messages in held_out]
questions = [question for question in asked if 0 < len(question) < 200][:3] or ["Hello"]
folder = Path(place.output_dir) / "answers" / f"{name}-{path.stem}"
settings = {
    "run.init_from": source,
    "run.output_dir": str(folder),
    "data.chat_file": str(path),
    "train.optimizer": "adamw",  # also where the base was trained with Muon
    "train.max_steps": steps,
    "train.learning_rate": rate,
    "train.warmup_steps": 10,
    "train.val_every": max(1, steps // 6),
    "train.val_max_tokens": 1024 if SMOKE else 8192,
    "train.sample_every": max(1, steps // 3),
    "train.prompts": questions[:2],
    "train.keep_last": 1,
}
if SMOKE:
    settings |= {"train.batch_size": 4}
config = load_config("smollm2-135m" if is_official else "nano", **settings)
some = {"block_length": config.data.sequence_length, "max_tokens": config.train.val_max_tokens}
before = score_tokens(model, data.val.tokens, data.val.text_bytes, **some)
print(f"held-out answers cost {before.loss:.3f} nats a token before")

# %% id="train-run" tags=["slow", "lesson"]
result = train(config, live_panel(folder / "logs"))
tuned, _ = load_model_and_tokenizer(result.checkpoint, device=device)
after = score_tokens(tuned, data.val.tokens, data.val.text_bytes, **some)

# %% id="train-check" tags=["check"]
fall = 1 - after.loss / before.loss
print(f"held-out answers: {before.loss:.3f} nats a token before, {after.loss:.3f} after")
print(f"({before.tokens:,} tokens of answers that no training saw; {fall:.0%} less)")
lesson.true("the form travels with the model", chat_template(result.checkpoint) == template)
likely = "too few steps, or too low a rate"
if kind == "short questions":
    lesson.true("the loss on held-out answers fell by 25 %", fall >= 0.25, likely)
else:
    lesson.true("the loss on held-out answers fell", fall > 0, likely)

# %% cellView="form" id="train-figure" tags=["figure"]
# @title Figure: the loss on answers { display-mode: "form" }
events = read_log(folder / "logs" / TRAINING)
points = {
    key: [(int(e["step"]), float(e[key])) for e in events if key in e]
    for key in ("train_loss", "val_loss")
}
fig, ax = plots.figure(7.5, 3)
ax.plot(*zip(*points["train_loss"], strict=True), color=plots.BLUE, label="trained on")
seen = [(0, before.loss), *points["val_loss"]]
ax.plot(*zip(*seen, strict=True), color=plots.ORANGE, marker="s", label="held out")
ax.set_ylim(0)
title = f"Answers cost {fall:.0%} less after {result.step} steps"
plots.label(ax, title, "optimizer step", "nats a token, answers only", legend=True)
alt = f"Loss on the answers alone: held out, it falls from {before.loss:.2f} to "
plots.show(fig, alt + f"{after.loss:.2f} nats a token in {result.step} steps.")

# %% [markdown] id="train-exercise"
# **✎ Exercise**: what did the lesson cost? Score both models on the held-out part of `input.txt`, as in notebook 6:
# `from smollm2.evaluate import score_file`, then `score_file(model, tokenizer, TEXT, "val", block_length=128)`, and the same for `tuned`.
#
# <details><summary>Solution</summary>After the short questions a small model needs far more bits per byte than before (1.88 became 5.84 in one trial): nothing in them reminds it of a story.
# This is called **catastrophic forgetting**. A lower rate, fewer steps, or a share of the old text among the new keep more of it.</details>

# %% [markdown] id="beside"
# ## 6 · Before and after
#
# The same three held-out questions, in the same form, to both. The base model was never told where an answer ends; does it stop by itself?

# %% id="beside-code" tags=["lesson"]
is_short = max(len(first(messages, "assistant")) for messages in held_out) < 100
writing = {"max_new_tokens": 24 if is_short else 60, "temperature": 0.0 if is_short else 0.7}
options = SamplingOptions(**writing, seed=1)


def conversation(model):
    """A talk with `model` in the form of section 2, also with one that never learned it."""
    talk = Conversation(model, tokenizer, base)
    talk.template, talk.special_tokens, talk.stop_ids = template, names, (end_id,)
    return talk


def answer(model, question):
    talk = conversation(model)
    return "".join(talk.stream(talk.ask(question), options)).strip()


# %% id="beside-answers" tags=["lesson"]
for question in questions:
    print(f"question: {question}")
    for who, each in (("before", model), ("after", tuned)):
        print(f"{who:>8}: {' '.join(answer(each, question).split())[:90]}")

# %% cellView="form" id="predict-right" tags=["predict", "slow"]
# @title Your prediction { display-mode: "form" }
guess = None  # @param {type:"raw"}
exam = held_out[: 8 if SMOKE else 40 if is_short else 4]
right = {
    who: sum(answer(each, first(m, "user")) == first(m, "assistant").strip() for m in exam)
    for who, each in (("before", model), ("after", tuned))
}
lesson.predict(
    f"Of {len(exam)} held-out questions, how many does it now answer word for word?",
    guess, right["after"], within=0.2, unit="questions",
    why=f"Before it was {right['before']}. A loss is a mean over tokens; an answer is right "
    "only if every token is. The loss falls first, right answers come later.",
)  # fmt: skip

# %% [markdown] id="where"
# **Where** did the loss fall? Take one held-out answer and let both models read it, token by token. The form is learned within a few steps. What costs most in
# the end: the words, the digits, or the token that ends the answer?

# %% id="where-row" tags=["lesson"]
rows = [encode_conversation(tokenizer, m, template, names)[0] for m in held_out[:20]]
rows = [row[: some["block_length"] + 1].tolist() for row in rows]
row = max(rows, key=lambda row: sum(i >= 0 for i in row))  # the longest answer
row = torch.tensor(row, device=device)
inputs, wanted = inputs_and_targets(row)

# %% id="where-check" tags=["check"]
at = (wanted != -100).nonzero()[:24, 0]  # at most 24 tokens of the answer
cost = {}
for who, each in (("before", model), ("after", tuned)):
    with torch.inference_mode():
        log_p = each(inputs[None])[0].log_softmax(-1)
    cost[who] = -log_p[at, wanted[at]].cpu()
    print(f"{who}: {cost[who].mean():.3f} nats a token")
saved = (cost["before"].mean() - cost["after"].mean()).item()
lesson.true("this answer became cheaper, too", saved > 0)

# %% cellView="form" id="where-figure" tags=["figure"]
# @title Figure: one answer, token by token { display-mode: "form" }
fig, ax = plots.figure(8.5, 3)
words = [piece(tokenizer, i) for i in wanted[at].tolist()]
places = torch.arange(len(words))
style = {"color": plots.SKY, "hatch": "//", "edgecolor": "white"}
ax.bar(places - 0.2, cost["before"], 0.4, label="before", **style)
ax.bar(places + 0.2, cost["after"], 0.4, color=plots.BLUE, label="after")
ax.set_xticks(places, words, rotation=45, ha="right", fontsize=8, parse_math=False)
dearest = words[int(cost["after"].argmax())]
title = f"After training, '{dearest}' costs most"
ax.set_ylim(0, 1.3 * float(max(cost["before"].max(), cost["after"].max())))
ax.grid(axis="x", visible=False)
plots.label(ax, title.replace("$", ""), "token of the answer", "nats", legend=True)
means = f"{cost['before'].mean():.2f} to {cost['after'].mean():.2f} nats a token"
alt = f"Cost of each token of one held-out answer: from {means} on average; after training "
plots.show(fig, alt + f"'{dearest}' costs most.")

# %% [markdown] id="chat-text"
# **Talk to it.** Type, and press Enter. It remembers the conversation: each answer is written from all that was said. Ask what it learned, then something else.
#
# **✎ Exercise**: ask *What comes after 1000?* or *What is 50 plus 3?* No such number was in its questions. Is it right? And what does that tell about what was learned?
#
# <details><summary>Solution</summary>Mostly wrong, and in the right form: in one trial *50 plus 3 is 30*. Of 200 held-out questions it then had 58 of 70 comparisons right, 41 of 52 next
# numbers, and 8 of 78 sums. A few hundred steps teach a form and cases near those seen, not arithmetic.
# The form is cheap to learn; knowledge comes from what the base model read.</details>

# %% id="chat" tags=["widget"]
dialogue = conversation(tuned)
you, page = widgets.text("you", questions[0]), ipywidgets.HTML()


def send(_change=None):
    """Ask what stands in the field, and show the answer while it is written."""
    try:
        for _ in dialogue.stream(dialogue.ask(you.value), options):
            said = (f"<b>{m['role']}</b>: {escape(m['content'])}" for m in dialogue.messages)
            page.value = f'<div style="background:#fff;color:#000">{"<br>".join(said)}</div>'
    except UserError as reason:  # a message that does not fit the context
        page.value = escape(str(reason))


send()
you.observe(send, names="value")
said = "\n".join(f"{m['role']}: {m['content']}" for m in dialogue.messages)
plots.show_html(page.value, said, ipywidgets.VBox([you, page]))

# %% [markdown] id="export-text"
# ## 7 · Take it along
#
# The export carries the template: in `tokenizer_config.json` for transformers, inside the GGUF for llama.cpp, and translated in the `Modelfile` for Ollama. Which line
# of the recipe makes the answer stop?

# %% id="export" tags=["lesson"]
out = Path(place.output_dir) / "export-answers"
try:
    export(result.checkpoint, out, gguf="q8_0")
except UserError as reason:
    print(f"{reason}.\nSo: without GGUF.")
    export(result.checkpoint, out)
recipe = (out / "Modelfile").read_text(encoding="utf-8")
print(f"{', '.join(sorted(path.name for path in out.iterdir()))}\n\n{recipe}")
print(f"cd {out}\nollama create my-model -f Modelfile")
print(f'ollama run my-model "{questions[0]}"')

# %% id="export-check" tags=["check"]
end = names["eos_token"]
lesson.true("Ollama stops where the model does", f'PARAMETER stop "{end}"' in recipe)
lesson.true("the template goes along", chat_template(out) == template)
copy, its_tokenizer = load_model_and_tokenizer(out, device=device)
dialogue = Conversation(copy, its_tokenizer, out, chat=True)  # all from the exported folder
said = "".join(dialogue.stream(dialogue.ask(questions[0]), options)).strip()
lesson.true("and the copy gives the same answer", said == answer(tuned, questions[0]))

# %% [markdown] id="self-test"
# ## What you can now explain
#
# * What does a chat template do, and why must training and use share it?
# * Why does the loss leave out the question, and why must it count the token that ends the answer?
# * Why is the loss a mean over the answers' tokens of the whole batch, not a mean of each row's mean?
# * What did the model learn in these minutes, and what did it not?
#
# <details><summary>Answers</summary>
#
# * It writes messages as one text with marks for whose turn it is. A model that learned one form reads another as noise.
# * The user writes the question. The end token is how the model hands over: without it, it never stops.
# * Rows hold different numbers of answer tokens. A mean of means would let a token of a short answer weigh more than one of a long answer.
# * The form: whose turn, how an answer begins and ends. Knowledge came from the base model's reading, and little is added.
# </details>

# %% id="score" tags=["check"]
lesson.score()

# %% [markdown] id="next"
# ## Next
#
# You built it, counted it, fed it, trained it, looked inside, measured it, and made it answer. What next?
# * **Conversations of yours.** A few hundred good ones change more than ten thousand poor ones. Section 4 takes the file.
# * **More of the base.** What it knows, it read before: a longer run on more text (notebook 6, *Where to go next*), then this notebook again.
# * **Better and worse answers.** The Instruct model then learned from pairs of answers, one preferred ([DPO](https://arxiv.org/abs/2305.18290)): the next thing to write by hand.
# * **Back to the beginning.** [1 · Build the model](01_build_the_model.ipynb)
#   ([open in Colab](https://colab.research.google.com/github/smollm2-from-scratch/smollm2-from-scratch/blob/main/notebooks/01_build_the_model.ipynb)), and change something: the checks will tell you what you did.
