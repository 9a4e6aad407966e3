"""Who may ask: host names, web pages of other origins, ids of requests, and forms of bodies."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cloud_verifier.model.target import Target
from edge_runtime.cli.main import main
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.auth import AccessRules, RequestGuard
from edge_runtime.service.errors import ApiError
from edge_runtime.service.middleware import REQUEST_ID_KEY, Middleware
from tests.edge_runtime.service.conftest import service_pair, wait_until

PAGE = "https://chat.example"


def check(rules: AccessRules, host: str) -> None:
    headers = [(b"host", host.encode())]
    RequestGuard(rules).check(Request({"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}))


def client_of(rules: AccessRules) -> httpx.AsyncClient:
    """Return a client of a minimal application that answers with the id of the request."""

    async def answer(request: Request) -> Response:
        return Response(request.scope[REQUEST_ID_KEY])

    app = Middleware(Starlette(routes=[Route("/v1/x", answer, methods=["GET", "POST"])]), rules)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8400", "127.0.0.1", "[::1]:8400", "a.localhost", "board.example:1", "Board.Example.", ""],
)
def test_a_local_service_answers_for_its_names(host: str) -> None:
    check(AccessRules(hosts=("board.example",)), host)


def test_a_local_service_answers_for_the_name_of_the_machine() -> None:
    name = socket.gethostname()
    check(AccessRules(), name)
    check(AccessRules(), f"{name.partition('.')[0]}.local:8400")


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "raspberrypi.local.evil.example", "ü"])
def test_other_names_are_refused_with_the_setting_that_admits_them(host: str) -> None:
    with pytest.raises(ApiError) as caught:
        check(AccessRules(hosts=("raspberrypi.local",)), host)
    assert (caught.value.status, caught.value.body.error.code) == (403, "host_not_allowed")
    assert "service.allowed_hosts" in caught.value.body.error.message
    # With keys, or on the network, any name is right.
    check(AccessRules(local=False), host)


async def test_only_pages_of_allowed_origins_may_ask() -> None:
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    async with client_of(AccessRules(origins=(PAGE,))) as client:
        allowed = await client.options("/v1/x", headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
        answer = await client.post("/v1/x", headers={"origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await client.options("/v1/x", headers=preflight | {"origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
    async with client_of(AccessRules()) as client:
        off = await client.options("/v1/x", headers=preflight)
        assert (off.status_code, "access-control-allow-origin" in off.headers) == (405, False)


async def test_rules_can_change() -> None:
    app = Middleware(Starlette(), AccessRules())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert "access-control-allow-origin" not in (await client.get("/", headers={"origin": PAGE})).headers
        app.apply(AccessRules(origins=("*",)))
        assert (await client.get("/", headers={"origin": PAGE})).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(("given", "echoed"), [("abc-1:2/3", True), ("x" * 129, False), ("a b", False), ("", False)])
async def test_every_response_has_the_id_of_its_request(given: str, echoed: bool) -> None:
    async with client_of(AccessRules()) as client:
        answer = await client.get("/v1/x", headers={"x-request-id": given})
        unknown = await client.get("/nowhere", headers={"x-request-id": given})
    assert answer.text == answer.headers["x-request-id"]
    assert (answer.text == given) == (unknown.headers["x-request-id"] == given) == echoed
    assert len(answer.text) > 8


async def test_the_log_names_answer_and_request(
    target: Target, draft: OnnxDraft, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edge_runtime.service")
    async with service_pair(target, draft) as pair:
        answer = await pair.client.completions.with_raw_response.create(
            model="", prompt="x", max_tokens=2, extra_headers={"x-request-id": "mine"}, extra_body={"brand_new": 1}
        )
        assert (answer.headers["x-request-id"], answer.headers["x-ignored-fields"]) == ("mine", "brand_new")
        await wait_until(lambda: any("request mine" in message for message in caplog.messages))
        (line,) = [message for message in caplog.messages if "request mine" in message]
        assert answer.parse().id in line


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "code"),
    [
        ("/v1/completions", {"content-encoding": "gzip"}, gzip.compress(b'{"prompt": "x"}', mtime=0), 415, None),
        ("/v1/completions", {"content-type": "text/plain"}, b'{"prompt": "x"}', 415, None),
        ("/v1/completions", {"content-encoding": "identity"}, b'{"prompt": "x", "max_tokens": 1}', 200, None),
        ("/v1/nothing", {}, b"{}", 404, "unknown_route"),
        ("/v1/completions", {}, b'{"prompt": "", "max_tokens": 1}', 400, "invalid_request"),
        ("/v1/completions", {}, b"{", 400, "invalid_json"),
    ],
)
def test_errors_always_have_a_code(
    url: str, path: str, headers: dict[str, str], body: bytes, status: int, code: str | None
) -> None:
    answer = httpx.post(url + path, content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    if status >= 400:
        error: dict[str, Any] = json.loads(answer.text)["error"]
        assert error["code"] == code if code else error["code"] == "unsupported_media_type"


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nonsense", "socks5://127.0.0.1:1", "http://127.0.0.1:1"])
def test_top_ignores_proxies_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, value)
    assert main(["top", "--once", "--json", "--url", url]) == 0


def test_health_has_both_of_its_names(url: str) -> None:
    assert httpx.get(f"{url}/health").text == httpx.get(f"{url}/healthz").text == "ok\n"
