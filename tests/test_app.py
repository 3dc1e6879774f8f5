"""The web app answers anyone and suffers nobody: limits, a queue that says when it is full, and no way around them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from smollm2.checkpoint import commit, step_name
from smollm2.errors import ConfigError
from smollm2.saver import tensor_file
from smollm2.weights import model_files

gradio = pytest.importorskip("gradio", reason="pip install gradio")
httpx = pytest.importorskip("httpx", reason="pip install httpx")

from smollm2 import (  # noqa: E402 - they need gradio
    app,
    gate,
    serving,
)


def run_with_two_checkpoints(root: Path, **changes) -> Path:
    """A run with steps 10 and 20, as training leaves it; returns the newer."""
    (root / "checkpoints").mkdir(parents=True)
    for step in (10, 20):
        model, tokenizer = tiny_model(seed=step, initializer_range=0.09, **changes), tiny_tokenizer()
        files = model_files(model.config) | tokenizer.files(512) | {"state.json": b"{}"}
        files["model.safetensors"] = tensor_file({name: p.detach() for name, p in model.named_parameters()})
        commit(root / "checkpoints", step_name(step), files, "run", step, {})
    return root / "checkpoints" / step_name(20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return run_with_two_checkpoints(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def server(checkpoint):
    page, address = app.launch(str(checkpoint))
    with httpx.Client(base_url=address, timeout=90) as client:
        yield page, client
    page.close()


def ask(client, **fields) -> httpx.Response:
    return client.post("/api/complete", json={"prompt": "The king", "max_new_tokens": 8, "seed": 1} | fields)


def page_request(page, **changes) -> dict:
    """What the page's button sends to Gradio's queue."""
    function = next(fn for fn in page.fns.values() if fn.name == "write")
    data = {
        "checkpoint": "step-00000020.ckpt",
        "prompt": "The king",
        "new": 8,
        "temperature": 0.8,
        "top_p": 1,
        "top_k": 0,
        "min_p": 0,
        "seed": 1,
    } | changes
    return {
        "data": list(data.values()),
        "fn_index": function._id,
        "session_hash": f"s{random.random()}",
        "event_data": None,
        "trigger_id": None,
    }


def listen(client, session: str, seconds: float = 60) -> list[dict]:
    """Messages of Gradio's event stream until the request is done."""
    found, deadline = [], time.monotonic() + seconds
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
        for line in answer.iter_lines():
            assert time.monotonic() < deadline
            if line.startswith("data: "):
                found.append(json.loads(line[6:]))
                if found[-1]["msg"] in ("process_completed", "close_stream"):
                    break
    return found


def test_a_script_gets_text_tokens_and_what_could_come_next(server, checkpoint):
    _, client = server
    answer = ask(client).json()
    assert answer["tokens"] == 8 and answer["reason"] == "length reached" and len(answer["next"]) == 10
    assert answer == ask(client).json() != ask(client, seed=2).json()
    from smollm2.pretrained import load_model_and_tokenizer
    from smollm2.sampling import complete

    assert answer["text"] == complete(
        *load_model_and_tokenizer(checkpoint), "The king", 8, temperature=0.8, seed=1
    )
    assert 0 < sum(row["probability"] for row in answer["next"]) <= 1.0001
    streamed = client.post(
        "/api/complete", json={"prompt": "The king", "max_new_tokens": 8, "seed": 1, "stream": True}
    )
    assert streamed.text == answer["text"] and streamed.headers["content-type"].startswith("text/plain")


def test_only_the_runs_own_checkpoints_can_be_chosen(server):
    _, client = server
    assert client.get("/api/checkpoints").json() == {
        "checkpoints": ["step-00000020.ckpt", "step-00000010.ckpt"],
        "default": "step-00000020.ckpt",
    }
    assert ask(client, checkpoint="step-00000010.ckpt").json()["text"] != ask(client).json()["text"]
    for name in ("../../etc", "/etc/passwd", "step-00000030.ckpt", "HuggingFaceTB/SmolLM2-135M"):
        answer = ask(client, checkpoint=name)
        assert answer.status_code == 404 and "not one of step-" in answer.json()["error"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a" * 8001}, {"prompt": 5}, {"prompt": None}, {"prompt": ["a"]}, {"max_new_tokens": 0}, {"max_new_tokens": 513},
        {"max_new_tokens": 1e99}, {"max_new_tokens": "8"}, {"max_new_tokens": True}, {"temperature": -1}, {"temperature": 11},
        {"temperature": "hot"}, {"top_k": 0}, {"top_k": 10**9}, {"top_p": 0}, {"top_p": 1.01}, {"min_p": -0.1}, {"seed": -1}, {"seed": 2**63},
        {"unknown": 1}, {"checkpoint": 7}, {"prompt": "word " * 1500},
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
        b'{"prompt":"a","temperature":NaN}',
        b'{"prompt":"\\ud800"}',
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 30000,
        b"null",
        b"",
    ],
)
def test_broken_bodies_are_refused(server, body):
    _, client = server
    assert (
        client.post("/api/complete", content=body, headers={"content-type": "application/json"}).status_code
        == 422
    )


def test_another_sites_form_cannot_post_here(server):
    _, client = server
    assert (
        client.post(
            "/api/complete", content=b'{"prompt":"a"}', headers={"content-type": "text/plain"}
        ).status_code
        == 415
    )


def test_large_bodies_are_refused_before_they_are_read(server):
    _, client = server
    big = b'{"prompt":"' + b"a" * 65536 + b'"}'
    for path in ("/api/complete", "/gradio_api/queue/join", "/login"):
        assert client.post(path, content=big, headers={"content-type": "application/json"}).status_code == 413
    chunks = client.post(
        "/api/complete", content=iter([b"a" * 10000] * 10), headers={"content-type": "application/json"}
    )
    assert chunks.status_code == 413


def test_a_body_that_drips_in_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)
    _, client = server
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as slow:
        slow.sendall(
            b"POST /api/complete HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in slow.recv(1000)


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/run/write",
             "/gradio_api/call/write", "/gradio_api/component_server", "/monitoring", "/gradio_api/vibe-code", "/docs", "/openapi.json", "/gradio_api/mcp/"]
)  # fmt: skip
def test_gradios_other_doors_are_closed(server, path):
    _, client = server
    assert client.get(path).status_code == 404
    assert client.post(path, json={}).status_code == 404


def test_the_page_writes_through_the_same_limits(server):
    page, client = server
    request = page_request(page)
    assert client.post("/gradio_api/queue/join", json=request).status_code == 200
    final = listen(client, request["session_hash"])[-1]
    assert final["success"], final
    too_long = page_request(page, prompt="a" * 8001)
    client.post("/gradio_api/queue/join", json=too_long)
    shown = json.dumps(listen(client, too_long["session_hash"]))
    assert "8000 characters" in shown
    for changes in (
        {"new": 100000},
        {"temperature": 1e9},
        {"checkpoint": "../../etc"},
        {"seed": float(2**70)},
        {"prompt": {"a": 1}},
    ):
        request = page_request(page, **changes)
        client.post("/gradio_api/queue/join", json=request)
        said = json.dumps(listen(client, request["session_hash"]))
        assert "length reached" not in said, changes
    assert ask(client).status_code == 200


def wait_until_free(client, seconds: float = 8) -> float:
    began = time.monotonic()
    while client.get("/health").json()["waiting"]:
        assert time.monotonic() - began < seconds, "the model is still writing for someone who left"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture
def slow_model(server):
    """Every token of the server's model takes 30 ms for as long as the test runs."""
    page, _ = server
    model, _ = page.writer.models.get("step-00000020.ckpt")
    handle = model.register_forward_pre_hook(lambda *_: None)
    hook = model.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    yield
    handle.remove()
    hook.remove()


def test_who_leaves_frees_the_model(server, slow_model):
    page, client = server
    body = json.dumps({"prompt": "The king", "max_new_tokens": 500, "seed": 3, "stream": True}).encode()
    for stream in (b"true", b"false"):
        with socket.create_connection((client.base_url.host, client.base_url.port), 10) as leaver:
            sent = body.replace(b"true", stream)
            leaver.sendall(
                b"POST /api/complete HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(sent)
                + sent
            )
            time.sleep(0.4)
            assert client.get("/health").json()["waiting"] == 1
        wait_until_free(client)
    request = page_request(page, new=500)
    client.post("/gradio_api/queue/join", json=request)
    with client.stream(
        "GET", "/gradio_api/queue/data", params={"session_hash": request["session_hash"]}
    ) as answer:
        for line in answer.iter_lines():
            if "process_generating" in line:
                break
        assert client.get("/health").json()["waiting"] == 1
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
    assert (
        "requests are waiting already"
        in next(answer for answer in answers if answer.status_code == 503).json()["error"]
    )
    joined = [
        client.post("/gradio_api/queue/join", json=page_request(page, new=100)).status_code for _ in range(25)
    ]
    assert joined.count(503) >= 1 and set(joined) == {200, 503}


def test_1000_fuzzed_bodies_are_answered_and_never_with_a_server_error(server, capfd):
    page, client = server
    wait_until_free(client, 60)
    rng = random.Random(0)
    valid = json.dumps(
        {"prompt": "The king", "max_new_tokens": 1, "temperature": 0.8, "top_p": 0.9, "seed": 1}
    ).encode()
    join = json.dumps(page_request(page, new=1)).encode()
    odd = [
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b'""',
        b"[]",
        b"{}",
        b'"\\ud800"',
        b"true",
        b"9" * 400,
        b'"' + b"x" * 9000 + b'"',
    ]
    codes: dict[int, int] = {}
    for i in range(1000):
        path, base = (
            ("/api/complete", valid)
            if i % 2
            else (
                rng.choice(
                    ["/gradio_api/queue/join"] * 4 + ["/gradio_api/cancel", "/gradio_api/reset", "/login"]
                ),
                join,
            )
        )
        raw = bytearray(base)
        kind = rng.randrange(4)
        if kind == 0:  # bits
            for _ in range(rng.randint(1, 8)):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # a value replaced
            fields = list(json.loads(base))
            raw = bytearray(
                b"{"
                + b",".join(
                    json.dumps(key).encode() + b":" + rng.choice(odd)
                    for key in rng.sample(fields, rng.randint(0, len(fields)))
                )
                + b"}"
            )
        elif kind == 2:  # a piece cut out or doubled
            a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
            raw = raw[:a] + raw[b:] if rng.random() < 0.5 else raw[:b] + raw[a:]
        else:
            raw = bytearray(rng.randbytes(rng.randint(0, 300)))
        answer = client.post(path, content=bytes(raw), headers={"content-type": "application/json"})
        assert answer.status_code < 500 or answer.status_code == 503, (
            path,
            bytes(raw[:300]),
            answer.status_code,
            answer.text[:200],
        )
        codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
    assert codes.get(422, 0) > 200
    printed = "".join(capfd.readouterr())
    assert (
        "The king" not in printed and "Traceback" not in printed
    )  # prompts are not logged, broken ones neither
    wait_until_free(client, 60)
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
    app.launch(str(checkpoint))
    assert (
        seen["share"] is False
        and seen["server_name"] == "127.0.0.1"
        and "GRADIO_SERVER_NAME" not in os.environ
    )
    app.launch(str(checkpoint), share=True, auth="user:long enough")
    assert seen["share"] is True and seen["auth"] == ("user", "long enough")


def test_with_a_password_neither_page_nor_api_answers_without_it(checkpoint):
    page, address = app.launch(str(checkpoint), auth="user:long enough")
    try:
        with httpx.Client(base_url=address, timeout=30) as client:
            assert ask(client).status_code == 401 and client.get("/api/checkpoints").status_code == 401
            assert client.get("/config").status_code == 401
            assert client.post("/gradio_api/queue/join", json=page_request(page)).status_code == 401
            assert (
                client.post("/api/complete", json={"prompt": "a"}, auth=("user", "wrong enough")).status_code
                == 401
            )
            assert (
                client.post(
                    "/api/complete", json={"prompt": "a", "max_new_tokens": 2}, auth=("user", "long enough")
                ).status_code
                == 200
            )
            assert client.get("/health").json()["status"] == "ok"
    finally:
        page.close()


def test_a_taken_port_and_a_wrong_one_are_said(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Exception, match="--port") as caught:
            app.launch(str(checkpoint), port=taken.getsockname()[1])
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected 1 to 65535"):
        app.launch(str(checkpoint), port=99999)


@pytest.mark.slow
def test_64_clients_of_every_kind_leave_it_answering_and_no_larger(server):
    psutil = pytest.importorskip("psutil")
    page, client = server
    process, address = psutil.Process(), (client.base_url.host, client.base_url.port)
    codes: list[int] = []
    lock = threading.Lock()

    def leave_early() -> None:
        body = json.dumps({"prompt": "The king", "max_new_tokens": 100, "stream": True}).encode()
        with socket.create_connection(address, 30) as leaver:
            leaver.sendall(
                b"POST /api/complete HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            time.sleep(random.random() * 0.2)

    def drip() -> None:
        with socket.create_connection(address, 30) as slow:
            slow.sendall(
                b"POST /api/complete HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            time.sleep(0.3)

    async def one_client(http, rng) -> None:
        for _ in range(10):
            kind = rng.randrange(6)
            if kind == 0:
                await asyncio.to_thread(leave_early)
            elif kind == 1:
                await asyncio.to_thread(drip)
            elif kind == 2:
                answer = await http.post(
                    "/api/complete", content=b"x" * 70000, headers={"content-type": "application/json"}
                )
                codes.append(answer.status_code)
            elif kind == 3:
                answer = await http.post("/gradio_api/queue/join", json=page_request(page, new=4))
                codes.append(answer.status_code)
            else:
                answer = await http.post(
                    "/api/complete", json={"prompt": "The king " * rng.randint(1, 20), "max_new_tokens": 8}
                )
                codes.append(answer.status_code)

    async def all_clients(round_number: int) -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120, limits=limits) as http:
            await asyncio.gather(
                *(one_client(http, random.Random(100 * round_number + i)) for i in range(64))
            )

    with lock:
        asyncio.run(all_clients(0))  # caches and thread pools are filled once
        wait_until_free(client, 120)
        before = process.memory_info().rss
        codes.clear()
        asyncio.run(all_clients(1))
        wait_until_free(client, 120)
    grown = process.memory_info().rss - before
    assert not [code for code in codes if code >= 500 and code != 503], codes
    assert {200, 413} <= set(codes)
    assert grown < 50e6, f"{grown:,} bytes more"
    assert ask(client).status_code == 200
    print(f"\n{len(codes)} answers {sorted(Counter(codes).items())}, memory {grown / 1e6:+.1f} MB")
