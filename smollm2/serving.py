"""What stands between a model and strangers: limits on every request, one writer at a time, and an API for scripts.

Notable:
* everything is checked here, on the server: a browser's own limits bind nobody;
* requests wait in one line of 16; the next one is told so with 503;
* whoever leaves is noticed at the next token, and the model is free again;
* prompts are neither logged nor kept, and no request can name a path: checkpoints are chosen by the names listed at start.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import anyio
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .checkpoint import candidates
from .device import choose_device, inference_dtype
from .errors import CheckpointError, UserError
from .gate import Refused
from .notebook.token_view import piece
from .pretrained import load_model_and_tokenizer
from .sampling import StreamDecoder, prompt_ids, stream
from .weights import resolve

MAX_PROMPT_CHARACTERS = 8000
MAX_NEW_TOKENS = 512
WALL_SECONDS = 60.0
MAX_WAITING = 16
SHOWN_TOKENS = 10
FULL = f"{MAX_WAITING} requests are waiting already: try again in a minute"


class Ask(BaseModel):
    """One request, from the page or from a script. Every bound is enforced here."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(max_length=MAX_PROMPT_CHARACTERS)
    checkpoint: str | None = Field(None, max_length=200)
    max_new_tokens: int = Field(128, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(0.8, ge=0, le=10)
    top_k: int | None = Field(None, ge=1, le=65536)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a character (a lone surrogate) is no text") from None
        return value


def parse(fields: dict | bytes) -> Ask:
    """A request from a table or a JSON body; raises `Refused` with the first problem, which never repeats the input."""
    try:
        return Ask.model_validate(fields) if isinstance(fields, dict) else Ask.model_validate_json(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = (
            str(problem["loc"][0])[:40]
            if problem["loc"] and problem["loc"][0] in Ask.model_fields
            else "request"
        )
        raise Refused(f"{where}: {problem['msg'][:200]}") from None


class Models:
    """The checkpoints that may be chosen, by name; the one used last stays loaded."""

    def __init__(self, checkpoint: str | Path):
        folder = resolve(checkpoint)
        self.first = folder.name if Path(checkpoint).is_dir() else str(checkpoint)
        siblings = candidates(folder.parent) if Path(checkpoint).is_dir() else []
        self.folders = {self.first: folder} | {
            path.name: path for path in siblings if (path / "model.safetensors").is_file()
        }
        self._lock = threading.Lock()
        self._loaded: tuple[str, object, object] | None = None

    def get(self, name: str | None = None):
        """(model, tokenizer) of a checkpoint, loaded when it is not the last one; raises `Refused`."""
        name = name or self.first
        if name not in self.folders:
            raise Refused(f"checkpoint: not one of {', '.join(sorted(self.folders))}", 404)
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None  # free the old one first: two may not fit
                device = choose_device()
                try:
                    self._loaded = (
                        name,
                        *load_model_and_tokenizer(
                            self.folders[name], dtype=inference_dtype(device), device=device
                        ),
                    )
                except (CheckpointError, OSError):
                    raise Refused(
                        f"checkpoint: {name} cannot be read any more; choose another", 404
                    ) from None
            return self._loaded[1:]


@dataclass(frozen=True)
class Step:
    """The text so far, and at the first and last step what could come next: (token, probability), likeliest first.

    `reason` is None until the end, then why it ended.
    """

    text: str
    tokens: int
    likely: list[tuple[str, float]] | None = None
    reason: str | None = None


def likely_tokens(tokenizer, logits: torch.Tensor) -> list[tuple[str, float]]:
    """The likeliest next tokens as visible words, with the model's own probability (before temperature and filters)."""
    probabilities = logits.float().softmax(-1)
    top = probabilities.topk(min(SHOWN_TOKENS, probabilities.numel()))
    rows: dict[str, float] = {}
    for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        word = piece(tokenizer, i)
        rows[f"{word} #{i}" if word in rows else word] = value
    return list(rows.items())


class Writer:
    """Runs requests one after the other, in the order they came."""

    def __init__(self, models: Models):
        self.models, self.waiting = models, 0
        self._turn = asyncio.Semaphore(1)

    async def write(self, ask: Ask) -> AsyncIterator[Step]:
        """Steps of one completion. Closing the iterator at any point frees the model; raises `Refused`."""
        if self.waiting >= MAX_WAITING:
            raise Refused(FULL, 503)
        self.waiting += 1
        try:
            async with self._turn, aclosing(self._write(ask)) as steps:
                async for step in steps:
                    yield step
        finally:
            self.waiting -= 1

    async def _write(self, ask: Ask) -> AsyncIterator[Step]:
        model, tokenizer = await anyio.to_thread.run_sync(self.models.get, ask.checkpoint)
        began = time.monotonic()
        try:
            ids = await anyio.to_thread.run_sync(prompt_ids, model, tokenizer, ask.prompt)
        except UserError as error:
            raise Refused(f"prompt: {error}") from None
        options = {
            "temperature": ask.temperature,
            "top_k": ask.top_k,
            "top_p": ask.top_p,
            "min_p": ask.min_p,
            "seed": ask.seed,
        }
        # one token more than asked for, never shown: its logits are what could come next
        tokens = stream(model, torch.tensor([ids]), ask.max_new_tokens + 1, stop_ids=(), **options)
        decoder, text, count = StreamDecoder(tokenizer, before=ids), "", 0
        while True:
            token, logits = await anyio.to_thread.run_sync(next, tokens)
            is_end = int(token) == model.config.eos_token_id
            is_late = time.monotonic() - began > WALL_SECONDS
            if is_end or is_late or count == ask.max_new_tokens:
                reason = (
                    "the text ended"
                    if is_end
                    else f"stopped after {WALL_SECONDS:.0f} s"
                    if is_late
                    else "length reached"
                )
                yield Step(text + decoder.flush(), count, likely_tokens(tokenizer, logits[0]), reason)
                return
            if count == 0:
                yield Step(text, count, likely_tokens(tokenizer, logits[0]))
            text, count = text + decoder.push(int(token)), count + 1
            yield Step(text, count)


# --- the API for scripts ----------------------------------------------------------------------------------------------


def is_allowed(request: Request, auth: tuple[str, str] | None) -> bool:
    """Whether a request carries the user and password (HTTP Basic), where there are any."""
    if auth is None:
        return True
    expected = base64.b64encode(":".join(auth).encode()).decode()
    return hmac.compare_digest(
        request.headers.get("authorization", "").encode(), f"Basic {expected}".encode()
    )


def api_routes(writer: Writer, auth: tuple[str, str] | None = None) -> list[Route]:
    """`GET /health`, `GET /api/checkpoints`, `POST /api/complete`. Errors are JSON: {"error": "..."}."""

    def error(message: str, status: int, **headers: str) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": writer.waiting})

    async def checkpoints(request: Request) -> Response:
        if not is_allowed(request, auth):
            return error("user and password needed (HTTP Basic)", 401, **{"WWW-Authenticate": "Basic"})
        return JSONResponse({"checkpoints": list(writer.models.folders), "default": writer.models.first})

    async def complete(request: Request) -> Response:
        if not is_allowed(request, auth):
            return error("user and password needed (HTTP Basic)", 401, **{"WWW-Authenticate": "Basic"})
        # application/json makes a browser ask first before another site's page may post here
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return error("expected Content-Type: application/json", 415)
        steps = None
        try:
            ask = parse(await request.body())
            steps = writer.write(ask)
            first = await anext(steps)
        except Refused as refused:
            return error(str(refused), refused.status)
        if ask.stream:
            return StreamingResponse(pieces(first, steps), media_type="text/plain; charset=utf-8")
        async with aclosing(steps):
            last = first
            async for step in steps:
                last = step
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
        likely = [{"token": token, "probability": round(value, 6)} for token, value in last.likely or []]
        return JSONResponse({"text": last.text, "tokens": last.tokens, "reason": last.reason, "next": likely})

    return [
        Route("/health", health, methods=["GET", "HEAD"]),
        Route("/api/checkpoints", checkpoints, methods=["GET"]),
        Route("/api/complete", complete, methods=["POST"]),
    ]


async def pieces(first: Step, steps: AsyncIterator[Step]) -> AsyncIterator[str]:
    """The text of steps, each part once. Ends with the client's leaving: the server then closes this iterator."""
    shown = len(first.text)
    yield first.text
    async with aclosing(steps):
        async for step in steps:
            if len(step.text) > shown:
                yield step.text[shown:]
                shown = len(step.text)
