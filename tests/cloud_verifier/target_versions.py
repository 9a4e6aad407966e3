"""A verifier of several target versions, set up as `cloud-verifier serve --registry` does, and versions for it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anyio.from_thread import start_blocking_portal
from safetensors.torch import save_file

from cloud_verifier.api.app import VerifierService
from cloud_verifier.draft_models.safetensors_io import read_tensors
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.rollout import DEFAULT_RETIREMENT_POLICY, RetirementPolicy, Rollout, load_default_target
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.onnx_speculation import OnnxSpeculation
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from cloud_verifier.registry.delta import CHANGED_TENSORS_FILE, CHANGES_FILE
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


def save_incompatible_version(base_directory: Path, directory: Path, base_path: str) -> None:
    """Write a version of the base whose final norm, which drafts share, is changed."""
    (norm,) = read_tensors(base_directory, ["model.norm.weight"]).values()
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"model.norm.weight": norm * 1.25}, directory / CHANGED_TENSORS_FILE, metadata={"format": "pt"})
    (directory / CHANGES_FILE).write_text(json.dumps({"format_version": 1, "base": base_path}) + "\n", encoding="utf-8")
