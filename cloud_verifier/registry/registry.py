"""The registry: a directory with one readable file, `targets.toml`, of the served versions and their names.

    targets.toml        a `Catalog`; may be edited by hand, and is then validated as a whole
    .lock               locked during a change
    anything else       versions and bundles may be stored here, or elsewhere

A change reads the file, writes a new one and renames it into place, under the lock. No change is lost, and readers
always see a complete file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cloud_verifier.registry.catalog import FORMAT_VERSION, NAME, Catalog, TargetVersion
from edge_runtime.common.files import lock_directory, write_atomically
from edge_runtime.protocol.errors import InputError, TargetError

if TYPE_CHECKING:
    # This module imports torch to read weights; `targets list` should not take the seconds that this costs.
    from cloud_verifier.registry.compatibility import CompatibilityReport, DraftFit

log = logging.getLogger(__name__)

REGISTRY_FILE = "targets.toml"
FILE_HEADING = "# Target versions, and what they are called: see `cloud-verifier targets --help`.\n\n"


class RegistryError(TargetError):
    """The registry's file is missing, invalid, or cannot be written."""


class ListedVersion(msgspec.Struct, frozen=True):
    """One version, as listed for people and programs.

    Attributes:
        state: `active` or `retired`.
        aliases: the aliases that lead to it, and the percentage of their new sessions that it gets.
        problem: why it cannot be loaded, as far as the registry can tell; empty if it can.
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
    """A registry in a directory, which need not exist before the first version is added.

    Attributes:
        file: its `targets.toml`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.file = self.path / REGISTRY_FILE

    def read(self) -> Catalog:
        """Read the catalog. Raises RegistryError."""
        catalog = self._read()
        if catalog is None:
            raise RegistryError(
                f"no registry of targets at {self.path}: it has no {REGISTRY_FILE}; make one with "
                f"`cloud-verifier targets add VERSION --registry {self.path}`"
            )
        return catalog

    def file_stamp(self) -> object:
        """A value that changes whenever the file does; None if there is no file."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    def update(self, change: Callable[[Catalog], Catalog]) -> Catalog:
        """Replace the catalog by `change(catalog)` and return the new one.

        Raises:
            RegistryError: the file is invalid or cannot be written; nothing was changed.
            InputError: raised by `change`.
        """
        try:
            with lock_directory(self.path, 0o755):
                before = self._read() or Catalog()
                after = change(before)
                after.validate()
                if after != before or not self.file.exists():
                    text = FILE_HEADING.encode() + msgspec.toml.encode(after)
                    write_atomically(self.file, text, 0o644)
        except OSError as error:
            why = error.strerror or error
            raise RegistryError(f"cannot write {self.file}: {why}; nothing was changed") from None
        return after

    def add(self, source: str, *, unshared: bool = False, only_roots: bool = False) -> TargetVersion:
        """Add the version at `source` if it passes the compatibility gate.

        Args:
            source: a directory, or the name of one in `roots`.
            unshared: admit it even if deployed drafts do not fit it.
            only_roots: accept only names in `roots`.

        Raises:
            IncompatibleVersion: deployed drafts do not fit it.
            TargetError, BundleError: the version, or a draft, cannot be read.
            InputError, RegistryError: see `locate` and `update`.
        """
        from cloud_verifier.registry.compatibility import IncompatibleVersion

        catalog = self._read() or Catalog()
        report, path = self.examine(source, catalog, only_roots=only_roots)
        if not report.compatible and not unshared:
            raise IncompatibleVersion(report)
        target = TargetVersion(
            version=report.version,
            path=self._stored_path(path),
            kind=report.kind,
            admitted="shared" if report.compatible else "unshared",
            added=utc_now(),
        )

        def add_target(current: Catalog) -> Catalog:
            if current.drafts != catalog.drafts:
                raise InputError(f"the drafts in {self.file} have changed meanwhile; add {source} again")
            return current.add(target)

        self.update(add_target)
        log.info("added %s as %s", target.version, target.admitted)
        return target

    def examine(
        self, source: str, catalog: Catalog, drafts: Sequence[Path] = (), *, only_roots: bool = False
    ) -> tuple[CompatibilityReport, Path]:
        """Run the compatibility gate on `source`, against `drafts` or else the deployed drafts.

        Returns the report and the directory of the version.

        Raises:
            TargetError, BundleError, InputError: see `add`.
        """
        from cloud_verifier.registry.compatibility import check_compatibility

        path = self.locate(source, catalog, only_roots=only_roots)
        in_use = self.default_path(catalog)
        against = in_use if in_use is not None and in_use.is_dir() and in_use.resolve() != path.resolve() else None
        deployed = [self.path / draft for draft in catalog.drafts]
        return check_compatibility(path, drafts or deployed, against), path

    def add_draft(self, bundle: Path) -> dict[str, DraftFit]:
        """Add the bundle to the deployed drafts.

        Returns the versions that aliases lead to and that the bundle does not fit.

        Raises:
            BundleError: the bundle is incomplete.
            TargetError, RegistryError: a version, or the registry, cannot be read.
        """
        from cloud_verifier.registry.compatibility import check_compatibility
        from edge_runtime.protocol.bundle import read_bundle

        read_bundle(bundle)
        stored = self._stored_path(bundle)

        def add_bundle(current: Catalog) -> Catalog:
            return msgspec.structs.replace(current, drafts=list(dict.fromkeys([*current.drafts, stored])))

        catalog = self.update(add_bundle)
        log.info("added the deployed bundle %s", bundle)
        served = {v for alias in catalog.aliases.values() for v in (alias.now.version, *alias.now.canary)}
        paths = {version: self.path_of(catalog.find_exact(version)) for version in sorted(served)}
        reports = {version: check_compatibility(path, [bundle]) for version, path in paths.items()}
        return {version: report.fits[0] for version, report in reports.items() if not report.compatible}

    def promote(self, alias: str, version: str, *, unshared: bool = False) -> Catalog:
        """See `Catalog.promote`; likewise for the methods below. An empty alias is the default alias."""
        return self._change_alias(
            alias, lambda catalog, name: catalog.promote(name, version, utc_now(), unshared=unshared)
        )

    def canary(self, alias: str, version: str, percent: float, *, unshared: bool = False) -> Catalog:
        return self._change_alias(
            alias, lambda catalog, name: catalog.canary(name, version, percent, utc_now(), unshared=unshared)
        )

    def rollback(self, alias: str) -> Catalog:
        return self._change_alias(alias, Catalog.rollback)

    def retire(self, version: str) -> TargetVersion:
        exact = self.read().find(version).version
        catalog = self.update(lambda catalog: catalog.retire(exact, utc_now()))
        log.info("retired %s", exact)
        return catalog.find_exact(exact)

    def locate(self, source: str, catalog: Catalog, *, only_roots: bool = False) -> Path:
        """The directory of a version: `source` itself, or the directory of this name in one of the roots.

        Raises:
            InputError: there is none.
        """
        if not only_roots and Path(source).is_dir():
            return Path(source).absolute()
        roots = [self.path / root for root in catalog.roots]
        if NAME.fullmatch(source):
            for root in roots:
                if (root / source).is_dir():
                    return root / source
        searched = ", ".join(map(str, roots)) or "no directory: the file names no roots"
        raise InputError(f"there is no version {source[:100]!r}: looked in {searched}")

    def default_path(self, catalog: Catalog) -> Path | None:
        """The directory of the version that the default alias leads to; None if there is no such alias."""
        alias = catalog.aliases.get(catalog.default)
        return self.path_of(catalog.find_exact(alias.now.version)) if alias else None

    def path_of(self, target: TargetVersion) -> Path:
        return self.path / target.path

    def list_versions(self, catalog: Catalog) -> list[ListedVersion]:
        """All versions, the newest first."""
        return [
            ListedVersion(
                version=target.version,
                kind=target.kind,
                admitted=target.admitted,
                state="retired" if target.retired else "active",
                aliases=catalog.traffic_shares(target.version),
                path=str(self.path_of(target)),
                added=target.added,
                problem="" if self.path_of(target).is_dir() else "its directory is missing",
            )
            for target in sorted(catalog.targets, key=lambda target: target.added, reverse=True)
        ]

    def _read(self) -> Catalog | None:
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
                    "upgrade flexspec, or correct the file"
                )
            catalog = msgspec.toml.decode(text, type=Catalog)
            catalog.validate()
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, InputError) as error:
            raise RegistryError(f"{self.file} is invalid: {error}; correct the file") from None
        return catalog

    def _stored_path(self, path: Path) -> str:
        """Relative if `path` is inside the registry, so that the registry can be moved; else absolute."""
        path = path.absolute()
        return str(path.relative_to(self.path)) if path.is_relative_to(self.path) else str(path)

    def _change_alias(self, alias: str, change: Callable[[Catalog, str], Catalog]) -> Catalog:
        alias = alias or self.read().default
        catalog = self.update(lambda catalog: change(catalog, alias))
        split = catalog.aliases[alias].now
        shares = ", ".join(f"{percent:g} % {version}" for version, percent in split.canary.items())
        log.info("the alias %s leads to %s%s", alias, split.version, f" ({shares})" if shares else "")
        return catalog


def utc_now() -> datetime:
    """The current time with its zone, to the microsecond."""
    return datetime.now(UTC)
