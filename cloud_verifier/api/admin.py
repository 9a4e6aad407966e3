"""The admin API: `cloud-verifier targets`, over HTTP and for a token whose role is admin.

    GET  /admin/v1/targets             -> Targets
    POST /admin/v1/targets             Add      -> Targets
    POST /admin/v1/targets/promote     Promote  -> Targets
    POST /admin/v1/targets/canary      Canary   -> Targets
    POST /admin/v1/targets/rollback    Rollback -> Targets
    POST /admin/v1/targets/retire      Retire   -> Targets
    POST /admin/v1/targets/check       Check    -> Checked

Bodies are JSON. What is asked for is in the registry when the answer comes; versions are loaded behind it, and
`Targets` says how far that is. Versions are added by name, from the registry's roots: nobody makes the verifier read
other places.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from cloud_verifier.api.codec import ADMIN, message_of, respond
from cloud_verifier.engine.auth import require_admin
from cloud_verifier.engine.rollout import Rollout, Served
from cloud_verifier.registry.catalog import Alias, Unknown
from cloud_verifier.registry.compatibility import Incompatible
from cloud_verifier.registry.registry import RegistryError
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import FlexSpecError, InputError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Message

MAX_BODY = 1 << 20
# For a check, which loads two versions and follows a text.
CHECK_SECONDS = 1800.0
# It gives way to those who serve.
NICENESS = 10

Handler = Callable[[Request], Awaitable[Response]]
M = TypeVar("M", bound=Message)


class Targets(Message, frozen=True, omit_defaults=False):
    """What there is.

    Attributes:
        default: the alias that sessions get which ask for no model.
        aliases: where they are to lead, and led before.
        leading: where they lead here, canaries aside: what is to come may still be loading.
        drafts: deployed bundles.
        data: every version.
    """

    default: str
    aliases: dict[str, Alias]
    leading: dict[str, str]
    drafts: list[str]
    data: list[Served]
    v: int = messages.VERSION


class Add(Message, frozen=True):
    """Attributes: see `Registry.add`."""

    name: str
    unshared: bool = False
    v: int = messages.VERSION


class Promote(Message, frozen=True):
    """Attributes: see `Roster.promote`; an empty alias is the default one, as in all of these."""

    version: str
    alias: str = ""
    unshared: bool = False
    v: int = messages.VERSION


class Canary(Message, frozen=True):
    """Attributes: see `Roster.canary`."""

    version: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)]
    alias: str = ""
    unshared: bool = False
    v: int = messages.VERSION


class Rollback(Message, frozen=True):
    """Attributes: see `Roster.rollback`."""

    alias: str = ""
    v: int = messages.VERSION


class Retire(Message, frozen=True):
    """Attributes: see `Roster.retire`."""

    version: str
    v: int = messages.VERSION


class Check(Message, frozen=True):
    """What to examine.

    Attributes:
        version: one of the registry's, or the name of one in its roots.
        tolerance: points of acceptance that it may lose against the version in use.
        text: to follow; empty for the one that ships.
    """

    version: str
    tolerance: Annotated[float, msgspec.Meta(ge=0, le=100)] = 3.0
    text: str = ""
    v: int = messages.VERSION


class Checked(Message, frozen=True, omit_defaults=False):
    """What came of it.

    Attributes:
        fine: neither does a draft not fit, nor would it be right too seldom.
        compatible: every deployed draft fits.
        gate: see `gate.Examined`.
        expected: of every draft, see `forecast.Forecast`.
    """

    fine: bool
    compatible: bool
    gate: dict[str, Any]
    expected: list[dict[str, Any]]
    v: int = messages.VERSION


class Operation(NamedTuple):
    """One of the API's: `handler` is the name of the method of `Admin`."""

    method: str
    path: str
    summary: str
    asked: type[Message] | None
    told: type[Message]
    handler: str


TARGETS = f"{ADMIN}v1/targets"
OPERATIONS = (
    Operation("GET", TARGETS, "What there is", None, Targets, "list_targets"),
    Operation("POST", TARGETS, "Add a version, if the deployed drafts fit it", Add, Targets, "add_target"),
    Operation("POST", f"{TARGETS}/promote", "All new sessions of an alias get it", Promote, Targets, "promote_target"),
    Operation("POST", f"{TARGETS}/canary", "Some new sessions of an alias get it", Canary, Targets, "canary_target"),
    Operation("POST", f"{TARGETS}/rollback", "An alias is what it was before", Rollback, Targets, "rollback_alias"),
    Operation("POST", f"{TARGETS}/retire", "It gets no new sessions any more", Retire, Targets, "retire_target"),
    Operation("POST", f"{TARGETS}/check", "What the drafts would be worth with it", Check, Checked, "check_target"),
)


class Admin:
    """Handlers over one roll-out.

    Args:
        check_options: of `cloud-verifier targets check`: on which device, and in which type.
    """

    def __init__(self, rollout: Rollout, check_options: list[str]) -> None:
        self._rollout = rollout
        self._registry = rollout.registry
        self._check_options = check_options
        self._checking = asyncio.Lock()

    def handler(self, operation: Operation) -> Handler:
        """What answers it."""
        handler: Handler = getattr(self, operation.handler)
        return handler

    async def list_targets(self, request: Request) -> Response:
        require_admin(request)
        with _typed():
            await self._rollout.refresh()
        return self._told(request)

    async def add_target(self, request: Request) -> Response:
        asked = await _asked(request, Add)
        return await self._changed(
            request, lambda: self._registry.add(asked.name, unshared=asked.unshared, only_roots=True)
        )

    async def promote_target(self, request: Request) -> Response:
        asked = await _asked(request, Promote)
        return await self._changed(
            request,
            lambda: self._registry.promote(asked.alias or self._default(), asked.version, unshared=asked.unshared),
        )

    async def canary_target(self, request: Request) -> Response:
        asked = await _asked(request, Canary)
        return await self._changed(
            request,
            lambda: self._registry.canary(
                asked.alias or self._default(), asked.version, asked.percent, unshared=asked.unshared
            ),
        )

    async def rollback_alias(self, request: Request) -> Response:
        asked = await _asked(request, Rollback)
        return await self._changed(request, lambda: self._registry.rollback(asked.alias or self._default()))

    async def retire_target(self, request: Request) -> Response:
        asked = await _asked(request, Retire)
        return await self._changed(request, lambda: self._registry.retire(asked.version))

    async def check_target(self, request: Request) -> Response:
        """In a process of its own, so that neither memory nor time nor a fault of it is this one's; one at a time."""
        asked = await _asked(request, Check)
        if self._checking.locked():
            raise VerifierRefused(ErrorCode.OVERLOADED, "another check is running; try again when it is over", 503)
        async with self._checking:
            with _typed():
                place = await asyncio.to_thread(self._place, asked.version)
            command = [sys.executable, "-m", "cloud_verifier.cli", "targets", "check", str(place), "--json"]
            command += ["--registry", str(self._registry.path), "--tolerance", str(asked.tolerance)]
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="replace") as text:
                text.write(asked.text)
                text.flush()
                command += ["--text", text.name] if asked.text else []
                code, output, said = await _run([*command, *self._check_options], CHECK_SECONDS)
        try:
            told = msgspec.json.decode(output, type=dict[str, Any])
            checked = Checked(code == 0, told["compatible"], told["gate"], told["expected"])
        except (msgspec.MsgspecError, KeyError):
            last = said.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("cloud-verifier: ")
            raise VerifierRefused(
                ErrorCode.TARGET_REFUSED, last[:1000] or f"the check ended with exit code {code}", 409
            ) from None
        return respond(request, checked)

    def _place(self, version: str) -> Path:
        roster = self._registry.read()
        with contextlib.suppress(Unknown):
            return self._registry.path_of(roster.find(version))
        return self._registry.locate(version, roster, only_roots=True)

    def _default(self) -> str:
        return self._registry.read().default

    async def _changed(self, request: Request, change: Callable[[], object]) -> Response:
        # Hashing a version's files takes as long as reading them.
        with _typed():
            await asyncio.to_thread(change)
            await self._rollout.refresh()
        return self._told(request)

    def _told(self, request: Request) -> Response:
        roster = self._rollout.roster
        listing = self._rollout.listing()
        return respond(request, Targets(roster.default, roster.aliases, self._rollout.aliases, roster.drafts, listing))


async def _asked(request: Request, kind: type[M]) -> M:
    """The message of an admin's request. Whoever it is from comes first."""
    require_admin(request)
    return await message_of(request, kind, MAX_BODY)


@contextlib.contextmanager
def _typed() -> Any:
    """Turns errors into refusals."""
    try:
        yield
    except Unknown as error:
        raise VerifierRefused(ErrorCode.UNKNOWN_MODEL, str(error), 404) from None
    except Incompatible as error:
        detail: dict[str, object] = {"differences": error.examined.report().splitlines()}
        raise VerifierRefused(ErrorCode.INCOMPATIBLE_TARGET, str(error), 409, detail) from None
    except RegistryError as error:
        raise VerifierRefused(ErrorCode.INTERNAL, str(error), 500) from None
    except (InputError, FlexSpecError) as error:
        raise VerifierRefused(ErrorCode.TARGET_REFUSED, str(error), 409) from None


async def _run(command: list[str], seconds: float) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and standard error of a process that gives way to this one; killed when late."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        output, said = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        raise VerifierRefused(
            ErrorCode.TARGET_REFUSED, f"the check was not over within {seconds:g} s, and was ended", 409
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output, said
