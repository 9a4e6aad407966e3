"""`cloud-verifier targets`: adds target versions to a registry, rolls them out, and rolls them back."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud_verifier.cli.serve import MAX_THREADS
from edge_runtime.common.options import add_action, add_flag, add_option, number, whole_number
from edge_runtime.common.terminal import new_console, print_note
from edge_runtime.protocol.errors import InputError, TargetError

# Imports that need the extras, or take time, are inside the functions: every command builds this parser.
if TYPE_CHECKING:
    from cloud_verifier.acceptance.forecast import AcceptanceForecast
    from cloud_verifier.registry.catalog import Catalog
    from cloud_verifier.registry.compatibility import CompatibilityReport
    from cloud_verifier.registry.registry import Registry

DESCRIPTION = """\
Manages the target versions that `cloud-verifier serve --registry DIR` serves. A version is admitted only if the drafts
deployed on boards (`add --draft`) are compatible with it: the same tokenizer, special ids, and shared tensors. An
alias, such as `latest`, leads new sessions to a version; an open session stays on the version it was opened with. A
running service applies every change within seconds.

examples:
  export FLEXSPEC_REGISTRY=registry
  cloud-verifier targets add family/target-v1 --draft family/bundle
  cloud-verifier targets add family/target-v2    # gets no sessions yet, except by name
  cloud-verifier targets check target-v2                        # forecast the acceptance rate of the boards' draft
  cloud-verifier targets canary target-v2 5                     # 5 % of the new sessions of `latest`
  cloud-verifier targets rollback                               # undo the last change of `latest`
  cloud-verifier targets promote target-v2                      # all new sessions of `latest`
  cloud-verifier targets promote target-v2 --alias stable
  cloud-verifier targets retire target-v1                       # no new sessions; unloaded after its last one
  cloud-verifier targets list --json
"""

# Inside the state directory of the service, to which its admin API may write.
DEFAULT_REGISTRY = Path("/var/lib/flexspec-verifier/targets")
REGISTRY_VARIABLE = "FLEXSPEC_REGISTRY"
# Width of tables in a pipe: one line per row.
PIPE_WIDTH = 300
VERSION_HELP = "name@hash, as in `list`; or a name, for the version of that name that was added last"
DEFAULT_ALIAS_HELP = "the alias for sessions that request no model"
UNSHARED_HELP = "although boards with a deployed draft would be refused"


def add_parser(commands: Any, device_options: argparse.ArgumentParser) -> None:
    """Add `targets` to argparse's subparsers. `device_options` has the options of where models are computed."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "targets",
        help="add, check, promote, roll back and retire target versions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    registry = argparse.ArgumentParser(add_help=False)
    text = f"default: ${REGISTRY_VARIABLE}, or {DEFAULT_REGISTRY}"
    default = Path(os.environ.get(REGISTRY_VARIABLE) or DEFAULT_REGISTRY)
    registry.add_argument("--registry", type=Path, default=default, metavar="DIR", help=text)
    as_json = argparse.ArgumentParser(add_help=False)
    add_flag(as_json, "--json", "print one JSON object")
    alias = argparse.ArgumentParser(add_help=False)
    alias.add_argument("--alias", default="", metavar="NAME", help=f"default: {DEFAULT_ALIAS_HELP}")
    version = argparse.ArgumentParser(add_help=False)
    version.add_argument("version", metavar="VERSION", help=VERSION_HELP)

    add_action(actions, "list", _list, "list versions and aliases", parents=[registry, as_json])
    text = "add a version, if the deployed drafts are compatible with it"
    add = add_action(actions, "add", _add, text, parents=[registry])
    text = "a directory, or the name of one in the registry's `roots`; without it, only --draft is registered"
    add.add_argument("version", nargs="?", metavar="VERSION", help=text)
    text = "register a bundle that is deployed on boards"
    add.add_argument("--draft", type=Path, action="append", default=[], metavar="BUNDLE", help=text)
    add_flag(add, "--unshared", f"admit it {UNSHARED_HELP}")
    text = "route all new sessions of an alias to a version"
    promote = add_action(actions, "promote", _promote, text, parents=[registry, alias, version])
    add_flag(promote, "--unshared", f"promote it {UNSHARED_HELP}")
    text = "route a percentage of the new sessions of an alias to a version"
    canary = add_action(actions, "canary", _canary, text, parents=[registry, alias, version])
    canary.add_argument(
        "percent",
        type=number(),
        metavar="PERCENT",
        help="percentage of new sessions; 0 ends the canary",
    )
    add_flag(canary, "--unshared", f"route to it {UNSHARED_HELP}")
    rollback = add_action(actions, "rollback", _rollback, "undo the last change of an alias", parents=[registry])
    rollback.add_argument("alias", nargs="?", default="", metavar="ALIAS", help=f"default: {DEFAULT_ALIAS_HELP}")
    text = "stop routing new sessions to a version"
    add_action(actions, "retire", _retire, text, parents=[registry, version])
    check = add_action(
        actions,
        "check",
        _check,
        "check compatibility, and forecast the acceptance rate compared with the version in use",
        parents=[registry, as_json, device_options],
        epilog="exit codes: 0: fine; 1: the acceptance rate would fall by more than --tolerance; "
        "3: a draft is incompatible, or a model does not load",
    )
    check.add_argument("version", metavar="VERSION", help=f"{VERSION_HELP}; or a directory outside the registry")
    text = "default: all deployed drafts"
    check.add_argument("--draft", type=Path, action="append", default=[], metavar="BUNDLE", help=text)
    add_option(check, "--text FILE", "text to evaluate on (default: one that ships, mostly code)", type=Path)
    text = "acceptable loss of acceptance rate, in percentage points"
    add_option(check, "--tolerance POINTS", text, default=3.0)
    check.add_argument(
        "--threads",
        type=whole_number(0, MAX_THREADS),
        default=0,
        metavar="N",
        help="CPU threads (default: the libraries' choice)",
    )


def _list(options: argparse.Namespace) -> int:
    import msgspec

    registry = _registry(options)
    catalog = registry.read()
    versions = registry.list_versions(catalog)
    if options.json:
        listing = {
            "default": catalog.default,
            "aliases": catalog.aliases,
            "drafts": catalog.drafts,
            "targets": versions,
        }
        print(msgspec.json.encode(listing).decode())
        return 0
    headers = ["version", "kind", "admitted", "state", "new sessions", "added", "directory", "problem"]
    rows = []
    for listed in versions:
        shares = ", ".join(f"{percent:g} % of {alias}" for alias, percent in listed.aliases.items())
        added = f"{listed.added.astimezone():%Y-%m-%d %H:%M}"
        rows.append(
            [listed.version, listed.kind, listed.admitted, listed.state, shares, added, listed.path, listed.problem]
        )
    _print_table(headers, rows)
    print(f"default alias: {catalog.default}; deployed drafts: {', '.join(catalog.drafts) or 'none'}")
    return 0


def _add(options: argparse.Namespace) -> int:
    registry = _registry(options)
    if not options.version and not options.draft:
        raise InputError("nothing to add: give a VERSION, a --draft, or both")
    for bundle in options.draft:
        incompatible = registry.add_draft(bundle)
        print(f"{bundle}: deployed")
        for version, fit in incompatible.items():
            for difference in fit.differences:
                print_note(f"cloud-verifier: warning: {version} is incompatible with it: {difference}")
    if options.version:
        entry = registry.add(options.version, unshared=options.unshared)
        shares = registry.read().traffic_shares(entry.version)
        described = ", ".join(f"{percent:g} % of new sessions of {alias}" for alias, percent in shares.items())
        gets = described or "no sessions yet, except by name"
        print(f"{entry.version}: added as {entry.admitted}; it gets {gets}")
    return 0


def _promote(options: argparse.Namespace) -> int:
    catalog = _registry(options).promote(options.alias, options.version, unshared=options.unshared)
    return _print_alias(options, catalog)


def _canary(options: argparse.Namespace) -> int:
    catalog = _registry(options).canary(options.alias, options.version, options.percent, unshared=options.unshared)
    return _print_alias(options, catalog)


def _rollback(options: argparse.Namespace) -> int:
    return _print_alias(options, _registry(options).rollback(options.alias))


def _print_alias(options: argparse.Namespace, catalog: Catalog) -> int:
    name = options.alias or catalog.default
    split = catalog.aliases[name].now
    canaries = "".join(f", {percent:g} % {version}" for version, percent in split.canary.items())
    print(f"{name}: {split.version}{canaries}")
    return 0


def _retire(options: argparse.Namespace) -> int:
    print(f"{_registry(options).retire(options.version).version}: retired")
    return 0


def _check(options: argparse.Namespace) -> int:
    import msgspec

    from cloud_verifier.registry.catalog import UnknownVersion

    registry = _registry(options)
    catalog, source = registry.read(), options.version
    if not Path(source).is_dir():
        # A version that is not in the registry may be a directory in one of its roots.
        with contextlib.suppress(UnknownVersion):
            source = str(registry.path_of(catalog.find(source)))
    report, path = registry.examine(source, catalog, options.draft)
    versions = [(report.version, path)]
    in_use = catalog.aliases.get(catalog.default)
    if in_use is not None and in_use.now.version != report.version:
        versions.append((in_use.now.version, registry.path_of(catalog.find_exact(in_use.now.version))))
    from cloud_verifier.acceptance.forecast import forecast

    # A draft with another vocabulary, or with more logits, has no acceptance rate.
    forecasts = [
        forecast(
            Path(fit.draft), versions, options.text, device=options.device, dtype=options.dtype, threads=options.threads
        )
        for fit in report.fits
        if not any(difference.what in ("vocabulary", "logits") for difference in fit.differences)
    ]
    if options.json:
        result = {"gate": report, "compatible": report.compatible, "expected": forecasts}
        print(msgspec.json.encode(result).decode())
    else:
        _print_check(report, forecasts)
    if not report.compatible:
        return TargetError.exit_code
    return int(any(forecasted.loss > options.tolerance for forecasted in forecasts))


def _print_check(report: CompatibilityReport, forecasts: list[AcceptanceForecast]) -> None:
    if report.compatible:
        print(f"{report.version} ({report.kind}): compatible with {len(report.fits)} deployed draft(s)")
    else:
        print(f"{report.version} ({report.kind}) differs:\n{report.describe()}")
    for forecast in forecasts:
        rows = []
        for expected in forecast.expectations:
            rates = [f"{100 * i.value:.1f} % ({100 * i.low:.1f} to {100 * i.high:.1f})" for i in expected.acceptance]
            rows.append([f"T={expected.temperature:g}", *rates])
            if expected.change is not None:
                change = expected.change
                rows[-1].append(f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})")
        print(f"{forecast.draft}, {forecast.positions} positions:")
        _print_table(["accepted", *forecast.versions, *(["change"] if len(forecast.versions) > 1 else [])], rows)


def _registry(options: argparse.Namespace) -> Registry:
    from cloud_verifier.registry.registry import Registry

    return Registry(options.registry)


def _print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width; programs that read it want one line per row.
    new_console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
