"""The roll-out: keeps what is loaded in step with the registry, and leads each new session to a version.

A version is loaded while it is in the registry and not retired. An alias leads to what the registry says as soon as
that is loaded, and until then to where it led before; a canary that is not loaded (yet) gets no sessions. A retired
version goes when its last session has been gone for a while, or when its time of grace is over. A session that is open
stays with its version whatever happens to aliases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from cloud_verifier.engine.scheduler import Make
from cloud_verifier.model.target import Target
from cloud_verifier.registry.catalog import Entry, Setting, Unknown
from cloud_verifier.registry.registry import Listed, Registry, RegistryError
from edge_runtime.protocol.errors import FlexSpecError, TargetError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

# How often the registry's file is looked at, since others may change it.
POLL_SECONDS = 1.0
# And whether the first version is loaded.
FIRST_POLL_SECONDS = 0.02


class Loader(Protocol):
    """Whatever holds the targets: the engine.

    Attributes:
        target: the first one, which it loads by itself (see `load_default`); None until then.
    """

    target: Target | None

    @property
    def versions(self) -> Mapping[str, Target]:
        """What is loaded, by exact version."""

    async def load(self, path: Path, name: str) -> Target:
        """Loads one more, while the others go on. Raises TargetError."""

    async def unload(self, version: str) -> None:
        """Forgets one, once no round of it is in progress."""


def load_default(registry: Registry, make: Make) -> Target:
    """The version that the default alias leads to, which is loaded before anything is served.

    Raises:
        RegistryError: there is no registry, it makes no sense, or nothing in it is the default.
        TargetError: the version does not load, or is not the one that was added.
    """
    roster = registry.read()
    alias = roster.aliases.get(roster.default)
    if alias is None:
        raise _nothing(registry, roster.default)
    entry = roster.entry(alias.now.version)
    return checked(make(registry.path_of(entry), entry.name, []), entry)


def checked(target: Target, entry: Entry) -> Target:
    """`target`. Raises TargetError unless it is still what was added."""
    if target.version != entry.version:
        raise TargetError(
            f"{entry.version}: its files have changed since it was added: it is {target.version} now; add it again"
        )
    return target


def _nothing(registry: Registry, default: str) -> RegistryError:
    return RegistryError(
        f"{registry.file} leads nowhere: there is no alias {default!r}, its default; "
        "`cloud-verifier targets promote` a version"
    )


class Pinned(Protocol):
    """The sessions, as far as they matter here."""

    def of_version(self, version: str) -> Sequence[str]:
        """Ids of the sessions that are pinned to it."""

    def remove(self, session_id: str) -> None:
        """Closes one."""


class Patience(msgspec.Struct, frozen=True):
    """With retired versions, in seconds.

    Attributes:
        lost: after its last session a version stays for so long: a board whose session was lost comes back for it.
        grace: for its sessions to end; then they are closed.
    """

    lost: float = 60.0
    grace: float = 3600.0


class Served(Listed, frozen=True):
    """One version, as it is here.

    Attributes:
        loaded: whether it is.
        sessions: that are pinned to it.
    """

    loaded: bool = False
    sessions: int = 0


PATIENCE = Patience()


class Rollout:
    """Which versions this process serves. Belongs to the event loop.

    Attributes:
        roster: the registry's, as it was read last.
    """

    def __init__(self, registry: Registry, loader: Loader, pinned: Pinned, patience: Patience = PATIENCE) -> None:
        """Raises RegistryError: there is no registry, or it makes no sense."""
        self.registry = registry
        self._loader = loader
        self._pinned = pinned
        self._patience = patience
        self.roster = registry.read()
        self._stamp = registry.stamp()
        self._leads: dict[str, Setting] = {}
        # Of entries that did not load: why. One that is added again is another entry.
        self._failures: dict[Entry, str] = {}
        # Of versions that are to go: since when, and when a session of theirs was last here.
        self._leaving: dict[str, tuple[float, float]] = {}
        self._loading: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether sessions that ask for no model can be opened."""
        return self.roster.default in self._leads

    @property
    def failure(self) -> TargetError | None:
        """Why that can never be, as things stand: the default's version did not load, and nothing was before."""
        alias = self.roster.aliases.get(self.roster.default)
        if self.ready:
            return None
        if alias is None:
            return _nothing(self.registry, self.roster.default)
        why = self._failures.get(self.roster.entry(alias.now.version))
        return TargetError(f"{alias.now.version}: {why}") if why else None

    @property
    def default(self) -> Target:
        """What sessions that ask for no model get, canaries aside. Raises VerifierRefused (`starting`)."""
        if not self.ready:
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly", 503)
        return self._loader.versions[self._leads[self.roster.default].version]

    @property
    def aliases(self) -> dict[str, str]:
        """Where aliases lead, canaries aside."""
        return {name: setting.version for name, setting in self._leads.items()}

    def resolve(self, model: str, key: str) -> Target:
        """The target for the session that is opened with `key`; see `Roster.resolve` for `model`.

        Raises:
            VerifierRefused: `unknown_model`, or `starting` while it is being loaded.
        """
        loaded, name = self._loader.versions, model or self.roster.default
        setting = self._leads.get(name)
        if setting is not None:
            chosen = setting.choose(name, key)
            return loaded[chosen if chosen in loaded else setting.version]
        since, _ = self._leaving.get(name, (time.monotonic(), 0.0))
        if name in loaded and time.monotonic() - since <= self._patience.grace:
            if name in self._leaving:
                self._leaving[name] = (since, time.monotonic())
            return loaded[name]
        try:
            entry = self.roster.find(name)
        except Unknown:
            raise self._unknown(name, "is not here") from None
        named = [other for other in self.roster.targets if other.name == name and not other.retired]
        there = [other for other in named if other.version in loaded]
        if there:
            return loaded[max(there, key=lambda other: other.added).version]
        if entry.retired:
            raise self._unknown(name, "is retired")
        if entry in self._failures:
            raise self._unknown(name, "could not be loaded")
        raise VerifierRefused(ErrorCode.STARTING, f"{entry.version} is still loading; try again shortly", 503)

    def models(self) -> dict[str, Target]:
        """What sessions can ask for, the default first: aliases, names, and versions whose name is a newer one's."""
        loaded = self._loader.versions
        found = {name: loaded[self._leads[name].version] for name in sorted(self._leads, key=self._rank)}
        for entry in sorted(self.roster.targets, key=lambda entry: entry.added, reverse=True):
            if entry.version in loaded and not entry.retired:
                found[entry.version if entry.name in found else entry.name] = loaded[entry.version]
        return found

    def _rank(self, alias: str) -> tuple[bool, str]:
        return (alias != self.roster.default, alias)

    def listing(self) -> list[Served]:
        """All versions of the registry, and how they are doing here."""
        loaded = self._loader.versions
        served = []
        for listed in self.registry.listing(self.roster):
            failure = self._failures.get(self.roster.entry(listed.version), "")
            told = msgspec.structs.asdict(listed) | {"problem": failure or listed.problem}
            here = listed.version in loaded
            served.append(Served(**told, loaded=here, sessions=len(self._pinned.of_version(listed.version))))
        return served

    async def refresh(self) -> None:
        """Follows the registry now, as far as that is possible without loading anything."""
        stamp = await asyncio.to_thread(self.registry.stamp)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.roster = await asyncio.to_thread(self.registry.read)
            except RegistryError as error:
                log.error("the roll-out stays as it was: %s", error)
        self._follow()

    def look(self) -> None:
        """Has `run` look at once."""
        self._looked.set()

    async def run(self) -> None:
        """Follows the registry until it is cancelled."""
        try:
            while True:
                try:
                    await self.refresh()
                    await self._sweep()
                except Exception:
                    log.exception("the roll-out stays as it was")
                with contextlib.suppress(TimeoutError):
                    seconds = POLL_SECONDS if self._begun else FIRST_POLL_SECONDS
                    await asyncio.wait_for(self._looked.wait(), seconds)
                self._looked.clear()
        finally:
            if self._loading is not None:
                self._loading.cancel()

    def _follow(self) -> None:
        """Brings aliases up to date, and sees to it that what is missing gets loaded."""
        loaded, roster = self._loader.versions, self.roster
        leads = {}
        for name, alias in roster.aliases.items():
            before = self._leads.get(name)
            if alias.now.version in loaded:
                leads[name] = alias.now
            elif before is not None and before.version in loaded:
                leads[name] = before
            if leads.get(name) != before:
                log.info("the alias %s leads to %s", name, leads[name].version if name in leads else "nothing")
        self._leads = leads
        self._failures = {entry: why for entry, why in self._failures.items() if entry in roster.targets}
        missing = [
            entry
            for entry in roster.targets
            if not entry.retired and entry.version not in loaded and entry not in self._failures
        ]
        free = self._loading is None or self._loading.done()
        if missing and free and self._begun:
            self._loading = asyncio.create_task(self._load(min(missing, key=self._urgency)))

    @property
    def _begun(self) -> bool:
        """Whether the first version is loaded, or was."""
        return self._loader.target is not None or bool(self._loader.versions)

    def _urgency(self, entry: Entry) -> tuple[bool, bool]:
        """What most wait for comes first."""
        shares = self.roster.shares(entry.version)
        return (shares.get(self.roster.default, 0) < 50, not shares)

    async def _load(self, entry: Entry) -> None:
        began = time.monotonic()
        try:
            target = await self._loader.load(self.registry.path_of(entry), entry.name)
            if all(target.version != other.version for other in self.roster.targets):
                await self._loader.unload(target.version)
            checked(target, entry)
            log.info("%s was loaded in %.1f s", entry.version, time.monotonic() - began)
        except FlexSpecError as error:
            log.error("%s did not load: %s", entry.version, error)
            self._failures[entry] = str(error)
        except Exception as error:
            log.exception("%s did not load", entry.version)
            self._failures[entry] = repr(error)
        self.look()

    async def _sweep(self) -> None:
        """Unloads what is retired, or no longer in the registry, once nobody is left who needs it."""
        now = time.monotonic()
        active = {entry.version for entry in self.roster.targets if not entry.retired}
        needed = active | {setting.version for setting in self._leads.values()}
        for version in list(self._loader.versions):
            if version in needed:
                self._leaving.pop(version, None)
                continue
            sessions = self._pinned.of_version(version)
            since, used = self._leaving.get(version, (now, now))
            used = now if sessions else used
            self._leaving[version] = (since, used)
            over = now - since > self._patience.grace
            if over and sessions:
                log.warning("%s is retired: %d sessions were closed", version, len(sessions))
                for session in sessions:
                    self._pinned.remove(session)
            if over or (not sessions and now - used > self._patience.lost):
                await self._loader.unload(version)
                del self._leaving[version]
                log.info("%s was unloaded", version)

    def _unknown(self, name: str, why: str) -> VerifierRefused:
        active = {entry.version for entry in self.roster.targets if not entry.retired}
        available = [*self._leads, *sorted(active & self._loader.versions.keys())]
        return VerifierRefused(
            ErrorCode.UNKNOWN_MODEL,
            f"the model {name[:100]!r} {why}; there is {', '.join(available) or 'none yet'}",
            404,
            {"available": available},
        )
