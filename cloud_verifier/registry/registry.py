"""The registry: a directory with one readable file, `targets.toml`, that says which target versions are served as what.

    targets.toml        a `Roster`; may be changed by hand, and is then checked as a whole
    .lock               held by whoever changes it
    anything else       versions and bundles may lie here, or elsewhere

A change reads the file, writes all of it anew and renames that into place, under the lock: nobody's change is lost, and
whoever reads at any moment reads a whole one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloud_verifier.registry.catalog import FORMAT_VERSION, NAME, Entry, Roster
from edge_runtime.common.files import locked, write_whole
from edge_runtime.protocol.errors import InputError, TargetError

if TYPE_CHECKING:
    # It reads weights with torch, and a list of versions should not take seconds.
    from cloud_verifier.registry.compatibility import Examined, Fit

log = logging.getLogger(__name__)

FILE = "targets.toml"
HEADING = "# Target versions, and what they are called: see `cloud-verifier targets --help`.\n\n"


class RegistryError(TargetError):
    """The registry's file is missing, makes no sense, or cannot be written."""


class Listed(msgspec.Struct, frozen=True):
    """One version, for people and programs.

    Attributes:
        state: `active`, or `retired`.
        aliases: those that lead to it, and which percentage of their new sessions it gets.
        problem: why it cannot be loaded, as far as that shows from outside; empty if it can.
    """

    version: str
    kind: str
    admitted: str
    state: str
    aliases: dict[str, float]
    path: str
    added: datetime
    problem: str = ""


class Registry:
    """A registry in a directory; it need not exist before the first version is added.

    Attributes:
        path: of the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.file = self.path / FILE

    def read(self) -> Roster:
        """The roster as it stands. Raises RegistryError."""
        roster = self._read()
        if roster is None:
            raise RegistryError(
                f"no registry of targets at {self.path}: it has no {FILE}; make one with "
                f"`cloud-verifier targets add VERSION --registry {self.path}`"
            )
        return roster

    def stamp(self) -> object:
        """Another value once the file has changed; None where there is none."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    def change(self, change: Callable[[Roster], Roster]) -> Roster:
        """Puts what `change` makes of the roster in its place, and returns it.

        Raises:
            RegistryError: the file makes no sense or cannot be written; nothing was changed.
            InputError: whatever `change` raises.
        """
        try:
            with locked(self.path, 0o755):
                before = self._read() or Roster()
                after = change(before)
                after.check()
                if after != before or not self.file.exists():
                    text = HEADING.encode() + msgspec.toml.encode(after)
                    write_whole(self.file, text, 0o644)
        except OSError as error:
            why = error.strerror or error
            raise RegistryError(f"cannot write {self.file}: {why}; nothing was changed") from None
        return after

    def add(self, source: str, *, unshared: bool = False, only_roots: bool = False) -> Entry:
        """Adds the version at `source`, once the gate lets it in.

        Args:
            source: a directory, or the name of one in `roots`.
            unshared: let it in even where deployed drafts do not fit it.
            only_roots: take names in `roots`, and nothing else.

        Raises:
            Incompatible: the deployed drafts do not fit it.
            TargetError, BundleError: it, or a draft, cannot be read.
            InputError, RegistryError: see `locate` and `change`.
        """
        from cloud_verifier.registry.compatibility import Incompatible

        roster = self._read() or Roster()
        examined, path = self.examine(source, roster, only_roots=only_roots)
        if not examined.compatible and not unshared:
            raise Incompatible(examined)
        entry = Entry(
            examined.version,
            self._as_stored(path),
            examined.kind,
            "shared" if examined.compatible else "unshared",
            now(),
        )

        def adding(current: Roster) -> Roster:
            if current.drafts != roster.drafts:
                raise InputError(f"the drafts in {self.file} have changed meanwhile; add {source} again")
            return current.add(entry)

        self.change(adding)
        log.info("%s was added as %s", entry.version, entry.admitted)
        return entry

    def examine(
        self, source: str, roster: Roster, drafts: Sequence[Path] = (), *, only_roots: bool = False
    ) -> tuple[Examined, Path]:
        """What the gate finds at `source`, against the deployed drafts or `drafts`, and where that is.

        Raises:
            TargetError, BundleError, InputError: see `add`.
        """
        from cloud_verifier.registry.compatibility import examine

        path = self.locate(source, roster, only_roots=only_roots)
        in_use = self.in_use(roster)
        against = in_use if in_use is not None and in_use.is_dir() and in_use.resolve() != path.resolve() else None
        return examine(path, drafts or [self.path / draft for draft in roster.drafts], against), path

    def add_draft(self, bundle: Path) -> dict[str, Fit]:
        """Counts the bundle among the deployed drafts.

        Returns the versions that aliases lead to and that it does not fit.

        Raises:
            BundleError: it is no whole bundle.
            TargetError, RegistryError: a version, or the registry, cannot be read.
        """
        from cloud_verifier.registry.compatibility import examine
        from edge_runtime.protocol.bundle import read_bundle

        read_bundle(bundle)
        stored = self._as_stored(bundle)

        def adding(current: Roster) -> Roster:
            return msgspec.structs.replace(current, drafts=list(dict.fromkeys([*current.drafts, stored])))

        roster = self.change(adding)
        log.info("the bundle %s is deployed", bundle)
        served = {v for alias in roster.aliases.values() for v in (alias.now.version, *alias.now.canary)}
        found = {version: examine(self.path_of(roster.entry(version)), [bundle]) for version in sorted(served)}
        return {version: examined.fits[0] for version, examined in found.items() if not examined.compatible}

    def promote(self, alias: str, version: str, *, unshared: bool = False) -> Roster:
        """See `Roster.promote`, as for the others below."""
        return self._logged(alias, self.change(lambda roster: roster.promote(alias, version, now(), unshared=unshared)))

    def canary(self, alias: str, version: str, percent: float, *, unshared: bool = False) -> Roster:
        return self._logged(
            alias, self.change(lambda roster: roster.canary(alias, version, percent, now(), unshared=unshared))
        )

    def rollback(self, alias: str) -> Roster:
        return self._logged(alias, self.change(lambda roster: roster.rollback(alias)))

    def retire(self, version: str) -> Entry:
        found = self.read().find(version).version
        roster = self.change(lambda roster: roster.retire(found, now()))
        log.info("%s is retired", found)
        return roster.entry(found)

    def locate(self, source: str, roster: Roster, *, only_roots: bool = False) -> Path:
        """The directory of a version: `source` itself, or the directory of this name in one of the roots.

        Raises:
            InputError: there is none.
        """
        if not only_roots and Path(source).is_dir():
            return Path(source).absolute()
        roots = [self.path / root for root in roster.roots]
        if NAME.fullmatch(source):
            for root in roots:
                if (root / source).is_dir():
                    return root / source
        looked = ", ".join(map(str, roots)) or "no directory: the file names no roots"
        raise InputError(f"there is no version {source[:100]!r}: looked in {looked}")

    def in_use(self, roster: Roster) -> Path | None:
        """Where the version is that the default alias leads to; None where it leads nowhere."""
        alias = roster.aliases.get(roster.default)
        return self.path_of(roster.entry(alias.now.version)) if alias else None

    def path_of(self, entry: Entry) -> Path:
        return self.path / entry.path

    def listing(self, roster: Roster) -> list[Listed]:
        """All versions, the newest first."""
        listed = []
        for entry in sorted(roster.targets, key=lambda entry: entry.added, reverse=True):
            path = self.path_of(entry)
            listed.append(
                Listed(
                    entry.version,
                    entry.kind,
                    entry.admitted,
                    "retired" if entry.retired else "active",
                    roster.shares(entry.version),
                    str(path),
                    entry.added,
                    "" if path.is_dir() else "its directory is gone",
                )
            )
        return listed

    def _read(self) -> Roster | None:
        try:
            text = self.file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RegistryError(f"cannot read {self.file}: {error.strerror}") from None
        try:
            format_version = msgspec.toml.decode(text, type=dict[str, object]).get("format_version")
            if format_version != FORMAT_VERSION:
                raise RegistryError(
                    f"{self.file} has format {format_version!r} and this release reads {FORMAT_VERSION}; "
                    "upgrade flexspec, or correct it"
                )
            roster = msgspec.toml.decode(text, type=Roster)
            roster.check()
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, InputError) as error:
            raise RegistryError(f"{self.file} makes no sense: {error}; correct it") from None
        return roster

    def _as_stored(self, path: Path) -> str:
        """Relative where it is inside the registry, so that the whole can be moved."""
        path = path.absolute()
        return str(path.relative_to(self.path)) if path.is_relative_to(self.path) else str(path)

    @staticmethod
    def _logged(alias: str, roster: Roster) -> Roster:
        setting = roster.aliases[alias].now
        shares = ", ".join(f"{percent:g} % {version}" for version, percent in setting.canary.items())
        log.info("the alias %s leads to %s%s", alias, setting.version, f" ({shares})" if shares else "")
        return roster


def now() -> datetime:
    """To the microsecond, with its zone."""
    return datetime.now(UTC)
