"""A verifier of several target versions, set up as `cloud-verifier serve --registry` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anyio.from_thread import start_blocking_portal

from cloud_verifier.api.app import VerifierService
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.rollout import DEFAULT_RETIREMENT_POLICY, RetirementPolicy, Rollout, load_default_target
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.onnx_speculation import OnnxSpeculation
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from cloud_verifier.registry.registry import Registry
from tests.cloud_verifier.protocol_client import listening


def make_target(path: Path, name: str, others: list[Target]) -> Target:
    """A target factory for tests."""
    return Target(path, device="cpu", dtype=torch.float32, name=name, share_with=others)


def registry_service(
    registry: Registry,
    tokens: Path | None = None,
    *,
    policy: RetirementPolicy = DEFAULT_RETIREMENT_POLICY,
    check_options: Sequence[str] = (),
    draft: Path | None = None,
) -> VerifierService:
    """A service of all versions of `registry`.

    Args:
        tokens: token file; None to require no tokens.
        draft: bundle for server-side speculation.
    """

    def load_speculation(target: Target) -> Speculation | None:
        return OnnxSpeculation(draft, target, max_draft_tokens=4, threads=1) if draft else None

    return VerifierService(
        lambda: load_default_target(registry, make_target),
        VerifierLimits(),
        load_speculation=load_speculation,
        authenticator=Authenticator(tokens),
        make_rollout=lambda scheduler, sessions: Rollout(registry, scheduler, sessions, policy),
        check_options=check_options,
        target_factory=make_target,
    )


@contextlib.contextmanager
def serve_registry(registry: Registry, tokens: Path | None = None, **options: Any) -> Iterator[str]:
    """Serve `registry_service` in a thread of its own; yields its URL."""
    service = registry_service(registry, tokens, **options)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(listening(service)) as server:
        yield server.url
