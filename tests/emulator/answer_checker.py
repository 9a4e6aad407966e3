"""Requests answers whose correct text is known from a board, and classifies what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import io
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding.detokenizer import decode_continuation

PROMPTS = (
    "class Connection:\n    def __init__(self, host, port",
    "import unittest\n\nclass Test",
    'def read_config(path):\n    """Read',
    "def main():\n    parser = argparse.ArgumentParser(",
    "# include the header\nfor name in sorted(os.listdir(path)):\n",
    "    async def fetch(self, url: str) -> bytes:\n",
)
SAMPLINGS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "seed": 3},
)
LENGTHS = (16, 32, 48)


class AnswerCase(msgspec.Struct, frozen=True):
    """A request and its only correct answer.

    Attributes:
        fields: fields of the request body.
        text, finish: the text and finish reason of the target model without speculation.
    """

    fields: dict[str, Any]
    text: str
    finish: str


class AnswerKind(enum.StrEnum):
    """Classification of an answer."""

    RIGHT = "right"
    UNVERIFIED = "unverified"  # contains text marked as unverified; its verified part is correct
    ERROR = "error"  # a typed error; any text before it was correct
    LOST = "lost"  # the connection to the board broke, which is allowed only if the board was killed
    HUNG = "hung"  # no complete answer within the time limit
    DIFFERENT = "different"  # verified text differs from the target's
    PASSED_OFF = "passed off"  # unverified text that was not marked as such
    UNTYPED = "untyped"  # an error without a machine-readable code


class CheckedAnswer(msgspec.Struct, frozen=True):
    """A classified answer. `code`: error code, if any; `withdrawn`: number of characters that were withdrawn."""

    kind: AnswerKind
    seconds: float
    code: str = ""
    withdrawn: int = 0
    detail: str = ""


def make_cases(target: Path) -> list[AnswerCase]:
    """Make a case of every prompt and sampling; `cloud-verifier generate` writes the correct texts."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    bodies: list[dict[str, Any]] = []
    jobs = []
    for number, (prompt, sampling) in enumerate(itertools.product(PROMPTS, SAMPLINGS)):
        length = LENGTHS[(number + number // 3) % 3]
        bodies.append({"prompt": prompt, "max_tokens": length, **sampling})
        ids = tokenizer.encode(prompt).ids
        jobs.append(json.dumps({"ids": ids, "max_new_tokens": length, "sampling": sampling}))
    # Imports PyTorch, which not everyone who checks answers needs.
    from cloud_verifier.cli.main import main

    output = io.StringIO()
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, contextlib.redirect_stdout(output):
        file.write("\n".join(jobs))
        file.flush()
        assert main(["generate", str(target), "--jobs", file.name]) == 0
    cases = []
    for fields, line in zip(bodies, output.getvalue().splitlines(), strict=True):
        ids = json.loads(line)
        finish = "stop" if ids[-1] == 0 else "length"
        prompt = tokenizer.encode(fields["prompt"]).ids
        cases.append(AnswerCase(fields, decode_continuation(tokenizer, prompt, ids), finish))
    return cases


async def request_answer(
    client: httpx.AsyncClient, case: AnswerCase, *, stream: bool, limit: float, **extra_fields: Any
) -> CheckedAnswer:
    """Request and classify one answer.

    Args:
        client: its base URL is the board's.
        limit: seconds after which the answer counts as hung.
        extra_fields: added to the request body.
    """
    started = time.perf_counter()
    body = case.fields | {"stream": stream} | extra_fields
    try:
        async with asyncio.timeout(limit):
            if stream:
                kind, code, withdrawn, detail = await _request_stream(client, case, body)
            else:
                kind, code, withdrawn, detail = await _request_whole(client, case, body)
    except TimeoutError:
        kind, code, withdrawn, detail = AnswerKind.HUNG, "", 0, f"{case.fields}, stream={stream}"
    except httpx.TransportError as error:
        kind, code, withdrawn, detail = AnswerKind.LOST, type(error).__name__, 0, str(error)
    return CheckedAnswer(kind, time.perf_counter() - started, code, withdrawn, detail)


Verdict = tuple[AnswerKind, str, int, str]


async def _request_whole(client: httpx.AsyncClient, case: AnswerCase, body: dict[str, Any]) -> Verdict:
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return _classify_error(response.status_code, response.text)
    answer = response.json()
    (choice,) = answer["choices"]
    unverified = _count_marked(answer, "unverified")
    return _classify_text(case, choice["text"], unverified, choice["finish_reason"], 0)


async def _request_stream(client: httpx.AsyncClient, case: AnswerCase, body: dict[str, Any]) -> Verdict:
    text, finish, done, failed, withdrawn, unverified = "", "", False, False, 0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return _classify_error(response.status_code, response.text)
        async for line in response.aiter_lines():
            if line == "event: error":
                failed = True
            elif line == "data: [DONE]":
                done = True
            elif failed and line:
                return _classify_error(200, line.removeprefix("data: "))
            # Comment lines report that the request is still waiting.
            elif line and not line.startswith(":"):
                chunk = json.loads(line.removeprefix("data: "))
                withdrawn_now = _count_marked(chunk, "withdrawn")
                withdrawn += withdrawn_now
                unverified = _count_marked(chunk, "unverified")
                if withdrawn_now > len(text):
                    return AnswerKind.DIFFERENT, "", withdrawn, f"{withdrawn_now} of {len(text)} characters withdrawn"
                for choice in chunk["choices"]:
                    text = text[: len(text) - withdrawn_now] + choice["text"]
                    finish = choice["finish_reason"] or finish
                verified = text[: len(text) - unverified]
                if not case.text.startswith(verified):
                    marked = unverified or withdrawn
                    return (
                        (AnswerKind.PASSED_OFF if marked else AnswerKind.DIFFERENT),
                        "",
                        withdrawn,
                        f"{verified!r}, not {case.text!r}",
                    )
    if not done:
        return AnswerKind.LOST, "no end", withdrawn, f"the stream ended after {text!r}"
    return _classify_text(case, text, unverified, finish, withdrawn)


def _classify_text(case: AnswerCase, text: str, unverified: int, finish: str, withdrawn: int) -> Verdict:
    if (text, finish, unverified) == (case.text, case.finish, 0):
        return AnswerKind.RIGHT, "", withdrawn, ""
    if unverified and case.text.startswith(text[: len(text) - unverified]):
        return AnswerKind.UNVERIFIED, "", withdrawn, ""
    kind = AnswerKind.PASSED_OFF if unverified or withdrawn else AnswerKind.DIFFERENT
    return kind, "", withdrawn, f"{text!r} ({finish}), not {case.text!r} ({case.finish})"


def _classify_error(status: int, body: str) -> Verdict:
    try:
        error = json.loads(body)["error"]
        code, message = error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return AnswerKind.UNTYPED, str(status), 0, body[:200]
    return (AnswerKind.ERROR if code and message else AnswerKind.UNTYPED), code or str(status), 0, message


def _count_marked(answer: dict[str, Any], name: str) -> int:
    """Return the number of "unverified" or "withdrawn" characters that an answer or a chunk reports."""
    choices = answer.get("choices") or [{}]
    return int(answer.get(name) or choices[0].get(name) or 0)
