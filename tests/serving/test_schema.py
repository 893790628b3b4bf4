"""Requests made from the OpenAPI schema by schemathesis, bounded: no answer is a 5xx."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

pytest.importorskip("schemathesis")

import schemathesis

from plug.serving.app import ROUTES, create_app
from plug.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def served(scripted_model: Callable[..., Any], serving: Callable[..., Any]) -> Iterator[Any]:
    with serving([scripted_model()], max_output_tokens=20) as client:
        yield client


def schema_of(scripted_model: Callable[..., Any]) -> dict[str, Any]:
    model = scripted_model()
    schema = create_app([model], ServeSettings()).openapi()
    model.close()
    return schema


def test_the_schema_has_every_route_and_body(scripted_model: Callable[..., Any]) -> None:
    schema = schema_of(scripted_model)

    for path, model, _ in ROUTES:
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = content["schema"]["$ref"].rsplit("/", 1)[1]
        assert name == model.__name__
        assert schema["components"]["schemas"][name]["properties"]
    properties = schema["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"prompt", "max_tokens", "temperature", "stop", "logit_bias"} <= properties.keys()


@pytest.mark.parametrize("path", [path for path, _, _ in ROUTES])
def test_requests_from_the_schema(
    served: Any, scripted_model: Callable[..., Any], path: str
) -> None:
    loaded = schemathesis.openapi.from_dict(schema_of(scripted_model))
    operation = loaded[path]["POST"]
    checked = 0

    @hypothesis.settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        nonlocal checked
        try:
            body = json.dumps(case.body).encode()
        except (TypeError, ValueError):
            return  # it made something that JSON cannot hold
        answer = served.request("POST", path, body, Content_Type="application/json")
        text = answer.read()
        checked += 1
        assert answer.status < 500, text
        if answer.status != 200:
            assert json.loads(text)["error"]["message"]

    ask()
    assert checked > 5
    served.wait_until(lambda: not served.service.jobs)
