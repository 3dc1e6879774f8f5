"""Sampling with a KV cache: from logits to tokens, from tokens to text.

It takes any model with `new_cache` and `next_logits`: `SmolLM2`, or a `FastDecoder` of it. The filters come
in transformers' order: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .config import SamplingOptions
from .errors import UserError

SORTED_TOKENS = (
    1024  # nearly always enough for top-p; sorting all 49,152 takes as long as a small model's step
)


def next_token_probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """Distribution that is sampled from: (..., V) logits -> (..., V) probabilities, fp32.

    `top_k` keeps the k likeliest tokens, `top_p` the smallest set whose probability reaches p (Holtzman et
    al. 2020), `min_p` those at least min_p times as likely as the best. The likeliest token is always kept.
    """
    logits = logits.float()
    # the best logit becomes 0 first, so that no temperature, however small, can overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1.0:
        probabilities = logits.softmax(-1)
        for few in (SORTED_TOKENS, logits.shape[-1]):
            ordered, order = probabilities.topk(min(few, logits.shape[-1]))
            before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens
            if bool((before[..., -1] >= top_p).all()):
                break
        kept = before < top_p
        kept[..., 0] = True
        logits = logits.masked_fill(
            ~torch.zeros_like(logits, dtype=bool).scatter(-1, order, kept), -torch.inf
        )
    if min_p is not None and min_p > 0.0:
        probabilities = logits.softmax(-1)
        best = probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill((probabilities < min_p * best) & (probabilities < best), -torch.inf)
    return logits.softmax(-1)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One token of each row: (B, V) -> (B,). On a CPU where a random height meets the summed probabilities:
    `torch.multinomial` draws a number for every token there, 1.1 ms for 49,152."""
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    summed = probabilities.double().cumsum(-1)
    share = torch.rand(len(summed), 1, generator=generator, dtype=torch.float64, device="cpu")
    return torch.searchsorted(summed, share * summed[:, -1:], right=True).squeeze(1)


@torch.inference_mode()
def stream(
    model, input_ids: torch.Tensor, max_new_tokens: int = 64, stop_ids=None, use_cache: bool = True, **options
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (tokens (B,), logits (B, V)) one position at a time, until every row has produced a stop token.

    `options` are those of `SamplingOptions`; `stop_ids` defaults to all that end the model's texts. When the
    context is full, the older half of it is forgotten. Raises ValueError for options out of range.
    """
    asked = SamplingOptions(max_new_tokens=max_new_tokens, **options)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, time), time >= 1")
    filters = asked.model_dump(include={"temperature", "top_k", "top_p", "min_p"})
    config, device = model.config, model.device
    stop_ids = model.end_ids if stop_ids is None else stop_ids
    stops = torch.tensor(stop_ids, dtype=torch.long, device=device)
    generator = torch.Generator(device=device)
    generator.manual_seed(asked.seed) if asked.seed is not None else generator.seed()
    context = config.max_position_embeddings
    ids, cache = input_ids.to(device), None
    finished = torch.zeros(len(ids), dtype=torch.bool, device=device)
    for _ in range(asked.max_new_tokens):
        if ids.shape[1] > context:
            ids, cache = ids[:, -max(context // 2, 1) :], None
        fresh = ids if cache is None else ids[:, -1:]
        if use_cache and cache is None:
            cache = model.new_cache(len(ids), min(context, ids.shape[1] + asked.max_new_tokens))
        logits = model.next_logits(fresh, cache)
        if asked.temperature == 0.0:
            tokens = logits.argmax(-1)
        else:
            probabilities = next_token_probabilities(logits, **filters)
            tokens = draw(probabilities, generator)
        if stop_ids:
            tokens = torch.where(finished, stops[0], tokens)  # a finished row repeats the stop token
            finished |= torch.isin(tokens, stops)
        yield tokens, logits
        if stop_ids and bool(finished.all()):
            return
        ids = torch.cat((ids, tokens.unsqueeze(1)), dim=1)


def generate(model, input_ids: torch.Tensor, max_new_tokens: int = 64, **options) -> torch.Tensor:
    """Continue (B, T) int64 ids; returns (B, T + new) int64, prompt included. Options as in `stream`."""
    tokens = [tokens.unsqueeze(1) for tokens, _ in stream(model, input_ids, max_new_tokens, **options)]
    return torch.cat([input_ids.to(model.device), *tokens], dim=1)


# --- text ---------------------------------------------------------------------------------------------------


class StreamDecoder:
    """Turns token ids into text piece by piece; holds back bytes that are not yet a whole character.

    `before` are the ids that the new ones continue: the pieces join to what decoding all of them gives, less
    what `before` alone gives (a Metaspace tokenizer drops the blank in front of the first token it decodes).
    tokenizers' `DecodeStream` says a prompt again that ends in U+FFFD, and raises where stray bytes meet byte
    fallback.
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()):
        self.tokenizer, self.ids, self.read = tokenizer, list(before), len(before)
        self.shown = self._text()

    def _text(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Text that became complete with this token (perhaps empty)."""
        self.ids.append(token_id)
        text = self._text()
        if len(text) <= len(self.shown) or text.endswith("\ufffd"):  # it ends inside a character
            return ""
        fresh = text[len(self.shown) :]
        self.ids = self.ids[self.read :]  # from the last whole character on: decoding stays O(1) a token
        self.read, self.shown = len(self.ids), self._text()
        return fresh

    def flush(self) -> str:
        """What was held back, as replacement characters."""
        return self._text()[len(self.shown) :]


def document_ids(model, tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt of any length, behind what begins a document (`Tokenizer.begin_ids`)."""
    ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
    if not ids and model.config.bos_token_id is None:
        raise UserError("an empty prompt, and the model has no begin-of-text token")
    return ids or [model.config.bos_token_id]


def prompt_ids(model, tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; raises `UserError` where they leave no room in the context."""
    ids, limit = document_ids(model, tokenizer, prompt), model.config.max_position_embeddings
    if len(ids) >= limit:
        found = f"the prompt has {len(ids):,} tokens, the model's context is {limit:,}"
        raise UserError(f"{found}; shorten the prompt")
    return ids


def stream_continuation(
    model, tokenizer, ids: list[int], max_new_tokens: int = 128, stop_ids=None, **options
) -> Iterator[str]:
    """Continuation of token ids as text, piece by piece, up to (and without) a stop token."""
    ends = model.end_ids if stop_ids is None else stop_ids
    decoder = StreamDecoder(tokenizer, before=ids)
    for tokens, _ in stream(
        model, torch.tensor([ids], device=model.device), max_new_tokens, stop_ids, **options
    ):
        if int(tokens) in ends:
            break
        yield decoder.push(int(tokens))
    yield decoder.flush()


def stream_text(model, tokenizer, prompt: str, max_new_tokens: int = 128, **options) -> Iterator[str]:
    """Continuation of a prompt as text, piece by piece. An empty prompt starts a new document."""
    ids = prompt_ids(model, tokenizer, prompt)
    yield from stream_continuation(model, tokenizer, ids, max_new_tokens, **options)


def complete(model, tokenizer, prompt: str, max_new_tokens: int = 128, **options) -> str:
    """Continuation of a prompt as one string (the prompt not included)."""
    return "".join(stream_text(model, tokenizer, prompt, max_new_tokens, **options))
