"""The catalog: which target versions exist, their names and aliases, and which version a new session gets.

Immutable values only: every change returns a new `Catalog`, and `cloud_verifier.registry.registry` keeps one on disk.

A version is requested by its exact version (`target-v2@0123456789ab`), by its name (the version of that name that was
added last) or by an alias (`latest`). An alias leads to one version and, for a percentage of new sessions, to canaries.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from typing import Annotated, Literal, TypeAlias

import msgspec

from edge_runtime.protocol.errors import InputError

FORMAT_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
VERSION = re.compile(NAME.pattern + r"@[0-9a-f]{12}")
# Earlier traffic splits of an alias that are kept for rollback.
MAX_ALIAS_HISTORY = 32

VersionKind: TypeAlias = Literal["checkpoint", "adapter", "changes"]
Admission: TypeAlias = Literal["shared", "unshared"]


class TargetVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One target version.

    Attributes:
        version: `name@hash`.
        path: its directory, absolute or relative to the registry.
        kind: a complete `checkpoint`, a PEFT `adapter` of one, or the tensors that differ from one (`changes`).
        admitted: `shared`: it kept the tensors that the deployed drafts share; `unshared`: it may not have.
        added: time of its admission.
        retired: time since which it takes no new sessions; None if it still takes them.
    """

    version: str
    path: str
    kind: VersionKind
    admitted: Admission
    added: datetime
    retired: datetime | None = None

    @property
    def name(self) -> str:
        return self.version.partition("@")[0]


class TrafficSplit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the new sessions of an alias are distributed over versions.

    Attributes:
        version: exact version that sessions get by default.
        since: when the split was set.
        canary: other exact versions, and the percentage of new sessions that each gets instead.
    """

    version: str
    since: datetime
    canary: dict[str, Annotated[float, msgspec.Meta(gt=0, le=100)]] = {}

    def choose_version(self, alias: str, key: str) -> str:
        """The exact version for the session that is opened with `key`; the same key always gets the same version."""
        digest = hashlib.sha256(f"{alias}\0{key}".encode()).digest()
        point = 100 * int.from_bytes(digest[:8]) / 2**64
        for version, percent in self.canary.items():
            point -= percent
            if point < 0:
                return version
        return self.version


class VersionAlias(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An alias: its current traffic split `now`, and earlier ones in `before`, the latest last."""

    now: TrafficSplit
    before: list[TrafficSplit] = []


class UnknownVersion(InputError):
    """The catalog has no version or alias of that name, or the version is retired."""


class Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All versions and aliases, as stored in the registry's file.

    Attributes:
        default: the alias for sessions that request no model.
        roots: directories in which versions are looked up by name, absolute or relative to the registry.
        drafts: directories of the bundles deployed on boards; a version must have kept what they share.
    """

    format_version: int = FORMAT_VERSION
    default: str = "latest"
    roots: list[str] = msgspec.field(default_factory=lambda: ["."])
    drafts: list[str] = []
    targets: list[TargetVersion] = []
    aliases: dict[str, VersionAlias] = {}

    def validate(self) -> None:
        """Raise InputError if the catalog contradicts itself, which a file edited by hand may."""
        versions = [target.version for target in self.targets]
        for version in versions:
            if not VERSION.fullmatch(version):
                raise InputError(f"{version!r} is not a valid version: it must be name@ and 12 hex digits")
            if versions.count(version) > 1:
                raise InputError(f"{version} is listed twice")
        for name, alias in self.aliases.items():
            self._check_alias_name(name)
            for split in (alias.now, *alias.before):
                for version in (split.version, *split.canary):
                    if version not in versions:
                        raise InputError(f"the alias {name} leads to {version}, which is not among the targets")
                _check_percentages(split)
            for version in (alias.now.version, *alias.now.canary):
                if self.find_exact(version).retired:
                    raise InputError(f"the alias {name} leads to {version}, which is retired")

    def find_exact(self, version: str) -> TargetVersion:
        """The target of an exact version. Raises UnknownVersion."""
        for target in self.targets:
            if target.version == version:
                return target
        raise UnknownVersion(f"there is no version {version[:100]!r}; available: {self._available()}")

    def find(self, name: str) -> TargetVersion:
        """The target of an exact version, or the active one of a name or alias. Raises UnknownVersion."""
        if "@" in name:
            return self.find_exact(name)
        if name in self.aliases:
            return self.find_exact(self.aliases[name].now.version)
        found = [target for target in self.targets if target.name == name and not target.retired]
        if not found:
            raise UnknownVersion(f"there is no active version {name[:100]!r}; available: {self._available()}")
        return max(found, key=lambda target: target.added)

    def resolve(self, model: str, key: str) -> str:
        """The exact version for a new session.

        Args:
            model: an exact version, which may be retired (a lost session continues with it while it is loaded); a name;
                an alias; or empty for the default alias.
            key: the key that the session is opened with; the same key gets the same version.

        Raises:
            UnknownVersion: there is no such version or alias.
        """
        name = model or self.default
        if name in self.aliases:
            return self.aliases[name].now.choose_version(name, key)
        return self.find(name).version

    def traffic_shares(self, version: str) -> dict[str, float]:
        """By alias: the percentage of its new sessions that an exact version gets. Only aliases that lead to it."""
        shares = {}
        for name, alias in self.aliases.items():
            canary = alias.now.canary
            share = 100 - sum(canary.values()) if alias.now.version == version else canary.get(version, 0)
            if share or alias.now.version == version:
                shares[name] = float(share)
        return shares

    def add(self, target: TargetVersion) -> Catalog:
        """Add `target`, or replace the entry of its version. `default` leads to the first one added.

        Raises:
            InputError: its name is invalid, or is an alias.
        """
        if not VERSION.fullmatch(target.version):
            raise InputError(
                f"{target.name!r} is no valid name for a version: use letters, digits, dots and dashes; rename it"
            )
        if target.name in self.aliases or target.name == self.default:
            raise InputError(f"{target.name} is an alias already; rename the version's directory")
        others = [other for other in self.targets if other.version != target.version]
        catalog = msgspec.structs.replace(self, targets=[*others, target])
        if self.default not in self.aliases:
            return catalog._set(self.default, TrafficSplit(target.version, target.added))
        return catalog

    def promote(self, alias: str, version: str, now: datetime, *, unshared: bool = False) -> Catalog:
        """Route all new sessions of `alias` to `version` and remove its canaries. Creates the alias if it is new.

        Args:
            unshared: allow a version that refuses the deployed drafts.

        Raises:
            InputError: there is no such version, it is retired or unshared, or `alias` is no valid name.
        """
        self._check_alias_name(alias)
        return self._set(alias, TrafficSplit(self._find_servable(version, unshared).version, now))

    def canary(self, alias: str, version: str, percent: float, now: datetime, *, unshared: bool = False) -> Catalog:
        """Route `percent` of the new sessions of `alias` to `version`; 0 removes the canary. Raises like `promote`."""
        split = self._alias(alias).now
        found = self._find_servable(version, unshared)
        if found.version == split.version:
            raise InputError(f"{alias} leads to {found.version} already; name another version as its canary")
        if not 0 <= percent <= 100:
            raise InputError(f"{percent:g} % of new sessions: give 0 to 100")
        canary = {name: share for name, share in split.canary.items() if name != found.version}
        if percent:
            canary[found.version] = float(percent)
        split = TrafficSplit(split.version, now, canary)
        _check_percentages(split)
        return self._set(alias, split)

    def rollback(self, alias: str) -> Catalog:
        """Undo the last change of `alias`.

        Raises:
            InputError: there is no such alias, it has no earlier split, or that leads to a retired version.
        """
        known = self._alias(alias)
        if not known.before:
            raise InputError(f"{alias} has always led to {known.now.version}; there is nothing to roll back to")
        *before, now = known.before
        for version in (now.version, *now.canary):
            if self.find_exact(version).retired:
                raise InputError(f"{alias} led to {version} before, which is retired; add it again, or promote another")
        return msgspec.structs.replace(self, aliases=self.aliases | {alias: VersionAlias(now, before)})

    def retire(self, version: str, now: datetime) -> Catalog:
        """Stop giving new sessions to `version`.

        Raises:
            InputError: there is no such version, or an alias leads to it.
        """
        target = self.find(version)
        for name, alias in self.aliases.items():
            if target.version in (alias.now.version, *alias.now.canary):
                raise InputError(f"the alias {name} leads to {target.version}; promote another version first")
        if target.retired:
            return self
        retired = msgspec.structs.replace(target, retired=now)
        targets = [retired if other is target else other for other in self.targets]
        return msgspec.structs.replace(self, targets=targets)

    def _alias(self, name: str) -> VersionAlias:
        if name not in self.aliases:
            raise UnknownVersion(f"there is no alias {name[:100]!r}; available: {', '.join(self.aliases) or 'none'}")
        return self.aliases[name]

    def _find_servable(self, version: str, unshared: bool) -> TargetVersion:
        target = self.find(version)
        if target.retired:
            raise InputError(f"{target.version} is retired; add it again first")
        if target.admitted == "unshared" and not unshared:
            raise InputError(
                f"{target.version} was admitted as unshared: boards with a draft would be refused; "
                "add --unshared to do it anyway"
            )
        return target

    def _set(self, alias: str, split: TrafficSplit) -> Catalog:
        known = self.aliases.get(alias)
        before = [*known.before, known.now][-MAX_ALIAS_HISTORY:] if known else []
        return msgspec.structs.replace(self, aliases=self.aliases | {alias: VersionAlias(split, before)})

    def _check_alias_name(self, alias: str) -> None:
        if not NAME.fullmatch(alias):
            raise InputError(f"{alias[:100]!r} is no valid name for an alias: use letters, digits, dots and dashes")
        if any(target.name == alias for target in self.targets):
            raise InputError(f"{alias} is the name of a version, and cannot be an alias")

    def _available(self) -> str:
        names = [*self.aliases, *(target.version for target in self.targets if not target.retired)]
        return ", ".join(names) or "none: add one with `cloud-verifier targets add`"


def _check_percentages(split: TrafficSplit) -> None:
    total = sum(split.canary.values())
    if total > 100:
        raise InputError(f"canaries get {total:g} % of new sessions together; at most 100")
