import os


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


class SecretNotFoundError(Exception):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class TimeoutException(Exception):
    def __init__(self, key):
        where = "Secrets can only be fetched when running from the Colab UI."
        super().__init__(f"Requesting secret {key} timed out. {where}")


def get(key):
    """The stored secret, or one of the three errors above."""
    mode = os.environ.get("FAKECOLAB_SECRETS")
    if mode:
        raise {"timeout": TimeoutException, "denied": NotebookAccessError}[mode](key)
    if f"FAKECOLAB_SECRET_{key}" not in os.environ:
        raise SecretNotFoundError(key)
    return os.environ[f"FAKECOLAB_SECRET_{key}"]
