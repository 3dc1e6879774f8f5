"""Text <-> token ids.

Three sources, one class: the real SmolLM2 tokenizer from the Hub, a local `tokenizer.json`, or a byte-level BPE
trained on the training split. Always loaded through `tokenizers`: transformers 5's AutoTokenizer drops the digit
split of SmolLM2's file and gives other ids for "\\n\\n1." without a word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from .errors import DataError, UserError
from .files import kind_of, sha256_bytes, write_durably

END_OF_TEXT = "<|endoftext|>"
SMOLLM2_TOKENIZER = "HuggingFaceTB/SmolLM2-135M"
MAX_TOKENIZER_BYTES = 64 * 2**20
LONGEST_WORD = 512  # characters, in training: the trainer's time grows with the square of a word, and its loop hears no Ctrl-C
_LONG_RUN = re.compile(
    "|".join(f"(?<!{kind}){kind}{{{LONGEST_WORD + 1},}}" for kind in (r"\s", r"[^\W\d_]", r"(?:_|[^\w\s])"))
)


class Tokenizer:
    """A `tokenizers` tokenizer with the exact bytes of its file, so that copies of it are byte for byte the same."""

    def __init__(self, raw: bytes, where: str = "tokenizer.json"):
        try:
            self._tokenizer = _Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise DataError(f"{where}: not a tokenizer.json: {str(error)[:120]}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.raw = raw
        self.sha256 = sha256_bytes(raw)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a `tokenizer.json` or a folder that holds one; raises `DataError`."""
        path = Path(path)
        file = path / "tokenizer.json" if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise DataError(f"tokenizer {file}: {kind_of(file)}; expected a tokenizer.json")
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise DataError(
                f"tokenizer {file}: {file.stat().st_size:,} bytes; expected at most {MAX_TOKENIZER_BYTES:,}"
            )
        return cls(file.read_bytes(), str(file))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with SmolLM2's pre-tokenisation (single digits, then GPT-2's pattern).

        All 256 bytes are in the vocabulary, so every text can be encoded and comes back unchanged.
        """
        tokenizer = _Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_without_long_runs(texts), trainer)
        return cls(tokenizer.to_str(pretty=False).encode(), "trained tokenizer")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def end_of_text_id(self) -> int | None:
        """Id of `<|endoftext|>`, or None when the vocabulary has no such entry."""
        return self._tokenizer.token_to_id(END_OF_TEXT)

    @cached_property
    def begin_ids(self) -> list[int]:
        """What stands before a document: what the file's own post-processor puts there, else `<|endoftext|>` where it is an entry."""
        framed = self._tokenizer.encode("a")
        added = takewhile(lambda pair: pair[1], zip(framed.ids, framed.special_tokens_mask, strict=True))
        return [i for i, _ in added] or ([] if self.end_of_text_id is None else [self.end_of_text_id])

    def end_id(self, own: int | None) -> int | None:
        """Id that ends a document: `<|endoftext|>`, else `own`, the model's end token, where it is a special entry other than the unknown one."""
        if self.end_of_text_id is not None or own is None or not self.is_special(own):
            return self.end_of_text_id
        return None if self.token(own) == getattr(self._tokenizer.model, "unk_token", None) else own

    def not_kept(self, texts: Iterable[str]) -> tuple[float, str]:
        """Share of a text's UTF-8 bytes whose characters do not come back from the ids (unknown, dropped or replaced), and it in words."""
        tried: set[str] = set()
        lost: dict[str, int] = {}
        total = 0
        for text in texts:
            total += len(text.encode())
            for character in sorted(set(text) - tried):  # between two others, for the ends may be stripped
                if character not in self.decode(self.encode(f"a{character}a"), skip_special_tokens=True):
                    lost[character] = 0
            tried |= set(text)
            for character in lost:
                lost[character] += text.count(character) * len(character.encode())
        share, most = (
            sum(lost.values()) / max(total, 1),
            "".join(sorted(lost, key=lost.get, reverse=True)[:12]),
        )
        return (
            share,
            f"{100 * share:.2g} % of the bytes are characters that do not come back from the tokenizer ({most!r})"
            if lost
            else "",
        )

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        # the library's own skipping misses special tokens that its normaliser marks, as Llama's does
        ids = [int(i) for i in ids if not (skip_special_tokens and self.is_special(int(i)))]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    @cached_property
    def _added(self) -> dict:
        return self._tokenizer.get_added_tokens_decoder()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._added and self._added[token_id].special

    def token(self, token_id: int) -> str | None:
        """The entry's name; of an added token its exact content, which `id_to_token` gives with the normaliser's marks."""
        added = self._added.get(int(token_id))
        return added.content if added else self._tokenizer.id_to_token(int(token_id))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def files(self, max_length: int) -> dict[str, bytes]:
        """`tokenizer.json` byte for byte, and a `tokenizer_config.json` that every transformers reads alike."""
        config = {"clean_up_tokenization_spaces": False, "model_max_length": max_length}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.end_of_text_id is not None:
            config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
        return {
            "tokenizer.json": self.raw,
            "tokenizer_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        }

    def save(self, folder: str | Path, max_length: int) -> None:
        for name, data in self.files(max_length).items():
            write_durably(Path(folder) / name, data)


def _without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with runs of one kind of character (one word to the trainer) cut at every `LONGEST_WORD`-th."""
    for text in texts:
        done = 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                yield text[done:cut]
                done = cut
        yield text[done:]


def load_tokenizer(spec: str) -> tuple[Tokenizer, str]:
    """The tokenizer of `--tokenizer PATH` or `--tokenizer HUB_ID`, and one line that says where it came from."""
    if os.path.exists(spec) or spec.endswith(".json"):  # unlike Path.exists it never raises
        return Tokenizer.from_file(spec), f"from {spec}, as asked"
    from .hub import fetch

    return Tokenizer.from_file(fetch(spec, "tokenizer.json")), f"{spec} from the Hub, as asked"


def choose_tokenizer(
    spec: str, vocab_size: int, train_size: int | None, training_texts, say: Callable[[str], None] = print
) -> tuple[Tokenizer, str]:
    """`auto`, a Hub id or a path -> (tokenizer, reason).

    `auto` trains a BPE of `train_size` entries where the preset asks for one; otherwise it takes the real SmolLM2
    tokenizer, and where the Hub is out of reach it trains one of `vocab_size` entries and says so.
    `training_texts()` must iterate over the training split only.
    """

    def train(size: int) -> Tokenizer:
        say(f"training a tokenizer of {size:,} entries ...")
        return Tokenizer.train(training_texts(), size)

    if spec != "auto":
        tokenizer, reason = load_tokenizer(spec)
    elif train_size:
        tokenizer = train(min(train_size, vocab_size))
        reason = f"byte-level BPE of {tokenizer.vocab_size:,} entries trained on the training split (the preset's choice)"
    else:
        try:
            tokenizer, reason = load_tokenizer(SMOLLM2_TOKENIZER)
            reason = (
                f"SmolLM2's own, {tokenizer.vocab_size:,} entries, from the Hub (default for this vocabulary)"
            )
        except UserError as error:
            tokenizer = train(vocab_size)
            reason = (
                f"byte-level BPE of {tokenizer.vocab_size:,} entries trained on the training split, because SmolLM2's own "
                f"cannot be fetched ({error}); pass --tokenizer PATH to use the real one"
            )
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer has {tokenizer.vocab_size:,} entries but model.vocab_size is {vocab_size:,}: "
            f"set model.vocab_size={tokenizer.vocab_size} or choose another tokenizer"
        )
    return tokenizer, reason
