"""Authentication and limits: tokens, roles, limits per principal, private sessions, client certificates."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cloud_verifier.api.app import VerifierLimits
from cloud_verifier.cli.main import main
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.principals import Role, hash_token, read_principals
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import InputError, VerifierRefused, VerifierUnreachable
from edge_runtime.protocol.messages import ErrorCode
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.link_faults import Fault
from edge_runtime.verifier.session import VerifierSession
from tests.cloud_verifier.certificates import CertificateAuthority
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.protocol_client import PROMPT, ProtocolClient, decode_error, opening, running
from tests.conftest import serving

ENDLESS = Sampling(ignore_eos=True)

AddToken = Callable[..., str]


@contextlib.asynccontextmanager
async def board_client(target: Target, tokens: Path | None, token: str) -> AsyncIterator[VerifierClient]:
    """A verifier with this token file, and a board's client with this token."""
    async with (
        serving(target, authenticator=Authenticator(tokens)) as server,
        VerifierClient(server.url, token=token) as client,
    ):
        yield client


async def drain(pieces: AsyncIterator[object]) -> None:
    """Wait for the end of a round."""
    async for _ in pieces:
        pass


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Path of the token file, which does not exist yet."""
    return tmp_path / "tokens.toml"


@pytest.fixture
def add_token(tokens: Path, capsys: pytest.CaptureFixture[str]) -> AddToken:
    """`add_token(name, *options)`: the new token of `cloud-verifier token add`."""

    def add_token(name: str, *options: str) -> str:
        capsys.readouterr()
        assert main(["token", "add", name, "--tokens", str(tokens), *options]) == 0
        return capsys.readouterr().out.strip()

    return add_token


# The token file


def test_a_token_is_printed_once_and_stored_as_its_hash(tokens: Path, add_token: AddToken) -> None:
    token = add_token("kitchen", "--max-sessions", "8", "--tokens-per-second", "50", "--max-prompt", "4096")
    assert len(token) == 32
    assert token not in tokens.read_text()
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    kitchen = read_principals(tokens)["kitchen"]
    assert (kitchen.name, kitchen.role, kitchen.sha256) == ("kitchen", Role.BOARD, hash_token(token))
    assert (kitchen.max_sessions, kitchen.tokens_per_second, kitchen.max_prompt) == (8, 50.0, 4096)


def test_tokens_are_unique_and_comments_stay(tokens: Path, add_token: AddToken) -> None:
    tokens.write_text("# first floor\n")
    assert add_token("one") != add_token("two")
    tokens.write_text(tokens.read_text().replace("[two]", "[two] # second"))
    add_token("three")
    text = tokens.read_text()
    assert "# first floor" in text
    assert "# second" in text
    assert list(read_principals(tokens)) == ["one", "two", "three"]


def test_a_token_is_replaced_only_with_replace(
    tokens: Path, add_token: AddToken, capsys: pytest.CaptureFixture[str]
) -> None:
    first = add_token("kitchen", "--max-sessions", "2")
    assert main(["token", "add", "kitchen", "--tokens", str(tokens)]) == 2
    assert "--replace revokes it" in capsys.readouterr().err
    assert read_principals(tokens)["kitchen"].sha256 == hash_token(first)
    second = add_token("kitchen", "--replace")
    assert read_principals(tokens)["kitchen"].sha256 == hash_token(second) != hash_token(first)


def test_list_and_revoke(tokens: Path, add_token: AddToken, capsys: pytest.CaptureFixture[str]) -> None:
    token = add_token("kitchen", "--max-sessions", "8", "--max-prompt", "none")
    add_token("operator", "--role", "admin")
    assert main(["token", "list", "--tokens", str(tokens)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed] == [["kitchen", "board"], ["operator", "admin"]]
    assert "8 sessions" in listed[0]
    assert main(["token", "list", "--json", "--tokens", str(tokens)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "kitchen": {"role": "board", "max_sessions": 8, "tokens_per_second": 200.0},
        "operator": {"role": "admin", "max_sessions": 16, "tokens_per_second": 200.0, "max_prompt": 32_768},
    }
    assert main(["token", "revoke", "kitchen", "--tokens", str(tokens)]) == 0
    assert list(read_principals(tokens)) == ["operator"]
    assert hash_token(token) not in tokens.read_text()
    assert main(["token", "revoke", "kitchen", "--tokens", str(tokens)]) == 2
    assert "has no token of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "is not TOML"),
        ("[a]\nrole = 'board'", r"\[a\]: Object missing required field `sha256`"),
        ("[a]\nsha256 = 'short'", r"\[a\]: .*sha256"),
        (f"[a]\nsha256 = '{'0' * 64}'\nrole = 'king'", r"\[a\]: .*'king'"),
        (f"[a]\nsha256 = '{'0' * 64}'\nmax_session = 1", r"\[a\]: .*max_session"),
        (f"[a]\nsha256 = '{'0' * 64}'\nmax_sessions = 0", r"\[a\]: .*max_sessions"),
        (f"[a]\nsha256 = '{'0' * 64}'\n[b]\nsha256 = '{'0' * 64}'", "a and b have the same token"),
        (f"['a b']\nsha256 = '{'0' * 64}'", "not a valid name of a principal"),
        ("a = 1", r"\[a\]: "),
        (None, "cannot read the token file"),
    ],
)
def test_an_invalid_token_file(
    tokens: Path, tiny_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        tokens.write_text(text)
    with pytest.raises(InputError, match=message):
        Authenticator(tokens)
    assert main(["serve", str(tiny_path), "--tokens", str(tokens)]) == 2
    assert str(tokens) in capsys.readouterr().err
    if text is not None:
        assert main(["token", "add", "c", "--tokens", str(tokens)]) == 2
        assert tokens.read_text() == text


def test_limits_are_finite_and_printed_unless_told_otherwise(
    tokens: Path, add_token: AddToken, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("max_sessions", "tokens_per_second", "max_prompt")
    assert main(["token", "add", "usual", "--tokens", str(tokens)]) == 0
    told = capsys.readouterr()
    assert len(told.out.split()) == 1
    assert "usual has the role board; 16 sessions, 200 tokens per second, 32768 prompt tokens" in told.err
    unlimited = [argument for name in limits for argument in (f"--{name.replace('_', '-')}", "none")]
    add_token("unlimited", *unlimited)
    add_token("prometheus", "--role", "monitor")
    principals = read_principals(tokens)
    for name in limits:
        assert getattr(principals["usual"], name)
        assert getattr(principals["unlimited"], name) is getattr(principals["prometheus"], name) is None


@pytest.mark.parametrize(
    "arguments",
    [["no/name"], ["x", "--max-sessions", "0"], ["x", "--tokens-per-second", "-1"], ["x", "--max-prompt", "0"]],
)
def test_invalid_arguments_write_nothing(
    tokens: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", "add", *arguments, "--tokens", str(tokens)]) == 2
    assert capsys.readouterr().err.startswith("cloud-verifier: ")
    assert not tokens.exists()


def test_a_failed_reload_changes_nothing(tokens: Path, add_token: AddToken) -> None:
    add_token("kitchen")
    authenticator = Authenticator(tokens)
    original = tokens.read_text()
    tokens.write_text("[kitchen]\n")
    with pytest.raises(InputError):
        authenticator.reload()
    assert len(authenticator) == 1
    tokens.write_text(original)
    add_token("hall")
    authenticator.reload()
    assert len(authenticator) == 2


# Over HTTP

PROTECTED = [
    ("POST", "/v1/sessions", Role.BOARD),
    ("POST", "/v1/sessions/abc/rounds", Role.BOARD),
    ("DELETE", "/v1/sessions/abc", Role.BOARD),
    ("GET", "/v1/models", Role.BOARD),
    ("GET", "/metrics", Role.MONITOR),
]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer x{}", "Bearer \xff"])
def test_protected_routes_need_a_known_token(tiny: Target, tokens: Path, add_token: AddToken, header: str) -> None:
    token = add_token("kitchen", "--role", "admin")
    with running(tiny, authenticator=Authenticator(tokens)) as url, httpx.Client(base_url=url) as client:
        headers = {"authorization": header.format(token).encode("latin-1")} if header else {}
        for method, path, _ in PROTECTED:
            response = client.request(method, path, headers=headers)
            assert (response.status_code, error_code(response)) == (401, ErrorCode.UNAUTHORIZED)
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert client.get(path, headers=headers).status_code == 200


def test_each_role_allows_its_own_routes_and_admin_allows_all(tiny: Target, tokens: Path, add_token: AddToken) -> None:
    token_by_role = {role: add_token(role, "--role", role) for role in Role}
    with running(tiny, authenticator=Authenticator(tokens)) as url, httpx.Client(base_url=url) as client:
        for role, token in token_by_role.items():
            for method, path, needed in PROTECTED:
                response = client.request(method, path, headers={"authorization": f"bearer {token}"})
                if role in (needed, Role.ADMIN):
                    assert response.status_code not in (401, 403), (role, path)
                else:
                    assert (response.status_code, error_code(response)) == (403, ErrorCode.FORBIDDEN)


def test_a_token_is_ignored_by_a_verifier_without_a_token_file(url: str) -> None:
    with ProtocolClient(url, token="whatever") as client:
        client.open().run_round(n=2)


def error_code(response: httpx.Response) -> str:
    """The code of an error reply, whose request may not have named an encoding."""
    if "content-type" in response.headers:
        return decode_error(response).code
    return next(code for code in ErrorCode if code.encode() in response.content)


@pytest.fixture
def two_clients(tiny: Target, tokens: Path, add_token: AddToken) -> Iterator[tuple[ProtocolClient, ProtocolClient]]:
    """Clients of two principals at one verifier."""
    first, second = add_token("one"), add_token("two")
    with (
        running(tiny, authenticator=Authenticator(tokens)) as url,
        ProtocolClient(url, token=first) as one,
        ProtocolClient(url, token=second) as other,
    ):
        yield one, other


def test_sessions_of_other_principals_do_not_exist(
    two_clients: tuple[ProtocolClient, ProtocolClient], reference_text: ReferenceText
) -> None:
    one, other = two_clients
    session = one.open(n=2)
    invented = session.path.replace(session.id, "A" * len(session.id))
    for request in (session.next_round(), session.next_round(round=7), session.next_round(draft=[300])):
        other_response, unknown_response = other.post(session.path, request), other.post(invented, request)
        assert other_response.status_code == unknown_response.status_code == 404
        assert decode_error(other_response) == decode_error(unknown_response)
        assert {*other_response.headers} == {*unknown_response.headers}
    assert other.http.delete(f"/v1/sessions/{session.id}").status_code == 204
    session.run_round(n=3)
    assert session.ids == PROMPT + reference_text(PROMPT, 5)


def test_the_same_key_of_two_principals_opens_two_sessions(two_clients: tuple[ProtocolClient, ProtocolClient]) -> None:
    one, other = two_clients
    first, second = one.open(key="the-same-key"), other.open([9, 9], key="the-same-key")
    assert first.id != second.id
    first.run_round()
    second.run_round()


# Limits


def test_one_session_too_many_closes_the_least_recently_used_of_the_principal(
    tiny: Target, tokens: Path, add_token: AddToken
) -> None:
    small, large = add_token("small", "--max-sessions", "2"), add_token("large")
    with (
        running(tiny, authenticator=Authenticator(tokens)) as url,
        ProtocolClient(url, token=small) as client,
        ProtocolClient(url, token=large) as other,
    ):
        unaffected = other.open()
        first, second = client.open([1, 1]), client.open([2, 2])
        first.run_round()
        third = client.open([3, 3])
        client.expect_error(client.post(second.path, second.next_round()), 404, ErrorCode.SESSION_LOST)
        for session in (first, third, unaffected):
            session.run_round()


def test_a_flood_of_sessions_evicts_only_its_own(tiny: Target, tokens: Path, add_token: AddToken) -> None:
    small, flood = add_token("small"), add_token("flood", "--max-sessions", "none")
    with (
        running(tiny, VerifierLimits(max_sessions=4), authenticator=Authenticator(tokens)) as url,
        ProtocolClient(url, token=small) as client,
        ProtocolClient(url, token=flood) as flooding,
    ):
        kept = client.open()
        flooded = [flooding.open([index, index]) for index in range(6)]
        kept.run_round()
        second = client.open([9, 9])
        for session in (kept, second, *flooded[-2:]):
            session.run_round()
        lost = flooded[-3]
        flooding.expect_error(flooding.post(lost.path, lost.next_round()), 404, ErrorCode.SESSION_LOST)


@pytest.mark.slow
async def test_a_principal_whose_sessions_are_all_busy_is_rate_limited(
    tiny: Target, tokens: Path, add_token: AddToken
) -> None:
    token = add_token("small", "--max-sessions", "1")
    async with (
        serving(tiny, authenticator=Authenticator(tokens)) as server,
        VerifierClient(server.url, token=token) as client,
    ):
        busy = VerifierSession(client, PROMPT, ENDLESS).run_round([], n=400, stream=True)
        await anext(busy)
        impatient = VerifierClient(server.url, token=token, deadline=1.0)
        with pytest.raises(VerifierRefused) as caught:
            await anext(VerifierSession(impatient, [5], ENDLESS).run_round([]))
        await impatient.aclose()
        assert (caught.value.status, caught.value.code) == (429, ErrorCode.RATE_LIMITED)
        assert (caught.value.retry_after, caught.value.detail) == (1, {"max_sessions": 1})
        async for _ in busy:
            pass
        await anext(VerifierSession(client, [5], ENDLESS).run_round([]))


def test_a_prompt_over_the_principals_limit(tiny: Target, tokens: Path, add_token: AddToken) -> None:
    token = add_token("short", "--max-prompt", "5")
    with running(tiny, authenticator=Authenticator(tokens)) as url, ProtocolClient(url, token=token) as client:
        client.open([1] * 5)
        error = client.expect_error(client.post("/v1/sessions", opening([1] * 6)), 413, ErrorCode.CONTEXT_OVERFLOW)
        assert error.detail == {"limit": 5}
        # A board reopens a lost session with a longer prompt.
        client.open([1] * 400, model=tiny.version)


def test_tokens_per_second_limit_the_long_run_rate(tiny: Target, tokens: Path, add_token: AddToken) -> None:
    token = add_token("slow", "--tokens-per-second", "2")
    with running(tiny, authenticator=Authenticator(tokens)) as url, ProtocolClient(url, token=token) as client:
        started = time.monotonic()
        session = client.open(sampling=ENDLESS, n=200)
        response = client.post(session.path, session.next_round())
        elapsed = time.monotonic() - started
        error = client.expect_error(response, 429, ErrorCode.RATE_LIMITED)
        # A burst of 20, 200 tokens generated, and 2 per second: 90 s, less what has passed since.
        assert 89 - elapsed <= int(response.headers["retry-after"]) <= 91
        assert error.detail == {"tokens_per_second": 2.0}
        assert client.post("/v1/sessions", opening()).status_code == 429
        # A repeated round is not a new one: the recorded reply is still available.
        assert client.post(session.path, session.next_round(round=0, position=4, n=200)).status_code == 200


@pytest.mark.slow
async def test_a_board_waits_for_retry_after(
    tiny: Target, tokens: Path, add_token: AddToken, reference_text: ReferenceText
) -> None:
    token = add_token("slow", "--tokens-per-second", "4")
    async with board_client(tiny, tokens, token) as client:
        session = VerifierSession(client, PROMPT, ENDLESS)
        await drain(session.run_round([], n=52))
        started = asyncio.get_running_loop().time()
        await drain(session.run_round([], n=2))
        assert client.retries > 0
        assert asyncio.get_running_loop().time() - started > 0.9
        assert session.ids == PROMPT + reference_text(PROMPT, 54, ENDLESS)


async def test_a_board_whose_deadline_is_too_short_does_not_wait(
    tiny: Target, tokens: Path, add_token: AddToken
) -> None:
    token = add_token("slow", "--tokens-per-second", "1")
    async with board_client(tiny, tokens, token) as client:
        session = VerifierSession(client, PROMPT, ENDLESS)
        await drain(session.run_round([], n=100))
        client.deadline = 20.0
        retries = client.retries
        with pytest.raises(VerifierRefused, match="1 tokens per second") as caught:
            await anext(session.run_round([]))
        assert caught.value.code == ErrorCode.RATE_LIMITED
        assert client.retries == retries


# Client certificates


@pytest.mark.slow
@pytest.mark.parametrize("http2", [True, False], ids=["http2", "http1"])
async def test_only_clients_with_a_certificate_of_the_authority_are_served(
    tiny: Target, tmp_path: Path, http2: bool
) -> None:
    authority, another = CertificateAuthority(tmp_path), CertificateAuthority(tmp_path, "another")
    certificate, key = authority.issue("verifier")
    tls = {"certificate": certificate, "key": key, "client_ca": authority.certificate}
    async with serving(tiny, **tls) as server:
        for own in (authority.issue("board"), None, another.issue("unknown")):
            client = VerifierClient(
                server.url, authorities=authority.certificate, certificate=own, http2=http2, deadline=2.5
            )
            async with client:
                if own and own[0].name == "board.pem":
                    assert (await client.models()).data[0].version == tiny.version
                    continue
                with pytest.raises(VerifierUnreachable) as caught:
                    await client.models()
                assert caught.value.fault == Fault.CERTIFICATE
                assert "--client-certificate and --client-key" in str(caught.value)


def test_an_unusable_client_certificate(tmp_path: Path) -> None:
    certificate, key = CertificateAuthority(tmp_path).issue("board")
    _, other = CertificateAuthority(tmp_path).issue("other")
    for pair in ((certificate, tmp_path / "none"), (key, key), (certificate, other)):
        with pytest.raises(InputError, match="cannot use the certificate"):
            VerifierClient("https://verifier.invalid", certificate=pair)


def test_client_certificates_need_tls(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = CertificateAuthority(tmp_path)
    assert main(["serve", str(tiny_path), "--client-ca", str(authority.certificate)]) == 2
    assert "give --certificate and --key too" in capsys.readouterr().err
    certificate, key = authority.issue("verifier")
    arguments = ["--certificate", str(certificate), "--key", str(key), "--client-ca", str(key)]
    assert main(["serve", str(tiny_path), *arguments]) == 2
    assert "holds no certificate" in capsys.readouterr().err


# Cost of a token


async def test_a_token_costs_about_one_byte_per_round(tiny: Target, tokens: Path, add_token: AddToken) -> None:
    spent = []
    known_token = add_token("kitchen")
    for file, token in ((None, ""), (tokens, known_token)):
        async with board_client(tiny, file, token) as client:
            session = VerifierSession(client, PROMPT, ENDLESS)
            await drain(session.run_round([]))
            await drain(session.run_round([1]))
            before = client.meter.total
            for _ in range(10):
                await drain(session.run_round([1, 2, 3]))
            spent.append(sum(client.meter.total) - sum(before))
    # One byte per round, plus an occasional HTTP/2 frame; 330 bytes if the token were sent every time.
    assert abs(spent[1] - spent[0]) < 100
