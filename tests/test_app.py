"""The web app answers anyone and suffers nobody: limits, a queue that says when it is full, and no way around them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from tiny_models import save_folder, tiny_model

from smollm2.errors import ConfigError

gradio = pytest.importorskip("gradio", reason="pip install gradio")
httpx = pytest.importorskip("httpx", reason="pip install httpx")

from smollm2 import app, serving  # noqa: E402 - they need gradio
from smollm2.pretrained import load_model_and_tokenizer  # noqa: E402
from smollm2.sampling import complete  # noqa: E402

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The app's changes to the environment (proxies, Gradio's settings) end with these tests."""
    with patch.dict(os.environ):
        yield


def two_checkpoints(root: Path, **changes) -> Path:
    """Steps 10 and 20 of a run; returns the newer."""
    for step in (10, 20):
        model = tiny_model(seed=step, initializer_range=0.09, **changes)
        save_folder(root / "checkpoints" / f"step-{step:08d}.ckpt", model)
    return root / "checkpoints" / "step-00000020.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return two_checkpoints(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def server(checkpoint):
    page, address = app.launch(str(checkpoint))
    with httpx.Client(base_url=address, timeout=90) as client:
        yield page, client
    page.close()


@pytest.fixture
def slow_model(server):
    """Every token of the server's model takes 30 ms for as long as the test runs."""
    page, _ = server
    model, _ = page.models.get("step-00000020.ckpt")
    hook = model.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    yield
    hook.remove()


def ask(client, **fields) -> httpx.Response:
    return client.post("/api/complete", json={"prompt": "The king", "max_new_tokens": 8, "seed": 1} | fields)


def page_request(page, **changes) -> dict:
    """What the page's button sends to Gradio's queue."""
    function = next(fn for fn in page.fns.values() if fn.name == "write")
    data = {"checkpoint": "step-00000020.ckpt", "prompt": "The king", "new": 8, "temperature": 0.8}
    data |= {"top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
    request = {"data": list((data | changes).values()), "fn_index": function._id, "event_data": None}
    return request | {"session_hash": f"s{random.random()}", "trigger_id": None}


def join(client, request: dict) -> httpx.Response:
    return client.post("/gradio_api/queue/join", json=request)


def listen(client, request: dict):
    """Messages of Gradio's event stream, until the request is done."""
    session = {"session_hash": request["session_hash"]}
    with client.stream("GET", "/gradio_api/queue/data", params=session) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])
                if json.loads(line[6:])["msg"] in ("process_completed", "close_stream"):
                    break


def send_raw(client, body: bytes, length: int | None = None) -> socket.socket:
    """A connection that has sent a request and waits."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), 30)
    head = "POST /api/complete HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
    connection.sendall(f"{head}{length or len(body)}\r\n\r\n".encode() + body)
    return connection


def wait_until_free(client, seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while client.get("/health").json()["waiting"]:
        assert time.monotonic() < deadline, "the model is still writing for someone who left"
        time.sleep(0.05)


def test_a_script_gets_text_tokens_and_what_could_come_next(server, checkpoint):
    _, client = server
    answer = ask(client).json()
    assert answer["tokens"] == 8 and answer["reason"] == "length reached" and len(answer["next"]) == 10
    assert answer == ask(client).json() != ask(client, seed=2).json()
    model, tokenizer = load_model_and_tokenizer(checkpoint)
    assert answer["text"] == complete(model, tokenizer, "The king", 8, temperature=0.8, seed=1)
    assert 0 < sum(row["probability"] for row in answer["next"]) <= 1.0001


def test_only_the_runs_own_checkpoints_can_be_chosen(server):
    page, client = server
    assert list(page.models.folders) == ["step-00000020.ckpt", "step-00000010.ckpt"]
    assert ask(client, checkpoint="step-00000010.ckpt").json()["text"] != ask(client).json()["text"]
    for name in ("../../etc", "/etc/passwd", "step-00000030.ckpt", "HuggingFaceTB/SmolLM2-135M"):
        answer = ask(client, checkpoint=name)
        assert answer.status_code == 404 and "not one of step-" in answer.json()["error"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a" * 8001}, {"prompt": 5}, {"prompt": None}, {"prompt": ["a"]}, {"max_new_tokens": 0},
        {"max_new_tokens": 513}, {"max_new_tokens": 1e99}, {"max_new_tokens": "8"}, {"max_new_tokens": True},
        {"temperature": -1}, {"temperature": 11}, {"temperature": "hot"}, {"top_k": 0}, {"top_k": 10**9},
        {"top_p": 0}, {"top_p": 1.01}, {"min_p": -0.1}, {"seed": -1}, {"seed": 2**63}, {"unknown": 1},
        {"checkpoint": 7}, {"prompt": "word " * 1500},
    ],
    ids=lambda fields: str(fields)[:30],
)  # fmt: skip
def test_every_limit_is_kept_on_the_server(server, fields):
    _, client = server
    answer = ask(client, **fields)
    assert answer.status_code == 422 and len(answer.json()["error"]) < 300
    assert "aaaa" not in answer.text  # what was sent is not repeated


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","temperature":NaN}', b'{"prompt":"\\ud800"}', b'{"prompt":"a","temperature":1e999}',
        b"[]", b"{", b"\xff\xfe", b"[" * 30000, b"null", b"",
    ],
)  # fmt: skip
def test_broken_bodies_are_refused(server, body):
    _, client = server
    assert client.post("/api/complete", content=body, headers=JSON).status_code == 422


def test_another_sites_form_cannot_post_here(server):
    _, client = server
    for path in ("/api/complete", "/gradio_api/queue/join"):
        answer = client.post(path, content=b'{"prompt":"a"}', headers={"content-type": "text/plain"})
        assert answer.status_code == 415


def test_large_bodies_are_refused_before_they_are_read(server):
    _, client = server
    big = b'{"prompt":"' + b"a" * 65536 + b'"}'
    for path in ("/api/complete", "/gradio_api/queue/join"):
        assert client.post(path, content=big, headers=JSON).status_code == 413
    chunks = client.post("/api/complete", content=iter([b"a" * 10000] * 10), headers=JSON)
    assert chunks.status_code == 413
    with send_raw(client, b"", length=10**9) as connection:
        assert b" 413 " in connection.recv(1000)


@pytest.mark.parametrize(
    "path", ["gradio_api/upload", "gradio_api/file=/etc/passwd", "file=/etc/passwd", "gradio_api/run/write", "login",
             "gradio_api/proxy=http://127.0.0.1:1/", "gradio_api/call/write", "gradio_api/component_server", "docs",
             "monitoring", "gradio_api/vibe-code", "openapi.json", "gradio_api/mcp/", "gradio_api/deep_link",
             "gradio_api/process_recording", "gradio_api/runs", "static/%2e%2e/config", "gradio_api/queue/status"]
)  # fmt: skip
def test_gradios_other_doors_are_closed(server, path):
    _, client = server
    assert client.get(f"/{path}").status_code == 404
    assert client.post(f"/{path}", json={}).status_code == 404


def test_the_page_writes_through_the_same_limits(server):
    page, client = server
    request = page_request(page)
    assert join(client, request).status_code == 200
    final = [*listen(client, request)][-1]
    assert final["success"] and "length reached: 8 tokens" in json.dumps(final)
    too_long = page_request(page, prompt="a" * 8001)
    join(client, too_long)
    assert "8000 characters" in json.dumps([*listen(client, too_long)])
    odd = [
        {"new": 10**5},
        {"temperature": 1e9},
        {"checkpoint": "../../etc"},
        {"seed": 2.0**70},
        {"prompt": {"a": 1}},
    ]
    for changes in odd:
        request = page_request(page, **changes)
        join(client, request)
        assert "length reached" not in json.dumps([*listen(client, request)]), changes
    assert ask(client).status_code == 200


def test_who_leaves_frees_the_model(server, slow_model):
    page, client = server
    with send_raw(client, json.dumps({"prompt": "The king", "max_new_tokens": 500}).encode()):
        time.sleep(0.4)
        assert client.get("/health").json()["waiting"] == 1
    wait_until_free(client)
    request = page_request(page, new=500)
    join(client, request)
    for message in listen(client, request):
        if message["msg"] == "process_generating":
            assert client.get("/health").json()["waiting"] == 1
            break
    wait_until_free(client)


def test_a_text_that_takes_too_long_is_ended(server, slow_model, monkeypatch):
    monkeypatch.setattr(serving, "WALL_SECONDS", 0.5)
    _, client = server
    answer = ask(client, max_new_tokens=500).json()
    assert answer["reason"].startswith("stopped after") and 0 < answer["tokens"] < 100


def test_a_full_queue_says_so_with_503(server, slow_model):
    page, client = server
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda seed: ask(client, max_new_tokens=10, seed=seed), range(30)))
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= serving.MAX_WAITING and codes.count(503) >= 1 and set(codes) == {200, 503}
    full = next(answer for answer in answers if answer.status_code == 503)
    assert "requests are waiting already" in full.json()["error"]
    joined = [join(client, page_request(page, new=100)).status_code for _ in range(25)]
    assert joined.count(503) >= 1 and set(joined) == {200, 503}


def test_1000_fuzzed_bodies_are_answered_and_never_with_a_server_error(server, capfd):
    page, client = server
    wait_until_free(client, 60)
    rng = random.Random(0)
    fields = {"prompt": "The king", "max_new_tokens": 1, "temperature": 0.8, "top_p": 0.9, "seed": 1}
    bodies = [json.dumps(page_request(page, new=1)).encode(), json.dumps(fields).encode()]
    doors = ["/gradio_api/queue/join"] * 4 + ["/gradio_api/cancel", "/gradio_api/reset"]
    odd = [b"null", b"NaN", b"-1", b"1e999", b'""', b"[]", b"{}", b'"\\ud800"', b"true", b"9" * 400]
    odd.append(b'"' + b"x" * 9000 + b'"')
    codes: Counter[int] = Counter()
    for i in range(1000):
        path, base = "/api/complete" if i % 2 else rng.choice(doors), bodies[i % 2]
        raw = bytearray(base)
        kind = rng.randrange(4)
        if kind == 0:  # bits
            for _ in range(rng.randint(1, 8)):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # a value replaced
            keys = list(json.loads(base))
            keys = rng.sample(keys, rng.randint(0, len(keys)))
            raw = b"{" + b",".join(json.dumps(key).encode() + b":" + rng.choice(odd) for key in keys) + b"}"
        elif kind == 2:  # a piece cut out or doubled
            a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
            raw = raw[:a] + raw[b:] if rng.random() < 0.5 else raw[:b] + raw[a:]
        else:
            raw = rng.randbytes(rng.randint(0, 300))
        answer = client.post(path, content=bytes(raw), headers=JSON)
        assert answer.status_code < 500 or answer.status_code == 503, (
            path,
            bytes(raw[:300]),
            answer.text[:200],
        )
        codes[answer.status_code] += 1
    assert codes[422] > 200
    for data in ([], ["The king"], page_request(page)["data"][:5]):
        request = page_request(page) | {"data": data}
        assert join(client, request).status_code == 200 and not [*listen(client, request)][-1]["success"]
    wait_until_free(client, 60)
    printed = "".join(capfd.readouterr())
    assert (
        "The king" not in printed and "Traceback" not in printed
    )  # prompts are not logged, broken ones neither
    assert ask(client).status_code == 200


def test_nothing_is_public_without_a_password(checkpoint, monkeypatch):
    monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **__: pytest.fail("it was launched"))
    for auth in (None, "user", "user:short", ":longenough"):
        with pytest.raises(ConfigError, match="--auth"):
            app.launch(str(checkpoint), share=True, auth=auth)


def test_sharing_is_what_was_asked_for_and_nothing_else(checkpoint, monkeypatch):
    seen = {}

    def launch(self, **options):
        seen.update(options)
        return None, "http://127.0.0.1:1/", None

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setenv("GRADIO_SHARE", "true")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    app.launch(str(checkpoint))  # on Colab too: Gradio shares by itself only where it is not told
    assert seen["share"] is False and seen["server_name"] == "127.0.0.1"
    assert "GRADIO_SERVER_NAME" not in os.environ
    app.launch(str(checkpoint), share=True, auth="user:long enough")
    assert seen["share"] is True and seen["app_kwargs"]["middleware"][0].kwargs["auth"].startswith("Basic ")


def test_with_a_password_neither_page_nor_api_answers_without_it(checkpoint):
    page, address = app.launch(str(checkpoint), auth="user:long énough")
    right, wrong = ("user", "long énough"), ("user", "wrong enough")
    try:
        with httpx.Client(base_url=address, timeout=30) as client:
            assert client.get("/health").json()["status"] == "ok"
            for path in ("/", "/config", "/gradio_api/info", "/theme.css", "/gradio_api/queue/data"):
                assert client.get(path).status_code == client.get(path, auth=wrong).status_code == 401
            assert ask(client).status_code == join(client, page_request(page)).status_code == 401
            client.auth = right
            assert client.get("/").status_code == client.get("/config").status_code == 200
            assert ask(client).status_code == join(client, page_request(page)).status_code == 200
    finally:
        page.close()


def test_a_taken_port_and_a_wrong_one_are_said(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            with pytest.raises(ConfigError, match=f"--port {port}") as caught:
                app.launch(str(checkpoint), port=port)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "surroundings",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},  # socksio is not installed
        {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "fe80::/10,[::1"},
        {"TMPDIR": "FOLDER"},  # its `gradio` is another user's
        {"GRADIO_TEMP_DIR": "/dev/null/gradio"},
    ],
    ids=lambda surroundings: "-".join(surroundings),
)
def test_the_page_starts_behind_a_proxy_and_beside_another_users_folder(checkpoint, tmp_path, surroundings):
    (tmp_path / "gradio").touch()
    surroundings = {name: value.replace("FOLDER", str(tmp_path)) for name, value in surroundings.items()}
    command = [sys.executable, "-m", "smollm2.app", "--checkpoint", str(checkpoint)]
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=clean | surroundings, **out) as process:
        said = process.stdout.readline()
        process.kill()
    assert said.startswith("the page is at http://127.0.0.1:")


def test_what_cannot_be_imported_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match="pip install 'gradio"):
        app.launch(str(checkpoint))
    monkeypatch.delitem(sys.modules, "gradio")
    (tmp_path / "gradio.py").write_text("import socksio_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="No module named 'socksio_is_not_here'") as caught:
        app.launch(str(checkpoint))
    assert "pip install" not in str(caught.value)


def test_the_web_server_draws_no_figures(checkpoint):
    code = "import sys, smollm2.app, smollm2.serving; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_64_clients_of_every_kind_leave_it_answering_and_no_larger(server):
    psutil = pytest.importorskip("psutil")
    page, client = server
    process, codes = psutil.Process(), []

    def leave_early() -> None:
        with send_raw(client, json.dumps({"prompt": "The king", "max_new_tokens": 100}).encode()):
            time.sleep(random.random() * 0.2)

    def drip() -> None:
        with send_raw(client, b"{", length=100):
            time.sleep(0.3)

    async def one_client(http, rng) -> None:
        for _ in range(10):
            kind = rng.randrange(6)
            if kind < 2:
                await asyncio.to_thread(drip if kind else leave_early)
                continue
            if kind == 2:
                answer = await http.post("/api/complete", content=b"x" * 70000, headers=JSON)
            elif kind == 3:
                answer = await http.post("/gradio_api/queue/join", json=page_request(page, new=4))
            else:
                fields = {"prompt": "The king " * rng.randint(1, 20), "max_new_tokens": 8}
                answer = await http.post("/api/complete", json=fields)
            codes.append(answer.status_code)

    async def all_clients(seed: int) -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(one_client(http, random.Random(seed + i)) for i in range(64)))

    asyncio.run(all_clients(0))  # caches and thread pools are filled once
    wait_until_free(client, 120)
    before = process.memory_info().rss
    codes.clear()
    asyncio.run(all_clients(100))
    wait_until_free(client, 120)
    grown = process.memory_info().rss - before
    assert set(codes) == {200, 413, 503} or set(codes) == {200, 413}, Counter(codes)
    assert grown < 50e6, f"{grown:,} bytes more"
    assert ask(client).status_code == 200
    print(f"\n{len(codes)} answers {sorted(Counter(codes).items())}, memory {grown / 1e6:+.1f} MB")
