"""The roster: which target versions there are, what they are called, and which of them a new session gets.

Values only. Every change returns a new `Roster`; `cloud_verifier.registry.registry` keeps one on disk.

A version is named exactly (`target-v2@0123456789ab`), by its name (the version of that name that was added last) or by
an alias (`latest`). An alias leads to one version, or, for so many percent of new sessions, to a canary.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from edge_runtime.protocol.errors import InputError

FORMAT_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
VERSION = re.compile(NAME.pattern + r"@[0-9a-f]{12}")
# How many earlier settings of an alias can be gone back to.
MOST_BEFORE = 32

Kind = Literal["checkpoint", "adapter", "changes"]
Admitted = Literal["shared", "unshared"]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One target version.

    Attributes:
        version: `name@hash`.
        path: its directory, absolute or relative to the registry.
        kind: a whole `checkpoint`, a PEFT `adapter` on one, or the tensors that differ from one (`changes`).
        admitted: `shared`: it kept the tensors that the deployed drafts share; `unshared`: it need not have.
        added: when.
        retired: since when it takes no new sessions; None while it does.
    """

    version: str
    path: str
    kind: Kind
    admitted: Admitted
    added: datetime
    retired: datetime | None = None

    @property
    def name(self) -> str:
        return self.version.partition("@")[0]


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where an alias leads.

    Attributes:
        version: exact; what new sessions get.
        since: when this was set.
        canary: other exact versions, and which percentage of new sessions each gets instead.
    """

    version: str
    since: datetime
    canary: dict[str, Annotated[float, msgspec.Meta(gt=0, le=100)]] = {}

    def choose(self, alias: str, key: str) -> str:
        """The exact version for the session that is opened with `key`: always the same one."""
        digest = hashlib.sha256(f"{alias}\0{key}".encode()).digest()
        point = 100 * int.from_bytes(digest[:8]) / 2**64
        for version, percent in self.canary.items():
            point -= percent
            if point < 0:
                return version
        return self.version


class Alias(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A name that leads somewhere else over time: `now`, and `before`, the latest last."""

    now: Setting
    before: list[Setting] = []


class Unknown(InputError):
    """Nothing of that name is in the roster, or it is retired."""


class Roster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it, as it stands in the registry's file.

    Attributes:
        default: the alias that a session gets which asks for none.
        roots: directories in which versions are looked for by name, absolute or relative to the registry.
        drafts: directories of the bundles that boards have; what they share, a version must have kept.
    """

    format_version: int = FORMAT_VERSION
    default: str = "latest"
    roots: list[str] = msgspec.field(default_factory=lambda: ["."])
    drafts: list[str] = []
    targets: list[Entry] = []
    aliases: dict[str, Alias] = {}

    def check(self) -> None:
        """Raises InputError where it contradicts itself, as a file changed by hand may."""
        versions = [entry.version for entry in self.targets]
        for version in versions:
            if not VERSION.fullmatch(version):
                raise InputError(f"{version!r} is no version: name@ and 12 hex digits")
            if versions.count(version) > 1:
                raise InputError(f"{version} is listed twice")
        for name, alias in self.aliases.items():
            self._check_alias_name(name)
            for setting in (alias.now, *alias.before):
                for version in (setting.version, *setting.canary):
                    if version not in versions:
                        raise InputError(f"the alias {name} leads to {version}, which is not among the targets")
                _check_shares(setting)
            for version in (alias.now.version, *alias.now.canary):
                if self.entry(version).retired:
                    raise InputError(f"the alias {name} leads to {version}, which is retired")

    def entry(self, version: str) -> Entry:
        """The entry of an exact version. Raises Unknown."""
        for entry in self.targets:
            if entry.version == version:
                return entry
        raise Unknown(f"there is no version {version[:100]!r}; there is {self._available()}")

    def find(self, name: str) -> Entry:
        """The entry of an exact version, or the one of this name or alias that takes new sessions. Raises Unknown."""
        if "@" in name:
            return self.entry(name)
        if name in self.aliases:
            return self.entry(self.aliases[name].now.version)
        found = [entry for entry in self.targets if entry.name == name and not entry.retired]
        if not found:
            raise Unknown(f"there is no version {name[:100]!r} that takes new sessions; there is {self._available()}")
        return max(found, key=lambda entry: entry.added)

    def resolve(self, model: str, key: str) -> str:
        """Which exact version a new session gets.

        Args:
            model: an exact version, which may be retired (a session that was lost is to go on with it while it is
                loaded); a name; an alias; or empty for the default alias.
            key: what the session is opened with; the same one gets the same version.

        Raises:
            Unknown: there is nothing of that name.
        """
        name = model or self.default
        if name in self.aliases:
            return self.aliases[name].now.choose(name, key)
        return self.find(name).version

    def shares(self, version: str) -> dict[str, float]:
        """Which percentage of the new sessions of each alias an exact version gets, where it gets any."""
        shares = {}
        for name, alias in self.aliases.items():
            canary = alias.now.canary
            share = 100 - sum(canary.values()) if alias.now.version == version else canary.get(version, 0)
            if share or alias.now.version == version:
                shares[name] = float(share)
        return shares

    def add(self, entry: Entry) -> Roster:
        """With `entry`, in the place of what was known of its version; the first is what `default` leads to.

        Raises:
            InputError: its name is no name, or that of an alias.
        """
        if not VERSION.fullmatch(entry.version):
            raise InputError(
                f"{entry.name!r} is no name for a version: use letters, digits, dots and dashes; rename it"
            )
        if entry.name in self.aliases or entry.name == self.default:
            raise InputError(f"{entry.name} is an alias already; rename the version's directory")
        others = [other for other in self.targets if other.version != entry.version]
        roster = msgspec.structs.replace(self, targets=[*others, entry])
        if self.default not in self.aliases:
            return roster._set(self.default, Setting(entry.version, entry.added))
        return roster

    def promote(self, alias: str, version: str, now: datetime, *, unshared: bool = False) -> Roster:
        """All new sessions of `alias` get `version`, and none a canary. A new alias comes into being.

        Args:
            unshared: let it lead to a version that refuses the boards' drafts.

        Raises:
            InputError: no such version, it is retired or unshared, or `alias` cannot be one.
        """
        self._check_alias_name(alias)
        return self._set(alias, Setting(self._servable(version, unshared).version, now))

    def canary(self, alias: str, version: str, percent: float, now: datetime, *, unshared: bool = False) -> Roster:
        """So many percent of the new sessions of `alias` get `version`; 0 ends that. Raises InputError, as above."""
        if alias not in self.aliases:
            raise Unknown(f"there is no alias {alias[:100]!r}; there is {', '.join(self.aliases) or 'none'}")
        setting = self.aliases[alias].now
        found = self._servable(version, unshared)
        if found.version == setting.version:
            raise InputError(f"{alias} leads to {found.version} already; name another version as its canary")
        if not 0 <= percent <= 100:
            raise InputError(f"{percent:g} % of new sessions: give 0 to 100")
        canary = {name: share for name, share in setting.canary.items() if name != found.version}
        if percent:
            canary[found.version] = float(percent)
        setting = Setting(setting.version, now, canary)
        _check_shares(setting)
        return self._set(alias, setting)

    def rollback(self, alias: str) -> Roster:
        """`alias` leads where it led before its last change.

        Raises:
            InputError: no such alias, nothing before, or what was before is retired.
        """
        if alias not in self.aliases:
            raise Unknown(f"there is no alias {alias[:100]!r}; there is {', '.join(self.aliases) or 'none'}")
        if not self.aliases[alias].before:
            raise InputError(f"{alias} has led to {self.aliases[alias].now.version} from the beginning")
        *before, now = self.aliases[alias].before
        for version in (now.version, *now.canary):
            if self.entry(version).retired:
                raise InputError(f"{alias} led to {version} before, which is retired; add it again, or promote another")
        return msgspec.structs.replace(self, aliases=self.aliases | {alias: Alias(now, before)})

    def retire(self, version: str, now: datetime) -> Roster:
        """`version` takes no new sessions any more.

        Raises:
            InputError: no such version, or an alias leads to it.
        """
        entry = self.find(version)
        for name, alias in self.aliases.items():
            if entry.version in (alias.now.version, *alias.now.canary):
                raise InputError(f"the alias {name} leads to {entry.version}; promote another version first")
        if entry.retired:
            return self
        retired = msgspec.structs.replace(entry, retired=now)
        targets = [retired if other is entry else other for other in self.targets]
        return msgspec.structs.replace(self, targets=targets)

    def _servable(self, version: str, unshared: bool) -> Entry:
        entry = self.find(version)
        if entry.retired:
            raise InputError(f"{entry.version} is retired; add it again first")
        if entry.admitted == "unshared" and not unshared:
            raise InputError(
                f"{entry.version} was admitted as unshared: boards with a draft would be refused; "
                "say --unshared if that is meant"
            )
        return entry

    def _set(self, alias: str, setting: Setting) -> Roster:
        known = self.aliases.get(alias)
        before = [*known.before, known.now][-MOST_BEFORE:] if known else []
        return msgspec.structs.replace(self, aliases=self.aliases | {alias: Alias(setting, before)})

    def _check_alias_name(self, alias: str) -> None:
        if not NAME.fullmatch(alias):
            raise InputError(f"{alias[:100]!r} is no name for an alias: use letters, digits, dots and dashes")
        if any(entry.name == alias for entry in self.targets):
            raise InputError(f"{alias} is the name of a version, and cannot be an alias")

    def _available(self) -> str:
        names = [*self.aliases, *(entry.version for entry in self.targets if not entry.retired)]
        return ", ".join(names) or "none: add one with `cloud-verifier targets add`"


def _check_shares(setting: Setting) -> None:
    if sum(setting.canary.values()) > 100:
        raise InputError(f"canaries get {sum(setting.canary.values()):g} % of new sessions together; at most 100")
