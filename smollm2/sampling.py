"""Sampling with a KV cache: from logits to tokens, from tokens to text. It takes any model that has `new_cache`.

The filters are applied in transformers' order: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .errors import UserError
from .tokenizer import StreamDecoder


def next_token_probabilities(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> torch.Tensor:
    """Distribution that is sampled from: (..., V) logits -> (..., V) probabilities, fp32.

    `top_k` keeps the k likeliest tokens, `top_p` the smallest set whose probability reaches p (Holtzman et al. 2020),
    `min_p` those at least min_p times as likely as the best. The likeliest token is always kept.
    """
    logits = logits.float()
    # the best logit becomes 0 first, so that no temperature, however small, can overflow
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens
        drop = before >= top_p
        drop[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if min_p is not None and min_p > 0.0:
        probabilities = logits.softmax(-1)
        best = probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill((probabilities < min_p * best) & (probabilities < best), -torch.inf)
    return logits.softmax(-1)


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Raises ValueError for settings out of range (NaN included)."""
    rules = [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0.0 <= temperature <= 100.0, "between 0 (greedy) and 100"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "above 0 and at most 1"),
        ("min_p", min_p, min_p is None or 0.0 <= min_p <= 1.0, "between 0 and 1"),
    ]
    for name, value, is_valid, expected in rules:
        if not is_valid:
            raise ValueError(f"{name} is {value}; expected {expected}")


@torch.inference_mode()
def stream(
    model,
    input_ids: torch.Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
    use_cache: bool = True,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (tokens (B,), logits (B, V)) one position at a time, until every row has produced a stop token.

    `temperature=0` is greedy. `stop_ids` defaults to the model's end-of-text token. When the context is full, the
    older half of it is forgotten. `seed=None` draws a fresh one.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, min_p)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, time) with time >= 1"
        )
    config, device = model.config, model.device
    if stop_ids is None:
        stop_ids = () if config.eos_token_id is None else (config.eos_token_id,)
    generator = torch.Generator(device=device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    context = config.max_position_embeddings
    ids = input_ids.to(device)
    batch, cache, fresh = ids.shape[0], None, ids
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    stops = torch.tensor(stop_ids, dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        if ids.shape[1] > context:
            ids, cache = ids[:, -max(context // 2, 1) :], None
        if use_cache:
            if cache is None:
                capacity = min(context, ids.shape[1] + max_new_tokens)
                cache, fresh = model.new_cache(batch, capacity), ids
            hidden = model.model(fresh, cache)
        else:
            hidden = model.model(ids)
        logits = model.lm_head(hidden[:, -1]).float()
        if temperature == 0.0:
            tokens = logits.argmax(-1)
        else:
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p, min_p)
            tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        if stop_ids:
            tokens = torch.where(finished, stops[0], tokens)  # a finished row repeats the stop token
            finished |= torch.isin(tokens, stops)
        yield tokens, logits
        if stop_ids and bool(finished.all()):
            return
        fresh = tokens.unsqueeze(1)
        ids = torch.cat((ids, fresh), dim=1)
        if cache is not None and cache.length >= cache.capacity:
            cache = None


def generate(model, input_ids: torch.Tensor, max_new_tokens: int = 64, **options) -> torch.Tensor:
    """Continue (B, T) int64 ids; returns (B, T + new) int64, prompt included. Options as in `stream`."""
    tokens = [tokens.unsqueeze(1) for tokens, _ in stream(model, input_ids, max_new_tokens, **options)]
    return torch.cat([input_ids.to(model.device), *tokens], dim=1)


def stream_text(model, tokenizer, prompt: str, max_new_tokens: int = 128, **options) -> Iterator[str]:
    """Continuation of a prompt as text, piece by piece. An empty prompt starts a new document."""
    yield from stream_continuation(
        model, tokenizer, prompt_ids(model, tokenizer, prompt), max_new_tokens, **options
    )


def stream_continuation(
    model, tokenizer, ids: list[int], max_new_tokens: int = 128, **options
) -> Iterator[str]:
    """Continuation of token ids as text, piece by piece, up to (and without) a stop token."""
    stop_ids = options["stop_ids"] if options.get("stop_ids") is not None else (model.config.eos_token_id,)
    decoder = StreamDecoder(tokenizer, before=ids)
    for tokens, _ in stream(model, torch.tensor([ids]), max_new_tokens, **options):
        if int(tokens) in stop_ids:
            break
        yield decoder.push(int(tokens))
    yield decoder.flush()


def document_ids(model, tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt of any length as generation reads it, behind what begins a document (see `Tokenizer.begin_ids`)."""
    ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
    if not ids and model.config.bos_token_id is None:
        raise ValueError("an empty prompt, and the model has no begin-of-text token")
    return ids or [model.config.bos_token_id]


def prompt_ids(model, tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; raises `UserError` where they leave no room in the context."""
    ids, limit = document_ids(model, tokenizer, prompt), model.config.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids):,} tokens, the model's context is {limit:,}; shorten the prompt"
        )
    return ids


def complete(model, tokenizer, prompt: str, max_new_tokens: int = 128, **options) -> str:
    """Continuation of a prompt as one string (the prompt not included)."""
    return "".join(stream_text(model, tokenizer, prompt, max_new_tokens, **options))
