"""Files from the Hugging Face Hub, and an export to it, without ever hanging.

Notable:
* downloads run in a process of their own, because a stalled one cannot be interrupted from inside: the library's
  timeouts do not catch a connection that stays open and sends nothing, or a byte now and then;
* no progress for a minute: that process is ended and tried once more without Xet (whose own transfers are the ones known
  to hang), then the local cache serves, or one clear line is raised. All within 90 seconds of the last progress;
* the official models are pinned by commit, so a new upload never changes a result, and a cached one needs no network.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

# Commits of the official repositories, as many public projects that pin them name them (the 135M's weights have sha256
# 80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1). A repository that is not listed follows `main`.
REVISIONS = {
    "HuggingFaceTB/SmolLM2-135M": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "HuggingFaceTB/SmolLM2-360M": "f8027fd0eaeea54caa13c31d31b9fdc459c38b49",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "a10cc1512eabd3dde888204e902eca88bddb4951",
    "HuggingFaceTB/SmolLM2-1.7B": "effd688a12921b4cc83e3312b6feb579f70f9c71",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "31b70e2e869a7173562077fd711b654946d38674",
}
STALL_SECONDS = 60.0
RETRY_STALL_SECONDS = 20.0
CACHE_SECONDS = 8.0
MIN_BYTES_PER_SECOND = (
    16 * 1024
)  # slower than this is stalled: the 135M's weights would take more than four hours
POLL_SECONDS = 0.2
ETAG_TIMEOUT_SECONDS = 10


class HubUnreachable(UserError):
    """The Hub did not answer and the file is not in the local cache."""


class _Stalled(Exception):
    """A download made no progress and was ended."""


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Path of a Hub file in the local cache, downloaded when needed; raises `HubUnreachable` or another `UserError`."""
    return fetch_files(repo_id, [filename], revision=revision)[filename]


def fetch_files(
    repo_id: str, required: Sequence[str], optional: Sequence[str] = (), revision: str | None = None
) -> dict[str, Path]:
    """Paths of Hub files in the local cache, all of one commit, downloaded when needed.

    `revision` defaults to the pinned commit of `REVISIONS`, else `main`. `optional` files that the repository does not
    have are left out. Raises `HubUnreachable` when the Hub is out of reach and the cache incomplete, `UserError` when it
    says that there is no such model or file.
    """
    revision = revision or REVISIONS.get(repo_id) or "main"
    cached = _cached(repo_id, required, optional, revision)
    if cached is not None:
        return cached
    request = {
        "repo_id": repo_id,
        "required": list(required),
        "optional": list(optional),
        "revision": revision,
        "cache_dir": str(cache_dir()),
    }
    attempts = [(STALL_SECONDS, {}), (RETRY_STALL_SECONDS, {"HF_HUB_DISABLE_XET": "1"})]
    reasons = []
    if not _is_set("HF_HUB_OFFLINE"):
        for stall_seconds, environment in attempts:
            try:
                answer = _download_apart(request, stall_seconds, environment)
            except _Stalled as stalled:
                reasons.append(str(stalled))
                continue
            if "paths" in answer:
                return {name: Path(path) for name, path in answer["paths"].items()}
            if answer["is_final"]:
                raise UserError(answer["text"])
            reasons.append(answer["text"])
            break  # the library has tried again by itself; only a stalled transfer gets a second process
    else:
        reasons.append("HF_HUB_OFFLINE is set")
    why = "; then ".join(dict.fromkeys(reasons))
    try:
        answer = _download_apart(request, CACHE_SECONDS, {"HF_HUB_OFFLINE": "1"})
    except _Stalled:
        answer = {}
    if "paths" in answer:
        print(
            f"{_endpoint()} is out of reach ({why}): using the copy of {repo_id} in the local cache",
            file=sys.stderr,
        )
        return {name: Path(path) for name, path in answer["paths"].items()}
    raise HubUnreachable(
        f"{repo_id}: {_endpoint()} is out of reach ({why}), and {', '.join(required)} is not in the local cache {cache_dir()}: "
        "check the connection and run the same command again, or give a local folder"
    )


def cache_dir() -> Path:
    """Where huggingface_hub keeps its files, by its own environment variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached(
    repo_id: str, required: Sequence[str], optional: Sequence[str], revision: str
) -> dict[str, Path] | None:
    """All files of a pinned commit where the cache has them: no process and no network is needed then."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        return None
    folder = cache_dir() / f"models--{repo_id.replace('/', '--')}"
    paths = {name: folder / "snapshots" / revision / name for name in (*required, *optional)}
    absent = {name for name, path in paths.items() if not path.exists()}
    known_absent = {name for name in optional if (folder / ".no_exist" / revision / name).exists()}
    return (
        None if absent - known_absent else {name: path for name, path in paths.items() if name not in absent}
    )


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "the Hub"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _bytes_in(folder: Path) -> int:
    """Bytes of everything under a folder that other processes write to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_symlink() else path.stat().st_size
        except OSError:  # renamed since it was listed
            continue
    return total


def _download_apart(request: dict, stall_seconds: float, environment: dict[str, str]) -> dict:
    """Run `main` of this module in a process of its own and return its answer; `_Stalled` when it makes no progress."""
    quiet = {} if sys.stderr.isatty() else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    source = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
    )
    env = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": source} | quiet | environment
    process = subprocess.Popen(
        [sys.executable, "-m", "smollm2.hub", json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if sys.stderr.isatty() else subprocess.DEVNULL,
        env=env,
    )
    folder = Path(request["cache_dir"]) / f"models--{request['repo_id'].replace('/', '--')}"
    mark, since = _bytes_in(folder), time.monotonic()
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                size, now = _bytes_in(folder), time.monotonic()
                if size - mark >= MIN_BYTES_PER_SECOND * stall_seconds:
                    mark, since = size, now
                elif now - since > stall_seconds:
                    raise _Stalled(
                        f"{max(size - mark, 0):,} bytes in {now - since:.0f} s, ended as stalled"
                    ) from None
    finally:
        process.kill()
        process.wait()
    try:
        return json.loads(output.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {
            "is_final": False,
            "text": f"the download ended with code {process.returncode} and said nothing",
        }


def main(argv: list[str]) -> int:
    """The process that downloads: one JSON request in, one JSON line out."""
    request = json.loads(argv[0])
    print(json.dumps(_download(**request)))
    return 0


def _download(repo_id: str, required: list[str], optional: list[str], revision: str, cache_dir: str) -> dict:
    from huggingface_hub import errors, hf_hub_download

    where = f"{repo_id} on {_endpoint()}"
    if unreachable := _cannot_connect():
        return {"is_final": False, "text": unreachable}
    paths = {}
    for name in [*required, *optional]:
        try:
            paths[name] = hf_hub_download(
                repo_id, name, revision=revision, cache_dir=cache_dir, etag_timeout=ETAG_TIMEOUT_SECONDS
            )
        except errors.HFValidationError:
            return {
                "is_final": True,
                "text": f"{repo_id!r} is neither a local folder nor a Hub id of the form owner/name",
            }
        except errors.GatedRepoError:
            return {
                "is_final": True,
                "text": f"{where} asks for an accepted licence: accept it on its page and set HF_TOKEN",
            }
        except errors.RepositoryNotFoundError:
            return {
                "is_final": True,
                "text": f"{where}: no such public model; check the spelling, or set HF_TOKEN for a private one",
            }
        except errors.RevisionNotFoundError:
            return {"is_final": True, "text": f"{where} has no revision {revision}"}
        except errors.LocalEntryNotFoundError as error:  # before EntryNotFoundError: it is one
            if name in optional and os.environ.get("HF_HUB_OFFLINE"):
                continue
            return {"is_final": False, "text": _first_line(error.__cause__ or error)}
        except errors.EntryNotFoundError:
            if name in required:
                return {"is_final": True, "text": f"{where} has no {name} (revision {revision})"}
        except Exception as error:  # connection errors of several libraries share no base class
            return {"is_final": False, "text": _first_line(error)}
    return {"paths": {name: str(path) for name, path in paths.items()}}


def _cannot_connect() -> str | None:
    """Why no connection to the Hub opens, or None. The library retries a refused one for 20 seconds and more; a laptop
    without a network should hear it at once."""
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if _is_set("HF_HUB_OFFLINE") or address.scheme in urllib.request.getproxies():
        return None
    try:
        socket.create_connection(
            (address.hostname, address.port or (443 if address.scheme == "https" else 80)),
            ETAG_TIMEOUT_SECONDS,
        ).close()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else 'no message'}"


# --- to the Hub -----------------------------------------------------------------------------------------------------


def check_repo_id(repo_id: str, flag: str) -> None:
    """Raises `UserError` for anything that is not OWNER/NAME as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        is_valid = repo_id.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{flag} {repo_id!r}: expected OWNER/NAME, letters, digits, '-', '_' and '.' only")


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository, made when it does not exist; returns its address. Needs a write token."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise UserError(
            "--push needs a token that may write: set HF_TOKEN, or run 'hf auth login'; the folder itself is written"
        )
    api = HfApi()
    try:
        address = str(api.create_repo(repo_id, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise UserError(
            f"--push {repo_id}: refused ({status}): check that the token may write there; the folder itself is written"
        ) from None
    except Exception as error:  # connection errors of several libraries share no base class
        raise HubUnreachable(
            f"--push {repo_id}: {_endpoint()} is out of reach ({_first_line(error)}); the folder itself is written"
        ) from None
    return address


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
