"""A Hub that is slow, broken, gone or refuses never hangs a command: it ends in the file, in the cached copy, or in
one clear line that blames the right one. Each download runs in a process of its own, with a person's variables."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_models import save_folder, tiny_model

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEERED = ("HF_", "HTTP", "http", "ALL_", "all_", "NO_", "no_", "XDG_", "TRANSFORMERS_")
FETCH = """
import json, sys
from smollm2 import hub
from smollm2.errors import UserError
try: paths = hub.fetch_files(*json.loads(sys.argv[1]))
except UserError as error: print(json.dumps({"kind": type(error).__name__, "text": str(error)}))
else: print(json.dumps({name: str(path) for name, path in paths.items()}))
"""


class FakeHub:
    """A loopback Hub with one model, "owner/model", whose behaviour the test sets; and a proxy that refuses."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.behaviour, self.requests, self.stop = files, "serve", [], threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_CONNECT(self):
                self.reply(403)

            def do_GET(self):
                fake.requests.append(self.path)
                _, owner, model, *_, name = self.path.split("?")[0].split("/")
                is_sent = self.command == "GET"
                if fake.behaviour == "stall":
                    fake.stop.wait(100)
                elif fake.behaviour.isdigit():
                    self.reply(int(fake.behaviour))
                elif fake.behaviour == "bad token" and self.headers["Authorization"]:
                    self.reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
                elif (owner, model) != ("owner", "model"):
                    self.reply(404, {"X-Error-Code": "RepoNotFound"})
                elif name not in fake.files:
                    self.reply(404, {"X-Error-Code": "EntryNotFound"})
                else:
                    data = fake.files[name]
                    self.reply(200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, len(data))
                    if is_sent and fake.behaviour == "stall body":
                        fake.stop.wait(100)
                    elif is_sent:
                        self.wfile.write(data[:100] if fake.behaviour == "truncate" else data)
                        self.close_connection = fake.behaviour == "truncate"

            do_HEAD = do_GET

            def reply(self, status: int, headers: dict | None = None, length: int = 0) -> None:
                self.send_response(status)
                own = {"X-Repo-Commit": COMMIT, "Content-Length": str(length)}
                for key, value in (own | (headers or {})).items():
                    self.send_header(key, value)
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that has gone
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake_hub(tmp_path):
    folder = save_folder(tmp_path / "made", tiny_model())
    fake = FakeHub({path.name: path.read_bytes() for path in folder.iterdir()})
    yield fake
    fake.close()


@pytest.fixture
def environment(fake_hub, tmp_path):
    """Variables of a person with an empty cache, whose Hub is the fake one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(STEERED)}
    return kept | {"HF_ENDPOINT": fake_hub.address, "HF_HOME": str(tmp_path / "home")}


def fetch(environment: dict, *files: str, optional=(), repo: str = "owner/model", revision=None) -> dict:
    """{file name: path}, or {"kind", "text"} of the error. What was said beside it is under "said"."""
    request = json.dumps([repo, files, list(optional), revision])
    command, options = [sys.executable, "-c", FETCH, request], {"capture_output": True, "text": True}
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=100, **options)
    return json.loads(done.stdout) | {"said": done.stderr}


QUICK = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}  # seconds; ten by themselves


@pytest.mark.parametrize(
    "behaviour", ["refuse", "stall", "stall body", "truncate", "500", "429", "bad token"]
)
@pytest.mark.parametrize("limits", [QUICK, pytest.param({}, marks=pytest.mark.slow)], ids=["quick", "real"])
def test_a_broken_hub_ends_within_90_seconds_in_the_cached_copy_or_one_line(
    fake_hub, environment, behaviour, limits
):
    whole = fetch(environment, "config.json")
    fake_hub.behaviour = behaviour
    if behaviour == "refuse":
        fake_hub.close()
    environment |= limits | {"HF_TOKEN": "hf_expired"}
    cached = fetch(environment, "config.json")
    assert cached["config.json"] == whole["config.json"]
    if behaviour not in ("stall body", "truncate"):
        assert "using the copy in the local cache: owner/model on http://127.0.0.1" in cached["said"]
    started = time.monotonic()
    failed = fetch(environment, "model.safetensors")
    assert time.monotonic() - started < 90 and "\n" not in failed["text"]
    assert failed["text"].startswith(f"owner/model on {fake_hub.address}")
    if behaviour == "bad token":
        assert failed["kind"] == "UserError" and "access token is refused" in failed["text"]
    else:
        assert failed["kind"] == "HubUnreachable" and " is out of reach (" in failed["text"]
        assert "model.safetensors is not in the local cache" in failed["text"]


@pytest.mark.parametrize(
    ("variables", "kind", "words"),
    [
        ({"HF_TOKEN": "hf_a\x01b"}, "UserError", "HF_TOKEN holds characters that no access token has"),
        ({"HF_HUB_CACHE": "FILE/hub"}, "UserError", "FILE/hub cannot be used"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "FILE/x"}, "UserError", "FILE/x/huggingface.* cannot be used"),
        ({"HF_ENDPOINT": "hf-mirror.com"}, "UserError", "on hf-mirror.com: .*; HF_ENDPOINT is set"),
        ({"HF_HUB_OFFLINE": "1"}, "HubUnreachable", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        ({"HF_ENDPOINT": "https://huggingface.co", "HTTPS_PROXY": "HUB"}, "HubUnreachable", "ProxyError.*HTTPS_PROXY is set"),
    ],
)  # fmt: skip
def test_the_right_one_is_blamed(fake_hub, environment, tmp_path, variables, kind, words):
    """Only a Hub that did not answer is out of reach: a token that it refuses and our own cache are other matters."""
    (tmp_path / "FILE").touch()
    fake_hub.behaviour = "bad token"
    for name, value in variables.items():
        environment[name] = value.replace("HUB", fake_hub.address).replace("FILE", str(tmp_path / "FILE"))
    failed = fetch({name: value for name, value in environment.items() if value}, "config.json")
    assert failed["kind"] == kind and re.search(words, failed["text"]), failed["text"]
    assert ("is out of reach" in failed["text"]) == (kind == "HubUnreachable")
    assert "hf_a" not in failed["text"]
