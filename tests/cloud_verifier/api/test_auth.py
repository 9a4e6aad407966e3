"""Who gets in, and what they get: tokens, roles, limits, other people's sessions, client certificates."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable, Iterator
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

Add = Callable[..., str]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """The file of the tokens, not there yet."""
    return tmp_path / "tokens.toml"


@pytest.fixture
def add(tokens: Path, capsys: pytest.CaptureFixture[str]) -> Add:
    """`add(name, *options)`: the new token of `cloud-verifier token add`."""

    def add(name: str, *options: str) -> str:
        capsys.readouterr()
        assert main(["token", "add", name, "--tokens", str(tokens), *options]) == 0
        return capsys.readouterr().out.strip()

    return add


# The file


def test_a_token_is_printed_once_and_kept_as_its_hash(tokens: Path, add: Add) -> None:
    token = add("kitchen", "--max-sessions", "8", "--tokens-per-second", "50", "--max-prompt", "4096")
    assert len(token) == 32
    assert token not in tokens.read_text()
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    kitchen = read_principals(tokens)["kitchen"]
    assert (kitchen.name, kitchen.role, kitchen.sha256) == ("kitchen", Role.BOARD, hash_token(token))
    assert (kitchen.max_sessions, kitchen.tokens_per_second, kitchen.max_prompt) == (8, 50.0, 4096)


def test_tokens_differ_and_comments_stay(tokens: Path, add: Add) -> None:
    tokens.write_text("# those of the first floor\n")
    assert add("one") != add("two")
    tokens.write_text(tokens.read_text().replace("[two]", "[two] # the loud one"))
    add("three")
    text = tokens.read_text()
    assert "# those of the first floor" in text
    assert "# the loud one" in text
    assert list(read_principals(tokens)) == ["one", "two", "three"]


def test_a_token_is_replaced_only_where_that_is_said(
    tokens: Path, add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    first = add("kitchen", "--max-sessions", "2")
    assert main(["token", "add", "kitchen", "--tokens", str(tokens)]) == 2
    assert "--replace revokes it" in capsys.readouterr().err
    assert read_principals(tokens)["kitchen"].sha256 == hash_token(first)
    second = add("kitchen", "--replace")
    assert read_principals(tokens)["kitchen"].sha256 == hash_token(second) != hash_token(first)


def test_list_and_revoke(tokens: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    token = add("kitchen", "--max-sessions", "8")
    add("operator", "--role", "admin")
    assert main(["token", "list", "--tokens", str(tokens)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in listed] == [["kitchen", "board"], ["operator", "admin"]]
    assert "8 sessions" in listed[0]
    assert main(["token", "list", "--json", "--tokens", str(tokens)]) == 0
    assert capsys.readouterr().out == '{"kitchen":{"role":"board","max_sessions":8},"operator":{"role":"admin"}}\n'
    assert main(["token", "revoke", "kitchen", "--tokens", str(tokens)]) == 0
    assert list(read_principals(tokens)) == ["operator"]
    assert hash_token(token) not in tokens.read_text()
    assert main(["token", "revoke", "kitchen", "--tokens", str(tokens)]) == 2
    assert "has no token of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
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
def test_a_file_with_errors(
    tokens: Path, tiny_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        tokens.write_text(text)
    with pytest.raises(InputError, match=said):
        Authenticator(tokens)
    assert main(["serve", str(tiny_path), "--tokens", str(tokens)]) == 2
    assert str(tokens) in capsys.readouterr().err
    if text is not None:
        assert main(["token", "add", "c", "--tokens", str(tokens)]) == 2
        assert tokens.read_text() == text


@pytest.mark.parametrize(
    "arguments",
    [["no/name"], ["x", "--max-sessions", "0"], ["x", "--tokens-per-second", "-1"], ["x", "--max-prompt", "0"]],
)
def test_bad_arguments_write_nothing(tokens: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "add", *arguments, "--tokens", str(tokens)]) == 2
    assert capsys.readouterr().err.startswith("cloud-verifier: ")
    assert not tokens.exists()


def test_a_reload_with_errors_changes_nothing(tokens: Path, add: Add) -> None:
    add("kitchen")
    doors = Authenticator(tokens)
    whole = tokens.read_text()
    tokens.write_text("[kitchen]\n")
    with pytest.raises(InputError):
        doors.reload()
    assert len(doors) == 1
    tokens.write_text(whole)
    add("hall")
    doors.reload()
    assert len(doors) == 2


# Over HTTP

GUARDED = [
    ("POST", "/v1/sessions", Role.BOARD),
    ("POST", "/v1/sessions/abc/rounds", Role.BOARD),
    ("DELETE", "/v1/sessions/abc", Role.BOARD),
    ("GET", "/v1/models", Role.BOARD),
    ("GET", "/metrics", Role.MONITOR),
]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer x{}", "Bearer \xff"])
def test_without_a_token_nothing_is_served(tiny: Target, tokens: Path, add: Add, header: str) -> None:
    token = add("kitchen", "--role", "admin")
    with running(tiny, authenticator=Authenticator(tokens)) as url, httpx.Client(base_url=url) as client:
        shown = {"authorization": header.format(token).encode("latin-1")} if header else {}
        for method, path, _ in GUARDED:
            response = client.request(method, path, headers=shown)
            assert (response.status_code, refusal_code(response)) == (401, ErrorCode.UNAUTHORIZED)
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert client.get(path, headers=shown).status_code == 200


def test_roles_open_their_own_doors_and_an_admin_all(tiny: Target, tokens: Path, add: Add) -> None:
    shown = {role: add(role, "--role", role) for role in Role}
    with running(tiny, authenticator=Authenticator(tokens)) as url, httpx.Client(base_url=url) as client:
        for role, token in shown.items():
            for method, path, needed in GUARDED:
                response = client.request(method, path, headers={"authorization": f"bearer {token}"})
                if role in (needed, Role.ADMIN):
                    assert response.status_code not in (401, 403), (role, path)
                else:
                    assert (response.status_code, refusal_code(response)) == (403, ErrorCode.FORBIDDEN)


def test_where_nobody_is_asked_a_token_does_no_harm(url: str) -> None:
    with ProtocolClient(url, token="whatever") as client:
        client.open().run_round(n=2)


def refusal_code(response: httpx.Response) -> str:
    """The code of a refusal whose request may not have named a type."""
    if "content-type" in response.headers:
        return decode_error(response).code
    return next(code for code in ErrorCode if code.encode() in response.content)


@pytest.fixture
def two(tiny: Target, tokens: Path, add: Add) -> Iterator[tuple[ProtocolClient, ProtocolClient]]:
    """Two principals at one verifier."""
    shown = add("one"), add("two")
    with (
        running(tiny, authenticator=Authenticator(tokens)) as url,
        ProtocolClient(url, token=shown[0]) as one,
        ProtocolClient(url, token=shown[1]) as other,
    ):
        yield one, other


def test_another_principals_session_is_like_none(
    two: tuple[ProtocolClient, ProtocolClient], reference_text: ReferenceText
) -> None:
    one, other = two
    session = one.open(n=2)
    invented = session.path.replace(session.id, "A" * len(session.id))
    for request in (session.next_round(), session.next_round(round=7), session.next_round(draft=[300])):
        theirs, nobodys = other.post(session.path, request), other.post(invented, request)
        assert theirs.status_code == nobodys.status_code == 404
        assert decode_error(theirs) == decode_error(nobodys)
        assert {*theirs.headers} == {*nobodys.headers}
    assert other.http.delete(f"/v1/sessions/{session.id}").status_code == 204
    session.run_round(n=3)
    assert session.ids == PROMPT + reference_text(PROMPT, 5)


def test_the_same_key_of_two_principals_opens_two_sessions(two: tuple[ProtocolClient, ProtocolClient]) -> None:
    one, other = two
    first, second = one.open(key="the-same-key"), other.open([9, 9], key="the-same-key")
    assert first.id != second.id
    first.run_round()
    second.run_round()


# Limits


def test_one_session_too_many_closes_the_principals_own_oldest(tiny: Target, tokens: Path, add: Add) -> None:
    small, large = add("small", "--max-sessions", "2"), add("large")
    with (
        running(tiny, authenticator=Authenticator(tokens)) as url,
        ProtocolClient(url, token=small) as client,
        ProtocolClient(url, token=large) as other,
    ):
        theirs = other.open()
        first, second = client.open([1, 1]), client.open([2, 2])
        first.run_round()
        third = client.open([3, 3])
        client.expect_error(client.post(second.path, second.next_round()), 404, ErrorCode.SESSION_LOST)
        for session in (first, third, theirs):
            session.run_round()


async def test_a_principal_whose_sessions_are_all_busy_is_told_to_wait(tiny: Target, tokens: Path, add: Add) -> None:
    token = add("small", "--max-sessions", "1")
    async with (
        serving(tiny, authenticator=Authenticator(tokens)) as server,
        VerifierClient(server.url, token=token) as client,
    ):
        busy = VerifierSession(client, PROMPT, ENDLESS).play([], n=400, stream=True)
        await anext(busy)
        impatient = VerifierClient(server.url, token=token, deadline=1.0)
        with pytest.raises(VerifierRefused) as caught:
            await anext(VerifierSession(impatient, [5], ENDLESS).play([]))
        await impatient.aclose()
        assert (caught.value.status, caught.value.code) == (429, ErrorCode.RATE_LIMITED)
        assert (caught.value.retry_after, caught.value.detail) == (1, {"max_sessions": 1})
        async for _ in busy:
            pass
        await anext(VerifierSession(client, [5], ENDLESS).play([]))


def test_a_prompt_over_the_principals_limit(tiny: Target, tokens: Path, add: Add) -> None:
    token = add("short", "--max-prompt", "5")
    with running(tiny, authenticator=Authenticator(tokens)) as url, ProtocolClient(url, token=token) as client:
        client.open([1] * 5)
        refusal = client.expect_error(client.post("/v1/sessions", opening([1] * 6)), 413, ErrorCode.CONTEXT_OVERFLOW)
        assert refusal.detail == {"limit": 5}
        # As a board goes on with a text whose session was lost.
        client.open([1] * 400, model=tiny.version)


def test_tokens_per_second_are_what_a_board_gets_in_the_long_run(tiny: Target, tokens: Path, add: Add) -> None:
    token = add("slow", "--tokens-per-second", "2")
    with running(tiny, authenticator=Authenticator(tokens)) as url, ProtocolClient(url, token=token) as client:
        session = client.open(sampling=ENDLESS, n=200)
        response = client.post(session.path, session.next_round())
        refusal = client.expect_error(response, 429, ErrorCode.RATE_LIMITED)
        # It had a burst of 20, has been told 200, and pays for them at 2 per second.
        assert 40 <= int(response.headers["retry-after"]) <= 91
        assert refusal.detail == {"tokens_per_second": 2.0}
        assert client.post("/v1/sessions", opening()).status_code == 429
        # What was answered is answered again: a repeated round is no new one.
        assert client.post(session.path, session.next_round(round=0, position=4, n=200)).status_code == 200


async def test_a_board_waits_as_long_as_it_is_told_to(
    tiny: Target, tokens: Path, add: Add, reference_text: ReferenceText
) -> None:
    token = add("slow", "--tokens-per-second", "4")
    async with (
        serving(tiny, authenticator=Authenticator(tokens)) as server,
        VerifierClient(server.url, token=token) as client,
    ):
        session = VerifierSession(client, PROMPT, ENDLESS)
        async for _ in session.play([], n=52):
            pass
        began = asyncio.get_running_loop().time()
        async for _ in session.play([], n=2):
            pass
        assert client.retries > 0
        assert asyncio.get_running_loop().time() - began > 0.9
        assert session.ids == PROMPT + reference_text(PROMPT, 54, ENDLESS)


async def test_a_board_without_the_time_to_wait_fails_at_once(tiny: Target, tokens: Path, add: Add) -> None:
    token = add("slow", "--tokens-per-second", "1")
    async with (
        serving(tiny, authenticator=Authenticator(tokens)) as server,
        VerifierClient(server.url, token=token) as client,
    ):
        session = VerifierSession(client, PROMPT, ENDLESS)
        async for _ in session.play([], n=100):
            pass
        client.deadline = 20.0
        began = asyncio.get_running_loop().time()
        with pytest.raises(VerifierRefused, match="1 tokens per second") as caught:
            await anext(session.play([]))
        assert caught.value.code == ErrorCode.RATE_LIMITED
        assert asyncio.get_running_loop().time() - began < 10


# Certificates of clients


@pytest.mark.parametrize("http2", [True, False], ids=["http2", "http1"])
async def test_only_who_has_a_certificate_of_theirs_is_served(tiny: Target, tmp_path: Path, http2: bool) -> None:
    authority, another = CertificateAuthority(tmp_path), CertificateAuthority(tmp_path, "another")
    certificate, key = authority.issue("verifier")
    tls = {"certificate": certificate, "key": key, "client_ca": authority.certificate}
    async with serving(tiny, **tls) as server:
        for own in (authority.issue("board"), None, another.issue("stranger")):
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


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
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


# What a token costs


async def test_a_token_costs_next_to_nothing_a_round(tiny: Target, tokens: Path, add: Add) -> None:
    spent = []
    shown = add("kitchen")
    for doors, token in ((None, ""), (Authenticator(tokens), shown)):
        async with serving(tiny, VerifierLimits(), doors) as server, VerifierClient(server.url, token=token) as client:
            session = VerifierSession(client, PROMPT, ENDLESS)
            async for _ in session.play([]):
                pass
            async for _ in session.play([1]):
                pass
            before = client.meter.total
            for _ in range(10):
                async for _ in session.play([1, 2, 3]):
                    pass
            spent.append(sum(client.meter.total) - sum(before))
    # One byte a round, and frames of HTTP/2 that come now and then; 330 where it is sent whole every time.
    assert abs(spent[1] - spent[0]) < 100
