"""The admin API over HTTP: authorization, operations, errors, and its OpenAPI description."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
import schemathesis
from schemathesis import GenerationMode

from cloud_verifier.api import admin
from cloud_verifier.api.admin import ADMIN_OPERATIONS, AdminOperation, TargetsReply
from cloud_verifier.cli.main import main
from cloud_verifier.registry.registry import Registry
from edge_runtime.protocol.messages import ErrorReply
from tests.cloud_verifier.cli.test_targets import write_text
from tests.cloud_verifier.protocol_client import TIMEOUT_SECONDS
from tests.cloud_verifier.target_versions import serve_registry
from tests.fuzzing import fuzz, whole
from tests.models import save_target

ADMIN = "/admin/v1/targets"
TOKENS = "tokens.toml"


@pytest.fixture
def registry(models: Path, tmp_path: Path) -> Registry:
    """A registry of v0, to which `latest` leads; v1 and v2 are in its roots."""
    registry = Registry(tmp_path / "registry")
    registry.update(lambda catalog: msgspec.structs.replace(catalog, roots=[".", str(models)]))
    registry.add("v0")
    return registry


@pytest.fixture
def tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Tokens by role, from the token file `tmp_path / TOKENS`."""
    file = tmp_path / TOKENS
    tokens = {}
    for role in ("admin", "board", "monitor"):
        assert main(["token", "add", role, "--role", role, "--tokens", str(file)]) == 0
        tokens[role] = capsys.readouterr().out.strip()
    return tokens


class AdminClient:
    """An HTTP client of the admin API, as plain as curl."""

    def __init__(self, url: str, token: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=TIMEOUT_SECONDS)

    def list(self) -> TargetsReply:
        response = self.http.get(ADMIN)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), response.text
        return msgspec.json.decode(response.content, type=TargetsReply)

    def post(self, action: str = "", **fields: object) -> TargetsReply:
        response = self.http.post(f"{ADMIN}/{action}".rstrip("/"), content=msgspec.json.encode(fields))
        assert response.status_code == 200, response.text
        return msgspec.json.decode(response.content, type=TargetsReply)

    def post_for_error(self, action: str = "", body: bytes | None = None, **fields: object) -> tuple[int, ErrorReply]:
        response = self.http.post(f"{ADMIN}/{action}".rstrip("/"), content=body or msgspec.json.encode(fields))
        assert response.headers["content-type"] == "application/json"
        return response.status_code, msgspec.json.decode(response.content, type=ErrorReply)

    def wait_until(self, condition: Callable[[TargetsReply], object]) -> TargetsReply:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition(self.list()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self.list()


@pytest.fixture
def admin_client(registry: Registry, tokens: dict[str, str], tmp_path: Path) -> Iterator[AdminClient]:
    with serve_registry(registry, tmp_path / TOKENS) as url:
        admin_client = AdminClient(url, tokens["admin"])
        admin_client.wait_until(lambda reply: reply.active_aliases)
        yield admin_client


def active_aliases(reply: TargetsReply) -> dict[str, str]:
    """Name of the version that each alias leads to."""
    return {alias: version.partition("@")[0] for alias, version in reply.active_aliases.items()}


@pytest.mark.slow
def test_only_admins_are_authorized(registry: Registry, tokens: dict[str, str], tmp_path: Path) -> None:
    with serve_registry(registry, tmp_path / TOKENS) as url:
        for token, status, code in (
            ("wrong", 401, "unauthorized"),
            (tokens["board"], 403, "forbidden"),
            (tokens["monitor"], 403, "forbidden"),
        ):
            for operation in ADMIN_OPERATIONS:
                # The request is authorized before its body is read.
                response = httpx.request(
                    operation.method, url + operation.path, headers={"authorization": f"Bearer {token}"}, content=b"{"
                )
                assert (response.status_code, response.json()["code"]) == (status, code)
    before = registry.file.read_bytes()
    with serve_registry(registry) as url:
        for operation in ADMIN_OPERATIONS:
            response = httpx.request(operation.method, url + operation.path)
            assert (response.status_code, response.json()["code"]) == (404, "unknown_route")
        assert ADMIN not in httpx.get(f"{url}/openapi.json").json().get("paths", {})
    assert registry.file.read_bytes() == before


def test_a_rollout_over_http(admin_client: AdminClient, registry: Registry) -> None:
    reply = admin_client.post(name="v1")
    assert [listed.version.partition("@")[0] for listed in reply.data] == ["v1", "v0"]
    reply = admin_client.wait_until(lambda reply: all(listed.loaded for listed in reply.data))
    assert (reply.default, active_aliases(reply)) == ("latest", {"latest": "v0"})
    assert active_aliases(admin_client.post("promote", version="v1")) == {"latest": "v1"}
    assert active_aliases(admin_client.post("promote", version="v0", alias="stable")) == {
        "latest": "v1",
        "stable": "v0",
    }
    reply = admin_client.post("canary", version="v0", percent=12.5)
    assert {listed.version[:2]: listed.aliases for listed in reply.data} == {
        "v1": {"latest": 87.5},
        "v0": {"latest": 12.5, "stable": 100.0},
    }
    admin_client.post("rollback")
    assert active_aliases(admin_client.post("rollback", alias="latest")) == {"latest": "v0", "stable": "v0"}
    reply = admin_client.post("retire", version="v1")
    assert {listed.version[:2]: listed.state for listed in reply.data} == {"v0": "active", "v1": "retired"}
    assert registry.read().aliases == reply.aliases
    assert [model["id"] for model in admin_client.http.get("/v1/models", headers={}).json()["data"]][:2] == [
        "latest",
        "stable",
    ]


def test_the_service_follows_changes_by_the_command(admin_client: AdminClient, registry: Registry) -> None:
    registry.add("v1")
    registry.promote("latest", "v1")
    admin_client.wait_until(lambda reply: active_aliases(reply) == {"latest": "v1"})


def test_refused_changes_are_explained_and_change_nothing(
    admin_client: AdminClient, registry: Registry, models: Path, tmp_path: Path
) -> None:
    admin_client.post(name="v1")
    before = registry.file.read_bytes()
    for action, fields, status, code in (
        ("promote", {"version": "v9"}, 404, "unknown_model"),
        ("promote", {"version": "v1", "alias": "a b"}, 409, "target_refused"),
        ("promote", {"version": "v1", "alias": "v0"}, 409, "target_refused"),
        ("promote", {"name": "v1"}, 400, "malformed"),
        ("promote", {"version": "v1", "v": 2}, 400, "unsupported_version"),
        ("canary", {"version": "v1", "percent": 101}, 400, "malformed"),
        ("canary", {"version": "v0", "percent": 5}, 409, "target_refused"),
        ("rollback", {}, 409, "target_refused"),
        ("rollback", {"alias": "stable"}, 404, "unknown_model"),
        ("retire", {"version": "v0"}, 409, "target_refused"),
        ("retire", {"version": ""}, 404, "unknown_model"),
        ("check", {"version": "../v1"}, 409, "target_refused"),
        ("", {"name": "../models/v1"}, 409, "target_refused"),
        ("", {"name": str(models / "v2")}, 409, "target_refused"),
        ("", {"name": ".."}, 409, "target_refused"),
        ("", {"name": "v9"}, 409, "target_refused"),
    ):
        found, error = admin_client.post_for_error(action, **fields)
        assert (found, error.code) == (status, code), (action, fields, error)
        assert len(error.message.split()) > 3
    assert admin_client.post_for_error("promote", b"\xff{")[0] == 400
    assert admin_client.post_for_error("promote", b"[" * 100_000)[0] == 400
    assert (
        admin_client.post_for_error("check", msgspec.json.encode({"version": "v1", "text": "x" * (1 << 20)}))[0] == 413
    )
    assert registry.file.read_bytes() == before


def test_an_incompatible_version_is_refused_with_its_differences(
    admin_client: AdminClient, registry: Registry, family: Path, tmp_path: Path
) -> None:
    registry.add_draft(family / "bundle")
    status, error = admin_client.post_for_error(name="v1")
    assert (status, error.code) == (409, "incompatible_target")
    assert any("tensor model.norm.weight" in line for line in error.detail["differences"])
    reply = admin_client.post(name="v1", unshared=True)
    assert {listed.version[:2]: listed.admitted for listed in reply.data} == {"v0": "shared", "v1": "unshared"}
    assert admin_client.post_for_error("promote", version="v1")[0] == 409
    assert active_aliases(admin_client.post("promote", version="v1", unshared=True))


def test_an_invalid_registry_is_a_typed_error(admin_client: AdminClient, registry: Registry) -> None:
    registry.file.write_text(registry.file.read_text() + "\n[nonsense]\n")
    status, error = admin_client.post_for_error("promote", version="v0")
    assert (status, error.code) == (500, "internal")
    assert "nonsense" in error.message
    assert active_aliases(admin_client.list()) == {"latest": "v0"}


@pytest.mark.slow
def test_a_check_over_http(
    tokens: dict[str, str], family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At low priority the check would hardly progress next to other tests.
    monkeypatch.setattr(admin, "CHECK_NICENESS", 0)
    family_registry = Registry(tmp_path / "family-registry")
    save_target(family_registry.path / "foreign")
    family_registry.update(lambda catalog: msgspec.structs.replace(catalog, roots=[".", str(family)]))
    family_registry.add_draft(family / "bundle")
    family_registry.add("target-v1")
    text = write_text(tmp_path / "text").read_text()
    with serve_registry(family_registry, tmp_path / TOKENS, check_options=["--threads", "1"]) as url:
        admin_client = AdminClient(url, tokens["admin"])

        def check(version: str) -> httpx.Response:
            body = {"version": version, "text": text, "tolerance": 50}
            return admin_client.http.post(f"{ADMIN}/check", json=body)

        with ThreadPoolExecutor() as pool:
            checks = [pool.submit(check, "target-v2") for _ in range(2)]
            assert admin_client.list().default == "latest"  # other requests are served meanwhile
        refused, good = sorted((checked.result() for checked in checks), key=lambda response: -response.status_code)
        assert (refused.status_code, refused.json()["code"], good.status_code) == (503, "overloaded", 200)
        good, bad = good.json(), check("foreign").json()
    assert (good["fine"], good["compatible"], len(good["expected"])) == (True, True, 1)
    assert (bad["fine"], bad["compatible"], bad["expected"]) == (False, False, [])
    assert "tensor" in {difference["what"] for difference in bad["gate"]["fits"][0]["differences"]}


# Not the check, which starts a process each time.
FUZZED = [operation for operation in ADMIN_OPERATIONS if operation.name != "check_target"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("operation", FUZZED, ids=lambda operation: operation.name)
def test_the_api_conforms_to_its_openapi_description(
    operation: AdminOperation, mode: GenerationMode, admin_client: AdminClient, registry: Registry
) -> None:
    if operation.request is None and mode is GenerationMode.NEGATIVE:
        return  # there is no body that could be invalid
    document = admin_client.http.get("/openapi.json").json()
    # The test supplies the token: everything else is fuzzed.
    del document["paths"][operation.path][operation.method.lower()]["security"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=str(admin_client.http.base_url))
    statuses: Counter[int] = Counter()

    def prepare(case: schemathesis.Case) -> None:
        case.headers.update({"authorization": admin_client.http.headers["authorization"]})
        case.body = whole(case.body)

    def record_status(response: schemathesis.Response) -> None:
        statuses[response.status_code] += 1

    fuzz(schema[operation.path][operation.method.lower()], mode, prepare, record_status)
    assert statuses.keys() <= ({200, 404, 409} if mode is GenerationMode.POSITIVE else {400})
    registry.read()
    assert admin_client.list().active_aliases


def test_the_openapi_document_describes_the_admin_api(admin_client: AdminClient) -> None:
    document = admin_client.http.get("/openapi.json").json()
    for operation in ADMIN_OPERATIONS:
        found = document["paths"][operation.path][operation.method.lower()]
        assert found["security"] == [{"token": []}]
        assert {"200", "401", "403", "409"} <= found["responses"].keys()
    assert set(document["components"]["schemas"]["AddTarget"]["properties"]) == {"name", "unshared", "v"}
