"""`Metrics`: what /metrics tells Prometheus. The number of series is fixed by this file.

No label has a value that a client chooses: a path that no route has counts as "other".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily

# How a request ended. A stream that breaks has the status 200 of its first byte, and is no "ok".
Outcome = Literal["ok", "refused", "rejected", "cancelled", "timeout", "failed"]
OTHER = "other"  # the route of paths that no route has
PAGE = "page"  # of the page's files

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """One registry, so that several servers in a process (tests) do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "plug_requests",
            "Requests by route and by how they ended",
            ("route", "outcome"),
            registry=self.registry,
        )
        self.time_to_first_token = self._histogram(
            "plug_time_to_first_token_seconds", "From arrival to the first token", _SHORT
        )
        self.time_between_tokens = self._histogram(
            "plug_time_between_tokens_seconds", "Between two tokens of a text", _BETWEEN
        )
        self.request_seconds = self._histogram(
            "plug_request_seconds", "Of requests that write, from arrival to the end", _LONG
        )
        self.request_prompt_tokens = self._histogram(
            "plug_request_prompt_tokens", "Tokens of a prompt", _TOKENS
        )
        self.request_completion_tokens = self._histogram(
            "plug_request_completion_tokens", "Tokens written for a request", _TOKENS
        )
        self.prompt_tokens = self._counter("plug_prompt_tokens", "Tokens of prompts")
        self.completion_tokens = self._counter("plug_completion_tokens", "Tokens written")

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Add a value that is asked for at each scrape."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def total(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Add a count kept elsewhere, that is asked for at each scrape."""
        self.registry.register(_Total(name, help_text, value))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        lines = generate_latest(self.registry).splitlines(keepends=True)
        # When each counter began: a third of all series, and nobody asks for it.
        return b"".join(line for line in lines if b"_created" not in line)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, registry=self.registry)


class _Total:
    """A collector of one counter."""

    def __init__(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        self._name, self._help_text, self._value = name, help_text, value

    def collect(self) -> list[CounterMetricFamily]:
        return [CounterMetricFamily(self._name, self._help_text, value=self._value())]
