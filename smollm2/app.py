"""The web page: `python -m smollm2.app --checkpoint DIR`.

Completion as it is written, its settings, what could come next, and a choice among the run's checkpoints. It answers to
this machine only, unless `--share` opens a public tunnel, and that needs `--auth USER:PASSWORD`. All text in and out is
plain text. The limits are in `serving.py`; a script can use `POST /api/complete` (README).
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import time
from pathlib import Path

from .errors import ArgumentParser, ConfigError, UserError, run_command
from .weights import resolve

MIN_PASSWORD_CHARACTERS = 8
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
#text textarea { font-size: 1.05rem; line-height: 1.55; }
#status textarea { color: var(--body-text-color); -webkit-text-fill-color: var(--body-text-color); opacity: 1; }
"""


def basic_auth(text: str | None, share: bool) -> str | None:
    """USER:PASSWORD -> the `Authorization` header that shows it. A public address without it raises `ConfigError`."""
    if text is None and not share:
        return None
    user, _, password = (text or "").partition(":")
    if not user or len(password) < MIN_PASSWORD_CHARACTERS:
        wanted = f"USER:PASSWORD with a password of at least {MIN_PASSWORD_CHARACTERS} characters"
        raise ConfigError(f"--auth: expected {wanted}; --share needs it, for it opens this page to everyone")
    return "Basic " + base64.b64encode(text.encode()).decode()


def import_gradio(share: bool):
    """Gradio, after everything in this process's surroundings that could open this server or keep it from starting."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # nothing but the command line opens this server
    folder = tempfile.TemporaryDirectory(prefix="smollm2-page-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # the usual one, /tmp/gradio, may be another user's
    # Gradio calls its own address; without --share it calls nobody else, so that no proxy of any kind matters
    os.environ["no_proxy"] = "127.0.0.1" if share else "*"
    try:
        import gradio
    except ImportError as error:
        if error.name == "gradio":
            raise ConfigError("the web page needs gradio: pip install 'gradio>=6.24,<7'") from None
        raise ConfigError(f"the web page needs gradio, which cannot be imported here: {error}") from None
    return gradio, folder


def build_page(gr, models):
    """The Gradio page around the models."""
    from .serving import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, MAX_WAITING, parse

    class Page(gr.Blocks):
        def validate_inputs(self, block_fn, inputs):
            if len(inputs) < len(block_fn.inputs):  # Gradio's own check logs what was sent
                raise gr.Error("not what the page sends", print_exception=False)

    async def write(checkpoint, prompt, max_new_tokens, temperature, top_k, top_p, min_p, seed):
        """(text, status, what could come next) as they change."""
        asked = {"checkpoint": checkpoint, "prompt": prompt, "max_new_tokens": max_new_tokens}
        asked |= {"temperature": temperature, "top_k": top_k or None, "top_p": top_p, "min_p": min_p}
        asked |= {"seed": None if seed == -1 else seed}
        began = time.monotonic()
        try:
            async for step in models.write(parse(json.dumps(asked))):
                speed = step["tokens"] / max(time.monotonic() - began, 1e-9)
                status = f"{step['reason'] or 'writing'}: {step['tokens']} tokens, {speed:.0f} a second"
                likely = step["next"] and {row["token"]: row["probability"] for row in step["next"]}
                yield prompt + step["text"], status, likely or gr.skip()
        except UserError as error:
            yield gr.skip(), str(error), gr.skip()

    context = models.get()[0].config.max_position_embeddings
    with Page(title="SmolLM2 from scratch", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# SmolLM2 from scratch", elem_id="page-title")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox(
                    "Once upon a time", label="Type the beginning of a text; the model goes on", lines=3, max_lines=8,
                    max_length=MAX_PROMPT_CHARACTERS, autofocus=True, elem_id="prompt",
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write")
                    stop = gr.Button("Stop", elem_id="stop")
                text = gr.Textbox(label="Text", lines=12, max_lines=30, interactive=False, elem_id="text")
                status = gr.Textbox(
                    "ready", show_label=False, container=False, interactive=False, elem_id="status"
                )
            with gr.Column(scale=2, min_width=320):
                names = list(models.folders)
                checkpoint = gr.Dropdown(names, value=names[0], label="Checkpoint", elem_id="checkpoint")
                likely = gr.Label(label="What could come next", num_top_classes=10, elem_id="likely")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    new_tokens = gr.Slider(1, MAX_NEW_TOKENS, min(128, context), step=1, label="New tokens")
                    temperature = gr.Slider(
                        0, 2, 0.8, label="Temperature", info="0: always the likeliest token"
                    )
                    top_k = gr.Slider(0, 100, 0, step=1, label="Top-k", info="0: off")
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: off")
                    min_p = gr.Slider(0, 1, 0, step=0.05, label="Min-p", info="0: off")
                    seed = gr.Number(
                        -1, precision=0, label="Seed", info="same seed, same text; -1: always new"
                    )
        # preprocess=False: what a client sends is checked in one place, `parse`; Gradio's own checks log it
        asked = [checkpoint, prompt, new_tokens, temperature, top_k, top_p, min_p, seed]
        private = {"show_progress": "hidden", "api_visibility": "private"}
        starts = [go.click, prompt.submit]
        writing = gr.on(starts, write, asked, [text, status, likely], preprocess=False, **private)
        # in the browser: it must answer while the queue is full; a moment later, or text still on its way would undo it
        stopped = "() => new Promise(done => setTimeout(() => done('stopped'), 300))"
        stop.click(None, None, status, js=stopped, cancels=[writing], **private)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def launch(checkpoint: str, port: int | None = None, share: bool = False, auth: str | None = None):
    """Start the server in a thread and return (page, address). `page.close()` ends it. Raises `UserError`."""
    auth = basic_auth(auth, share)
    folder = resolve(checkpoint)  # before the proxies are set aside: a Hub id may need them
    gr, scratch = import_gradio(share)
    from fastapi.exceptions import RequestValidationError
    from starlette.middleware import Middleware

    from .serving import Models, answer, api_routes, gate

    models = Models(folder, None if Path(checkpoint).is_dir() else checkpoint)
    page = build_page(gr, models)
    page.models, page.scratch = models, scratch  # the folder goes when nothing holds it any more
    gate = Middleware(gate, auth=auth)
    app = {
        "middleware": [gate],
        "routes": api_routes(models),
        "exception_handlers": {RequestValidationError: answer},
    }
    theme = gr.themes.Monochrome(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, local, public = page.launch(
            server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=True, quiet=True, max_threads=8,
            state_session_capacity=256, enable_monitoring=False, run_history=False, ssr_mode=False, mcp_server=False,
            footer_links=[], theme=theme, css=CSS, app_kwargs=app,
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {error}".splitlines()[0]) from None
    return page, public or local


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m smollm2.app", description="A web page to write with a trained model."
    )
    which = "checkpoint folder, or a Hub id; its run's other checkpoints can be chosen too"
    parser.add_argument("--checkpoint", required=True, help=which)
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address for some days; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask everyone for this user and password")
    page, address = launch(**vars(parser.parse_args(argv)))
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close()


if __name__ == "__main__":
    run_command(main)
