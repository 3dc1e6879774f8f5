import os

from google.colab import errors


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(errors.Error):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(errors.Error):
    def __init__(self, key):
        super().__init__(
            f"Requesting secret {key} timed out. Secrets can only be fetched when running from the Colab UI."
        )


def get(key):
    """The stored secret, or one of the three errors above."""
    mode = os.environ.get("FAKECOLAB_SECRETS")
    if mode == "timeout":
        raise TimeoutException(key)
    if mode == "denied":
        raise NotebookAccessError(key)
    if f"FAKECOLAB_SECRET_{key}" not in os.environ:
        raise SecretNotFoundError(key)
    return os.environ[f"FAKECOLAB_SECRET_{key}"]
