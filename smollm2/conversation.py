"""Several turns with a model, in a terminal too: a text that grows, or an Instruct model's messages.

What a model folder says about that (template, special tokens, what ends a text) is read here. A chat template
is a small program from that folder: transformers' own renderer runs it in Jinja's sandbox, to the same text.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .config import SamplingOptions
from .errors import CheckpointError, UserError, is_terminal, tell
from .tokenizer import Tokenizer
from .weights import read_end_ids, read_table

# --- what the folder says -----------------------------------------------------------------------------------


def special_tokens(fields: dict) -> dict[str, str]:
    """{"eos_token": "<|im_end|>", ...} of a `tokenizer_config.json`, as a chat template reads them."""
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in fields.items()}
    return {key: value for key, value in named.items() if key.endswith("_token") and isinstance(value, str)}


def tokenizer_config(folder: Path) -> dict:
    """`tokenizer_config.json`; in a folder of the old kind, `special_tokens_map.json` counts first, as in
    transformers."""
    fields = read_table(folder / "tokenizer_config.json", optional=True)
    is_old = "added_tokens_decoder" not in fields
    return fields | (read_table(folder / "special_tokens_map.json", optional=True) if is_old else {})


def stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a text: those of the model's files, and the tokenizer's."""
    name = special_tokens(tokenizer_config(folder)).get("eos_token", "")
    own = tokenizer.token_id(utf8(name, f"{folder}: eos_token"))
    return tuple(i for i in dict.fromkeys([own, *read_end_ids(folder)]) if i is not None)


def chat_template(folder: Path) -> str | None:
    """The Jinja chat template of a model folder, or None; of several the one called "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():  # transformers 5 writes a file, 4 a field
        return utf8(file.read_text("utf-8", "surrogateescape"), str(file))
    template = tokenizer_config(folder).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in named}
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str | None):
        raise CheckpointError(f"{folder}: the chat template is {template!r:.60}; expected a text")
    return utf8(template, f"{folder}: the chat template") if template else None


def render_chat(
    template: str, messages: list[dict], special_tokens: dict | None = None, asks_for_answer: bool = True
) -> str:
    """The text a chat model reads for `messages` ({"role", "content"}), up to where its answer begins.

    Raises `CheckpointError` for a template that does not run.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # a second to import

    try:
        texts, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=asks_for_answer, **special_tokens or {}
        )
    except ImportError as error:  # of Jinja, which is too old
        raise UserError(f"a chat template cannot be run here: {error}") from None
    except Exception as error:  # a foreign program: it can fail in any way
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the folder's chat template does not run: {why}") from None
    return texts[0]


# --- what was said ------------------------------------------------------------------------------------------


class Conversation:
    """What was said so far. `ask` gives the ids to continue from, `stream` what the model writes.

    With `chat` it is messages in the folder's chat template (`UserError` where there is none), else one text.
    """

    def __init__(self, model, tokenizer: Tokenizer, folder: Path, chat: bool = False, room: int = 64):
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids(folder, tokenizer)
        self.template = chat_template(folder) if chat else None
        self.special_tokens = special_tokens(tokenizer_config(folder))
        if chat and self.template is None:
            raise UserError(f"--chat: {folder} has no chat template, expected an Instruct model")
        context = model.config.max_position_embeddings
        self.limit = max(context - room, context // 2)  # tokens; the rest is for the answer
        self.clear()

    def clear(self) -> None:
        self.messages, self.forgotten = [], False

    def _ids(self, messages: list[dict]) -> list[int]:
        if self.template is None:
            from .sampling import document_ids  # with PyTorch: the first words are said before

            return document_ids(self.model, self.tokenizer, "".join(said["content"] for said in messages))
        if ids := self.tokenizer.encode(render_chat(self.template, messages, self.special_tokens)):
            return ids
        raise UserError("--chat: the folder's chat template writes nothing")

    def ask(self, line: str) -> list[int]:
        """Ids of everything so far and `line`. What does not fit the context is forgotten, oldest first."""
        if self.template is None and self.messages and line:
            line = "\n" + line
        messages = [*self.messages, {"role": "user", "content": line}]
        ids = self._ids(messages)
        self.forgotten = len(ids) > self.limit
        while self.template is not None and len(ids) > self.limit:
            if len(messages) < 3:
                raise UserError(f"the message has {len(ids):,} tokens, {self.limit:,} fit; shorten it")
            messages = messages[2:]  # without the oldest question and its answer
            ids = self._ids(messages)
        self.messages = messages
        return ids[-self.limit :]

    def stream(self, ids: list[int], options: SamplingOptions) -> Iterator[str]:
        """The answer to `ask`'s ids, piece by piece; what was written of it is kept, also where it stops."""
        from .sampling import stream_continuation

        said = {"role": "assistant", "content": ""}
        self.messages.append(said)
        settings = options.model_dump() | {"stop_ids": self.stop_ids}
        for piece in stream_continuation(self.model, self.tokenizer, ids, **settings):
            said["content"] += piece
            yield piece


# --- in a terminal ------------------------------------------------------------------------------------------


def utf8(text: str, where: str) -> str:
    """`text` as it is; raises `UserError` where what it came from held bytes that are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def standard_input() -> TextIO:
    """Standard input, with bytes that are not UTF-8 left for `utf8`; raises `UserError` where closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("standard input is closed: pass the text with --prompt")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def read_prompt() -> str:
    """Standard input up to its end, without the line break that a shell adds."""
    if is_terminal(standard_input()):
        tell("type the text to continue, then Ctrl-D:")
    return utf8(sys.stdin.read(), "standard input").removesuffix("\n")


def talk(conversation: Conversation, first: str | None, options: SamplingOptions) -> int:
    """Turn by turn until Ctrl-D. Ctrl-C stops an answer; at the prompt it leaves."""
    standard_input()
    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    # in a chat an empty line is a message like any other
    go_on = "Empty line: go on. " if conversation.template is None else ""
    tell(f"{go_on}/new: forget all. Ctrl-C: stop an answer. Ctrl-D: leave.")
    while True:
        try:
            line = first if first is not None else utf8(input("> "), "standard input")
        except EOFError:
            print(flush=True)
            return 0
        first = None
        if line.strip() == "/new":
            conversation.clear()
            continue
        try:
            ids = conversation.ask(line)
            if conversation.forgotten:
                tell("(the context is full: the oldest part is forgotten)")
            for piece in conversation.stream(ids, options):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except UserError as error:
            tell(error)
            continue
        print(flush=True)
        options = options.next_seed()  # the next answer draws anew, yet the whole talk repeats
