"""The web page: `python -m smollm2.app --checkpoint DIR`.

Completion as it is written, its settings, what could come next, and a choice among the run's checkpoints. It answers to
this machine only, unless `--share` opens a public tunnel, and that needs `--auth USER:PASSWORD`. All text in and out is
plain text. The limits are in `web/serving.py`; a script can use `POST /api/complete` (README).
"""

from __future__ import annotations

import os
import time

from .errors import ArgumentParser, ConfigError, UserError, run_command
from .gate import Gate, Refused
from .serving import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, MAX_WAITING, Models, Writer, api_routes, parse

MIN_PASSWORD_CHARACTERS = 8
REDRAW_SECONDS = 0.05
CLEAR = "() => new Promise(done => setTimeout(() => done(['', '', {label: null, confidences: []}]), 300))"
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
#page-title h1 { margin-bottom: 0.1em; }
#text textarea { font-size: 1.05rem; line-height: 1.55; }
#status textarea { color: var(--body-text-color); -webkit-text-fill-color: var(--body-text-color); opacity: 1; }
"""


def parse_auth(text: str | None, share: bool) -> tuple[str, str] | None:
    """USER:PASSWORD -> (user, password). A public address without a password is refused; raises `ConfigError`."""
    if text is None:
        if share:
            raise ConfigError(
                "--share opens this page to everyone on the internet: it needs --auth USER:PASSWORD"
            )
        return None
    user, _, password = text.partition(":")
    if not user or len(password) < MIN_PASSWORD_CHARACTERS:
        raise ConfigError(
            f"--auth: expected USER:PASSWORD with a password of at least {MIN_PASSWORD_CHARACTERS} characters"
        )
    return user, password


def build_page(writer: Writer):
    """The Gradio page around a writer."""
    import gradio as gr

    models = writer.models
    context = models.get()[0].config.max_position_embeddings

    async def write(checkpoint, prompt, new_tokens, temperature, top_p, top_k, min_p, seed):
        """(text, status, what could come next) as they change."""
        asked = {
            "checkpoint": checkpoint,
            "prompt": prompt,
            "max_new_tokens": as_int(new_tokens),
            "temperature": temperature,
        }
        asked |= {
            "top_p": top_p,
            "top_k": as_int(top_k) or None,
            "min_p": min_p,
            "seed": None if seed in (None, -1) else as_int(seed),
        }
        began = drawn_at = time.monotonic()
        try:
            async for step in writer.write(parse(asked)):
                now = time.monotonic()
                if step.likely is None and step.reason is None and now - drawn_at < REDRAW_SECONDS:
                    continue
                drawn_at = now
                speed = f"{step.tokens} tokens, {step.tokens / max(now - began, 1e-9):.0f} a second"
                likely = gr.skip() if step.likely is None else dict(step.likely)
                yield prompt + step.text, f"{step.reason or 'writing'}: {speed}", likely
        except Refused as refused:
            yield gr.skip(), str(refused), gr.skip()

    # system fonts: the page loads nothing from strangers
    theme = gr.themes.Soft(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    theme.set(  # dark enough to read white on, bright enough to read on dark
        body_background_fill="*neutral_50", button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_700",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300", body_text_color_subdued="*neutral_600",
        block_title_text_color="*primary_700", block_title_text_color_dark="white",
    )  # fmt: skip
    with gr.Blocks(title="SmolLM2 from scratch", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# SmolLM2 from scratch\nType the beginning of a text; the model goes on.", elem_id="page-title"
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox(
                    "Once upon a time",
                    label="Beginning",
                    lines=3,
                    max_lines=8,
                    max_length=MAX_PROMPT_CHARACTERS,
                    elem_id="prompt",
                    autofocus=True,
                )
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write", min_width=80)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    clear = gr.Button("Clear", elem_id="clear", min_width=80)
                text = gr.Textbox(
                    label="Text", lines=12, max_lines=30, interactive=False, buttons=["copy"], elem_id="text"
                )
                status = gr.Textbox(
                    show_label=False,
                    container=False,
                    interactive=False,
                    lines=1,
                    max_lines=3,
                    elem_id="status",
                    placeholder="ready",
                )
            with gr.Column(scale=2, min_width=320):
                checkpoint = gr.Dropdown(
                    list(models.folders), value=models.first, label="Checkpoint", elem_id="checkpoint"
                )
                with gr.Accordion("What could come next", open=True):
                    likely = gr.Label(
                        show_label=False, show_heading=False, num_top_classes=10, elem_id="likely"
                    )
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    new_tokens = gr.Slider(1, MAX_NEW_TOKENS, min(128, context), step=1, label="New tokens")
                    temperature = gr.Slider(
                        0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"
                    )
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: off")
                    top_k = gr.Slider(0, 100, 0, step=1, label="Top-k", info="0: off")
                    min_p = gr.Slider(0, 1, 0, step=0.05, label="Min-p", info="0: off")
                    seed = gr.Number(
                        -1,
                        precision=0,
                        minimum=-1,
                        maximum=2**31 - 1,
                        label="Seed",
                        info="same seed, same text; -1: a new one each time",
                    )
        shared = {
            "inputs": [checkpoint, prompt, new_tokens, temperature, top_p, top_k, min_p, seed],
            "outputs": [text, status, likely],
        }
        page.inputs = len(shared["inputs"])
        # preprocess=False: what a client sends comes as it is and is checked in one place, `parse`; Gradio's own checks log it
        writing = gr.on(
            [go.click, prompt.submit],
            write,
            **shared,
            show_progress="minimal",
            show_progress_on=status,
            api_visibility="private",
            preprocess=False,
        )
        # in the browser: they must answer while the queue is full; a moment later, or text still on its way would undo them
        stop.click(
            None,
            None,
            status,
            js="() => new Promise(done => setTimeout(() => done(['stopped']), 300))",
            cancels=[writing],
            api_visibility="private",
        )
        clear.click(None, None, [text, status, likely], js=CLEAR, cancels=[writing], api_visibility="private")
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page, theme


def as_int(value):
    """A whole number that a slider sent as 12.0 is 12; anything else stays for `parse` to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def launch(checkpoint: str, port: int | None = None, share: bool = False, auth: str | None = None):
    """Start the server in a thread and return (page, address). `page.close()` ends it. Raises `UserError`."""
    credentials = parse_auth(auth, share)
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected 1 to 65535")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for variable in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_SERVER_NAME", "GRADIO_ROOT_PATH"):
        os.environ.pop(variable, None)  # nothing but the command line opens this server
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError("the web page needs gradio: pip install 'gradio>=6.24,<7'") from None
    from starlette.middleware import Middleware

    writer = Writer(Models(checkpoint))
    page, theme = build_page(writer)
    try:
        _, local, public = page.launch(
            share=share, auth=credentials, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, inbrowser=False,
            show_error=False, max_threads=8, max_file_size="1kb", state_session_capacity=256, enable_monitoring=False, run_history=False,
            ssr_mode=False, mcp_server=False, footer_links=[], theme=theme, css=CSS,
            app_kwargs={"middleware": [Middleware(Gate, inputs=page.inputs)], "routes": api_routes(writer, credentials), "openapi_url": None},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {port}: {error}".splitlines()[0]) from None
    page.writer = writer
    return page, public or local


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m smollm2.app", description="A web page to write with a trained model."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint folder, or a Hub id; its run's other checkpoints can be chosen too",
    )
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address for 72 hours; needs --auth")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", default=None, help="ask everyone for this user and password"
    )
    args = parser.parse_args(argv)
    page, address = launch(args.checkpoint, args.port, args.share, args.auth)
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close()


if __name__ == "__main__":
    run_command(main)
