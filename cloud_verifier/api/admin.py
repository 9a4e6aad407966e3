"""The admin API: `cloud-verifier targets` over HTTP, for tokens with the role admin.

    GET  /admin/v1/targets                             -> TargetsReply
    POST /admin/v1/targets             AddTarget       -> TargetsReply
    POST /admin/v1/targets/promote     PromoteTarget   -> TargetsReply
    POST /admin/v1/targets/canary      SetCanary       -> TargetsReply
    POST /admin/v1/targets/rollback    RollbackAlias   -> TargetsReply
    POST /admin/v1/targets/retire      RetireTarget    -> TargetsReply
    POST /admin/v1/targets/check       CheckTarget     -> CheckReply

Bodies are JSON. A change is in the registry when the reply arrives; versions are loaded afterwards, and `TargetsReply`
reports the progress. Versions are added by name from the roots of the registry, so that no request can make the
verifier read other directories.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cloud_verifier.api.codec import ADMIN_PREFIX, message_response, read_message
from cloud_verifier.engine.auth import require_admin
from cloud_verifier.engine.rollout import Rollout, ServedVersion
from cloud_verifier.registry.catalog import UnknownVersion, VersionAlias
from cloud_verifier.registry.compatibility import IncompatibleVersion
from cloud_verifier.registry.registry import RegistryError
from edge_runtime.protocol.errors import FlexSpecError, InputError, VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, Message

MAX_BODY_BYTES = 1 << 20
# Limit of a check, which loads two versions and evaluates them on a text.
CHECK_SECONDS = 1800.0
# A check yields the CPU to the verifier.
CHECK_NICENESS = 10

Handler = Callable[[Request], Awaitable[Response]]
M = TypeVar("M", bound=Message)


class TargetsReply(Message, frozen=True, omit_defaults=False):
    """The state of all target versions.

    Attributes:
        default: the alias for sessions that request no model.
        aliases: the aliases in the registry, with their history.
        leading: the version that each alias leads to in this process, apart from canaries; the registry's version may
            still be loading.
        drafts: deployed bundles.
        data: all versions.
    """

    default: str
    aliases: dict[str, VersionAlias]
    leading: dict[str, str]
    drafts: list[str]
    data: list[ServedVersion]
    v: int = PROTOCOL_VERSION


class AddTarget(Message, frozen=True):
    """Arguments of `Registry.add`."""

    name: str
    unshared: bool = False
    v: int = PROTOCOL_VERSION


class PromoteTarget(Message, frozen=True):
    """Arguments of `Catalog.promote`. In this and the following requests an empty alias is the default alias."""

    version: str
    alias: str = ""
    unshared: bool = False
    v: int = PROTOCOL_VERSION


class SetCanary(Message, frozen=True):
    """Arguments of `Catalog.canary`."""

    version: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)]
    alias: str = ""
    unshared: bool = False
    v: int = PROTOCOL_VERSION


class RollbackAlias(Message, frozen=True):
    """Arguments of `Catalog.rollback`."""

    alias: str = ""
    v: int = PROTOCOL_VERSION


class RetireTarget(Message, frozen=True):
    """Arguments of `Catalog.retire`."""

    version: str
    v: int = PROTOCOL_VERSION


class CheckTarget(Message, frozen=True):
    """A version to compare with the one in use.

    Attributes:
        version: a version of the registry, or the name of a directory in its roots.
        tolerance: percentage points of acceptance rate that it may lose against the version in use.
        text: text to evaluate on; empty for the one that ships.
    """

    version: str
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=100)] = 3.0
    text: str = ""
    v: int = PROTOCOL_VERSION


class CheckReply(Message, frozen=True, omit_defaults=False):
    """The result of a check.

    Attributes:
        fine: all deployed drafts are compatible, and none loses more acceptance than the tolerance.
        compatible: all deployed drafts are compatible.
        gate: see `compatibility.CompatibilityReport`.
        expected: for every draft, see `forecast.AcceptanceForecast`.
    """

    fine: bool
    compatible: bool
    gate: dict[str, Any]
    expected: list[dict[str, Any]]
    v: int = PROTOCOL_VERSION


class AdminOperation(NamedTuple):
    """One operation of the admin API. `handler` names a method of `AdminApi`."""

    method: str
    path: str
    summary: str
    request: type[Message] | None
    reply: type[Message]
    handler: str


TARGETS_PATH = f"{ADMIN_PREFIX}v1/targets"
ADMIN_OPERATIONS = (
    AdminOperation(
        method="GET",
        path=TARGETS_PATH,
        summary="List versions and aliases",
        request=None,
        reply=TargetsReply,
        handler="list_targets",
    ),
    AdminOperation(
        method="POST",
        path=TARGETS_PATH,
        summary="Add a version, if the deployed drafts are compatible with it",
        request=AddTarget,
        reply=TargetsReply,
        handler="add_target",
    ),
    AdminOperation(
        method="POST",
        path=f"{TARGETS_PATH}/promote",
        summary="Route all new sessions of an alias to a version",
        request=PromoteTarget,
        reply=TargetsReply,
        handler="promote_target",
    ),
    AdminOperation(
        method="POST",
        path=f"{TARGETS_PATH}/canary",
        summary="Route a percentage of the new sessions of an alias to a version",
        request=SetCanary,
        reply=TargetsReply,
        handler="canary_target",
    ),
    AdminOperation(
        method="POST",
        path=f"{TARGETS_PATH}/rollback",
        summary="Undo the last change of an alias",
        request=RollbackAlias,
        reply=TargetsReply,
        handler="rollback_alias",
    ),
    AdminOperation(
        method="POST",
        path=f"{TARGETS_PATH}/retire",
        summary="Stop routing new sessions to a version",
        request=RetireTarget,
        reply=TargetsReply,
        handler="retire_target",
    ),
    AdminOperation(
        method="POST",
        path=f"{TARGETS_PATH}/check",
        summary="Forecast the acceptance rate of the deployed drafts with a version",
        request=CheckTarget,
        reply=CheckReply,
        handler="check_target",
    ),
)


class AdminApi:
    """Request handlers over one rollout.

    Args:
        check_options: options of `cloud-verifier targets check`: the device and the dtype.
    """

    def __init__(self, rollout: Rollout, check_options: list[str]) -> None:
        self._rollout = rollout
        self._registry = rollout.registry
        self._check_options = check_options
        self._check_lock = asyncio.Lock()

    def handler(self, operation: AdminOperation) -> Handler:
        handler: Handler = getattr(self, operation.handler)
        return handler

    async def list_targets(self, request: Request) -> Response:
        require_admin(request)
        with _registry_errors_as_replies():
            await self._rollout.refresh()
        return self._targets_response(request)

    async def add_target(self, request: Request) -> Response:
        body = await _read_admin_message(request, AddTarget)
        return await self._change(
            request, lambda: self._registry.add(body.name, unshared=body.unshared, only_roots=True)
        )

    async def promote_target(self, request: Request) -> Response:
        body = await _read_admin_message(request, PromoteTarget)
        return await self._change(
            request,
            lambda: self._registry.promote(body.alias or self._default_alias(), body.version, unshared=body.unshared),
        )

    async def canary_target(self, request: Request) -> Response:
        body = await _read_admin_message(request, SetCanary)
        return await self._change(
            request,
            lambda: self._registry.canary(
                body.alias or self._default_alias(), body.version, body.percent, unshared=body.unshared
            ),
        )

    async def rollback_alias(self, request: Request) -> Response:
        body = await _read_admin_message(request, RollbackAlias)
        return await self._change(request, lambda: self._registry.rollback(body.alias or self._default_alias()))

    async def retire_target(self, request: Request) -> Response:
        body = await _read_admin_message(request, RetireTarget)
        return await self._change(request, lambda: self._registry.retire(body.version))

    async def check_target(self, request: Request) -> Response:
        """Run `cloud-verifier targets check` in a process of its own, to isolate memory, time and faults.

        Only one check runs at a time.
        """
        body = await _read_admin_message(request, CheckTarget)
        if self._check_lock.locked():
            raise VerifierRefused(ErrorCode.OVERLOADED, "another check is running; try again when it has ended", 503)
        async with self._check_lock:
            with _registry_errors_as_replies():
                directory = await asyncio.to_thread(self._find_directory, body.version)
            command = [sys.executable, "-m", "cloud_verifier.cli", "targets", "check", str(directory), "--json"]
            command += ["--registry", str(self._registry.path), "--tolerance", str(body.tolerance)]
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="replace") as text:
                text.write(body.text)
                text.flush()
                command += ["--text", text.name] if body.text else []
                exit_code, stdout, stderr = await _run_check([*command, *self._check_options])
        try:
            result = msgspec.json.decode(stdout, type=dict[str, Any])
            reply = CheckReply(exit_code == 0, result["compatible"], result["gate"], result["expected"])
        except (msgspec.MsgspecError, KeyError):
            last_line = stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("cloud-verifier: ")
            raise VerifierRefused(
                ErrorCode.TARGET_REFUSED, last_line[:1000] or f"the check ended with exit code {exit_code}", 409
            ) from None
        return message_response(request, reply)

    def _find_directory(self, version: str) -> Path:
        catalog = self._registry.read()
        with contextlib.suppress(UnknownVersion):
            return self._registry.path_of(catalog.find(version))
        return self._registry.locate(version, catalog, only_roots=True)

    def _default_alias(self) -> str:
        return self._registry.read().default

    async def _change(self, request: Request, change: Callable[[], object]) -> Response:
        # In a thread: adding a version hashes its files, which takes as long as reading them.
        with _registry_errors_as_replies():
            await asyncio.to_thread(change)
            await self._rollout.refresh()
        return self._targets_response(request)

    def _targets_response(self, request: Request) -> Response:
        catalog = self._rollout.catalog
        reply = TargetsReply(
            default=catalog.default,
            aliases=catalog.aliases,
            leading=self._rollout.active_aliases,
            drafts=catalog.drafts,
            data=self._rollout.list_versions(),
        )
        return message_response(request, reply)


async def _read_admin_message(request: Request, kind: type[M]) -> M:
    """Authorize the request, then decode its body."""
    require_admin(request)
    return await read_message(request, kind, MAX_BODY_BYTES)


@contextlib.contextmanager
def _registry_errors_as_replies() -> Iterator[None]:
    """Turn errors of the registry into typed error replies."""
    try:
        yield
    except UnknownVersion as error:
        raise VerifierRefused(ErrorCode.UNKNOWN_MODEL, str(error), 404) from None
    except IncompatibleVersion as error:
        detail: dict[str, object] = {"differences": error.report.describe().splitlines()}
        raise VerifierRefused(ErrorCode.INCOMPATIBLE_TARGET, str(error), 409, detail) from None
    except RegistryError as error:
        raise VerifierRefused(ErrorCode.INTERNAL, str(error), 500) from None
    except (InputError, FlexSpecError) as error:
        raise VerifierRefused(ErrorCode.TARGET_REFUSED, str(error), 409) from None


async def _run_check(command: list[str]) -> tuple[int, bytes, bytes]:
    """Run a check at low priority; return its exit code, stdout and stderr. It is killed after `CHECK_SECONDS`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, CHECK_NICENESS)
        stdout, stderr = await asyncio.wait_for(process.communicate(), CHECK_SECONDS)
    except TimeoutError:
        raise VerifierRefused(
            ErrorCode.TARGET_REFUSED, f"the check did not end within {CHECK_SECONDS:g} s and was killed", 409
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, stdout, stderr
