"""Conversations to learn from: messages -> tokens of which only the answers are learned.

`--chat_file` names a .jsonl with {"messages": [{"role": ..., "content": ...}, ...]} in each line, or a text
in the form of input.txt, whose pieces become questions and answers. A token that is read but not learned is
kept as ~id, a negative number: `loss.inputs_and_targets` makes -100 of it, which the loss leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from .conversation import chat_template, render_chat, special_tokens, tokenizer_config
from .data import FORMAT, TokenData, TokenFile
from .errors import DataError
from .files import sha256_json
from .text import documents, read_text, source_identity
from .tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# for a tokenizer that has no tokens for turns, as one that was trained here
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}"
    "{{ eos_token }}{% else %}Question: {{ message['content'] }}\nAnswer: {% endif %}{% endfor %}"
)
ROLES = ("system", "user", "assistant")


def default_template(tokenizer: Tokenizer) -> tuple[str, int]:
    """(chat template, id that ends an answer) for a model that has none yet: ChatML where the vocabulary
    knows it, as SmolLM2's does, else plain words. Raises `DataError` where nothing can end an answer."""
    end = tokenizer.token_id("<|im_end|>")
    if end is not None and tokenizer.is_special(end):
        return CHATML, end
    if tokenizer.end_of_text_id is None:
        raise DataError(
            "--chat_file: the tokenizer has neither <|im_end|> nor <|endoftext|> to end an answer"
        )
    return PLAIN, tokenizer.end_of_text_id


def read_conversations(path: str | Path, left_out: list[str] | None = None) -> Iterator[list[dict]]:
    """The messages of each conversation; raises `DataError` that names file and line. `left_out` gets the
    pieces of a text that are none."""
    if Path(path).suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        yield from _pairs(path, [] if left_out is None else left_out)
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _messages(line, f"--chat_file {path}, line {number}")


def _lines(path: str | Path) -> Iterator[str]:
    rest = ""
    for text in read_text(path):
        *whole, rest = (rest + text).split("\n")
        yield from whole
    yield rest


def _messages(line: str, where: str) -> list[dict]:
    try:
        messages = json.loads(line)["messages"]
        found = [{"role": said["role"], "content": said["content"]} for said in messages]
        calls_a_tool = any(said.get("tool_calls") for said in messages)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        form = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
        raise DataError(f"{where}: {line[:60]!r}; expected {form}") from None
    if calls_a_tool:
        raise DataError(f"{where}: tool_calls, which are not learned; expected roles and texts alone")
    for said in found:
        if said["role"] not in ROLES or not isinstance(said["content"], str):
            raise DataError(f"{where}: {str(said)[:80]}; expected a role of {', '.join(ROLES)} and a text")
        said["content"] = said["content"].encode(errors="replace").decode()  # half a surrogate pair is none
    if not any(said["role"] == "assistant" for said in found):
        raise DataError(f"{where}: nobody answers; expected a message with role assistant")
    return found


def _pairs(path: str | Path, left_out: list[str]) -> Iterator[list[dict]]:
    """A piece is a title, a blank line and the text: what asks for it, and the text."""
    pieces: list[str] = []
    for piece, is_end in chain(documents(read_text(path)), [("", True)]):  # the last may lack its end
        pieces.append(piece)
        if not is_end:
            continue
        piece, pieces = "".join(pieces).strip("\n"), []
        title, _, text = piece.partition("\n\n")
        if text.strip() and "\n" not in title:
            explains = title.split(" ")[0] in ("How", "Why", "What", "Where", "When")
            ask = f"Explain: {title}" if explains else f"Tell me the story called {title}"
            yield [{"role": "user", "content": ask}, {"role": "assistant", "content": text.strip()}]
        elif piece.strip():
            left_out.append(piece)


def encode_conversation(
    tokenizer: Tokenizer, messages: list[dict], template: str, special_tokens: dict[str, str]
) -> tuple[np.ndarray, int]:
    """(token ids (count,) int32 with ~id for what is not learned, UTF-8 bytes of the answers).

    An answer is tokenised apart from what stands before it, as when the model writes it; what follows its end
    token (a line break in ChatML) is not learned.
    """
    ids: list[int] = []
    done, answer_bytes = "", 0
    for number, said in enumerate(messages):
        if said["role"] != "assistant":
            continue
        before = render_chat(template, messages[:number], special_tokens)
        after = render_chat(template, messages[: number + 1], special_tokens, asks_for_answer=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                "--chat_file: the chat template rewrites earlier turns: it cannot be learned from"
            )
        answer = tokenizer.encode(after[len(before) :])
        ends = [place for place, token in enumerate(answer) if tokenizer.is_special(token)]
        learned = ends[-1] + 1 if ends else len(answer)
        ids += [~token for token in tokenizer.encode(before[len(done) :])]
        ids += answer[:learned] + [~token for token in answer[learned:]]
        done, answer_bytes = after, answer_bytes + len(said["content"].encode())
    return np.array(ids, dtype=np.int32), answer_bytes


@dataclass(frozen=True)
class ChatFile:
    """The text of `--chat_file`, with what `data.InputFile` has, too. `model_folder`: the checkpoint or base
    model whose chat template goes on."""

    name: str
    held_out: float
    model_folder: Path | None

    def template_and_end(self, tokenizer: Tokenizer, own_end: int | None = None) -> tuple[str, int]:
        """(chat template, id that ends an answer)."""
        own = self.model_folder and chat_template(self.model_folder)
        if not own:
            return default_template(tokenizer)
        # what the template writes there: a base model may carry one beside another end of its documents
        end = default_template(tokenizer)[1] if own_end is None else own_end
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        said = render_chat(own, talk, self.special_tokens(tokenizer, end), asks_for_answer=False)
        ends = [token for token in tokenizer.encode(said) if tokenizer.is_special(token)]
        return own, (ends or [end])[-1]

    def special_tokens(self, tokenizer: Tokenizer, end: int) -> dict[str, str]:
        """What the template may name, as when it answers: the folder's own, and what ends an answer."""
        own = special_tokens(tokenizer_config(self.model_folder)) if self.model_folder else {}
        return own | {"eos_token": tokenizer.token(end)}

    def training_texts(self, limit: int) -> Iterator[str]:
        """About `limit` characters of what is said, to train a tokenizer on."""
        conversations = list(read_conversations(self.name))
        for messages in conversations[: self._trained(len(conversations))]:
            yield (text := "\n".join(said["content"] for said in messages))
            limit -= len(text)
            if limit <= 0:
                return

    def _trained(self, count: int) -> int:
        return count - max(1, round(count * self.held_out))

    def prepare(self, tokenizer: Tokenizer, own_end: int | None, check, say) -> TokenData:
        """Tokens in memory, made anew at each start; the last conversations are held out."""
        template, end = self.template_and_end(tokenizer, own_end)
        key = {
            "format": FORMAT,
            "source": source_identity(self.name),
            "chat_template": template,
            "end_id": end,
        }
        identity = sha256_json(key | {"tokenizer": tokenizer.sha256, "held_out_fraction": self.held_out})
        check(identity)
        special, left_out = self.special_tokens(tokenizer, end), []
        encoded = [
            encode_conversation(tokenizer, messages, template, special)
            for messages in read_conversations(self.name, left_out)
        ]
        if left_out:
            want = "are left out for want of a title and a blank line"
            say(f"note: {len(left_out):,} pieces {want}: {left_out[0][:60]!r}")
        cut = self._trained(len(encoded))
        if cut < 1:
            raise DataError(f"--chat_file {self.name}: {len(encoded)} conversations; expected at least 2")
        train, val = (
            TokenFile(np.concatenate([ids for ids, _ in part]), sum(size for _, size in part))
            for part in (encoded[:cut], encoded[cut:])
        )
        learned = sum(int((part.tokens >= 0).sum()) for part in (train, val))
        say(f"chat: {len(encoded):,} conversations, {cut:,} to train on; {learned:,} tokens are answers")
        sidecar = {"chat_template": template, "special_tokens": special}
        return TokenData(train, val, identity, Path(self.name).parent, sidecar)
