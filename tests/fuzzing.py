"""Schemathesis, quick and the same every time: asks what a service's own description allows, and what not."""

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
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def fuzz(
    operation: Any,
    mode: GenerationMode,
    prepare: Callable[[schemathesis.Case], None],
    heed: Callable[[schemathesis.Response], None] = lambda response: None,
) -> None:
    """Asks for `operation` twenty times; `prepare` may change what is asked, and `heed` hears what is answered."""

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        prepare(case)
        heed(case.call_and_validate(checks=CHECKS))

    ask()


def whole(value: Any) -> Any:
    """`value` with integers for such numbers: 5.0 is an integer to JSON Schema only."""
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
