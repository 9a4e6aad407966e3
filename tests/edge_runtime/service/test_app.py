"""The service as a process, used by the `openai` client, curl, and hostile clients."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.cli.main import main
from edge_runtime.draft.model import OnnxDraft
from tests.edge_runtime.service.conftest import board_process

pytestmark = pytest.mark.usefixtures("toy_bundle")

PROMPT = "def read_config(path):\n"
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "seed": 5, "max_tokens": 32, "extra_body": {"ignore_eos": True}}
MEGABYTE = 1 << 20


def run_generate(verifier: str, *options: str) -> str:
    """Return the text that `edge-runtime generate` prints."""
    command = [sys.executable, "-m", "edge_runtime.cli", "generate", PROMPT, "--verifier", verifier, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.removesuffix("\n")


@pytest.mark.slow
def test_the_text_equals_that_of_generate(client: openai.OpenAI, verifier: str) -> None:
    options = ("--temperature", "0.7", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "32", "--ignore-eos")
    expected = run_generate(verifier, *options)
    answer = client.completions.create(model="", prompt=PROMPT, **SAMPLED)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 32
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 32
    assert answer.model == "target-v1"
    assert answer.system_fingerprint.startswith("target-v1@")
    timings = answer.timings
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
    assert timings["predicted_n"] == 32
    greedy = client.completions.create(model="target-v1", prompt=PROMPT, temperature=0, max_tokens=24)
    assert greedy.choices[0].text == run_generate(verifier, "--max-new-tokens", "24")


@pytest.mark.slow
def test_a_stream_has_the_same_text_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="", prompt=PROMPT, **SAMPLED)
    stream = client.completions.create(
        model="", prompt=PROMPT, **SAMPLED, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last, usage = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in chunks)
    assert (last.choices[0].finish_reason, last.timings["predicted_n"]) == ("length", 32)
    assert (usage.choices, usage.usage.completion_tokens) == ([], 32)
    assert len({chunk.id for chunk in [*chunks, last, usage]}) == 1
    plain = list(client.completions.create(model="", prompt=PROMPT, **SAMPLED, stream=True))
    assert all("usage" not in chunk.model_fields_set for chunk in plain)


def test_chat_uses_the_plain_template(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    answer = client.chat.completions.create(model="", messages=messages, seed=1, max_completion_tokens=12)
    message = answer.choices[0].message
    assert (message.role, answer.object) == ("assistant", "chat.completion")
    # The plain rendering of the conversation, because the bundle has no chat template.
    plain = "System: Be brief.\n\nUser: Why?\n\nAssistant:"
    text = client.completions.create(model="", prompt=plain, seed=1, max_tokens=12, stop="\nUser:").choices[0].text
    assert message.content == text
    stream = client.chat.completions.create(model="", messages=messages, seed=1, max_tokens=12, stream=True)
    first, *chunks = list(stream)
    assert first.choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in [first, *chunks]]
    assert "".join(pieces) == text
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    again = client.chat.completions.create(model="", messages=[*messages, message], max_tokens=1)  # type: ignore[list-item]
    assert again.usage.completion_tokens == 1


def test_prompts_may_be_ids_and_are_echoed_on_request(client: openai.OpenAI, draft: OnnxDraft) -> None:
    ids = draft.tokenizer.encode(PROMPT).ids
    texts = [
        client.completions.create(model="", prompt=prompt, temperature=0, max_tokens=6, echo=echo).choices[0].text
        for prompt, echo in ((PROMPT, False), ([PROMPT], False), (ids, False), ([ids], False), (ids, True))
    ]
    assert texts[:4] == [texts[0]] * 4
    assert texts[4] == PROMPT + texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_span_tokens_and_rounds(client: openai.OpenAI, stream: bool) -> None:
    whole = client.completions.create(model="", prompt=PROMPT, **SAMPLED).choices[0].text
    for start in range(0, len(whole) - 4, 13):
        stop = whole[start : start + 4]
        options = SAMPLED | {"stop": ["never there", stop]}
        answer = client.completions.create(model="", prompt=PROMPT, **options, stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert 0 < chunks[-1].timings["predicted_n"] <= 32


def test_a_random_seed_is_returned(client: openai.OpenAI) -> None:
    first, second = (client.completions.create(model="", prompt=PROMPT, max_tokens=16) for _ in range(2))
    assert first.seed != second.seed
    # JavaScript's numbers have 53 bits.
    assert max(first.seed, second.seed) < 1 << 53
    again = client.completions.create(model="", prompt=PROMPT, max_tokens=16, seed=first.seed)
    assert again.choices[0].text == first.choices[0].text
    negative = client.completions.create(model="", prompt=PROMPT, max_tokens=2, seed=-7)
    assert negative.seed == -7


def test_speculation_can_be_switched_off(client: openai.OpenAI) -> None:
    options = SAMPLED | {"extra_body": {"ignore_eos": True, "speculation": False}}
    target_only = client.completions.create(model="", prompt=PROMPT, **options)
    with_draft = client.completions.create(model="", prompt=PROMPT, **SAMPLED)
    assert target_only.choices[0].text == with_draft.choices[0].text
    assert (target_only.timings["draft_n"], target_only.timings["rounds"]) == (0, 1)
    assert with_draft.timings["draft_n"] > 0


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("target-v1", "model")
    assert client.models.retrieve("target-v1").version == model.version
    assert client.models.retrieve(model.version).id == "target-v1"
    exact = client.completions.create(model=model.version, prompt=PROMPT, max_tokens=1)
    assert (exact.model, exact.system_fingerprint) == (model.version, model.version)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize("field", ["prompt", "logit_bias", "stop_token_ids"])
def test_a_token_that_does_not_exist_is_refused_by_field(url: str, field: str) -> None:
    value = {"2048": 1.0} if field == "logit_bias" else [2048]
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1, field: value}, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, field, "invalid_token")


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
        ({"suffix": "end"}, openai.BadRequestError, "unsupported_parameter"),
        ({"n": 0}, openai.BadRequestError, "invalid_parameter"),
        ({"n": 100}, openai.BadRequestError, "invalid_request"),
        ({"prompt": "x " * 5000}, openai.BadRequestError, "context_length_exceeded"),
        ({"prompt": [2048]}, openai.BadRequestError, "invalid_token"),
        ({"prompt": [2048], "extra_body": {"speculation": False}}, openai.BadRequestError, "invalid_token"),
        ({"prompt": "x" * 2_000_000}, openai.APIStatusError, "body_too_large"),
        ({"extra_body": {"use_beam_search": True}}, openai.BadRequestError, "unsupported_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_the_types_of_openai(
    client: openai.OpenAI, fields: dict[str, object], kind: type[openai.APIStatusError], code: str | None, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**({"model": "", "prompt": PROMPT, "max_tokens": 4, "stream": stream} | fields))
    assert caught.value.code == code
    assert caught.value.status_code < 500


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url: str) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "300", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = json.dumps({"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True})
    lines = curl(f"{url}/v1/completions", "-H", "content-type: application/json", "-d", body).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    # HTTP/2 works, and a body without the content type that web pages cannot send is refused.
    assert curl("--http2-prior-knowledge", f"{url}/healthz") == "ok\n"
    assert json.loads(curl(f"{url}/v1/completions", "-d", body))["error"]["code"] == "unsupported_media_type"


def test_metrics(client: openai.OpenAI, url: str) -> None:
    client.completions.create(model="", prompt=PROMPT, **SAMPLED)
    client.completions.create(model="", prompt=PROMPT, **SAMPLED | {"extra_body": {"speculation": False}})
    page = httpx.get(f"{url}/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    numbers = {name: float(value) for name, value in values.items() if name.startswith("flexspec_")}
    assert numbers["flexspec_spec_decode_num_drafts_total"] > 0
    accepted = numbers["flexspec_spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted < numbers["flexspec_spec_decode_num_draft_tokens_total"]
    per_position = [value for name, value in numbers.items() if "accepted_tokens_per_pos_total{" in name]
    assert sum(per_position) == accepted
    assert numbers['flexspec_cloud_rounds_total{reason="switched_off"}'] >= 1
    assert numbers['flexspec_requests_total{outcome="length"}'] >= 2
    assert numbers["flexspec_link_bytes_per_accepted_token"] > 4
    assert numbers["flexspec_link_sent_bytes_total"] > 100
    assert numbers["flexspec_requests_running"] == 0
    assert numbers["flexspec_unverified_tokens_total"] == numbers["flexspec_withdrawn_tokens_total"] == 0


def test_foreign_hosts_and_forms_of_web_pages_are_refused(url: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    rebound = httpx.post(f"{url}/v1/completions", json=body, headers={"host": "evil.example:8400"})
    assert rebound.status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8400", "board.localhost"):
        assert httpx.get(f"{url}/healthz", headers={"host": host}).status_code == 200
    for kind in ("text/plain", "text/plain; of=application/json", "application/x-www-form-urlencoded"):
        form = httpx.post(f"{url}/v1/completions", content=json.dumps(body), headers={"content-type": kind})
        assert form.status_code == 415


def test_unknown_routes_and_methods(url: str) -> None:
    assert httpx.get(f"{url}/v1/embeddings").json()["error"]["code"] == "unknown_route"
    wrong = httpx.get(f"{url}/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def exchange(url: str, data: bytes) -> bytes:
    """Send raw bytes and return what the service responds."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(4096):
                received += piece
        except OSError:
            pass
    return received


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff" * 500,
        b"GET /v1/models HTTP/1.1\r\nhost: [\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: \xff\r\n\r\n",
        b"GET /v1/models/%ff%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: \xff\xfe\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b'content-length: 100\r\n\r\n{"prompt"',
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"content-length: 200002\r\n\r\n" + b"[" * 200_002,
    ],
)
def test_malformed_requests_do_no_harm(url: str, data: bytes) -> None:
    assert b" 500 " not in exchange(url, data)
    assert httpx.get(f"{url}/readyz").text == "ready\n"


@pytest.mark.slow
@settings(max_examples=40)
@given(body=st.binary(max_size=80), path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
def test_garbage_bodies_are_refused(url: str, body: bytes, path: str) -> None:
    answer = httpx.post(f"{url}{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_disconnected_and_stalled_readers_occupy_no_slots(url: str, client: openai.OpenAI) -> None:
    """More of both than there are slots, and another request is still served."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPT, "stream": True, "ignore_eos": True}).encode()
    stalled = []
    for index in range(9):
        connection = socket.create_connection((host, int(port)), timeout=300)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        if index % 2:
            connection.close()
        else:
            stalled.append(connection)
    assert client.completions.create(model="", prompt=PROMPT, max_tokens=4).usage.completion_tokens >= 1
    for connection in stalled:
        received = b""
        while b"data: [DONE]" not in received and b" 429 " not in received:
            received += connection.recv(65536)
        connection.close()


@pytest.mark.slow
def test_concurrent_requests_wait_or_are_refused_with_retry_after(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | int:
        try:
            return client.completions.create(model="", prompt=PROMPT, max_tokens=8, seed=seed).choices[0].text
        except openai.RateLimitError as error:
            assert 1 <= int(error.response.headers["retry-after"]) <= 60
            return error.status_code

    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        answers = list(pool.map(ask, range(14)))
    texts = [answer for answer in answers if isinstance(answer, str)]
    assert len(texts) >= 10
    assert texts == [ask(seed) for seed, answer in enumerate(answers) if isinstance(answer, str)]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# two boards\nfirst-key\n\nsecond-key\n")
    return file


@pytest.mark.slow
def test_keys_memory_and_shutdown_of_a_service_process(verifier: str, keys: Path) -> None:
    with board_process(verifier, "--api-key-file", str(keys), "--max-new-tokens", "100") as (process, url):
        assert httpx.get(f"{url}/readyz").status_code == 200
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
        assert resident * 1024 < 150 * MEGABYTE
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        for key in ("", "first", "first-key2"):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            refused = httpx.get(f"{url}/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="second-key", max_retries=0) as client:
            stream = iter(
                client.completions.create(
                    model="", prompt=PROMPT, stream=True, temperature=0, extra_body={"ignore_eos": True}
                )
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            # Running answers are completed.
            assert list(stream)[-1].choices[0].finish_reason == "length"
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "")
        # The log has one line per answer and none of its text, after a notice about the toy bundle.
        notice, answer = err.splitlines()
        assert "has no chat template" in notice
        assert answer.startswith("INFO edge_runtime.service.access_log: length: 100 tokens in ")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--bundle", "/nowhere"], 2, "--bundle: there is no directory /nowhere"),
        (["--bundle", "/"], 3, "no draft bundle at /"),
        (["--max-concurrent", "0"], 2, "--max-concurrent: must be a whole number from 1 to 64, and is 0"),
        (["--draft-prefix-cache", "1048576"], 2, "take"),
        (["--port", "65536"], 2, "--port: must be a whole number from 0 to 65535"),
        (["--certificate", "x"], 2, "--certificate and --key go together"),
        (["--api-key-file", "/nowhere"], 2, "the file that it names does not exist"),
        (["--api-key-file", "/dev"], 2, "the file that it names does not exist"),
        (["--host", "192.0.2.1"], 1, "could not listen on 192.0.2.1"),
        (["--verifier", "nonsense"], 2, "--verifier: 'nonsense' is not a URL"),
        (["--verifier", "http://127.0.0.1:99999"], 2, "--verifier: 'http://127.0.0.1:99999' is not a URL"),
        (["--deadline", "nan"], 2, "--deadline: must be a number above 0 and at most 3600, and is NaN"),
        (["--threads", "-3"], 2, "--threads: must be a whole number from 0"),
        (["--max-connections", "0"], 2, "--max-connections: must be a whole number from 16"),
        (["--cors-origins", "nonsense,https://a.example"], 2, "--cors-origins: 'nonsense' is not an origin"),
    ],
)
def test_startup_errors_are_one_message_and_an_exit_code(
    options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.splitlines()[-1].startswith("edge-runtime: ")


def test_idle_connections_do_not_block_others(url: str) -> None:
    """More connections than granian admits by default; half are silent, half stop in the middle of a request."""
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for index in range(200):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=300))
            connection.sendall(HEAD + b"content-length: 10\r\n\r\n{" if index % 2 else HEAD[:20])
        assert httpx.get(f"{url}/readyz").text == "ready\n"
