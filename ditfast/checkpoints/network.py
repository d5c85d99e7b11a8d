"""Servers of weights. They are asked for an answer first: what downloads would wait and retry for much longer."""

import urllib.request
from urllib.error import HTTPError

from ditfast.optional import import_optional

SECONDS = 5.0  # to wait for an answer


def why_no_answer(url: str) -> str | None:
    """Why the server of ``url`` does not answer; None if it does, even if only with an error."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        return None
    except OSError as error:
        return one_line(getattr(error, "reason", error))
    return None


def why_no_hub() -> str | None:
    """Why the Hugging Face Hub does not answer; None if it does."""
    endpoint = import_optional("huggingface_hub.constants").ENDPOINT
    session = import_optional("huggingface_hub.utils").get_session()  # with the user's proxy and settings
    try:
        session.head(endpoint, timeout=SECONDS)
    except Exception as error:  # requests' or httpx's, by version
        return f"{endpoint} does not answer: {one_line(error)}"
    return None


def one_line(error: object) -> str:
    """The message of an error, which may have several lines or none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
