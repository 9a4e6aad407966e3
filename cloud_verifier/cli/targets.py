"""`cloud-verifier targets`: adds target versions, rolls them out, and takes them back."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import TargetError

# Every command of `cloud-verifier` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from cloud_verifier.acceptance.forecast import Forecast
    from cloud_verifier.registry.catalog import Alias, Roster
    from cloud_verifier.registry.compatibility import Examined
    from cloud_verifier.registry.registry import Registry

DESCRIPTION = """\
Keeps the target versions that `cloud-verifier serve --registry DIR` serves. A version is let in only if the drafts
that boards have (`add --draft`) still fit it: the same tokenizer, special ids, and every tensor that they share. An
alias, such as `latest`, leads new sessions to a version; a session that is open stays with the version that it was
opened with. A service that runs follows every change within seconds.

examples:
  cloud-verifier targets add /srv/models/target-v1 --draft /srv/bundles/bundle
  cloud-verifier targets add /srv/models/target-v2           # nobody gets it yet, unless by its name
  cloud-verifier targets check target-v2                     # would the boards' draft do worse on it?
  cloud-verifier targets canary target-v2 5                  # 5 % of the new sessions of `latest`
  cloud-verifier targets promote target-v2                   # all of them
  cloud-verifier targets promote target-v1 --alias stable
  cloud-verifier targets rollback                            # `latest` is what it was before its last change
  cloud-verifier targets retire target-v1                    # no new sessions; unloaded when its last one has ended
  cloud-verifier targets list --json
"""

# In the state directory of the service, which its admin API may write to.
REGISTRY = Path("/var/lib/flexspec-verifier/targets")
VARIABLE = "FLEXSPEC_REGISTRY"
PIPE_WIDTH = 300
VERSION = "name@hash, as `list` shows; or a name, for the version of that name that was added last"
UNSHARED = "even though boards with a deployed draft would be refused"


def add_parser(commands: Any) -> None:
    """Adds `targets` to argparse's sub-parsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(
        "targets", help="add, check, promote, roll back and retire target versions", description=DESCRIPTION,
        formatter_class=raw,
    )  # fmt: skip
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--registry", type=Path, default=default_registry(), metavar="DIR", help=f"default: ${VARIABLE}, or {REGISTRY}"
    )
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="print one JSON object")
    aliased = argparse.ArgumentParser(add_help=False)
    aliased.add_argument("--alias", default="", metavar="NAME", help="default: the one that sessions get by default")

    listing = actions.add_parser("list", parents=[shared, machine], help="what there is, and what leads to it")
    listing.set_defaults(run=_list)

    add = actions.add_parser("add", parents=[shared], help="add a version, if the deployed drafts fit it")
    add.add_argument(
        "version", nargs="?", metavar="VERSION", help="a directory, or the name of one in the registry's `roots`"
    )
    add.add_argument(
        "--draft",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="a bundle that boards have, from now on",
    )
    add.add_argument("--unshared", action="store_true", help=f"let it in {UNSHARED}")
    add.set_defaults(run=_add)

    promote = actions.add_parser(
        "promote", parents=[shared, aliased], help="all new sessions of an alias get a version"
    )
    promote.add_argument("version", metavar="VERSION", help=VERSION)
    promote.add_argument("--unshared", action="store_true", help=UNSHARED)
    promote.set_defaults(run=_promote)

    canary = actions.add_parser("canary", parents=[shared, aliased], help="some new sessions of an alias get a version")
    canary.add_argument("version", metavar="VERSION", help=VERSION)
    canary.add_argument("percent", type=float, metavar="PERCENT", help="of new sessions; 0 ends it")
    canary.add_argument("--unshared", action="store_true", help=UNSHARED)
    canary.set_defaults(run=_canary)

    rollback = actions.add_parser("rollback", parents=[shared], help="an alias is what it was before its last change")
    rollback.add_argument("alias", nargs="?", default="", metavar="ALIAS", help="default: as for --alias of the others")
    rollback.set_defaults(run=_rollback)

    retire = actions.add_parser("retire", parents=[shared], help="a version gets no new sessions any more")
    retire.add_argument("version", metavar="VERSION", help=VERSION)
    retire.set_defaults(run=_retire)

    check = actions.add_parser(
        "check",
        parents=[shared, machine],
        help="what differs, and how often the draft would be right, beside the version in use",
        epilog="exit codes: 0 fine; 1 the draft would be right less often than --tolerance allows; "
        "3 a draft does not fit, or something does not load",
    )
    check.add_argument("version", metavar="VERSION", help=f"{VERSION}; or a directory that is not in the registry")
    check.add_argument(
        "--draft", type=Path, action="append", default=[], metavar="BUNDLE", help="default: all deployed drafts"
    )
    check.add_argument(
        "--text", type=Path, metavar="FILE", help="text to follow (default: one that ships, mostly code)"
    )
    check.add_argument(
        "--tolerance", type=float, default=3.0, metavar="POINTS", help="of acceptance to lose (default: %(default)s)"
    )
    check.add_argument("--device", default="cpu", help="torch device, such as cuda (default: %(default)s)")
    check.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: %(default)s"
    )
    check.add_argument("--threads", type=int, default=0, help="CPU threads (default: the libraries' choice)")
    check.set_defaults(run=_check)


def default_registry() -> Path:
    """Where the registry is if nobody says."""
    return Path(os.environ.get(VARIABLE) or REGISTRY)


def _list(options: argparse.Namespace) -> int:
    import msgspec

    registry = _registry(options)
    roster = registry.read()
    listed = registry.listing(roster)
    if options.json:
        told = {"default": roster.default, "aliases": roster.aliases, "drafts": roster.drafts, "targets": listed}
        print(msgspec.json.encode(told).decode())
        return 0
    table = _table("version", "kind", "admitted", "state", "new sessions", "added", "directory", "problem")
    for one in listed:
        shares = ", ".join(f"{percent:g} % of {alias}" for alias, percent in one.aliases.items())
        added = f"{one.added.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(one.version, one.kind, one.admitted, one.state, shares, added, one.path, one.problem)
    _print(table)
    print(f"without a model's name: {roster.default}; deployed drafts: {', '.join(roster.drafts) or 'none'}")
    return 0


def _add(options: argparse.Namespace) -> int:
    from edge_runtime.protocol.errors import InputError

    registry = _registry(options)
    if not options.version and not options.draft:
        raise InputError("nothing to add: give a VERSION, a --draft, or both")
    for bundle in options.draft:
        misfits = registry.add_draft(bundle)
        print(f"{bundle}: deployed")
        for version, fit in misfits.items():
            for difference in fit.differences:
                print(f"cloud-verifier: warning: {version} does not fit it: {difference}", file=sys.stderr)
    if options.version:
        entry = registry.add(options.version, unshared=options.unshared)
        shares = registry.read().shares(entry.version)
        print(f"{entry.version}: added as {entry.admitted}{_told(shares)}")
    return 0


def _promote(options: argparse.Namespace) -> int:
    registry = _registry(options)
    alias = options.alias or registry.read().default
    _tell(alias, registry.promote(alias, options.version, unshared=options.unshared))
    return 0


def _canary(options: argparse.Namespace) -> int:
    registry = _registry(options)
    alias = options.alias or registry.read().default
    _tell(alias, registry.canary(alias, options.version, options.percent, unshared=options.unshared))
    return 0


def _rollback(options: argparse.Namespace) -> int:
    registry = _registry(options)
    alias = options.alias or registry.read().default
    _tell(alias, registry.rollback(alias))
    return 0


def _retire(options: argparse.Namespace) -> int:
    print(f"{_registry(options).retire(options.version).version}: retired")
    return 0


def _check(options: argparse.Namespace) -> int:
    import msgspec

    from cloud_verifier.registry.catalog import Unknown

    registry = _registry(options)
    roster, source = registry.read(), options.version
    if not Path(source).is_dir():
        # What is not in the registry may be in one of its roots.
        with contextlib.suppress(Unknown):
            source = str(registry.path_of(roster.find(source)))
    examined, path = registry.examine(source, roster, options.draft)
    versions = [(examined.version, path)]
    in_use = roster.aliases.get(roster.default)
    if in_use is not None and in_use.now.version != examined.version:
        versions.append((in_use.now.version, registry.path_of(roster.entry(in_use.now.version))))
    forecasts = _forecasts(options, versions, examined)
    if options.json:
        told = {"gate": examined, "compatible": examined.compatible, "expected": forecasts}
        print(msgspec.json.encode(told).decode())
    else:
        _print_check(examined, forecasts)
    if not examined.compatible:
        return TargetError.exit_code
    return int(any(forecast.loss > options.tolerance for forecast in forecasts))


def _forecasts(options: argparse.Namespace, versions: list[tuple[str, Path]], examined: Examined) -> list[Forecast]:
    """For every draft that has the version's vocabulary."""
    from cloud_verifier.acceptance.forecast import forecast

    return [
        forecast(
            Path(fit.draft),
            versions,
            options.text,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
        )
        for fit in examined.fits
        if not any(difference.what == "vocabulary" for difference in fit.differences)
    ]


def _print_check(examined: Examined, forecasts: list[Forecast]) -> None:
    if examined.compatible:
        print(f"{examined.version} ({examined.kind}): fits {len(examined.fits)} deployed draft(s)")
    else:
        print(f"{examined.version} ({examined.kind}) differs:\n{examined.report()}")
    for forecast in forecasts:
        headers = ["accepted", *forecast.versions]
        table = _table(*headers, *(["change"] if len(forecast.versions) > 1 else []))
        for expected in forecast.expectations:
            row = [f"T={expected.temperature:g}"]
            row += [f"{100 * i.value:.1f} % ({100 * i.low:.1f} to {100 * i.high:.1f})" for i in expected.of]
            if expected.change is not None:
                change = expected.change
                row.append(f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})")
            table.add_row(*row)
        print(f"{forecast.draft}, {forecast.positions} positions:")
        _print(table)


def _tell(alias: str, roster: Roster) -> None:
    found: Alias = roster.aliases[alias]
    shares = "".join(f", {percent:g} % {version}" for version, percent in found.now.canary.items())
    print(f"{alias}: {found.now.version}{shares}")


def _told(shares: dict[str, float]) -> str:
    told = ", ".join(f"{percent:g} % of new sessions of {alias}" for alias, percent in shares.items())
    return f"; it gets {told}" if told else "; nobody gets it yet, unless by its name"


def _registry(options: argparse.Namespace) -> Registry:
    from cloud_verifier.registry.registry import Registry

    return Registry(options.registry)


def _table(*headers: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _print(table: Any) -> None:
    from rich.console import Console

    # A pipe has no width, and whatever reads it wants one line for each.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
