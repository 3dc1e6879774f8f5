"""`python -m smollm2.generate`: continue a text, or talk to a model, in a terminal."""

from __future__ import annotations

from pydantic import ValidationError

from .config import DECODING_DTYPES, SamplingOptions, problems
from .conversation import Conversation, read_prompt, talk, utf8
from .errors import ArgumentParser, UserError, run_command, tell
from .signals import loading
from .weights import resolve


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser("python -m smollm2.generate", description="Continue a text with a trained model")
    parser.add_path("--checkpoint", help="checkpoint folder, or a Hub id")
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--interactive", action="store_true", help="go on turn by turn")
    parser.add_argument("--chat", action="store_true", help="through the chat template of an Instruct model")
    default = "of the weights (default: fp32 on a CPU, half precision on a GPU; auto: the fastest)"
    parser.add_argument("--dtype", choices=DECODING_DTYPES, help=default)
    for name, field in SamplingOptions.model_fields.items():
        parser.add_argument(f"--{name}", default=field.default, help=field.description)
    parser.set_defaults(max_new_tokens=200, temperature=0.8)
    args = parser.parse_args(argv)
    try:
        options = SamplingOptions(**{name: getattr(args, name) for name in SamplingOptions.model_fields})
    except ValidationError as error:
        raise UserError(f"--{problems(error, SamplingOptions)}") from None
    prompt = args.prompt if args.prompt is None else utf8(args.prompt, "--prompt")
    if prompt is None and not args.interactive:
        prompt = read_prompt()
    folder = resolve(args.checkpoint)
    with loading():
        from .device import sharing_cores
        from .pretrained import load_to_write
        from .sampling import prompt_ids

    model, tokenizer, why = load_to_write(folder, args.dtype)
    if args.dtype == "auto":
        tell(why)
    conversation = Conversation(model, tokenizer, folder, args.chat)
    with sharing_cores():
        if args.interactive:
            return talk(conversation, prompt, options)
        ids = conversation.ask(prompt) if args.chat else prompt_ids(model, tokenizer, prompt)
        print("" if args.chat else prompt, end="", flush=True)
        for piece in conversation.stream(ids, options):
            print(piece, end="", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
