"""The gate in front of the web app: which paths exist, and how much a request may send, how fast.

Gradio always has routes for uploads, files and proxying; the page needs none of them, so behind this gate there are none.
"""

from __future__ import annotations

import asyncio
import json

from starlette.responses import JSONResponse

from .errors import UserError

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0  # a body that drips in more slowly is refused


class Refused(UserError):
    """A request outside the limits; `status` is the HTTP answer."""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


OPEN_PATHS = {
    "/",
    "/config",
    "/config/",
    "/theme.css",
    "/login",
    "/login/",
    "/logout",
    "/manifest.json",
    "/favicon.ico",
    "/robots.txt",
    "/health",
}
OPEN_FOLDERS = ("/assets/", "/static/", "/svelte/", "/api/", "/gradio_api/heartbeat/")
GRADIO_CALLS = (
    "queue/join",
    "queue/data",
    "cancel",
    "reset",
    "app_id",
    "startup-events",
    "login_check",
    "user",
    "theme.css",
    "info",
)


class Gate:
    """ASGI middleware in front of everything: only the paths the page needs, and bodies of at most 64 KiB within 10 s.

    Upload, file and proxy routes, which Gradio always has, do not exist behind it.
    """

    def __init__(self, app, inputs: int):
        self.app, self.inputs = app, inputs  # `inputs`: values that the page's one request carries

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path = scope["path"]
        call = path.removeprefix("/gradio_api/").rstrip("/") if path.startswith("/gradio_api/") else None
        if ".." in path or not (path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or call in GRADIO_CALLS):
            return await JSONResponse({"error": "no such page"}, 404)(scope, receive, send)
        try:
            body = await asyncio.wait_for(read_body(scope, receive), BODY_SECONDS)
        except TimeoutError:
            return await JSONResponse(
                {"error": f"the body took longer than {BODY_SECONDS:.0f} s"}, 408, {"Connection": "close"}
            )(scope, receive, send)
        except Refused as refused:
            return await JSONResponse({"error": str(refused)}, refused.status, {"Connection": "close"})(
                scope, receive, send
            )
        if body is None:
            return None  # the client left
        if call and scope["method"] == "POST":
            fields = json_table(body)
            data = fields.get("data") if fields is not None else None
            if fields is None or (
                call == "queue/join" and not (isinstance(data, list) and len(data) == self.inputs)
            ):
                return await JSONResponse({"error": "not what the page sends"}, 422)(scope, receive, send)
        was_read = False

        async def replay():
            nonlocal was_read
            if not was_read:
                was_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()  # what comes next can only be the client's leaving

        return await self.app(scope, replay, send)


async def read_body(scope, receive) -> bytes | None:
    """The whole body, or None when the client left; raises `Refused` beyond the limit, before it is read where it says so."""
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    too_large = Refused(f"the body is larger than {MAX_BODY_BYTES // 1024} KiB", 413)
    if not declared.isdigit() or int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def json_table(body: bytes) -> dict | None:
    """A JSON table of finite numbers and whole characters, which Gradio's own parser takes for granted; else None."""
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError):  # half a character (UnicodeEncodeError) is a ValueError too
        return None
    return fields if isinstance(fields, dict) else None
