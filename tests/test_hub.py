"""A Hub that is slow, broken, gone or refuses never hangs a command: it ends in the file, in the cached copy, or in
one clear line that blames the right one. Each download runs in a process of its own, with a person's variables."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import FIRST, FakeHub
from tiny_models import save_folder, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parent.parent
STEERED = ("HF_", "HTTP", "http", "ALL_", "all_", "NO_", "no_", "XDG_", "TRANSFORMERS_")
FETCH = """
import json, sys, time
from huggingface_hub import constants
from smollm2 import hub
from smollm2.errors import UserError
name, seconds = sys.argv[1], float(sys.argv[2])
if seconds:
    constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = seconds
    time.sleep = lambda pause: None
try: path = hub.fetch("owner/model", name)
except UserError as error: print(json.dumps({"kind": type(error).__name__, "text": str(error)}))
else: print(json.dumps({name: str(path)}))
"""


@pytest.fixture
def fake_hub(tmp_path):
    folder = save_folder(tmp_path / "made", tiny_model())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    fake = FakeHub("owner/model", {FIRST: files})
    yield fake
    fake.close()


@pytest.fixture
def environment(fake_hub, tmp_path):
    """Variables of a person with an empty cache, whose Hub is the fake one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(STEERED)}
    return kept | {"HF_ENDPOINT": fake_hub.address, "HF_HOME": str(tmp_path / "home")}


def run(environment: dict, *words: str) -> subprocess.CompletedProcess:
    options = {"cwd": ROOT, "timeout": 100, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], env=environment, **options)


def fetch(environment: dict, name: str, seconds: float = 0) -> dict:
    """{file name: path}, or {"kind", "text"} of the error. What was said beside it is under "said". The Hub library
    waits so long for an answer (0: as by itself), and not at all between two tries."""
    done = run(environment, "-c", FETCH, name, str(seconds))
    return json.loads(done.stdout) | {"said": done.stderr}


@pytest.mark.parametrize("trouble", ["refuse", "stall", "stall body", "truncate", "500", "429", "bad token"])
@pytest.mark.parametrize("seconds", [0.3, pytest.param(0, marks=pytest.mark.slow)], ids=["quick", "real"])
def test_a_broken_hub_ends_soon_in_the_cached_copy_or_one_line(fake_hub, environment, trouble, seconds):
    whole = fetch(environment, "config.json")
    fake_hub.behaviour = trouble
    if trouble == "refuse":
        fake_hub.close()
    environment["HF_TOKEN"] = "hf_expired"
    cached = fetch(environment, "config.json", seconds)
    assert cached["config.json"] == whole["config.json"]
    if trouble not in ("stall body", "truncate"):
        assert "using the copy in the local cache: owner/model on http://127.0.0.1" in cached["said"]
    started = time.monotonic()
    failed = fetch(environment, "model.safetensors", seconds)
    assert time.monotonic() - started < 90 and "\n" not in failed["text"]
    assert failed["text"].startswith(f"owner/model on {fake_hub.address}")
    if trouble == "bad token":
        assert failed["kind"] == "UserError" and "access token is refused" in failed["text"]
    else:
        assert failed["kind"] == "HubUnreachable" and " is out of reach (" in failed["text"]
        assert "model.safetensors is not in the local cache" in failed["text"]


@pytest.mark.parametrize(
    ("variables", "kind", "words"),
    [
        ({"HF_TOKEN": "hf_a\x01b"}, "UserError", "HF_TOKEN holds characters that no access token has"),
        ({"HF_TOKEN_PATH": "UTF16"}, "UserError", "UTF16 holds characters that no access token has"),
        ({"HF_HUB_CACHE": "FILE/hub"}, "UserError", "FILE/hub cannot be used"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "FILE/x"}, "UserError", "FILE/x/huggingface.* cannot be used"),
        ({"HF_ENDPOINT": "hf-mirror.com"}, "UserError", "HF_ENDPOINT='hf-mirror.com': expected https://"),
        ({"SSL_CERT_FILE": "FILE"}, "UserError", "SSL_CERT_FILE=.*FILE cannot be read"),
        ({"SSL_CERT_FILE": "FILE/x"}, "UserError", "SSL_CERT_FILE=.*FILE/x cannot be read"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "UserError", "cannot be asked from here .*ALL_PROXY is set"),
        ({"HF_HUB_OFFLINE": "1"}, "HubUnreachable", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
        ({"HF_ENDPOINT": "https://huggingface.co", "HTTPS_PROXY": "HUB"}, "HubUnreachable", "ProxyError.*HTTPS_PROXY is set"),
    ],
)  # fmt: skip
def test_the_right_one_is_blamed(fake_hub, environment, tmp_path, variables, kind, words):
    """Only a Hub that did not answer is out of reach: a token that it refuses and our own cache are other matters."""
    (tmp_path / "FILE").touch()
    (tmp_path / "UTF16").write_text("hf_abc", "utf-16")  # as PowerShell writes a file
    fake_hub.behaviour = "bad token"
    for name, value in variables.items():
        for file in ("FILE", "UTF16"):
            value = value.replace(file, str(tmp_path / file))
        environment[name] = value.replace("HUB", fake_hub.address)
    failed = fetch({name: value for name, value in environment.items() if value}, "config.json")
    assert failed["kind"] == kind and re.search(words, failed["text"]), failed["text"]
    assert ("is out of reach" in failed["text"]) == (kind == "HubUnreachable")
    assert "hf_a" not in failed["text"]


def test_a_repository_without_the_file_is_not_one_that_is_misspelt(fake_hub, environment):
    """As one that holds pickled weights alone, or a GGUF."""
    failed = fetch(environment, "weights.bin")
    assert failed["kind"] == "UserError" and "a file that is needed is not" in failed["text"]
    assert "weights.bin" in failed["text"] and "spelling" not in failed["text"]


@pytest.mark.parametrize("trouble", ["serve", "stall"])
def test_a_model_of_the_hub_writes_and_a_hub_that_stalls_is_told(fake_hub, environment, tmp_path, trouble):
    files = save_folder(tmp_path / "with tokenizer", tiny_model(vocab_size=400), tiny_tokenizer())
    fake_hub.commits[FIRST] |= {path.name: path.read_bytes() for path in files.iterdir()}
    fake_hub.behaviour = trouble
    environment["HF_HUB_ETAG_TIMEOUT"] = environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    done = run(environment, "-m", "smollm2.generate", "--checkpoint=owner/model", "--prompt=a", "--seed=1")
    if trouble == "stall":
        assert (
            re.fullmatch("error: owner/model on .* out of reach .*\n", done.stderr) and done.returncode == 2
        )
    else:
        assert done.returncode == 0 and len(done.stdout) > 20, done.stderr


SHARDS = """
import sys
from pathlib import Path
from huggingface_hub import constants
from smollm2 import SmolLM2
expected = SmolLM2.from_pretrained(sys.argv[1]).state_dict()
def read(revision=None):
    found = SmolLM2.from_pretrained("owner/model", revision=revision).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
read("1" * 40)
next(Path(constants.HF_HUB_CACHE).rglob("model-00002-of*")).unlink()  # as where it was killed before that one
read("1" * 40)
read()
constants.HF_HUB_OFFLINE = True
read()
"""


def test_a_model_in_shards_is_one_also_from_the_cache_and_behind_a_kill(fake_hub, environment, tmp_path):
    whole, parts = save_folder(tmp_path / "whole", tiny_model()), tmp_path / "parts"
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(parts, max_shard_size="50KB")
    del fake_hub.commits[FIRST]["model.safetensors"]
    fake_hub.commits[FIRST] |= {path.name: path.read_bytes() for path in parts.iterdir()}
    done = run(environment, "-c", SHARDS, str(whole))
    assert done.returncode == 0, done.stderr


COMPARE = """
import sys
from huggingface_hub import constants
constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = 0.5
from smollm2.training import train
from tests.soak import small_config
config = small_config(sys.argv[1], sys.argv[2], max_steps=3)
place = config.run.model_copy(update={"compare_with": "owner/model"})
print(train(config.model_copy(update={"run": place})).table())
"""


@pytest.mark.slow
def test_a_run_ends_beside_the_hubs_model_and_without_it_where_the_hub_stalls(
    fake_hub, environment, text, tmp_path
):
    def end(place: str) -> str:
        command = [sys.executable, "-c", COMPARE, str(text), str(tmp_path / place)]
        done = subprocess.run(command, env=environment, cwd=ROOT, timeout=100, capture_output=True, text=True)
        return done.stdout + done.stderr

    files = save_folder(tmp_path / "with tokenizer", tiny_model(vocab_size=400), tiny_tokenizer())
    fake_hub.commits[FIRST] |= {path.name: path.read_bytes() for path in files.iterdir()}
    fake_hub.behaviour = "stall"
    stalled = end("stalled")
    assert (
        "not compared with owner/model: " in stalled and "out of reach" in stalled and "talk to it" in stalled
    )
    fake_hub.behaviour = "serve"
    assert re.search(r"^model  .* on the same [0-9,]+ bytes, where this run has", end("served"), re.M)


def test_a_time_out_that_is_no_whole_number_keeps_nothing_from_starting(environment):
    environment |= {"HF_HUB_ETAG_TIMEOUT": "", "HF_HUB_DOWNLOAD_TIMEOUT": "2.5"}
    code = (
        "from smollm2 import hub\nfrom huggingface_hub import constants\nprint(constants.HF_HUB_ETAG_TIMEOUT)"
    )
    done = run(environment, "-c", code)
    assert done.stdout == "10\n", done.stderr
