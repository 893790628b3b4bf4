"""`Record`: what is known of one request; becomes its line in the log and its counts."""

from __future__ import annotations

import json
import logging
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from plug.serving.metrics import OTHER, Outcome

logger = logging.getLogger("plug.serving")


@dataclass(slots=True)
class Record:
    """One request. Holds no text of a user, so that none gets into a log.

    Attributes:
        request_id: the client's own, or one made here.
        method: of HTTP.
        route: the path as the server knows it, or `OTHER`.
        began: `time.perf_counter()` at its arrival.
        status: of HTTP; 0 while nothing was sent.
        outcome: how it ended, where the status does not tell.
        model: the name of one of the server's models.
        stream: whether the answer was streamed.
        prompt_tokens: of all its prompts.
        completion_tokens: written for it.
        first_token: `time.perf_counter()` at its first token.
        error: the code of the error that was answered, or the type of an exception.
    """

    request_id: str
    method: str = ""
    route: str = OTHER
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    outcome: Outcome | None = None
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    error: str | None = None

    def end(self) -> Outcome:
        """How it ended."""
        if self.outcome is None:
            self.outcome = _outcome(self.status)
        return self.outcome

    def log(self) -> None:
        """Write the line of this request."""
        seconds = time.perf_counter() - self.began
        values: dict[str, Any] = {
            "event": "request",
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "outcome": self.end(),
            "seconds": round(seconds, 4),
        }
        if self.error is not None:
            values["error"] = self.error
        if self.model is not None:
            values |= {"model": self.model, "prompt_tokens": self.prompt_tokens}
        if self.completion_tokens:
            values |= {"completion_tokens": self.completion_tokens, "stream": self.stream}
        if self.first_token is not None:
            values["time_to_first_token"] = round(self.first_token - self.began, 4)
        log_event(logging.INFO, **values)


def log_event(level: int, **values: Any) -> None:
    """Log one JSON object; `event` says what happened."""
    if logger.isEnabledFor(level):
        logger.log(level, json.dumps(values, ensure_ascii=False))


def log_failure(record: Record, error: BaseException) -> None:
    """Log where a bug shows. The exception's own words may quote a user, and are left out."""
    frames = traceback.extract_tb(error.__traceback__)
    log_event(
        logging.ERROR,
        event="failure",
        request_id=record.request_id,
        error=type(error).__name__,
        frames=[f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]],
    )


class JsonLines(logging.Formatter):
    """A line of JSON with its time; messages that are JSON objects keep their fields."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head: dict[str, Any] = {"time": f"{stamp}.{int(record.msecs):03d}Z"}
        head["level"] = record.levelname.lower()
        if record.name == logger.name and message.startswith("{"):
            return f"{json.dumps(head)[:-1]}, {message[1:]}"
        return json.dumps({**head, "logger": record.name, "message": message}, ensure_ascii=False)


def _outcome(status: int) -> Outcome:
    match status:
        case 0:
            return "cancelled"  # it went away before anything was sent
        case 408 | 504:
            return "timeout"
        case 429:
            return "rejected"
        case _ if status < 400:
            return "ok"
        case _ if status < 500:
            return "refused"
        case _:
            return "failed"
