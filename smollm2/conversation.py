"""Several turns with a model, in a terminal too: a text that grows, or messages in the chat template of an Instruct model.

A chat template is a small program from the model's folder, so it runs in Jinja's sandbox, with the settings that
transformers' `apply_chat_template` uses: the text is the same.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from .errors import CheckpointError, UserError
from .files import strict_json
from .model import SmolLM2
from .sampling import document_ids, stream_continuation
from .tokenizer import Tokenizer

END_OF_TURN = "<|im_end|>"


def chat_template(folder: Path) -> str | None:
    """The Jinja chat template of a model folder, or None. transformers 5 writes a file of its own, 4 a field."""
    own, fields = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text("utf-8")
    return strict_json(fields.read_bytes(), str(fields)).get("chat_template") if fields.is_file() else None


def render_chat(
    template: str, messages: list[dict[str, str]], special_tokens: dict[str, str] | None = None
) -> str:
    """The text a chat model reads for `messages` ({"role", "content"}), up to where its answer begins.

    Raises `CheckpointError` for a template that does not run.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **(special_tokens or {})
        )
    except Exception as error:  # a foreign program: it can fail in any way
        raise CheckpointError(f"the folder's chat template does not run: {str(error)[:200]}") from None


class Conversation:
    """What was said so far. `ask` gives the ids to continue from, `answer` keeps what the model wrote."""

    def __init__(self, model: SmolLM2, tokenizer: Tokenizer, template: str | None = None, room: int = 64):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.text, self.messages, self.forgotten = "", [], 0
        self.limit = max(
            model.config.max_position_embeddings - room, 2
        )  # tokens; the rest is left for the answer

    @classmethod
    def chat(cls, model: SmolLM2, tokenizer: Tokenizer, folder: Path, room: int = 64) -> Conversation:
        """A conversation in the chat template of a model folder; raises `UserError` where it has none."""
        template = chat_template(folder)
        if template is None:
            raise UserError(
                f"--chat: {folder} has no chat template, so it is a base model: leave --chat out, or take an -Instruct model"
            )
        return cls(model, tokenizer, template, room)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the model's end of text, and of a chat's turn."""
        turn = self.tokenizer.token_id(END_OF_TURN) if self.template else None
        return tuple(dict.fromkeys(i for i in (self.model.config.eos_token_id, turn) if i is not None))

    def ask(self, line: str) -> list[int]:
        """Ids of everything so far and `line`. What does not fit the context is forgotten, the oldest first."""
        if self.template is None:
            self.text += ("\n" if self.text and line else "") + line
            ids = document_ids(self.model, self.tokenizer, self.text)
            self.forgotten = max(len(ids) - self.limit, 0)
            return ids[-self.limit :]
        self.messages.append({"role": "user", "content": line})
        special = {
            f"{role}_token": self.tokenizer.token(i)
            for role in ("bos", "eos")
            if (i := getattr(self.model.config, f"{role}_token_id")) is not None
        }
        self.forgotten = 0
        while True:
            ids = self.tokenizer.encode(render_chat(self.template, self.messages, special))
            if len(ids) <= self.limit:
                return ids
            if len(self.messages) < 3:
                self.messages.pop()
                raise UserError(f"the message has {len(ids):,} tokens, {self.limit:,} fit; shorten it")
            del self.messages[:2]  # the oldest question and its answer
            self.forgotten += 2

    def answer(self, text: str) -> None:
        if self.template is None:
            self.text += text
        else:
            self.messages.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        self.text, self.messages = "", []


# --- in a terminal --------------------------------------------------------------------------------------------------


def utf8(text: str, where: str) -> str:
    """`text` as it is; raises `UserError` where the terminal or pipe it came from held bytes that are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


def read_prompt() -> str:
    """Standard input up to its end, without the line break that a shell adds."""
    if sys.stdin is None:
        raise UserError("no --prompt and no standard input to read it from")
    if sys.stdin.isatty():
        print("type the text to continue, then Ctrl-D:", file=sys.stderr)
    raw = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    return utf8(raw.decode("utf-8", "surrogateescape"), "standard input").removesuffix("\n")


def talk(conversation: Conversation, first: str | None, max_new_tokens: int, options: dict) -> int:
    """Turn by turn until Ctrl-D. Ctrl-C stops an answer; at the prompt it leaves."""
    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    print(
        "An empty line goes on, /new forgets everything, Ctrl-C stops an answer, Ctrl-D leaves.",
        file=sys.stderr,
    )
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
        pieces: list[str] = []
        try:
            ids = conversation.ask(line)
            if conversation.forgotten:
                print("(the context is full: the oldest part is forgotten)", file=sys.stderr)
            for piece in stream_continuation(
                conversation.model,
                conversation.tokenizer,
                ids,
                max_new_tokens,
                stop_ids=conversation.stop_ids,
                **options,
            ):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        print(flush=True)
        conversation.answer("".join(pieces))
        if options["seed"] is not None:
            options = options | {
                "seed": options["seed"] + 1
            }  # the next answer draws anew, yet the whole talk repeats
