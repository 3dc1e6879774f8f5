import os

FAILURES = {  # what the real one says
    "absent": "Secret {} does not exist.",
    "denied": "Notebook does not have access to secret {}",
    "timeout": "Requesting secret {} timed out. Secrets can only be fetched when running from the Colab UI.",
}


def get(key):
    """The stored secret, or one of the three failures above."""
    mode = os.environ.get("FAKECOLAB_SECRETS") or "absent"
    if mode != "absent" or f"FAKECOLAB_SECRET_{key}" not in os.environ:
        raise Exception(FAILURES[mode].format(key))
    return os.environ[f"FAKECOLAB_SECRET_{key}"]
