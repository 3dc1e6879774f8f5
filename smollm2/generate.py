"""What a model says: sampling with a KV cache, and `python -m smollm2.generate`.

The filters are applied in transformers' order: temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from .errors import ArgumentParser, UserError, run_command
from .model import KVCache, SmolLM2


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


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
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
    model: SmolLM2,
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
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, time) with time >= 1")
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
                cache, fresh = KVCache(config, batch, capacity, model.model.embed_tokens.weight.dtype, device), ids
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


def generate(model: SmolLM2, input_ids: torch.Tensor, max_new_tokens: int = 64, **options) -> torch.Tensor:
    """Continue (B, T) int64 ids; returns (B, T + new) int64, prompt included. Options as in `stream`."""
    tokens = [tokens.unsqueeze(1) for tokens, _ in stream(model, input_ids, max_new_tokens, **options)]
    return torch.cat([input_ids.to(model.device), *tokens], dim=1)


def stream_text(model: SmolLM2, tokenizer, prompt: str, max_new_tokens: int = 128, **options) -> Iterator[str]:
    """Continuation of a prompt as text, piece by piece. An empty prompt starts a new document."""
    yield from stream_continuation(model, tokenizer, prompt_ids(model, tokenizer, prompt), max_new_tokens, **options)


def stream_continuation(model: SmolLM2, tokenizer, ids: list[int], max_new_tokens: int = 128, **options) -> Iterator[str]:
    """Continuation of token ids as text, piece by piece, up to (and without) a stop token."""
    from .tokenizer import StreamDecoder

    stop_ids = options["stop_ids"] if options.get("stop_ids") is not None else (model.config.eos_token_id,)
    decoder = StreamDecoder(tokenizer, before=ids)
    for tokens, _ in stream(model, torch.tensor([ids]), max_new_tokens, **options):
        if int(tokens) in stop_ids:
            break
        yield decoder.push(int(tokens))
    yield decoder.flush()


def document_ids(model: SmolLM2, tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt of any length as generation reads it, behind what begins a document (see `Tokenizer.begin_ids`)."""
    ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
    if not ids and model.config.bos_token_id is None:
        raise ValueError("an empty prompt, and the model has no begin-of-text token")
    return ids or [model.config.bos_token_id]


def prompt_ids(model: SmolLM2, tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; raises `UserError` where they leave no room in the context."""
    ids, limit = document_ids(model, tokenizer, prompt), model.config.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids):,} tokens, the model's context is {limit:,}; shorten the prompt")
    return ids


def complete(model: SmolLM2, tokenizer, prompt: str, max_new_tokens: int = 128, **options) -> str:
    """Continuation of a prompt as one string (the prompt not included)."""
    return "".join(stream_text(model, tokenizer, prompt, max_new_tokens, **options))


def seed_number(text: str) -> int:
    """A seed from the command line: what torch's generators take and training accepts."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not between 0 and 2^63 - 1")
    return int(text)


def add_sampling_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (default 0.8)")
    parser.add_argument("--top_k", type=int, default=None)
    parser.add_argument("--top_p", type=float, default=None)
    parser.add_argument("--min_p", type=float, default=None)
    parser.add_argument("--seed", type=seed_number, default=None, help="same seed, same text")


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m smollm2.generate", description="Continue a text with a trained model.")
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a Hub id")
    parser.add_argument("--prompt", default=None, help="text to continue (default: standard input)")
    parser.add_argument("--num_samples", type=int, default=1, help="this many continuations; with --seed S they use S, S+1, ...")
    parser.add_argument("--interactive", action="store_true", help="go on turn by turn")
    parser.add_argument("--chat", action="store_true", help="talk to an Instruct model through its chat template")
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    options = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "min_p", "seed")}
    try:
        check_sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.num_samples < 1:
        raise UserError(f"--num_samples {args.num_samples}: expected at least 1")
    if args.num_samples > 1 and (args.interactive or args.temperature == 0):
        other = "--interactive" if args.interactive else "--temperature 0 (all samples would be the same)"
        raise UserError(f"--num_samples {args.num_samples} does not go with {other}")
    from .conversation import Conversation, read_prompt, talk, utf8
    from .device import choose_device, inference_dtype
    from .pretrained import load_model_and_tokenizer, resolve

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    prompt = utf8(args.prompt, "--prompt") if args.prompt is not None else None if args.interactive else read_prompt()
    device, folder = choose_device(), resolve(args.checkpoint)
    model, tokenizer = load_model_and_tokenizer(folder, dtype=inference_dtype(device), device=device)
    conversation = Conversation.chat(model, tokenizer, folder) if args.chat else Conversation(model, tokenizer)
    if args.interactive:
        return talk(conversation, prompt, args.max_new_tokens, options)
    ids = conversation.ask(prompt) if args.chat else prompt_ids(model, tokenizer, prompt)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples} ---")
        print("" if args.chat else prompt, end="", flush=True)
        seed = None if args.seed is None else args.seed + i
        for piece in stream_continuation(model, tokenizer, ids, args.max_new_tokens, stop_ids=conversation.stop_ids, **options | {"seed": seed}):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
