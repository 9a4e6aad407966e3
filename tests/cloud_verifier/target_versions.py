"""A verifier of several versions, as `cloud-verifier serve --registry` makes it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anyio.from_thread import start_blocking_portal

from cloud_verifier.api.app import Service
from cloud_verifier.api.server import Server
from cloud_verifier.engine.auth import Doors
from cloud_verifier.engine.rollout import PATIENCE, Patience, Rollout, load_default
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from cloud_verifier.registry.registry import Registry
from edge_runtime.common.http_server import Listening


def service_of(
    registry: Registry,
    tokens: Path | None = None,
    *,
    patience: Patience = PATIENCE,
    check_options: Sequence[str] = (),
    draft: Path | None = None,
) -> Service:
    """Without tokens everybody is a board; with a `draft`, a bundle, it speculates beside the targets."""

    def make(path: Path, name: str, beside: list[Target]) -> Target:
        return Target(path, device="cpu", dtype=torch.float32, name=name, beside=beside)

    def speculate(target: Target) -> Speculation | None:
        return Speculation(draft, target, 4, threads=1) if draft else None

    return Service(
        lambda: load_default(registry, make),
        VerifierLimits(),
        speculate,
        Doors(tokens),
        lambda engine, sessions: Rollout(registry, engine, sessions, patience),
        check_options,
        make,
    )


@contextlib.contextmanager
def serving_registry(registry: Registry, tokens: Path | None = None, **options: Any) -> Iterator[str]:
    """The URL of such a service, in a thread of its own."""

    @contextlib.asynccontextmanager
    async def serving() -> AsyncIterator[Server]:
        server = Server(service_of(registry, tokens, **options), Listening(port=0))
        await server.start()
        try:
            yield server
        finally:
            await server.stop()

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving()) as server:
        yield server.url
