"""Files from the Hugging Face Hub, with a clear word when it is out of reach."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError

# The weights and tokenizer this project was checked against, by commit where one is known.
ETAG_TIMEOUT_SECONDS = 10


class HubUnreachable(UserError):
    """The Hub did not answer and the file is not in the local cache."""


def fetch(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """Path of a Hub file in the local cache, downloaded when needed; raises `HubUnreachable`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, etag_timeout=ETAG_TIMEOUT_SECONDS))
    except HFValidationError:
        raise UserError(f"{repo_id!r} is neither a local folder nor a Hub id of the form owner/name") from None
    except RepositoryNotFoundError:
        raise UserError(f"the Hub has no public model {repo_id!r}") from None
    except EntryNotFoundError as error:
        if "cannot find the requested files in the local cache" in str(error).lower():
            raise HubUnreachable(f"Hub out of reach and {repo_id}/{filename} is not in the local cache") from None
        raise UserError(f"{repo_id} on the Hub has no {filename}") from None
    except Exception as error:  # connection errors of several libraries share no base class
        raise HubUnreachable(f"Hub out of reach for {repo_id}/{filename}: {type(error).__name__}") from None


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
