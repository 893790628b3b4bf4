from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from plug.errors import UsageError
from plug.serving.app import ROUTES, create_app
from plug.serving.guard import MAX_HEADER_BYTES, OPEN_PATHS
from plug.serving.settings import ServeSettings

KEY, OTHER_KEY = "sk-first-key", "sk-other-key"


@pytest.fixture
def locked(scripted_model: Callable[..., Any], serving: Callable[..., Any]) -> Any:
    with serving([scripted_model()], api_key=(KEY, OTHER_KEY)) as client:
        yield client


def test_every_route_but_health_ready_and_the_page_needs_a_key(
    locked: Any, scripted_model: Callable[..., Any]
) -> None:
    model = scripted_model()
    routes: Any = create_app([model], ServeSettings()).routes
    model.close()
    opened = set()
    for route in routes:
        for method in route.methods or {"GET"}:
            path = route.path.replace("{name:path}", "plug-test")
            answer = locked.request(method, path, b"{}" if method == "POST" else None)
            answer.read()
            if answer.status != 401:
                opened.add(route.path)

    assert {path for path, _, _ in ROUTES} <= {route.path for route in routes}
    page = {path for path in opened if path not in OPEN_PATHS}
    assert opened >= set(OPEN_PATHS)
    assert "/" in page
    assert all(path == "/" or path.endswith((".html", ".js", ".css", ".svg")) for path in page)


@pytest.mark.parametrize("path", ["/v1/nothing", "/docs", "/openapi.json", "/page/../app.py", "//"])
def test_unknown_paths_need_a_key_too(locked: Any, path: str) -> None:
    assert locked.get(path)[0] == 401


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {OTHER_KEY}", 200),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401),
        ("Bearer ", 401),
        ("Bearer 密钥", 401),
    ],
)
def test_the_key_is_a_bearer_token(locked: Any, header: str, status: int) -> None:
    got, text, headers = locked.get("/v1/models", Authorization=header.encode().decode("latin-1"))

    assert got == status
    if status == 401:
        assert headers["www-authenticate"] == "Bearer"
        assert json.loads(text)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "plug.example"])
def test_a_public_address_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="--allow-unauthenticated"):
        ServeSettings(host=host)

    ServeSettings(host=host, allow_unauthenticated=True)
    ServeSettings(host=host, api_key=(KEY,))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_a_local_address_needs_no_key(host: str) -> None:
    assert not ServeSettings(host=host).is_public


@pytest.mark.parametrize("key", ["short", "有汉字的密钥密钥", "with a blank in it"])
def test_a_weak_or_odd_key_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="密钥"):
        ServeSettings(api_key=(key,))


def test_keys_of_a_file(tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n {OTHER_KEY} \n")

    assert ServeSettings(api_key_file=str(path)).api_key == (KEY, OTHER_KEY)
    path.write_text("# none\n")
    with pytest.raises(UsageError, match="没有密钥"):
        ServeSettings(api_key_file=str(path))


def test_a_page_of_another_site_gets_nothing(client: Any) -> None:
    """No CORS headers, so that a browser shows the answer to no other site."""
    answer = client.request("OPTIONS", "/v1/completions", Origin="https://evil.example")
    answer.read()
    _, _, headers = client.get("/v1/models", Origin="https://evil.example")

    assert answer.status == 405
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost:80", 200), ("[::1]:80", 200), ("evil.example", 403)],
)
def test_without_keys_only_names_of_this_machine_are_answered(
    client: Any, host: str, status: int
) -> None:
    assert client.get("/v1/models", Host=host)[0] == status


def test_a_body_that_is_not_declared_as_json_is_refused(client: Any) -> None:
    """A form on any page could send it to this machine without asking the browser first."""
    status, answer, _ = client.post("/v1/completions", {"prompt": "花"}, Content_Type="text/plain")

    assert status == 415
    assert "application/json" in answer["error"]["message"]


def test_a_request_id_is_echoed_or_made(client: Any) -> None:
    assert client.get("/health", X_Request_Id="abc-1")[2]["x-request-id"] == "abc-1"
    made = client.get("/health", X_Request_Id='a"b<c>')[2]["x-request-id"]
    assert made != 'a"b<c>'
    assert len(made) == 32


def test_large_bodies_are_refused_before_they_are_read(client: Any) -> None:
    status, answer, _ = client.post("/v1/completions", b"{}" + b" " * 2**20)

    assert status == 413
    assert answer["error"]["code"] == "body_too_large"


def test_large_bodies_in_chunks_are_refused(client: Any) -> None:
    chunks = (b" " * 65_536 for _ in range(20))
    answer = client.request("POST", "/v1/completions", chunks, Content_Type="application/json")

    assert answer.status == 413


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES, 100_000])
def test_large_headers_are_refused(client: Any, size: int) -> None:
    status, text, _ = client.get("/v1/models", X_Large="x" * size)

    assert status == 431
    assert json.loads(text)["error"]["code"] == "headers_too_large"


def test_the_page_has_its_policy(client: Any) -> None:
    for path in ("/", "/app.js", "/style.css"):
        status, _, headers = client.get(path)
        assert status == 200
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("prefix", ["/plug", ""])
def test_a_proxy_may_strip_the_root_path_or_not(
    scripted_model: Callable[..., Any], serving: Callable[..., Any], prefix: str
) -> None:
    with serving([scripted_model()], root_path="/plug", api_key=(KEY,)) as client:
        assert client.get(f"{prefix}/health")[0] == 200
        assert client.get(f"{prefix}/v1/models")[0] == 401
        assert client.get(f"{prefix}/v1/models", Authorization=f"Bearer {KEY}")[0] == 200


def test_the_log_is_json_and_has_no_text_of_users(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "plug.serving"):
        client.post("/v1/completions", {"prompt": "公园看花", "max_tokens": 2}, X_Request_Id="r1")
        client.post("/v1/completions", {"prompt": "", "max_tokens": 2}, X_Request_Id="r2")
        client.post("/v1/completions", {"prompt": "花", "temperature": "热"}, X_Request_Id="r3")
        client.get("/v1/%E5%85%AC%E5%9B%AD", X_Request_Id="r4")
        client.wait_until(lambda: len(caplog.records) == 4)  # a line is written after the answer
    lines = [json.loads(each.getMessage()) for each in caplog.records]

    first = lines[0]
    assert first["request_id"] == "r1"
    assert (first["status"], first["outcome"], first["model"]) == (200, "ok", "plug-test")
    assert (first["prompt_tokens"], first["completion_tokens"]) == (4, 2)
    assert [each["status"] for each in lines] == [200, 400, 400, 404]
    shown = "".join(each.getMessage() for each in caplog.records)
    assert not any(word in shown for word in ("公园", "看花", "今天", "热"))


def test_a_bug_is_a_500_without_details(
    client: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_text: str) -> list[int]:
        raise RuntimeError("公园里的秘密")

    monkeypatch.setattr(client.service.models["plug-test"], "encode_prompt", fail)
    status, answer, _ = client.post("/v1/completions", {"prompt": "花"}, X_Request_Id="r1")

    assert status == 500
    assert "r1" in answer["error"]["message"]
    assert "秘密" not in json.dumps(answer, ensure_ascii=False)
    assert "秘密" not in caplog.text
    assert "RuntimeError" in caplog.text
    assert client.post("/v1/completions", {"prompt": "花"})[0] == 500  # the server goes on
