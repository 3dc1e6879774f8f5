from google.colab import errors


class MessageError(errors.Error):
    """Raised on an error answer of the browser page."""
