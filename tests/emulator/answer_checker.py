"""Asks a board for answers whose text is known, and judges what comes."""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding.detokenizer import Detokeniser

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


class Case(msgspec.Struct, frozen=True):
    """A request, and the one right answer.

    Attributes:
        fields: of the request's body.
        text, finish: what the target says by itself.
    """

    fields: dict[str, Any]
    text: str
    finish: str


class Kind(enum.StrEnum):
    """How an answer came out."""

    RIGHT = "right"
    UNVERIFIED = "unverified"  # and marked so; what of it is verified is right
    ERROR = "error"  # a typed one, and whatever text came before it was right
    LOST = "lost"  # the connection to the board broke: only a board that was killed may do that
    HUNG = "hung"  # nothing came to an end in time
    DIFFERENT = "different"  # from the target's own text
    PASSED_OFF = "passed off"  # unverified text that was not marked so
    UNTYPED = "untyped"  # an error that no program can tell from others


class Judged(msgspec.Struct, frozen=True):
    """One answer. `code`: of its error; `withdrawn`: characters that were taken back."""

    kind: Kind
    seconds: float
    code: str = ""
    withdrawn: int = 0
    detail: str = ""


def cases(target: Path) -> list[Case]:
    """Every prompt under every sampling, some long and some short; the texts by `cloud-verifier generate`."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    asked: list[dict[str, Any]] = []
    jobs = []
    for number, (prompt, sampling) in enumerate(itertools.product(PROMPTS, SAMPLINGS)):
        length = LENGTHS[(number + number // 3) % 3]
        asked.append({"prompt": prompt, "max_tokens": length, **sampling})
        ids = tokenizer.encode(prompt).ids
        jobs.append(json.dumps({"ids": ids, "max_new_tokens": length, "sampling": sampling}))
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("\n".join(jobs))
        file.flush()
        command = [sys.executable, "-m", "cloud_verifier.cli", "generate", str(target), "--jobs", file.name]
        # More threads than one only wait for each other on a busy machine.
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=alone).stdout
    made = []
    for fields, line in zip(asked, output.splitlines(), strict=True):
        ids = json.loads(line)
        text = Detokeniser(tokenizer)
        finish = "stop" if ids[-1] == 0 else "length"
        made.append(Case(fields, "".join(text.step(token) for token in ids), finish))
    return made


async def ask(client: httpx.AsyncClient, case: Case, *, stream: bool, limit: float, **more: Any) -> Judged:
    """One answer, within `limit` seconds. `client` knows the board's URL; `more` are fields of the request."""
    started = time.perf_counter()
    body = case.fields | {"stream": stream} | more
    try:
        async with asyncio.timeout(limit):
            if stream:
                kind, code, withdrawn, detail = await _streamed(client, case, body)
            else:
                kind, code, withdrawn, detail = await _whole(client, case, body)
    except TimeoutError:
        kind, code, withdrawn, detail = Kind.HUNG, "", 0, f"{case.fields}, stream={stream}"
    except httpx.TransportError as error:
        kind, code, withdrawn, detail = Kind.LOST, type(error).__name__, 0, str(error)
    return Judged(kind, time.perf_counter() - started, code, withdrawn, detail)


Verdict = tuple[Kind, str, int, str]


async def _whole(client: httpx.AsyncClient, case: Case, body: dict[str, Any]) -> Verdict:
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return _error(response.status_code, response.text)
    said = response.json()
    (choice,) = said["choices"]
    unverified = _mark(said, "unverified")
    return _compare(case, choice["text"], unverified, choice["finish_reason"], 0)


async def _streamed(client: httpx.AsyncClient, case: Case, body: dict[str, Any]) -> Verdict:
    text, finish, done, failed, withdrawn, unverified = "", "", False, False, 0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return _error(response.status_code, response.text)
        async for line in response.aiter_lines():
            if line == "event: error":
                failed = True
            elif line == "data: [DONE]":
                done = True
            elif failed and line:
                return _error(200, line.removeprefix("data: "))
            # Comments say that it waits.
            elif line and not line.startswith(":"):
                chunk = json.loads(line.removeprefix("data: "))
                back = _mark(chunk, "withdrawn")
                withdrawn += back
                unverified = _mark(chunk, "unverified")
                if back > len(text):
                    return Kind.DIFFERENT, "", withdrawn, f"{back} of {len(text)} characters withdrawn"
                for choice in chunk["choices"]:
                    text = text[: len(text) - back] + choice["text"]
                    finish = choice["finish_reason"] or finish
                verified = text[: len(text) - unverified]
                if not case.text.startswith(verified):
                    marked = unverified or withdrawn
                    return (
                        (Kind.PASSED_OFF if marked else Kind.DIFFERENT),
                        "",
                        withdrawn,
                        f"{verified!r}, not {case.text!r}",
                    )
    if not done:
        return Kind.LOST, "no end", withdrawn, f"the stream ended behind {text!r}"
    return _compare(case, text, unverified, finish, withdrawn)


def _compare(case: Case, text: str, unverified: int, finish: str, withdrawn: int) -> Verdict:
    if (text, finish, unverified) == (case.text, case.finish, 0):
        return Kind.RIGHT, "", withdrawn, ""
    if unverified and case.text.startswith(text[: len(text) - unverified]):
        return Kind.UNVERIFIED, "", withdrawn, ""
    kind = Kind.PASSED_OFF if unverified or withdrawn else Kind.DIFFERENT
    return kind, "", withdrawn, f"{text!r} ({finish}), not {case.text!r} ({case.finish})"


def _error(status: int, body: str) -> Verdict:
    try:
        error = json.loads(body)["error"]
        code, message = error["code"], error["message"]
    except (ValueError, KeyError, TypeError):
        return Kind.UNTYPED, str(status), 0, body[:200]
    return (Kind.ERROR if code and message else Kind.UNTYPED), code or str(status), 0, message


def _mark(said: dict[str, Any], name: str) -> int:
    """Of an answer or a chunk: how many characters are unverified, or withdrawn."""
    choices = said.get("choices") or [{}]
    return int(said.get(name) or choices[0].get(name) or 0)
