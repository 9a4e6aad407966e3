"""Fast, deterministic Schemathesis fuzzing: sends requests that a service's OpenAPI document allows or forbids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

CHECKS = [
    checks.positive_data_acceptance,
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
QUICK = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def fuzz(
    operation: Any,
    mode: GenerationMode,
    prepare: Callable[[schemathesis.Case], None],
    inspect_response: Callable[[schemathesis.Response], None] = lambda response: None,
) -> None:
    """Send twenty requests to `operation` and validate the responses against its schema.

    Args:
        prepare: may change each request before it is sent.
        inspect_response: called with each valid response.
    """
    # A request that `prepare` changed may count as forbidden for Schemathesis although it was generated as allowed.
    dropped = checks.negative_data_rejection if mode is GenerationMode.POSITIVE else None
    applied = [check for check in CHECKS if check is not dropped]

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        prepare(case)
        inspect_response(case.call_and_validate(checks=applied))

    send()


def whole(value: Any) -> Any:
    """Return `value` with integral floats as integers, because 5.0 is an integer only to JSON Schema."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
