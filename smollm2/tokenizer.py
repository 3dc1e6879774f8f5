"""Text <-> token ids.

Three sources, one class: the real SmolLM2 tokenizer from the Hub, a local `tokenizer.json`, or a byte-level
BPE trained on the training split. Always loaded through `tokenizers`: transformers 5's AutoTokenizer drops
the digit split of SmolLM2's file and gives other ids for "\\n\\n1." without a word.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from . import hub
from .errors import DataError
from .files import kind_of, sha256_bytes, write_durably
from .text import END_OF_TEXT

SMOLLM2_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
# Characters, in training: the trainer's time grows with the square of a word, and it hears no Ctrl-C.
LONGEST_WORD = 512
_LONG_RUN = re.compile(  # of one kind of character, which is one word to the trainer
    "|".join(f"(?<!{kind}){kind}{{{LONGEST_WORD + 1},}}" for kind in (r"\s", r"[^\W\d_]", r"(?:_|[^\w\s])"))
)


class Tokenizer:
    """A `tokenizers` tokenizer with the exact bytes of its file, so that copies are equal byte for byte."""

    def __init__(self, raw: bytes, where: str = "tokenizer.json"):
        try:
            self._tokenizer = _Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise DataError(f"{where}: not a tokenizer.json: {str(error)[:120]}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.raw = raw
        self.sha256 = sha256_bytes(raw)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a `tokenizer.json` or a folder that holds one; raises `DataError`."""
        file = Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)
        if not os.path.isfile(file):
            raise DataError(f"tokenizer {file}: {kind_of(file)}; expected a tokenizer.json")
        return cls(file.read_bytes(), str(file))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with SmolLM2's pre-tokenisation (single digits, then GPT-2's pattern).

        All 256 bytes are in the vocabulary, so every text can be encoded and comes back unchanged.
        """
        tokenizer = _Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        tokenizer.decoder = decoders.ByteLevel()
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator(_without_long_runs(texts), trainer)
        return cls(tokenizer.to_str(pretty=False).encode(), "trained tokenizer")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id: the ids of a file may begin at 1, or leave some out."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    # --- special tokens

    def is_special(self, token_id: int) -> bool:
        return token_id in self._added and self._added[token_id].special

    def token(self, token_id: int) -> str | None:
        """The entry's name; of an added token its content: `id_to_token` adds the normaliser's marks."""
        added = self._added.get(int(token_id))
        return added.content if added else self._tokenizer.id_to_token(int(token_id))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    @property
    def end_of_text_id(self) -> int | None:
        """Id of `<|endoftext|>`, or None when the vocabulary has no such entry."""
        return self.token_id(END_OF_TEXT)

    def end_id(self, own: int | None = None) -> int | None:
        """Id that ends a document, in training and everywhere: `own`, the model's end token, where that is a
        special entry other than the unknown one; else `<|endoftext|>`, if there is such an entry."""
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if own is not None and self.is_special(own) and self.token(own) != unknown:
            return own
        return self.end_of_text_id

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the file's own post-processor puts before a text, and behind it (the last one first)."""
        framed = self._tokenizer.encode("a")
        pairs = [*zip(framed.ids, framed.special_tokens_mask, strict=True)]
        before, behind = ([i for i, _ in takewhile(lambda p: p[1], side)] for side in (pairs, pairs[::-1]))
        return before, behind

    @property
    def begin_ids(self) -> list[int]:
        """What stands before a document: what the file's own post-processor puts there, else `<|endoftext|>`,
        if there is such an entry."""
        return self.around[0] or ([] if self.end_of_text_id is None else [self.end_of_text_id])

    # --- text and ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        # the library's own skipping misses special tokens that its normaliser marks, as Llama's does
        ids = [int(i) for i in ids if not (skip_special_tokens and self.is_special(int(i)))]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def not_kept(self, texts: Iterable[str]) -> tuple[float, str]:
        """Share of a text's UTF-8 bytes whose characters do not come back from the ids (unknown, dropped or
        replaced), and it in words."""
        kept: set[str] = set()
        lost: Counter[str] = Counter()  # bytes of each such character
        total = 0
        for text in texts:
            total += len(text.encode())
            for character in sorted(set(text) - kept):  # between two others, for the ends may be stripped
                if character in self.decode(self.encode(f"a{character}a"), skip_special_tokens=True):
                    kept.add(character)
                else:
                    lost[character] += text.count(character) * len(character.encode())
        share = lost.total() / max(total, 1)
        most = "".join(character for character, _ in lost.most_common(12))
        words = f"{100 * share:.2g} % of the bytes are characters that do not come back from the tokenizer"
        return share, f"{words} ({most!r})" if lost else ""

    # --- files

    def files(
        self, max_length: int, bos_id=None, eos_id=None, pad_id=None, named: dict[str, str] | None = None
    ) -> dict[str, bytes]:
        """`tokenizer.json` byte for byte, and a `tokenizer_config.json` that every transformers reads alike,
        as {name: bytes}. The ids are the model's; without them, what begins and ends a document here.
        `named`: {"eos_token": "<|im_end|>", ...} of the folder it came from; entries among them come first.
        """
        begin = bos_id if bos_id is not None else next(iter(self.begin_ids), None)
        end = eos_id if eos_id is not None else self.end_id()
        roles = {"bos_token": begin, "eos_token": end, "unk_token": self.end_of_text_id}
        roles["pad_token"] = pad_id
        tokens = {role: self.token(i) for role, i in roles.items() if i is not None} | (named or {})
        config = {role: token for role, token in tokens.items() if token and self.token_id(token) is not None}
        config |= {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        raw = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
        return {"tokenizer.json": self.raw, "tokenizer_config.json": raw}

    def save(self, folder: str | Path, max_length: int) -> None:
        for name, data in self.files(max_length).items():
            write_durably(Path(folder) / name, data)


def _without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with runs of one kind of character cut at every `LONGEST_WORD`-th."""
    for text in texts:
        done = 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                yield text[done:cut]
                done = cut
        yield text[done:]


def load_tokenizer(spec: str) -> tuple[Tokenizer, str]:
    """The tokenizer of `--tokenizer PATH` or `--tokenizer HUB_ID`, and a line that says where it is from."""
    if os.path.exists(spec) or spec.endswith(".json"):  # unlike Path.exists it never raises
        return Tokenizer.from_file(spec), f"from {spec}, as asked"
    return Tokenizer.from_file(hub.fetch(spec, "tokenizer.json")), f"{spec} from the Hub, as asked"


def choose_tokenizer(
    spec: str, vocab_size: int, train_size: int | None, training_texts, say: Callable[[str], None] = print
) -> tuple[Tokenizer, str]:
    """`auto`, a Hub id or a path -> (tokenizer, reason).

    `auto` trains a BPE of `train_size` entries where the preset asks for one; otherwise it takes the real
    SmolLM2 tokenizer, and where the Hub is out of reach it trains one of `vocab_size` entries and says so.
    `training_texts()` must iterate over the training split only.
    """
    why, size = "the preset's choice", train_size
    if spec != "auto":
        tokenizer, reason = load_tokenizer(spec)
    elif not train_size:
        try:
            tokenizer, _ = load_tokenizer(SMOLLM2_TOKENIZER)
            entries = f"{tokenizer.vocab_size:,} entries"
            reason = f"SmolLM2's own, {entries}, from the Hub (default for this preset)"
        except hub.HubUnreachable as error:  # a Hub that refuses is no reason to train on other tokens
            why = f"SmolLM2's own cannot be fetched ({error}); pass --tokenizer PATH to use the real one"
            size = vocab_size
    if spec == "auto" and size:
        size = min(size, vocab_size)
        say(f"training a tokenizer of {size:,} entries ...")
        tokenizer = Tokenizer.train(training_texts(), size)
        reason = f"byte-level BPE of {tokenizer.vocab_size:,} entries trained on the training split ({why})"
    if (found := tokenizer.vocab_size) > vocab_size:
        wrong = f"tokenizer has {found:,} entries but model.vocab_size is {vocab_size:,}"
        raise DataError(f"{wrong}: set model.vocab_size={found} or choose another tokenizer")
    return tokenizer, reason
