"""`Admission`: how much the server has taken on, and whether it can take more."""

from __future__ import annotations

import math
import time
from collections import deque

from plug.serving.errors import ApiError, shutting_down
from plug.serving.settings import ServeSettings

_REMEMBERED = 64  # texts, for an estimate of how long one takes
_LONGEST_WAIT = 60  # seconds; clients that obey Retry-After give up above 120


class Admission:
    """Counts texts that wait and that run, and source tokens that wait; on the event loop alone."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.running = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self.is_draining = False
        self._ended: deque[float] = deque(maxlen=_REMEMBERED)

    def enter(self, token_counts: list[int]) -> None:
        """Take texts on, which wait from now, or none of them.

        Raises:
            ApiError: the server drains, or there is no room.
        """
        if self.is_draining:
            raise shutting_down()
        settings = self._settings
        texts, tokens = len(token_counts), sum(token_counts)
        # An idle server takes any request that is within the limits of one, however large.
        is_idle = not self.running and not self.waiting
        free = settings.max_num_seqs - self.running
        is_full = self.waiting + texts > settings.max_waiting + max(0, free)
        if not is_idle and (is_full or self.waiting_tokens + tokens > settings.max_waiting_tokens):
            wait = self._estimate()
            raise ApiError(
                429,
                f"服务器忙：{self.waiting} 个请求在排队。请 {wait} 秒后再试。",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.waiting += texts
        self.waiting_tokens += tokens

    def begin(self, tokens: int) -> None:
        """A text that waited is being worked on."""
        self.waiting -= 1
        self.waiting_tokens -= tokens
        self.running += 1

    def leave(self, tokens: int, *, began: bool) -> None:
        """A text is done, or given up."""
        if began:
            self.running -= 1
            self._ended.append(time.monotonic())
        else:
            self.waiting -= 1
            self.waiting_tokens -= tokens

    def _estimate(self) -> int:
        """Seconds until half of what waits has begun, by how fast texts ended lately."""
        if len(self._ended) < 2:
            return 1
        span = max(0.001, time.monotonic() - self._ended[0])
        return min(_LONGEST_WAIT, max(1, math.ceil(self.waiting * span / len(self._ended) / 2)))
