"""The web page: `python -m smollm2.app --checkpoint DIR`.

Completion as it is written, its settings, what could come next, and a choice among the run's checkpoints.
It answers to this machine only, unless `--share` opens a public tunnel; that needs `--auth USER:PASSWORD`.
All text in and out is plain text. The limits are in `serving.py`; scripts use `POST /api/complete` (README).
"""

from __future__ import annotations

import base64
import json
import os
import tempfile

from .config import DECODING_DTYPES
from .errors import ArgumentParser, ConfigError, UserError, run_command
from .signals import loading
from .weights import resolve

MIN_PASSWORD_CHARACTERS = 8


def basic_auth(text: str | None, share: bool) -> str | None:
    """USER:PASSWORD -> the `Authorization` header that shows it; raises `ConfigError`."""
    if text is None and not share:
        return None
    user, _, password = (text or "").partition(":")
    if not user or len(password) < MIN_PASSWORD_CHARACTERS:
        what = f"USER:PASSWORD with a password of {MIN_PASSWORD_CHARACTERS} or more characters"
        raise ConfigError(f"--auth: expected {what}; --share, which opens the page to everyone, needs it")
    return "Basic " + base64.b64encode(text.encode()).decode()


def import_gradio(folder: str, share: bool):
    """Gradio, whatever proxies and other users this machine has; raises `ConfigError`."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # the settings of another page: its port, its name, what it tries at its start
    os.environ["GRADIO_TEMP_DIR"] = folder  # it must write at its start; /tmp/gradio may be another user's
    # Gradio calls its own address, and without --share nobody else: no proxy and no certificate matters
    os.environ["no_proxy"] = "127.0.0.1" if share else "*"
    for name in () if share else ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        os.environ.pop(name, None)
    try:
        import gradio
    except (ImportError, OSError) as error:
        raise ConfigError(f"the web page needs a working gradio>=6.24,<7 (extra: app): {error}") from None
    return gradio


def settings(gr, checkpoints: list[str], max_new_tokens: int) -> dict:
    """The controls of a request, named as in `serving.Ask`."""
    return {
        "checkpoint": gr.Dropdown(checkpoints, label="Checkpoint", elem_id="checkpoint"),
        "max_new_tokens": gr.Slider(1, max_new_tokens, 128, step=1, label="New tokens"),
        "temperature": gr.Slider(0, 2, 0.8, label="Temperature", info="0: the likeliest"),
        "top_k": gr.Number(0, precision=0, label="Top-k", info="0: off"),
        "top_p": gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: off"),
        "min_p": gr.Slider(0, 1, 0, step=0.05, label="Min-p", info="0: off"),
        "seed": gr.Number(-1, precision=0, label="Seed", info="same seed, same text; -1: a new one"),
    }


def build_page(gr, models):
    """The Gradio page around the models."""
    from .serving import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, MAX_WAITING, parse

    class Page(gr.Blocks):
        def validate_inputs(self, block_fn, inputs):
            if len(inputs) < len(block_fn.inputs):  # Gradio's own check logs what was sent
                raise gr.Error("not what the page sends", print_exception=False)

    async def write(*values):
        """(text, status, what could come next) as they change."""
        asked = dict(zip(fields, values, strict=False))
        for name, off in (("top_k", 0), ("seed", -1)):  # a number box cannot be empty: it sends a number
            asked[name] = None if asked[name] == off else asked[name]
        try:
            async for step in models.write(parse(json.dumps(asked))):
                status = f"{step['reason'] or 'writing'}: {step['tokens']} tokens"
                likely = {row["token"]: row["probability"] for row in step["next"] or []}
                yield asked["prompt"] + step["text"], status, likely or gr.skip()
        except UserError as error:
            yield gr.skip(), str(error), gr.skip()

    with Page(title="SmolLM2 from scratch", analytics_enabled=False) as page:
        gr.Markdown("# SmolLM2 from scratch", elem_id="page-title")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt = gr.Textbox(
                    "Once upon a time", label="Type the beginning of a text; the model goes on", lines=3,
                    max_lines=8, max_length=MAX_PROMPT_CHARACTERS, autofocus=True, elem_id="prompt",
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write")
                    stop = gr.Button("Stop", elem_id="stop")
                text = gr.Textbox(label="Text", lines=12, interactive=False, buttons=["copy"], elem_id="text")
                status = gr.Textbox("ready", show_label=False, interactive=False, elem_id="status")
            with gr.Column(scale=2, min_width=320):
                likely = gr.Label(label="What could come next", show_heading=False, elem_id="likely")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    fields = {"prompt": prompt} | settings(gr, [*models.folders], MAX_NEW_TOKENS)
        # preprocess=False: what a client sends is checked in one place, `parse`; Gradio's checks log it
        writing = gr.on(
            [go.click, prompt.submit], write, list(fields.values()), [text, status, likely], preprocess=False,
            show_progress="minimal", show_progress_on=status, api_visibility="private",
        )  # fmt: skip
        # in the browser: it must answer while the queue is full; later, or text on its way would undo it
        stopped = "() => new Promise(done => setTimeout(() => done('stopped'), 300))"
        stop.click(None, None, status, js=stopped, cancels=[writing], api_visibility="private")
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)


def launch(checkpoint: str, port: int | None = None, share=False, auth: str | None = None, dtype="auto"):
    """Start the server in a thread and return (page, address). `page.close()` ends it. Raises `UserError`."""
    header = basic_auth(auth, share)
    folder = resolve(checkpoint)  # before the proxies are set aside: a Hub id may need them
    # only Gradio's start writes there: nothing that the gate lets through makes it write a file
    with tempfile.TemporaryDirectory() as scratch:
        with loading():
            gr = import_gradio(scratch, share)
            from .serving import Models, app_options

        models = Models(folder, None if os.path.isdir(checkpoint) else checkpoint, dtype)
        models.thread.submit(models.get).result()  # a checkpoint that cannot be read is told now
        page = build_page(gr, models)
        page.models = models
        try:
            _, local, public = page.launch(
                server_name="127.0.0.1", server_port=port or None, share=share, prevent_thread_lock=True,
                quiet=True, max_threads=8, state_session_capacity=256, enable_monitoring=False,
                run_history=False, ssr_mode=False, mcp_server=False, num_workers=0, root_path="",
                footer_links=[], theme=gr.themes.Monochrome(font="system-ui"),
                app_kwargs=app_options(models, header),
            )  # fmt: skip
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--port {port}: {error}") from None
    return page, public or local


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m smollm2.app", description="A page to write with a trained model.")
    parser.add_path("--checkpoint", help="folder or Hub id; its run may have others")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public address for some days; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask everyone for this user and password")
    parser.add_argument("--dtype", choices=DECODING_DTYPES, default="auto", help="of the weights")
    page, address = launch(**vars(parser.parse_args(argv)))
    print(f"the page is at {address} (Ctrl-C ends it), {page.models.why}", flush=True)
    from .device import sharing_cores

    with sharing_cores():
        page.block_thread()
    return 0


if __name__ == "__main__":
    run_command(main)
