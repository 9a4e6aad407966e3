"""The admin API, over HTTP: who may use it, and what each of its answers is."""

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
from tests.cloud_verifier.target_versions import serve_registry
from tests.fuzzing import fuzz, whole
from tests.models import save_target

ADMIN = "/admin/v1/targets"
TOKENS = "tokens.toml"


@pytest.fixture
def registry(models: Path, tmp_path: Path) -> Registry:
    """With v0, which `latest` leads to; v1 and v2 lie in its roots."""
    registry = Registry(tmp_path / "registry")
    registry.update(lambda roster: msgspec.structs.replace(roster, roots=[".", str(models)]))
    registry.add("v0")
    return registry


@pytest.fixture
def tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Tokens by role; their file is `tmp_path / TOKENS`."""
    file = tmp_path / TOKENS
    tokens = {}
    for role in ("admin", "board", "monitor"):
        assert main(["token", "add", role, "--role", role, "--tokens", str(file)]) == 0
        tokens[role] = capsys.readouterr().out.strip()
    return tokens


class Operator:
    """Somebody with a token, and curl."""

    def __init__(self, url: str, token: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=240)

    def list(self) -> TargetsReply:
        response = self.http.get(ADMIN)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), response.text
        return msgspec.json.decode(response.content, type=TargetsReply)

    def say(self, what: str = "", **said: object) -> TargetsReply:
        response = self.http.post(f"{ADMIN}/{what}".rstrip("/"), content=msgspec.json.encode(said))
        assert response.status_code == 200, response.text
        return msgspec.json.decode(response.content, type=TargetsReply)

    def refused(self, what: str = "", body: bytes | None = None, **said: object) -> tuple[int, ErrorReply]:
        response = self.http.post(f"{ADMIN}/{what}".rstrip("/"), content=body or msgspec.json.encode(said))
        assert response.headers["content-type"] == "application/json"
        return response.status_code, msgspec.json.decode(response.content, type=ErrorReply)

    def wait(self, holds: Callable[[TargetsReply], object]) -> TargetsReply:
        end = time.monotonic() + 30
        while not holds(self.list()):
            assert time.monotonic() < end
            time.sleep(0.02)
        return self.list()


@pytest.fixture
def operator(registry: Registry, tokens: dict[str, str], tmp_path: Path) -> Iterator[Operator]:
    with serve_registry(registry, tmp_path / TOKENS) as url:
        operator = Operator(url, tokens["admin"])
        operator.wait(lambda told: told.leading)
        yield operator


def leads(told: TargetsReply) -> dict[str, str]:
    """Where aliases lead, by name."""
    return {alias: version.partition("@")[0] for alias, version in told.leading.items()}


def test_only_an_admin_gets_in(registry: Registry, tokens: dict[str, str], tmp_path: Path) -> None:
    with serve_registry(registry, tmp_path / TOKENS) as url:
        for token, status, code in (
            ("wrong", 401, "unauthorized"),
            (tokens["board"], 403, "forbidden"),
            (tokens["monitor"], 403, "forbidden"),
        ):
            for one in ADMIN_OPERATIONS:
                # The body is not looked at before it is known whose it is.
                response = httpx.request(
                    one.method, url + one.path, headers={"authorization": f"Bearer {token}"}, content=b"{"
                )
                assert (response.status_code, response.json()["code"]) == (status, code)
    before = registry.file.read_bytes()
    with serve_registry(registry) as url:
        for one in ADMIN_OPERATIONS:
            response = httpx.request(one.method, url + one.path)
            assert (response.status_code, response.json()["code"]) == (404, "unknown_route")
        assert ADMIN not in httpx.get(f"{url}/openapi.json").json().get("paths", {})
    assert registry.file.read_bytes() == before


def test_a_roll_out_over_http(operator: Operator, registry: Registry) -> None:
    told = operator.say(name="v1")
    assert [one.version.partition("@")[0] for one in told.data] == ["v1", "v0"]
    told = operator.wait(lambda told: all(one.loaded for one in told.data))
    assert (told.default, leads(told)) == ("latest", {"latest": "v0"})
    assert leads(operator.say("promote", version="v1")) == {"latest": "v1"}
    assert leads(operator.say("promote", version="v0", alias="stable")) == {"latest": "v1", "stable": "v0"}
    told = operator.say("canary", version="v0", percent=12.5)
    assert {one.version[:2]: one.aliases for one in told.data} == {
        "v1": {"latest": 87.5},
        "v0": {"latest": 12.5, "stable": 100.0},
    }
    operator.say("rollback")
    assert leads(operator.say("rollback", alias="latest")) == {"latest": "v0", "stable": "v0"}
    told = operator.say("retire", version="v1")
    assert {one.version[:2]: one.state for one in told.data} == {"v0": "active", "v1": "retired"}
    assert registry.read().aliases == told.aliases
    assert [one["id"] for one in operator.http.get("/v1/models", headers={}).json()["data"]][:2] == ["latest", "stable"]


def test_what_the_command_changes_the_service_follows(operator: Operator, registry: Registry) -> None:
    registry.add("v1")
    registry.promote("latest", "v1")
    operator.wait(lambda told: leads(told) == {"latest": "v1"})


def test_what_is_refused_says_why_and_changes_nothing(
    operator: Operator, registry: Registry, models: Path, tmp_path: Path
) -> None:
    operator.say(name="v1")
    before = registry.file.read_bytes()
    for what, said, status, code in (
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
        found, refusal = operator.refused(what, **said)
        assert (found, refusal.code) == (status, code), (what, said, refusal)
        assert len(refusal.message.split()) > 3
    assert operator.refused("promote", b"\xff{")[0] == 400
    assert operator.refused("promote", b"[" * 100_000)[0] == 400
    assert operator.refused("check", msgspec.json.encode({"version": "v1", "text": "x" * (1 << 20)}))[0] == 413
    assert registry.file.read_bytes() == before


def test_a_version_outside_the_contract_is_refused_with_its_tensors(
    operator: Operator, registry: Registry, family: Path, tmp_path: Path
) -> None:
    registry.add_draft(family / "bundle")
    status, refusal = operator.refused(name="v1")
    assert (status, refusal.code) == (409, "incompatible_target")
    assert any("tensor model.norm.weight" in line for line in refusal.detail["differences"])
    told = operator.say(name="v1", unshared=True)
    assert {one.version[:2]: one.admitted for one in told.data} == {"v0": "shared", "v1": "unshared"}
    assert operator.refused("promote", version="v1")[0] == 409
    assert leads(operator.say("promote", version="v1", unshared=True))


def test_a_registry_that_cannot_be_written_is_a_typed_fault(operator: Operator, registry: Registry) -> None:
    registry.file.write_text(registry.file.read_text() + "\n[nonsense]\n")
    status, refusal = operator.refused("promote", version="v0")
    assert (status, refusal.code) == (500, "internal")
    assert "nonsense" in refusal.message
    assert leads(operator.list()) == {"latest": "v0"}


@pytest.mark.slow
def test_a_check_over_http(
    tokens: dict[str, str], family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beside other tests it would hardly get its turn.
    monkeypatch.setattr(admin, "CHECK_NICENESS", 0)
    own = Registry(tmp_path / "own")
    save_target(own.path / "foreign")
    own.update(lambda roster: msgspec.structs.replace(roster, roots=[".", str(family)]))
    own.add_draft(family / "bundle")
    own.add("target-v1")
    text = write_text(tmp_path / "text").read_text()
    with serve_registry(own, tmp_path / TOKENS, check_options=["--threads", "1"]) as url:
        operator = Operator(url, tokens["admin"])

        def check(version: str) -> httpx.Response:
            body = {"version": version, "text": text, "tolerance": 50}
            return operator.http.post(f"{ADMIN}/check", json=body)

        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(check, "target-v2") for _ in range(2)]
            assert operator.list().default == "latest"  # meanwhile others are served
        refused, good = sorted((one.result() for one in asked), key=lambda answer: -answer.status_code)
        assert (refused.status_code, refused.json()["code"], good.status_code) == (503, "overloaded", 200)
        good, bad = good.json(), check("foreign").json()
    assert (good["fine"], good["compatible"], len(good["expected"])) == (True, True, 1)
    assert (bad["fine"], bad["compatible"], bad["expected"]) == (False, False, [])
    assert "tensor" in {difference["what"] for difference in bad["gate"]["fits"][0]["differences"]}


FUZZED = [one for one in ADMIN_OPERATIONS if one.handler != "check_target"]  # that one starts a process each time


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("one", FUZZED, ids=lambda one: one.handler)
def test_it_does_what_its_description_says(
    one: AdminOperation, mode: GenerationMode, operator: Operator, registry: Registry
) -> None:
    if one.request is None and mode is GenerationMode.NEGATIVE:
        return  # there is nothing to say wrongly
    described = operator.http.get("/openapi.json").json()
    # The token is given here: what is to be tried is the rest.
    del described["paths"][one.path][one.method.lower()]["security"]
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=str(operator.http.base_url))
    counted: Counter[int] = Counter()

    def prepare(case: schemathesis.Case) -> None:
        case.headers.update({"authorization": operator.http.headers["authorization"]})
        case.body = whole(case.body)

    def heed(response: schemathesis.Response) -> None:
        counted[response.status_code] += 1

    fuzz(schema[one.path][one.method.lower()], mode, prepare, heed)
    assert counted.keys() <= ({200, 404, 409} if mode is GenerationMode.POSITIVE else {400})
    registry.read()
    assert operator.list().leading


def test_the_api_is_described(operator: Operator) -> None:
    described = operator.http.get("/openapi.json").json()
    for one in ADMIN_OPERATIONS:
        found = described["paths"][one.path][one.method.lower()]
        assert found["security"] == [{"token": []}]
        assert {"200", "401", "403", "409"} <= found["responses"].keys()
    assert set(described["components"]["schemas"]["AddTarget"]["properties"]) == {"name", "unshared", "v"}
