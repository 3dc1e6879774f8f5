"""The web app answers anyone and suffers nobody: limits, a queue that can be full, no way around them."""

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
from smollm2.pretrained import load_to_write  # noqa: E402
from smollm2.sampling import complete  # noqa: E402

JSON = {"content-type": "Application/JSON; charset=utf-8"}
ASK = {"prompt": "The king", "max_new_tokens": 8, "temperature": 0.8, "seed": 1}


def two_checkpoints(root: Path, **changes) -> Path:
    """Steps 10 and 20 of a run; returns the newer."""
    for step in (10, 20):
        model = tiny_model(seed=step, initializer_range=0.09, **changes)
        save_folder(root / f"step-{step:08d}.ckpt", model)
    return root / "step-00000020.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with patch.dict(os.environ):  # what the app changes for itself ends with these tests
        yield two_checkpoints(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(checkpoint):
    page, page.address = app.launch(str(checkpoint))
    yield page
    page.close()


@pytest.fixture(scope="module")
def client(page):
    with httpx.Client(base_url=page.address, timeout=90) as client:
        yield client


@pytest.fixture
def slow_model(page, monkeypatch):
    """Every token of the server's model takes 30 ms for as long as the test runs."""
    model = page.models.get()[0]
    real = model.next_logits
    monkeypatch.setattr(model, "next_logits", lambda *inputs: time.sleep(0.03) or real(*inputs))


def ask(client, **fields) -> httpx.Response:
    return client.post("/api/complete", json=ASK | fields)


def page_request(page, **changes) -> dict:
    """What the page's button sends to Gradio's queue."""
    function = next(fn for fn in page.fns.values() if fn.name == "write")
    data = {"prompt": "", "checkpoint": "step-00000020.ckpt", "max_new_tokens": 8, "temperature": 0}
    data |= {"top_k": None, "top_p": 1, "min_p": 0} | ASK | changes
    return {"data": list(data.values()), "fn_index": function._id, "session_hash": f"s{random.random()}"}


def join(client, request: dict) -> int:
    return client.post("/gradio_api/queue/join", json=request).status_code


def listen(client, request: dict):
    """What the page is told until its request is done, as Gradio's event stream."""
    return client.stream("GET", "/gradio_api/queue/data", params={"session_hash": request["session_hash"]})


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


def test_a_script_gets_text_tokens_and_what_could_come_next(client, checkpoint):
    answer = ask(client).json()
    assert answer["tokens"] == 8 and answer["reason"] == "length reached" and len(answer["next"]) == 10
    assert answer == ask(client).json() != ask(client, seed=2).json()
    model, tokenizer, _ = load_to_write(checkpoint, "auto")
    assert answer["text"] == complete(model, tokenizer, "The king", 8, temperature=0.8, seed=1)
    assert 0 < sum(row["probability"] for row in answer["next"]) <= 1.0001


def test_only_the_runs_own_checkpoints_can_be_chosen(page, client):
    assert list(page.models.folders) == ["step-00000020.ckpt", "step-00000010.ckpt"]
    assert ask(client, checkpoint="step-00000010.ckpt").json()["text"] != ask(client).json()["text"]
    for name in ("../../etc", "/etc/passwd", "step-00000030.ckpt", "HuggingFaceTB/SmolLM2-135M"):
        answer = ask(client, checkpoint=name)
        assert answer.status_code == 404 and "not one of step-" in answer.json()["error"]


def test_a_checkpoint_that_has_gone_is_told_without_its_path_and_the_others_write_on(
    page, client, tmp_path, monkeypatch
):
    monkeypatch.setitem(page.models.folders, "gone.ckpt", tmp_path / "gone.ckpt")
    folder = save_folder(tmp_path / "gone.ckpt", tiny_model())
    for name in ("tokenizer.json", "model.safetensors", "config.json"):  # on its way, as when it is pruned
        (folder / name).unlink()
        answer = ask(client, checkpoint="gone.ckpt")
        assert answer.status_code == 404 and "gone.ckpt" in answer.text and str(tmp_path) not in answer.text
    assert ask(client).status_code == 200


def test_a_folder_that_is_current_has_its_name_and_its_neighbours(page, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert [*serving.Models(Path(".")).folders] == [*page.models.folders]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a" * 8001}, {"prompt": 5}, {"prompt": None}, {"prompt": ["a"]}, {"max_new_tokens": 0},
        {"max_new_tokens": 513}, {"max_new_tokens": 1e99}, {"max_new_tokens": "8"}, {"max_new_tokens": True},
        {"temperature": -1}, {"temperature": 11}, {"temperature": "hot"}, {"temperature": float("nan")},
        {"top_k": 0}, {"top_k": 10**9}, {"top_p": 0}, {"top_p": 1.01}, {"min_p": -0.1}, {"seed": -1},
        {"seed": 2**63}, {"unknown": 1}, {"checkpoint": 7}, {"prompt": "word " * 1500}, {"prompt": "\ud800"},
        b"[]", b"{", b"\xff\xfe", b"[" * 30000, b"null", b"", b'{"prompt":"a","temperature":1e999}',
    ],
    ids=lambda fields: str(fields)[:30],
)  # fmt: skip
def test_every_limit_is_kept_on_the_server(client, fields):
    body = fields if isinstance(fields, bytes) else json.dumps(ASK | fields)
    answer = client.post("/api/complete", content=body, headers=JSON)
    assert answer.status_code == 422 and len(answer.json()["error"]) < 300
    assert "aaaa" not in answer.text  # what was sent is not repeated


def test_large_bodies_are_refused_before_they_are_read_and_other_sites_forms_too(client):
    for path in ("/api/complete", "/gradio_api/queue/join"):
        assert client.post(path, content=b'"' + b"a" * 65536, headers=JSON).status_code == 413
        assert client.post(path, content=iter([b"a" * 10000] * 10), headers=JSON).status_code == 413
        assert client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    with send_raw(client, b"", length=10**9) as connection:
        assert b" 413 " in connection.recv(1000)


def test_gradios_other_doors_are_closed(client):
    doors = "upload file=/etc/passwd run/write call/write proxy=http://127.0.0.1:1/ mcp/ runs stream/a "
    doors += "queue/status component_server vibe-code deep_link process_recording openapi.json "
    doors += "custom_component/a"
    outer = ["file=/etc/passwd", "login", "docs", "monitoring", "openapi.json", "static/%2e%2e/config"]
    for path in [*outer, *(f"gradio_api/{door}" for door in doors.split())]:
        assert client.get(f"/{path}").status_code == client.post(f"/{path}", json={}).status_code == 404, path


def test_the_page_writes_through_the_same_limits(page, client):
    def said(**changes) -> str:
        request = page_request(page, **changes)
        assert join(client, request) == 200
        with listen(client, request) as answer:
            return answer.read().decode()

    assert "length reached: 8 tokens" in said()
    assert "8000 characters" in said(prompt="a" * 8001)
    odd = [{"max_new_tokens": 10**5}, {"temperature": 1e9}, {"checkpoint": "../../etc"}, {"seed": 2.0**70}]
    for changes in [*odd, {"prompt": {"a": 1}}]:
        assert "length reached" not in said(**changes), changes


def test_who_leaves_frees_the_model(page, client, slow_model):
    with send_raw(client, json.dumps(ASK | {"max_new_tokens": 500}).encode()):
        time.sleep(0.4)
        assert client.get("/health").json()["waiting"] == 1
    wait_until_free(client)
    request = page_request(page, max_new_tokens=500)
    join(client, request)
    with listen(client, request) as answer:
        next(line for line in answer.iter_lines() if "process_generating" in line)
        assert client.get("/health").json()["waiting"] == 1
    wait_until_free(client)


def test_a_full_queue_says_503_and_a_text_that_takes_too_long_ends(page, client, slow_model, monkeypatch):
    monkeypatch.setattr(serving, "WALL_SECONDS", 0.5)
    answer = ask(client, max_new_tokens=500).json()
    assert answer["reason"].startswith("stopped after") and 0 < answer["tokens"] < 100
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda seed: ask(client, seed=seed), range(30)))
    codes = Counter(answer.status_code for answer in answers)
    assert codes[200] >= serving.MAX_WAITING and codes[503] >= 1 and set(codes) == {200, 503}
    assert any("requests are waiting already" in answer.text for answer in answers)
    joined = Counter(join(client, page_request(page, max_new_tokens=100)) for _ in range(25))
    assert joined[503] >= 1 and set(joined) == {200, 503}


def test_nothing_is_public_by_accident_or_without_a_password(checkpoint, monkeypatch):
    seen = {}
    launched = (None, "http://127.0.0.1:1/", None)
    monkeypatch.setattr(gradio.Blocks, "launch", lambda _, **options: seen.update(options) or launched)
    for auth in (None, "user", "user:short", ":longenough"):
        with pytest.raises(ConfigError, match="--auth"):
            app.launch(str(checkpoint), share=True, auth=auth)
    assert not seen
    app.launch(str(checkpoint))  # False, not None: on Colab Gradio shares by itself where it is not told
    assert seen["share"] is False and seen["server_name"] == "127.0.0.1" and seen["root_path"] == ""
    app.launch(str(checkpoint), share=True, auth="user:long enough")
    assert seen["share"] is True


def test_with_a_password_neither_page_nor_api_answers_without_it(checkpoint):
    page, address = app.launch(str(checkpoint), auth="user:long énough")
    with httpx.Client(base_url=address, timeout=30) as client:
        assert client.get("/health").json()["status"] == "ok"
        for path in ("/", "/config", "/gradio_api/info", "/theme.css", "/gradio_api/queue/data"):
            assert client.get(path).status_code == 401 == client.get(path, auth=("user", "other")).status_code
        assert ask(client).status_code == join(client, page_request(page)) == 401
        client.auth = ("user", "long énough")
        assert client.get("/").status_code == ask(client).status_code == 200
        assert join(client, page_request(page)) == 200
    page.close()


def test_a_taken_port_and_a_wrong_one_are_said(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            with pytest.raises(ConfigError, match=f"^--port {port}: [^\n]*$"):
                app.launch(str(checkpoint), port=port)


SURROUNDINGS = {
    "HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": "fe80::/10,[::1",
    "ALL_PROXY": "socks5://127.0.0.1:9",  # socksio is not installed
    "TMPDIR": "FOLDER", "GRADIO_TEMP_DIR": "FOLDER/gradio",  # another user's
    "GRADIO_SERVER_PORT": "x", "GRADIO_ROOT_PATH": "/x", "SSL_CERT_FILE": "FOLDER/none",  # another page's
}  # fmt: skip


def test_the_page_starts_behind_a_proxy_and_whatever_others_left_behind(checkpoint, tmp_path):
    (tmp_path / "gradio").touch()
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    clean |= {name: value.replace("FOLDER", str(tmp_path)) for name, value in SURROUNDINGS.items()}
    command = [sys.executable, "-m", "smollm2.app", "--checkpoint", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        process.kill()
    assert said.startswith("the page is at http://127.0.0.1:")


def test_what_cannot_be_imported_is_named(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "gradio")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gradio.py").write_text("import socksio_is_not_here\n")
    with pytest.raises(ConfigError, match=r"gradio>=6.* No module named 'socksio_is_not_here'"):
        app.launch(str(checkpoint))


@pytest.mark.slow
def test_64_clients_of_every_kind_leave_it_answering_and_no_larger(page, client):
    process, codes, memory = pytest.importorskip("psutil").Process(), Counter(), []
    long = json.dumps(ASK | {"max_new_tokens": 100}).encode()

    def one_client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(10):
            kind = rng.randrange(6)
            if kind < 2:  # leaves in the middle of a question, or of an answer
                with send_raw(client, b"{", 100) if kind else send_raw(client, long):
                    time.sleep(0.2)
            elif kind == 2:
                codes[client.post("/api/complete", content=b"x" * 70000, headers=JSON).status_code] += 1
            elif kind == 3:
                codes[join(client, page_request(page, max_new_tokens=4))] += 1
            else:
                codes[ask(client, prompt="The king " * rng.randint(1, 20)).status_code] += 1

    for first in (0, 64):  # the first round fills caches and thread pools
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(one_client, range(first, first + 64)))
        wait_until_free(client, 120)
        memory.append(process.memory_info().rss)
    assert {200, 413} <= set(codes) <= {200, 413, 503}, codes
    assert memory[1] - memory[0] < 50e6, memory
    assert ask(client).status_code == 200
    print(f"\n{sorted(codes.items())}, memory {(memory[1] - memory[0]) / 1e6:+.1f} MB")
