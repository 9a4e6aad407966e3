"""Requests as large as the service takes: the watchdog of the suite finds what of them holds the event loop.

See `tests/event_loop_watchdog.py`. All of them are refused or answered soon; what matters is how the others fare.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from tests.edge_runtime.service.conftest import service_pair

USER = {"role": "user", "content": "a"}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": ("completions", {"prompt": [1] * 130_000}),
    "text": ("completions", {"prompt": "ab " * 85_000}),
    "too many prompts": ("completions", {"prompt": ["a"] * 60_000}),
    "unknown fields": ("completions", {"prompt": "a", **{f"field_{index}": 1 for index in range(14_000)}}),
    "messages": ("chat/completions", {"messages": [USER] * 7_000}),
    "parts": ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 8_000}]}),
    "tools": (
        "chat/completions",
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(4_500)]},
    ),
    "schema": (
        "chat/completions",
        {
            "messages": [USER],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "x",
                    "schema": {"properties": {f"p{i}": {"type": "string"} for i in range(8_000)}},
                },
            },
        },
    ),
    "input": ("responses", {"input": [USER] * 7_000}),
}


async def test_large_bodies_do_not_hold_the_event_loop(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair, httpx.AsyncClient(timeout=300) as client:
        limit = pair.service.state.limits.max_body
        for name, (path, body) in BODIES.items():
            answer_limit = {} if path == "responses" else {"max_tokens": 1}
            content = json.dumps(body | answer_limit, separators=(",", ":")).encode()
            assert limit * 0.6 < len(content) <= limit, name
            response = await client.post(
                f"{pair.url}/v1/{path}", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code in (200, 400), response.text


@pytest.mark.slow
async def test_many_log_probabilities_do_not_hold_the_event_loop(target: Target, draft: OnnxDraft) -> None:
    body = {"messages": [USER], "max_tokens": 500, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    planner = FixedPlanner(Plan(draft=0, continuation=512))
    async with service_pair(target, draft, planner=planner) as pair, httpx.AsyncClient(timeout=300) as client:
        answer = (await client.post(f"{pair.url}/v1/chat/completions", json=body)).json()
        described = answer["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in described] == [20] * 500
