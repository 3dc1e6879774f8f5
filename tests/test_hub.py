"""A Hub that is slow, broken or gone never hangs a command: it ends in the file, in the cached copy, or in one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from tiny_models import save_folder, tiny_model, tiny_tokenizer

from smollm2 import SmolLM2, hub
from smollm2.errors import UserError
from smollm2.files import dump_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STALL, RETRY = 1.0, 0.6  # seconds; the real limits are 60 and 20


class FakeHub:
    """A loopback Hub with one model, whose behaviour the test sets: serve, error, stall, trickle or truncate."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.behaviour, self.requests, self.stop = files, "serve", [], threading.Event()
        hub_self = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub_self.requests.append((self.command, self.path))
                if hub_self.behaviour == "stall" or (
                    hub_self.behaviour == "stall body" and body and "/resolve/" in self.path
                ):
                    if body and hub_self.behaviour == "stall body":
                        self.headers_for(self.path.split("/")[-1], 10**6)
                    hub_self.stop.wait(30)
                    self.close_connection = True
                    return
                if hub_self.behaviour == "error":
                    return self.refuse(500, "ServerError")
                parts = self.path.split("?")[0].split("/")
                name = parts[-1]
                if "/resolve/" not in self.path:
                    return self.refuse(404, "NotHere")
                if parts[1:3] != ["owner", "model"]:
                    return self.refuse(404, "RepoNotFound")
                if name not in hub_self.files:
                    return self.refuse(404, "EntryNotFound")
                data = hub_self.files[name]
                start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0]) if body else 0
                self.headers_for(name, len(data) - start, start)
                if not body:
                    return
                if hub_self.behaviour == "trickle":
                    for i in range(start, len(data)):
                        if hub_self.stop.wait(0.05):
                            break
                        self.wfile.write(data[i : i + 1])
                        self.wfile.flush()
                    self.close_connection = True
                elif hub_self.behaviour == "truncate":
                    self.wfile.write(data[start : start + (len(data) - start) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.wfile.write(data[start:])

            def headers_for(self, name: str, length: int, start: int = 0) -> None:
                data = hub_self.files[name]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(length))
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.end_headers()

            def refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """The fake Hub and an empty cache."""
    folder = save_folder(tmp_path / "made", tiny_model())
    fake = FakeHub({path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", fake.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for variable in (
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HTTP_PROXY",
        "http_proxy",
        "HTTPS_PROXY",
        "https_proxy",
    ):
        monkeypatch.delenv(variable, raising=False)
    yield fake
    fake.close()


@pytest.fixture
def impatient(monkeypatch):
    """Call it to end a stalled download after about a second."""

    def shorten():
        monkeypatch.setattr(hub, "STALL_SECONDS", STALL)
        monkeypatch.setattr(hub, "RETRY_STALL_SECONDS", RETRY)

    return shorten


def test_files_are_downloaded_into_the_cache_and_load(fake_hub, tmp_path):
    model = SmolLM2.from_pretrained("owner/model")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.parameters(), SmolLM2.from_pretrained(tmp_path / "made").parameters(), strict=True
        )
    )
    path = hub.fetch("owner/model", "tokenizer.json")
    assert path.read_bytes() == fake_hub.files["tokenizer.json"] and path.is_relative_to(hub.cache_dir())
    assert hub.fetch_files("owner/model", ["config.json"], optional=["nothing.here"]).keys() == {
        "config.json"
    }


def test_a_pinned_commit_in_the_cache_needs_no_network_and_no_process(fake_hub, monkeypatch):
    first = hub.fetch_files("owner/model", ["config.json"], ["nothing.here"], revision=COMMIT)
    fake_hub.behaviour = "stall"
    before = len(fake_hub.requests)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    assert hub.fetch_files("owner/model", ["config.json"], ["nothing.here"], revision=COMMIT) == first
    assert len(fake_hub.requests) == before


def test_the_official_models_are_pinned_by_whole_commits():
    from smollm2.tokenizer import SMOLLM2_TOKENIZER

    assert hub.REVISIONS[SMOLLM2_TOKENIZER]
    assert all(
        revision is None or (len(revision) == 40 and int(revision, 16)) for revision in hub.REVISIONS.values()
    )


@pytest.mark.parametrize("behaviour", ["stall", "stall body", "trickle", "truncate", "error", "refuse"])
def test_a_broken_hub_ends_in_one_clear_line(fake_hub, impatient, behaviour):
    impatient()
    fake_hub.behaviour = behaviour
    if behaviour == "refuse":
        fake_hub.close()
    started = time.monotonic()
    with pytest.raises(hub.HubUnreachable) as caught:
        hub.fetch("owner/model", "model.safetensors")
    message = str(caught.value)
    assert time.monotonic() - started < STALL + RETRY + hub.CACHE_SECONDS
    assert (
        "owner/model" in message
        and fake_hub.address in message
        and "model.safetensors is not in the local cache" in message
    )
    assert "\n" not in message and len(message) < 900
    if behaviour in ("stall", "stall body", "trickle"):
        assert "ended as stalled" in message
    left = [
        " ".join(child.cmdline())
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
    ]
    assert not [line for line in left if "smollm2.hub" in line]


@pytest.mark.parametrize("behaviour", ["stall", "error", "refuse"])
def test_a_broken_hub_is_survived_by_the_cached_copy(fake_hub, impatient, behaviour):
    whole = hub.fetch("owner/model", "tokenizer.json").read_bytes()
    impatient()
    fake_hub.behaviour = behaviour
    if behaviour == "refuse":
        fake_hub.close()
    started = time.monotonic()
    assert hub.fetch("owner/model", "tokenizer.json").read_bytes() == whole
    assert time.monotonic() - started < STALL + RETRY + hub.CACHE_SECONDS


def test_the_second_try_goes_without_xet_and_can_succeed(fake_hub, monkeypatch):
    monkeypatch.setattr(hub, "STALL_SECONDS", STALL)
    tries = []
    apart = hub._download_apart

    def watched(request, stall_seconds, environment):
        tries.append(environment)
        if environment.get("HF_HUB_DISABLE_XET"):
            fake_hub.behaviour = "serve"
        return apart(request, stall_seconds, environment)

    monkeypatch.setattr(hub, "_download_apart", watched)
    fake_hub.behaviour = "stall"
    assert hub.fetch("owner/model", "config.json").read_bytes() == fake_hub.files["config.json"]
    assert tries == [{}, {"HF_HUB_DISABLE_XET": "1"}]


def test_the_real_limits_end_within_90_seconds():
    from importlib import reload

    fresh = reload(hub)
    assert (
        fresh.STALL_SECONDS == 60
        and fresh.STALL_SECONDS + fresh.RETRY_STALL_SECONDS + fresh.CACHE_SECONDS <= 89
    )


def test_what_the_hub_does_not_have_is_said_at_once(fake_hub):
    with pytest.raises(UserError, match="no such public model"):
        hub.fetch("nobody/nothing", "config.json")
    with pytest.raises(UserError, match=r"has no absent\.json"):
        hub.fetch("owner/model", "absent.json")
    with pytest.raises(UserError, match="neither a local folder nor a Hub id"):
        hub.fetch("owner/mo del", "config.json")


def test_offline_is_respected(fake_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubUnreachable, match="HF_HUB_OFFLINE is set"):
        hub.fetch("owner/model", "config.json")
    assert fake_hub.requests == []


def test_a_command_reports_a_hub_that_is_out_of_reach_in_one_line(fake_hub):
    fake_hub.close()
    command = [sys.executable, "-m", "smollm2.generate", "--checkpoint", "owner/model", "--prompt", "a"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=dict(os.environ),
        timeout=60,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: owner/model: ")
        and done.stderr.count("\n") == 1
    )


# --- official weights -------------------------------------------------------------------------------------------------


def official_fields(**changes) -> dict:
    """`config.json` as the Hub's SmolLM2-135M has it: transformers 4's form, theta 100,000, 8,192 positions, bf16."""
    return {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True, "vocab_size": 49152,
    } | changes  # fmt: skip


def official_layout(folder: Path, fields: dict) -> Path:
    """A random model in the Hub's layout: bf16 tensors, no lm_head, that config.json."""
    from safetensors.torch import save_file

    from smollm2 import SmolLM2Config

    torch.manual_seed(1)
    model = SmolLM2(SmolLM2Config.from_hf_dict(fields))
    folder.mkdir(parents=True)
    save_file(
        {name: p.detach().bfloat16() for name, p in model.named_parameters()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_bytes(dump_json(fields))
    tiny_tokenizer().save(folder, 8192)
    return folder


def compare_with_transformers(folder: Path, length: int) -> None:
    from transformers import AutoModelForCausalLM

    ours = SmolLM2.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(ours.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert ours.config.rope_theta == 100000 and ours.config.max_position_embeddings == 8192


def test_a_folder_laid_out_like_the_official_weights_matches_transformers(tmp_path):
    small = official_fields(hidden_size=72, intermediate_size=96, num_hidden_layers=3, vocab_size=400)
    compare_with_transformers(official_layout(tmp_path / "SmolLM2-135M", small), 1024)
    assert json.loads((tmp_path / "SmolLM2-135M" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_the_official_shape_matches_transformers_and_trains_on(tmp_path):
    folder = official_layout(tmp_path / "SmolLM2-135M", official_fields())
    assert 269_000_000 < (folder / "model.safetensors").stat().st_size < 269_100_000  # the size on the Hub
    compare_with_transformers(folder, 512)
