"""The rollout: keeps the loaded targets in step with the registry and routes each new session to a version.

A version is loaded while it is in the registry and not retired. An alias leads to the version that the registry names
as soon as that is loaded, and until then to the previous one. A canary that is not loaded (yet) gets no sessions.
A retired version is unloaded some time after its last session, or when its grace period is over. An open session stays
on its version, whatever happens to aliases.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import NamedTuple

import msgspec

from cloud_verifier.engine.scheduler import Scheduler, TargetFactory
from cloud_verifier.engine.sessions import SessionStore
from cloud_verifier.model.target import Target
from cloud_verifier.registry.catalog import TargetVersion, TrafficSplit, UnknownVersion
from cloud_verifier.registry.registry import ListedVersion, Registry, RegistryError
from edge_runtime.protocol.errors import FlexSpecError, TargetError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

# How often the registry's file is checked for changes by other processes.
POLL_SECONDS = 1.0
# How often the rollout checks whether the initial version is loaded.
INITIAL_POLL_SECONDS = 0.02


class RetirementPolicy(msgspec.Struct, frozen=True):
    """When a retired version is unloaded, in seconds.

    Attributes:
        linger_seconds: time after its last session: a board whose session was lost reopens it on the same version.
        grace_seconds: time for its sessions to end; after that they are closed.
    """

    linger_seconds: float = 60.0
    grace_seconds: float = 3600.0


DEFAULT_RETIREMENT_POLICY = RetirementPolicy()


class ServedVersion(ListedVersion, frozen=True):
    """One version of the registry and its state in this process.

    Attributes:
        sessions: number of sessions pinned to it.
        general_tier_reason: why it runs on the slower general tier; empty if it does not, or is not loaded.
    """

    loaded: bool = False
    sessions: int = 0
    general_tier_reason: str = ""


class _Retirement(NamedTuple):
    """Times by `time.monotonic`: start of the grace period, and when the version last had a session."""

    started_at: float
    last_used_at: float


def load_default_target(registry: Registry, make_target: TargetFactory) -> Target:
    """Load the version of the default alias, which is loaded before anything is served.

    Raises:
        RegistryError: there is no registry, it is invalid, or its default alias does not exist.
        TargetError: the version does not load, or its files have changed since it was added.
    """
    catalog = registry.read()
    alias = catalog.aliases.get(catalog.default)
    if alias is None:
        raise _no_default_error(registry, catalog.default)
    entry = catalog.find_exact(alias.now.version)
    return require_same_version(make_target(registry.path_of(entry), entry.name, []), entry)


def require_same_version(target: Target, entry: TargetVersion) -> Target:
    """Return `target`. Raises TargetError if its files have changed since the version was added."""
    if target.version != entry.version:
        raise TargetError(
            f"the files of {entry.version} have changed since it was added: it is {target.version} now; add it again"
        )
    return target


def _no_default_error(registry: Registry, default: str) -> RegistryError:
    return RegistryError(
        f"{registry.file} has no alias {default!r}, which is its default; `cloud-verifier targets promote` a version"
    )


class Rollout:
    """Decides which versions this process loads and which version a session gets. Belongs to the event loop.

    Attributes:
        catalog: the registry's catalog, as of the last refresh.
    """

    def __init__(
        self,
        registry: Registry,
        scheduler: Scheduler,
        sessions: SessionStore,
        policy: RetirementPolicy = DEFAULT_RETIREMENT_POLICY,
    ) -> None:
        """Read the registry. Raises RegistryError if it is missing or invalid."""
        self.registry = registry
        self._scheduler = scheduler
        self._sessions = sessions
        self._policy = policy
        self.catalog = registry.read()
        self._file_stamp = registry.file_stamp()
        # Traffic splits in force, by alias: their versions are loaded.
        self._active_splits: dict[str, TrafficSplit] = {}
        # Why versions did not load. A version that is added again is another key.
        self._failures: dict[TargetVersion, str] = {}
        # Loaded versions that are to be unloaded, and the one that is being unloaded.
        self._retirements: dict[str, _Retirement] = {}
        self._unloading: str | None = None
        self._loading: asyncio.Task[None] | None = None
        self._refresh_requested = asyncio.Event()
        self._refresh_lock = asyncio.Lock()

    @property
    def ready(self) -> bool:
        """Whether sessions that request no model can be opened."""
        return self.catalog.default in self._active_splits

    @property
    def failure(self) -> TargetError | None:
        """Why `ready` cannot become true without a change of the registry; None if it is or may become true."""
        alias = self.catalog.aliases.get(self.catalog.default)
        if self.ready:
            return None
        if alias is None:
            return _no_default_error(self.registry, self.catalog.default)
        why = self._failures.get(self.catalog.find_exact(alias.now.version))
        return TargetError(f"{alias.now.version}: {why}") if why else None

    @property
    def default_target(self) -> Target:
        """The target for sessions that request no model, apart from canaries. Raises VerifierRefused (`starting`)."""
        if not self.ready:
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly")
        return self._loaded[self._active_splits[self.catalog.default].version]

    @property
    def active_aliases(self) -> dict[str, str]:
        """The version that each alias leads to in this process, apart from canaries."""
        return {name: split.version for name, split in self._active_splits.items()}

    def resolve(self, model: str, key: str) -> Target:
        """Return the target for the session that is opened with `key`; see `Catalog.resolve` for `model`.

        Raises:
            VerifierRefused: `unknown_model`, or `starting` while the version is being loaded.
        """
        loaded, name = self._loaded, model or self.catalog.default
        split = self._active_splits.get(name)
        if split is not None:
            version = split.choose_version(name, key)
            return loaded[version if version in loaded else split.version]
        now = time.monotonic()
        retirement = self._retirements.get(name)
        if name in loaded and (retirement is None or now - retirement.started_at <= self._policy.grace_seconds):
            if retirement is not None:
                self._retirements[name] = retirement._replace(last_used_at=now)
            return loaded[name]
        try:
            entry = self.catalog.find(name)
        except UnknownVersion:
            raise self._unknown_model_error(name, "does not exist here") from None
        candidates = [
            other
            for other in self.catalog.targets
            if other.name == name and not other.retired and other.version in loaded
        ]
        if candidates:
            return loaded[max(candidates, key=lambda other: other.added).version]
        if entry.retired:
            raise self._unknown_model_error(name, "is retired")
        if entry in self._failures:
            raise self._unknown_model_error(name, "could not be loaded")
        raise VerifierRefused(ErrorCode.STARTING, f"{entry.version} is still loading; try again shortly")

    def models(self) -> dict[str, Target]:
        """The names that sessions can request, the default first, and their targets.

        These are aliases, names of versions, and exact versions if the name belongs to a newer one.
        """
        loaded = self._loaded
        aliases = sorted(self._active_splits, key=lambda alias: (alias != self.catalog.default, alias))
        models = {alias: loaded[self._active_splits[alias].version] for alias in aliases}
        for entry in sorted(self.catalog.targets, key=lambda entry: entry.added, reverse=True):
            if entry.version in loaded and not entry.retired:
                models[entry.version if entry.name in models else entry.name] = loaded[entry.version]
        return models

    def list_versions(self) -> list[ServedVersion]:
        """All versions of the registry, with their state in this process."""
        loaded = self._loaded
        served = []
        for listed in self.registry.list_versions(self.catalog):
            failure = self._failures.get(self.catalog.find_exact(listed.version), "")
            fields = msgspec.structs.asdict(listed) | {"problem": failure or listed.problem}
            sessions = len(self._sessions.ids_of_version(listed.version))
            target = loaded.get(listed.version)
            served.append(
                ServedVersion(
                    **fields,
                    loaded=target is not None,
                    sessions=sessions,
                    general_tier_reason=target.general_tier_reason if target else "",
                )
            )
        return served

    async def refresh(self) -> None:
        """Apply changes of the registry as far as possible without loading, and start to load what is missing.

        All changes that were made before the call are applied when it returns.
        """
        # One at a time: a second refresh must not return while the first one is still reading the change.
        async with self._refresh_lock:
            stamp = await asyncio.to_thread(self.registry.file_stamp)
            if stamp != self._file_stamp:
                self._file_stamp = stamp
                try:
                    self.catalog = await asyncio.to_thread(self.registry.read)
                except RegistryError as error:
                    log.error("the rollout does not change: %s", error)
            self._apply_catalog()

    def request_refresh(self) -> None:
        """Make `run` refresh at once."""
        self._refresh_requested.set()

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        try:
            while True:
                try:
                    await self.refresh()
                    await self._unload_retired()
                except Exception:
                    log.exception("the rollout does not change")
                with contextlib.suppress(TimeoutError):
                    seconds = POLL_SECONDS if self._initial_loaded else INITIAL_POLL_SECONDS
                    await asyncio.wait_for(self._refresh_requested.wait(), seconds)
                self._refresh_requested.clear()
        finally:
            if self._loading is not None:
                self._loading.cancel()

    def _apply_catalog(self) -> None:
        """Update the aliases, and start to load a missing version unless one is being loaded."""
        loaded, catalog = self._loaded, self.catalog
        splits = {}
        for name, alias in catalog.aliases.items():
            previous = self._active_splits.get(name)
            if alias.now.version in loaded:
                splits[name] = alias.now
            elif previous is not None and previous.version in loaded:
                splits[name] = previous
            if splits.get(name) != previous:
                version = splits[name].version if name in splits else "no version"
                log.info("the alias %s leads to %s", name, version)
        self._active_splits = splits
        self._failures = {entry: why for entry, why in self._failures.items() if entry in catalog.targets}
        missing = [
            entry
            for entry in catalog.targets
            if not entry.retired and entry.version not in self._scheduler.versions and entry not in self._failures
        ]
        if missing and self._initial_loaded and (self._loading is None or self._loading.done()):
            self._loading = asyncio.create_task(self._load(min(missing, key=self._load_order)))

    @property
    def _loaded(self) -> dict[str, Target]:
        """The versions that new sessions can get. One that is being unloaded has to be loaded again first."""
        return {version: target for version, target in self._scheduler.versions.items() if version != self._unloading}

    @property
    def _initial_loaded(self) -> bool:
        """Whether the initial version is or has been loaded."""
        return self._scheduler.target is not None or bool(self._scheduler.versions)

    def _load_order(self, entry: TargetVersion) -> tuple[bool, bool]:
        """Sort key: the versions that the most sessions need come first."""
        shares = self.catalog.traffic_shares(entry.version)
        return (shares.get(self.catalog.default, 0) < 50, not shares)

    async def _load(self, entry: TargetVersion) -> None:
        started = time.monotonic()
        try:
            target = await self._scheduler.load(self.registry.path_of(entry), entry.name)
            if all(target.version != other.version for other in self.catalog.targets):
                await self._scheduler.unload(target.version)
            require_same_version(target, entry)
            log.info("%s was loaded in %.1f s", entry.version, time.monotonic() - started)
        except FlexSpecError as error:
            log.error("%s did not load: %s", entry.version, error)
            self._failures[entry] = str(error)
        except Exception as error:
            log.exception("%s did not load", entry.version)
            self._failures[entry] = repr(error)
        self.request_refresh()

    async def _unload_retired(self) -> None:
        """Unload versions that are retired, or no longer in the registry, as the retirement policy says."""
        now = time.monotonic()
        active = {entry.version for entry in self.catalog.targets if not entry.retired}
        needed = active | {split.version for split in self._active_splits.values()}
        for version in list(self._scheduler.versions):
            if version in needed:
                self._retirements.pop(version, None)
                continue
            sessions = self._sessions.ids_of_version(version)
            retirement = self._retirements.get(version, _Retirement(now, now))
            if sessions:
                retirement = retirement._replace(last_used_at=now)
            self._retirements[version] = retirement
            expired = now - retirement.started_at > self._policy.grace_seconds
            if expired and sessions:
                log.warning("%s is retired: %d sessions were closed", version, len(sessions))
                for session in sessions:
                    self._sessions.remove(session)
            if expired or (not sessions and now - retirement.last_used_at > self._policy.linger_seconds):
                self._unloading = version
                try:
                    await self._scheduler.unload(version)
                finally:
                    self._unloading = None
                del self._retirements[version]
                log.info("%s was unloaded", version)
                # It may have been added again meanwhile.
                self.request_refresh()

    def _unknown_model_error(self, name: str, why: str) -> VerifierRefused:
        active = {entry.version for entry in self.catalog.targets if not entry.retired}
        available = [*self._active_splits, *sorted(active & self._loaded.keys())]
        return VerifierRefused(
            ErrorCode.UNKNOWN_MODEL,
            f"the model {name[:100]!r} {why}; available: {', '.join(available) or 'none yet'}",
            detail={"available": available},
        )
