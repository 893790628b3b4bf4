from __future__ import annotations

import uuid
from typing import Any

from plug.serving.app import ROUTES
from plug.serving.metrics import Metrics


def series(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_what_is_counted(client: Any) -> None:
    client.post("/v1/completions", {"prompt": "看花", "max_tokens": 5, "n": 2})
    client.post("/v1/completions", {"prompt": ""})
    client.wait_until(
        lambda: (
            'route="/v1/completions",outcome="refused"' in found(client)[0]
            or 'outcome="refused",route="/v1/completions"' in found(client)[0]
        )
    )
    _, values = found(client)

    assert values['plug_requests_total{outcome="ok",route="/v1/completions"}'] == 1
    assert values['plug_requests_total{outcome="refused",route="/v1/completions"}'] == 1
    assert values["plug_prompt_tokens_total"] == 2
    assert values["plug_completion_tokens_total"] == 10
    assert values["plug_time_to_first_token_seconds_count"] == 1
    assert values["plug_time_between_tokens_seconds_count"] == 8
    assert values["plug_running_texts"] == 0
    assert values["plug_waiting_texts"] == 0


def found(client: Any) -> tuple[str, dict[str, float]]:
    text = client.get("/metrics")[1]
    return text, series(text)


def test_clients_cannot_make_series(client: Any) -> None:
    for index in range(30):
        client.get(f"/{uuid.uuid4()}")
        client.get(f"/v1/models/{uuid.uuid4()}")
        client.request(f"M{index}", "/v1/completions").read()
        client.post("/v1/completions", {"prompt": "花", "max_tokens": 1, "model": str(index)})
    text, values = found(client)

    assert len(values) < 150
    assert 'route="other"' in text
    assert 'route="/v1/models/{name:path}"' in text


def test_there_are_at_most_250_series() -> None:
    metrics = Metrics()

    others = [
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/models/{name:path}",
        "other",
        "page",
    ]
    outcomes = ["ok", "refused", "rejected", "cancelled", "timeout", "failed"]
    for route in [path for path, _, _ in ROUTES] + others:
        for outcome in outcomes:
            metrics.requests.labels(route, outcome).inc()

    assert len(series(metrics.render().decode())) + 30 <= 250
