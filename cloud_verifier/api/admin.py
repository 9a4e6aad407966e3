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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cloud_verifier.api.codec import ADMIN_PREFIX, message_response, read_message
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.principals import Role
from cloud_verifier.engine.rollout import Rollout, ServedVersion
from cloud_verifier.registry.catalog import UnknownVersion, VersionAlias
from cloud_verifier.registry.compatibility import IncompatibleVersion
from cloud_verifier.registry.registry import Registry, RegistryError
from edge_runtime.protocol.errors import FlexSpecError, VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, Message

MAX_BODY_BYTES = 1 << 20
# Limit of a check, which loads two versions and evaluates them on a text.
CHECK_SECONDS = 1800.0
# A check yields the CPU to the verifier.
CHECK_NICENESS = 10


class TargetsReply(Message, frozen=True, omit_defaults=False):
    """The state of all target versions.

    Attributes:
        default: the alias for sessions that request no model.
        aliases: the aliases in the registry, with their history.
        active_aliases: the version that each alias leads to in this process, apart from canaries; the version that the
            registry names may still be loading.
        drafts: deployed bundles.
        data: all versions.
    """

    default: str
    aliases: dict[str, VersionAlias]
    active_aliases: dict[str, str] = msgspec.field(name="leading")
    drafts: list[str]
    data: list[ServedVersion]
    v: int = PROTOCOL_VERSION


class RegistryChange(Message, frozen=True):
    """A request that changes the registry."""

    def apply(self, registry: Registry) -> object:
        """Change the registry. Raises FlexSpecError; nothing has changed then."""
        raise NotImplementedError


class AddTarget(RegistryChange, frozen=True):
    """Arguments of `Registry.add`."""

    name: str
    unshared: bool = False
    v: int = PROTOCOL_VERSION

    def apply(self, registry: Registry) -> object:
        return registry.add(self.name, unshared=self.unshared, only_roots=True)


class PromoteTarget(RegistryChange, frozen=True):
    """Arguments of `Registry.promote`. In this and the following requests an empty alias is the default alias."""

    version: str
    alias: str = ""
    unshared: bool = False
    v: int = PROTOCOL_VERSION

    def apply(self, registry: Registry) -> object:
        return registry.promote(self.alias, self.version, unshared=self.unshared)


class SetCanary(RegistryChange, frozen=True):
    """Arguments of `Registry.canary`."""

    version: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)]
    alias: str = ""
    unshared: bool = False
    v: int = PROTOCOL_VERSION

    def apply(self, registry: Registry) -> object:
        return registry.canary(self.alias, self.version, self.percent, unshared=self.unshared)


class RollbackAlias(RegistryChange, frozen=True):
    """Arguments of `Registry.rollback`."""

    alias: str = ""
    v: int = PROTOCOL_VERSION

    def apply(self, registry: Registry) -> object:
        return registry.rollback(self.alias)


class RetireTarget(RegistryChange, frozen=True):
    """Arguments of `Registry.retire`."""

    version: str
    v: int = PROTOCOL_VERSION

    def apply(self, registry: Registry) -> object:
        return registry.retire(self.version)


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
        passed: all deployed drafts are compatible, and none loses more acceptance than the tolerance.
        compatible: all deployed drafts are compatible.
        gate: see `compatibility.CompatibilityReport`.
        expected: for every draft, see `forecast.AcceptanceForecast`.
    """

    passed: bool = msgspec.field(name="fine")
    compatible: bool
    gate: dict[str, Any]
    expected: list[dict[str, Any]]
    v: int = PROTOCOL_VERSION


class AdminOperation(NamedTuple):
    """One operation of the admin API. The access log calls it by its name."""

    name: str
    path: str
    summary: str
    request: type[Message] | None
    reply: type[Message] = TargetsReply

    @property
    def method(self) -> str:
        return "POST" if self.request else "GET"


TARGETS_PATH = f"{ADMIN_PREFIX}v1/targets"
ADMIN_OPERATIONS = (
    AdminOperation("list_targets", TARGETS_PATH, "List versions and aliases", None),
    AdminOperation(
        "add_target", TARGETS_PATH, "Add a version, if the deployed drafts are compatible with it", AddTarget
    ),
    AdminOperation(
        "promote_target", f"{TARGETS_PATH}/promote", "Route all new sessions of an alias to a version", PromoteTarget
    ),
    AdminOperation(
        "canary_target",
        f"{TARGETS_PATH}/canary",
        "Route a percentage of the new sessions of an alias to a version",
        SetCanary,
    ),
    AdminOperation("rollback_alias", f"{TARGETS_PATH}/rollback", "Undo the last change of an alias", RollbackAlias),
    AdminOperation("retire_target", f"{TARGETS_PATH}/retire", "Stop routing new sessions to a version", RetireTarget),
    AdminOperation(
        "check_target",
        f"{TARGETS_PATH}/check",
        "Forecast the acceptance rate of the deployed drafts with a version",
        CheckTarget,
        CheckReply,
    ),
)


class AdminApi:
    """Executes the operations on one rollout and its registry.

    Args:
        check_options: options of `cloud-verifier targets check`: the device and the dtype.
    """

    def __init__(self, rollout: Rollout, authenticator: Authenticator, check_options: Sequence[str]) -> None:
        self._rollout = rollout
        self._registry = rollout.registry
        self._authenticator = authenticator
        self._check_options = check_options
        self._check_lock = asyncio.Lock()

    async def handle(self, operation: AdminOperation, request: Request) -> Response:
        """Authorize the request, then decode its body and execute it. Errors of the registry become typed replies."""
        self._authenticator.authorize(request, Role.ADMIN)
        body = await read_message(request, operation.request, MAX_BODY_BYTES) if operation.request else None
        try:
            if isinstance(body, CheckTarget):
                return message_response(request, await self._check(body))
            if isinstance(body, RegistryChange):
                # In a thread: adding a version hashes its files, which takes as long as reading them.
                await asyncio.to_thread(body.apply, self._registry)
            await self._rollout.refresh()
        except VerifierRefused:
            raise
        except UnknownVersion as error:
            raise VerifierRefused(ErrorCode.UNKNOWN_MODEL, str(error)) from None
        except IncompatibleVersion as error:
            detail: dict[str, object] = {"differences": error.report.describe().splitlines()}
            raise VerifierRefused(ErrorCode.INCOMPATIBLE_TARGET, str(error), detail=detail) from None
        except RegistryError as error:
            raise VerifierRefused(ErrorCode.INTERNAL, str(error)) from None
        except FlexSpecError as error:
            raise VerifierRefused(ErrorCode.TARGET_REFUSED, str(error)) from None
        catalog = self._rollout.catalog
        reply = TargetsReply(
            default=catalog.default,
            aliases=catalog.aliases,
            active_aliases=self._rollout.active_aliases,
            drafts=catalog.drafts,
            data=self._rollout.list_versions(),
        )
        return message_response(request, reply)

    async def _check(self, body: CheckTarget) -> CheckReply:
        """Run `cloud-verifier targets check` in a process of its own, to isolate memory, time and faults.

        Only one check runs at a time.
        """
        if self._check_lock.locked():
            raise VerifierRefused(ErrorCode.OVERLOADED, "another check is running; try again when it has ended")
        async with self._check_lock:
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
            return CheckReply(exit_code == 0, result["compatible"], result["gate"], result["expected"])
        except (msgspec.MsgspecError, KeyError):
            last_line = stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("cloud-verifier: ")
            raise VerifierRefused(
                ErrorCode.TARGET_REFUSED, last_line[:1000] or f"the check ended with exit code {exit_code}"
            ) from None

    def _find_directory(self, version: str) -> Path:
        catalog = self._registry.read()
        with contextlib.suppress(UnknownVersion):
            return self._registry.path_of(catalog.find(version))
        return self._registry.locate(version, catalog, only_roots=True)


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
            ErrorCode.TARGET_REFUSED, f"the check did not end within {CHECK_SECONDS:g} s and was killed"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, stdout, stderr
