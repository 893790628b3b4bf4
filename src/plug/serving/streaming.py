"""`EventStream`: an answer that is sent as it is written (server-sent events).

It does without Starlette's `StreamingResponse`, whose task group costs more than the frames.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response

from plug.serving.guard import Receive, Scope, Send
from plug.serving.jobs import Job

ALIVE_SECONDS = 15.0  # proxies cut a connection that is silent for a minute
_ALIVE = b": \n\n"  # a comment, which clients skip
ABORT = "plug.abort"  # in a scope: closes the connection without sending what is left

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold frames back
}


class EventStream(Response):
    """Sends ``frames`` until they end, or the client leaves.

    Args:
        job: what is written; it is stopped when the stream ends for whatever reason.
        frames: each a whole event, or b"" for nothing new.
        seconds: after which a client that does not read is cut off.
        on_gone: called if the client left before the end.
        headers: besides those of a stream.
    """

    def __init__(
        self,
        job: Job,
        frames: AsyncIterator[bytes],
        seconds: float,
        on_gone: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(None, 200, {**HEADERS, **headers})
        del self.headers["content-length"]
        self._job = job
        self._frames = frames
        self._seconds = seconds
        self._on_gone = on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.create_task(self._watch(receive))
        ticking = asyncio.create_task(self._tick())
        try:
            async with asyncio.timeout(self._seconds):
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                message: dict[str, Any] = {"type": "http.response.body", "more_body": True}
                async for frame in self._frames:
                    await send({**message, "body": frame or _ALIVE})
                if not watching.done():
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:  # it does not read
            self._on_gone()
            scope.get(ABORT, lambda: None)()
        finally:
            self._job.stop()
            ticking.cancel()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _watch(self, receive: Receive) -> None:
        await disconnected(receive)
        if not self._job.is_done:
            self._on_gone()
            self._job.stop()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            self._job.wake()


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
