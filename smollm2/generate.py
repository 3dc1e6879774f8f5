"""`python -m smollm2.generate`: continue a text, or talk to a model, in a terminal."""

from __future__ import annotations

import argparse
import sys

from .errors import ArgumentParser, UserError, run_command
from .sampling import check_sampling, prompt_ids, stream_continuation


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
    parser = ArgumentParser(
        prog="python -m smollm2.generate", description="Continue a text with a trained model."
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a Hub id")
    parser.add_argument("--prompt", default=None, help="text to continue (default: standard input)")
    parser.add_argument(
        "--num_samples",
        type=int,
        default=1,
        help="this many continuations; with --seed S they use S, S+1, ...",
    )
    parser.add_argument("--interactive", action="store_true", help="go on turn by turn")
    parser.add_argument(
        "--chat", action="store_true", help="talk to an Instruct model through its chat template"
    )
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
    from .pretrained import load_model_and_tokenizer
    from .weights import resolve

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that cannot show a character is no reason to stop
    prompt = (
        utf8(args.prompt, "--prompt")
        if args.prompt is not None
        else None
        if args.interactive
        else read_prompt()
    )
    device, folder = choose_device(), resolve(args.checkpoint)
    model, tokenizer = load_model_and_tokenizer(folder, dtype=inference_dtype(device), device=device)
    conversation = (
        Conversation.chat(model, tokenizer, folder) if args.chat else Conversation(model, tokenizer)
    )
    if args.interactive:
        return talk(conversation, prompt, args.max_new_tokens, options)
    ids = conversation.ask(prompt) if args.chat else prompt_ids(model, tokenizer, prompt)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples} ---")
        print("" if args.chat else prompt, end="", flush=True)
        seed = None if args.seed is None else args.seed + i
        for piece in stream_continuation(
            model,
            tokenizer,
            ids,
            args.max_new_tokens,
            stop_ids=conversation.stop_ids,
            **options | {"seed": seed},
        ):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
