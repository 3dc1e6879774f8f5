"""What stands between a model and strangers: limits on every request, one text at a time, an API for scripts.

Notable:
* everything is checked here, on the server: a browser's own limits bind nobody;
* requests wait in one line of 16; the next one is told so with 503;
* whoever leaves is noticed at the next token, and the model is free again;
* prompts are neither logged nor kept, and no request can name a path: checkpoints have names.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path

import torch
from fastapi.exceptions import RequestValidationError
from pydantic import ConfigDict, Field, ValidationError
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .checkpoint import candidates
from .config import SamplingOptions
from .conversation import stop_ids
from .errors import UserError
from .pretrained import load_to_write
from .sampling import StreamDecoder, prompt_ids, stream
from .token_text import piece

MAX_BODY_BYTES = 64 * 1024
MAX_PROMPT_CHARACTERS = 8000
MAX_NEW_TOKENS = 512
WALL_SECONDS = 60.0
MAX_WAITING = 16
SHOWN_TOKENS = 10
OPEN_PATHS = ("/health", "/gradio_api/startup-events")  # Gradio asks for the second when it starts
# what the page and scripts need: Gradio's uploads, files, proxy, deep links and direct calls do not exist
PATHS = re.compile(
    r"/|/(config|theme\.css|manifest\.json|favicon\.ico|robots\.txt|health|api/complete)"
    r"|/(assets|static|svelte)(/[\w-][\w.-]*)+"
    r"|/gradio_api/(info|app_id|startup-events|login_check|heartbeat/\w+|queue/(join|data)|cancel|reset)/?"
)


class Refused(UserError):
    """A request outside the limits; `status` is the HTTP answer."""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


class Ask(SamplingOptions):
    """One request, from the page or from a script. Every bound is enforced here."""

    model_config = ConfigDict(strict=True)

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    checkpoint: str | None = Field(None, max_length=200)
    max_new_tokens: int = Field(128, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(0.8, ge=0, le=10)
    top_k: int | None = Field(None, ge=1, le=65536)


def parse(body: bytes | str) -> Ask:
    """A request from JSON; raises `Refused` with the first problem, which never repeats the input."""
    try:
        return Ask.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = next((name for name in problem["loc"][:1] if name in Ask.model_fields), "request")
        raise Refused(f"{field}: {problem['msg'][:200]}") from None


class Models:
    """A checkpoint and its neighbours, to choose from by name; they write one text at a time."""

    def __init__(self, folder: Path, name: str | None = None, dtype: str = "auto"):
        """`name` is what the folder is called where its own name says nothing."""
        self.dtype, self.why, folder = dtype, "", Path(os.path.abspath(folder))  # "." has no name
        self.default = name or folder.name
        self.folders = {self.default: folder} | {path.name: path for path in candidates(folder.parent)}
        self.waiting = 0  # requests in line, the one that is being written included
        self._turn = asyncio.Lock()
        # one for all: each thread that computes gets OpenMP threads of its own, and where these are more than
        # the cores, every one of them writes at half the speed
        self.thread = ThreadPoolExecutor(1)
        self._loaded: dict[str, tuple] = {}

    def get(self, name: str | None = None):
        """(model, tokenizer, ids that end a text) of a checkpoint; the last one stays. Raises `UserError`."""
        name = name or self.default
        if name not in self.folders:
            raise Refused(f"checkpoint: not one of {', '.join(sorted(self.folders))}", 404)
        if name not in self._loaded:
            self._loaded.clear()  # two may not fit
            folder = self.folders[name]
            try:
                model, tokenizer, self.why = load_to_write(folder, self.dtype)
            except UserError as error:  # where it lies is not for everyone who asks
                raise Refused(str(error).replace(f"{folder.parent}{os.sep}", ""), 404) from None
            self._loaded[name] = model, tokenizer, stop_ids(folder, tokenizer)
        return self._loaded[name]

    async def write(self, ask: Ask) -> AsyncIterator[dict]:
        """The growing answer: `text` and `tokens` so far, the `reason` why it ended (or None), and `next`, at
        the first and the last step, what could come next. Closing it frees the model. Raises `UserError`."""
        if self.waiting >= MAX_WAITING:
            raise Refused(f"{MAX_WAITING} requests are waiting already: try again in a minute", 503)
        self.waiting += 1
        try:
            async with self._turn:
                there = partial(asyncio.get_running_loop().run_in_executor, self.thread)
                model, tokenizer, ends = await there(self.get, ask.checkpoint)
                ids = await there(prompt_ids, model, tokenizer, ask.prompt)
                options = ask.model_dump(include=set(SamplingOptions.model_fields) - {"max_new_tokens"})
                # one token more than asked for, never shown: its logits are what could come next
                inputs = torch.tensor([ids], device=model.device)
                tokens = stream(model, inputs, ask.max_new_tokens + 1, stop_ids=(), **options)
                decoder, text, count, reason = StreamDecoder(tokenizer, ids), "", 0, None
                ends_at = time.monotonic() + WALL_SECONDS
                while step := await there(next, tokens, None):
                    token, logits = step
                    if int(token) in ends:
                        reason = "the text ended"
                    elif time.monotonic() > ends_at:
                        reason = f"stopped after {WALL_SECONDS:.0f} s"
                    elif count == ask.max_new_tokens:
                        reason = "length reached"
                    is_shown = reason or count == 0
                    likely = await there(likely_tokens, tokenizer, logits[0]) if is_shown else None
                    text += decoder.flush() if reason else decoder.push(int(token))
                    count += reason is None
                    yield {"text": text, "tokens": count, "reason": reason, "next": likely}
                    if reason:
                        return
        finally:
            self.waiting -= 1


def likely_tokens(tokenizer, logits: torch.Tensor) -> list[dict]:
    """The likeliest next tokens as visible words, with the model's own probability (no settings)."""
    top = logits.float().softmax(-1).topk(min(SHOWN_TOKENS, logits.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [{"token": piece(tokenizer, i), "probability": round(share, 6)} for i, share in pairs]


def app_options(models: Models, auth: str | None) -> dict:
    """What makes a FastAPI application serve `GET /health` and `POST /api/complete`, behind `check`."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": models.waiting})

    async def complete(request: Request) -> Response:
        async with aclosing(models.write(parse(await request.body()))) as steps:
            async for step in steps:
                last = step
                if await request.is_disconnected():
                    break  # nobody reads it
        return JSONResponse(last)

    def gate(app):
        async def checked(scope, receive, send):
            refused = check(Request(scope), auth) if scope["type"] == "http" else None
            await (answer(None, refused) if refused else app)(scope, receive, send)

        return checked

    routes = [Route("/health", health), Route("/api/complete", complete, methods=["POST"])]
    handlers = dict.fromkeys((UserError, OSError, ClientDisconnect, RequestValidationError), answer)
    return {"routes": routes, "middleware": [Middleware(gate)], "exception_handlers": handlers}


def answer(_: Request | None, error: Exception) -> Response:
    """An error as JSON. FastAPI's own answer to a broken body repeats it, and fails where it is no UTF-8."""
    error = error if isinstance(error, UserError) else Refused("this cannot be answered")
    status = getattr(error, "status", 422)
    headers = {"WWW-Authenticate": 'Basic charset="UTF-8"'} if status == 401 else None
    return JSONResponse({"error": str(error)}, status, headers)


def check(request: Request, auth: str | None) -> Refused | None:
    """The gate: the password (`auth` is the header that shows it), the paths, bodies of at most 64 KiB."""
    path, headers = request.url.path, request.headers
    shown = headers.get("authorization", "").encode()
    if auth and path not in OPEN_PATHS and not hmac.compare_digest(shown, auth.encode()):
        return Refused("user and password needed (HTTP Basic)", 401)
    if not PATHS.fullmatch(path):
        return Refused("no such page", 404)
    if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
        return Refused(f"expected a body with a Content-Length of at most {MAX_BODY_BYTES // 1024} KiB", 413)
    # application/json makes a browser ask first before another site's page may post here
    if request.method == "POST" and not headers.get("content-type", "").lower().startswith(
        "application/json"
    ):
        return Refused("expected Content-Type: application/json", 415)
    return None
