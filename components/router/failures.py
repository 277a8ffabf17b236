"""How a request fails: what Dynamo's streams say of it, and what the frontend is told.

An error that a handler raises costs a traceback in the log, whatever it is. An error frame in the stream costs none; it
carries the class from which the frontend makes a status, and the text that it shows.
"""

import json
from typing import Any

# Dynamo's error classes, with which the text of an error in its streams begins. For these the request itself is to
# blame: no worker would take it.
_REFUSALS = ("InvalidRequest", "NotFound", "PayloadTooLarge", "UnsupportedMedia")
_GONE = ("Unavailable", "DeadlineExceeded")


class RequestError(Exception):
    """A request that gets no answer, or no more of it. `kind` is the error class that the frontend is told: it makes
    400 of InvalidRequest, 503 of Unavailable and 500 of Internal. With DeadlineExceeded or CannotConnect it would take
    this router for dead."""

    kind = "Unavailable"
    is_public = True  # the text is shown to the client


class Refused(RequestError):
    """The request is to blame."""

    def __init__(self, reason: str, kind: str = "InvalidRequest"):
        super().__init__(reason)
        self.kind = kind


class NoWorker(RequestError):
    """There is no worker that the prompt could be sent to."""


class Disconnected(RequestError):
    """The client is gone."""


class Late(RequestError):
    """The worker missed the deadline for a token."""


class GivenUp(Late):
    """No worker had a first token within the bound."""


class WorkerError(RequestError):
    """The worker answered with an error of its own."""

    kind = "Internal"
    is_public = False


class WorkerGone(RequestError):
    """The worker is not reached, or ended before its answer did."""

    is_public = False


def of_dynamo(error: Exception) -> RequestError:
    """What an exception of Dynamo's stream says. It passes a worker's error on as a ValueError, "CLASS: text"."""
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
    """Of a worker's HttpError, which comes as JSON, the message."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text
