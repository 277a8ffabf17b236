"""The errors of a request: how Dynamo's streams report them, and how the frontend gets them.

If a handler raises an exception, Dynamo logs a traceback. An error frame in the stream avoids that. It carries the
error class, which the frontend maps to an HTTP status, and the text for the client.
"""

import json
from typing import Any

# Dynamo's error classes; the text of an error in its streams begins with one. These mean that the request itself is
# invalid: no worker would accept it.
_REFUSALS = ("InvalidRequest", "NotFound", "PayloadTooLarge", "UnsupportedMedia")
_GONE = ("Unavailable", "DeadlineExceeded")


class RequestError(Exception):
    """A request that gets no response, or an incomplete one. `kind` is the error class for the frontend, which maps
    InvalidRequest to 400, Unavailable to 503 and Internal to 500. DeadlineExceeded or CannotConnect must not be used:
    the frontend would count this router as dead."""

    kind = "Unavailable"
    is_public = True  # the text is shown to the client


class Refused(RequestError):
    """The request is invalid."""

    def __init__(self, reason: str, kind: str = "InvalidRequest"):
        super().__init__(reason)
        self.kind = kind


class NoWorker(RequestError):
    """No worker can take the prompt."""


class Disconnected(RequestError):
    """The client disconnected."""


class Late(RequestError):
    """The worker missed the deadline for a token."""


class GivenUp(Late):
    """No worker produced a first token within the bound."""


class WorkerError(RequestError):
    """The worker returned an error of its own."""

    kind = "Internal"
    is_public = False


class WorkerGone(RequestError):
    """The worker is unreachable, or ended before its response was complete."""

    is_public = False


def of_dynamo(error: Exception) -> RequestError:
    """The error for an exception of Dynamo's stream. A worker's error arrives as a ValueError, "CLASS: text"."""
    kind, _, text = str(error).partition(": ")
    if kind in _REFUSALS:
        return Refused(_message(text), kind)
    if isinstance(error, ValueError) and kind not in _GONE:
        return WorkerError(str(error))
    return WorkerGone(str(error))


def frame(error: RequestError) -> dict[str, Any]:
    """The error as an item of a handler's stream, in Dynamo's wire format."""
    told: dict[str, Any] = {"class": error.kind, "diagnostic": str(error)}
    if error.is_public:
        told["public"] = {"type": "message", "message": str(error)}
    return {"_dynamo_annotated": True, "event": "error", "error": told}


def _message(text: str) -> str:
    """The message of a worker's HttpError, which is JSON; otherwise the text itself."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text
