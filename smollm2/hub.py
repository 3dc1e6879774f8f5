"""Files from the Hugging Face Hub, without hanging.

Notable:
* `huggingface_hub` downloads, resumes and caches; this module bounds the wait and says whose fault it is;
* the Hub is asked once, for ten seconds, whether it answers at all: the library would ask for minutes;
* a connection that falls silent is given up after about 65 seconds (six read time-outs of ten seconds);
  one that sends a byte now and then is not noticed;
* the official models are pinned by commit: a new upload changes no result, a cached one needs no network.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, tell

# Commits of the official repositories, as many public projects that pin them name them (the 135M's weights
# have sha256 80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1). Others follow `main`.
REVISIONS = {
    "HuggingFaceTB/SmolLM2-135M": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "HuggingFaceTB/SmolLM2-360M": "f8027fd0eaeea54caa13c31d31b9fdc459c38b49",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "a10cc1512eabd3dde888204e902eca88bddb4951",
    "HuggingFaceTB/SmolLM2-1.7B": "effd688a12921b4cc83e3312b6feb579f70f9c71",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "31b70e2e869a7173562077fd711b654946d38674",
}
STEERING = ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
    if not os.environ.get(name, "1").isdecimal():  # the library's import fails on "" and on 2.5
        del os.environ[name]


class HubUnreachable(UserError):
    """The Hub did not answer, and the cache has no copy. Where it refuses, that is a plain `UserError`."""


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Path of a Hub file in the local cache, downloaded when needed; raises as `fetch_files` does."""
    return fetch_files(repo_id, [filename], revision=revision)[filename]


def fetch_files(
    repo_id: str, required: Sequence[str], optional=(), revision: str | None = None
) -> dict[str, Path]:
    """Paths of Hub files in the local cache, all of one commit, downloaded when needed.

    `revision` defaults to the pinned commit of `REVISIONS`, else `main`. `optional` files that the repository
    does not have are left out. What cannot be downloaded is taken from the cache, and that is said; where the
    cache is incomplete, raises `HubUnreachable` if the Hub is out of reach, `UserError` if it refuses or the
    fault is on this side.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub import try_to_load_from_cache as look_up

    constants.HF_HUB_DISABLE_XET = True  # plain HTTP has read time-outs; a transfer by Xet is known to hang
    revision = revision or REVISIONS.get(repo_id) or "main"
    cached, paths = {}, {}
    try:
        known = {name: look_up(repo_id, name, revision=revision) for name in (*required, *optional)}
        cached = {name: Path(path) for name, path in known.items() if isinstance(path, str)}
        is_whole = cached.keys() >= set(required) and None not in known.values()
        if is_whole and re.fullmatch(r"[0-9a-f]{40}", revision):
            return cached  # a commit never changes, and of the files that it lacks the cache knows, too
        url = hf_hub_url(repo_id, required[0], revision=revision)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        for name in known:
            try:
                paths[name] = Path(hf_hub_download(repo_id, name, revision=revision))
                revision = paths[name].parent.name  # the commit: `main` may move between two files
            except errors.EntryNotFoundError as error:  # its "local" kind means that the transfer failed
                if name in required or isinstance(error, errors.LocalEntryNotFoundError):
                    raise
        return paths
    except Exception as error:  # connection errors of several libraries share no base class
        problem = explained(error, repo_id)
    if cached.keys() >= set(required):
        tell(f"using the copy in the local cache: {problem}")
        return cached
    if isinstance(problem, HubUnreachable):
        missing = f"{', '.join(required)} is not in the local cache {constants.HF_HUB_CACHE}"
        raise HubUnreachable(f"{problem}, and {missing}: check the connection, or give a local folder")
    raise problem


def explained(error: Exception, repo_id: str) -> UserError:
    """A failed transfer in one line that blames the right one: `HubUnreachable` or, answered, `UserError`."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__ or error
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    certificates = os.environ.get("SSL_CERT_FILE")
    unread = FileNotFoundError, NotADirectoryError, ssl.SSLError
    if certificates and isinstance(error, unread) and not error.filename:
        return UserError(f"SSL_CERT_FILE={certificates} cannot be read ({said}): mend it, or unset it")
    # errors of the network are OSErrors without a number
    if "home directory" in said or getattr(error, "errno", None):
        folder = getattr(error, "filename", None) or constants.HF_HUB_CACHE
        return UserError(f"{folder} cannot be used ({said}): set HF_HUB_CACHE or HF_HOME to another folder")
    status = getattr(getattr(error, "response", None), "status_code", 0)
    try:
        token = get_token() or ""
    except UnicodeError:  # of its file, as PowerShell writes one
        token = "\0"
    if not (token.isascii() and token.isprintable()):  # some libraries would show it in their message
        source = "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
        return UserError(f"{source} holds characters that no access token has: copy it again, or unset it")
    said += "".join(f"; {name} is set" for name in STEERING if os.environ.get(name))
    where = f"{repo_id} on {constants.ENDPOINT}"
    if not constants.ENDPOINT.startswith("http"):
        return UserError(f"HF_ENDPOINT={constants.ENDPOINT!r}: expected https://...; mend it, or unset it")
    if isinstance(error, ImportError):
        return UserError(f"{where} cannot be asked from here ({said})")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{where}: no local folder, and no Hub id OWNER/NAME ({said})")
    if 400 <= status < 500 and status not in (407, 408, 429):  # those come from a proxy, or pass
        remedy = "check the spelling, or set HF_TOKEN for a private model"
        if isinstance(error, errors.EntryNotFoundError):
            remedy = "the repository is there, a file that is needed is not; choose another"
        elif isinstance(error, errors.GatedRepoError):
            remedy = "accept the licence on its page and set HF_TOKEN"
        elif token and status in (401, 403):
            remedy = "the access token is refused; renew or unset HF_TOKEN, or run 'hf auth login'"
        return UserError(f"{where}: {remedy} ({said})")
    if constants.HF_HUB_OFFLINE:
        said = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    return HubUnreachable(f"{where} is out of reach ({said})")
