"""Which verifier a user's answers come from: options, and the configuration where they are silent."""

from __future__ import annotations

import argparse
import os
import typing
from pathlib import Path
from typing import Any

from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.errors import InputError

DEFAULT_URL = "http://127.0.0.1:8500"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `client_of` reads, and `--config` (see `configure`)."""
    verifier = parser.add_argument_group("verifier")
    verifier.add_argument(
        "--verifier",
        default=os.environ.get("FLEXSPEC_VERIFIER", DEFAULT_URL),
        metavar="URL[,URL...]",
        help=f"the preferred one first; the others are asked while it is gone (default: $FLEXSPEC_VERIFIER, else "
        f"{DEFAULT_URL})",
    )
    verifier.add_argument("--model", default="", help="which target, where nobody says (default: the verifier's)")
    verifier.add_argument(
        "--deadline",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="that an answer may stand still, attempts to reach a verifier included (default: %(default)g)",
    )
    verifier.add_argument(
        "--on-link-loss",
        choices=typing.get_args(OnLinkLoss),
        default="wait",
        help="without a verifier: wait for one and go on where the text stood; let the draft go on alone, marked as "
        "unverified, until there is one again; or fail at once (default: %(default)s)",
    )
    verifier.add_argument("--no-http2", action="store_true", help="do not try HTTP/2")
    verifier.add_argument("--token-file", type=Path, metavar="FILE", help="of the token that the verifier asks for")
    verifier.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="PEM authorities to trust instead of the system's"
    )
    verifier.add_argument(
        "--client-certificate",
        type=Path,
        metavar="FILE",
        help="PEM certificate of this board, for verifiers that ask for one",
    )
    verifier.add_argument("--client-key", type=Path, metavar="FILE", help="PEM private key of that certificate")
    verifier.add_argument(
        "--insecure",
        action="store_true",
        help="let prompts and answers travel in clear to an http:// verifier on another machine; never a token",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration that speaks where no option does (default: see `edge-runtime config --help`)",
    )
    parser.set_defaults(configured=parser)


def configure(options: argparse.Namespace) -> None:
    """Makes what the configuration says the defaults of the command's options; for a second parsing.

    Raises:
        InputError: the configuration has errors.
        BundleError: the bundle that it names, or that the store holds, cannot be used.
    """
    from edge_runtime.bundles.store import configured_bundle
    from edge_runtime.settings.loading import read_configuration

    configuration = read_configuration(options.config)
    draft, verifier, planner, service = (
        configuration.draft,
        configuration.verifier,
        configuration.planner,
        configuration.service,
    )
    defaults: dict[str, Any] = {
        "threads": draft.threads,
        "no_memory": not draft.memory,
        "verifier": ",".join(verifier.urls),
        "on_link_loss": service.on_link_loss,
        "model": verifier.model,
        "deadline": verifier.deadline_seconds,
        "no_http2": not verifier.http2,
        "token_file": verifier.token_file,
        "ca_file": verifier.ca_file,
        "client_certificate": verifier.certificate_file,
        "client_key": verifier.key_file,
        "insecure": verifier.insecure,
        "policy": planner.policy,
        "objective": planner.objective,
        "profile": planner.profile or None,
        "radio": planner.radio,
        "energy_budget": planner.energy_budget or None,
        "host": service.host,
        "port": service.port,
        "max_concurrent": service.max_concurrent,
        "max_waiting": service.max_waiting,
        "api_key_file": service.api_key_file,
        "log_level": configuration.log.level,
        "log_prompts": configuration.log.prompts,
    }
    parser: argparse.ArgumentParser = options.configured
    named = options.bundle != parser.get_default("bundle")
    if not named and (draft.bundle is not None or os.path.lexists(draft.store / "current")):
        defaults["bundle"] = configured_bundle(draft).path
    if draft.memory_directory is not None:
        defaults["memory"] = draft.memory_directory
    parser.set_defaults(**{name: value for name, value in defaults.items() if hasattr(options, name)})


def client_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `VerifierClient`. Raises InputError: the token cannot be read, or the way there is not private."""
    from edge_runtime.settings.validators import read_secret

    if options.deadline <= 0:
        raise InputError(f"--deadline {options.deadline:g}: must be more than 0 seconds")
    if bool(options.client_certificate) != bool(options.client_key):
        raise InputError("--client-certificate and --client-key go together (verifier.certificate_file and .key_file)")
    urls = [url.strip() for url in options.verifier.split(",")]
    check_private(urls, bool(options.token_file), options.insecure)
    return {
        "url": urls,
        "deadline": options.deadline,
        "http2": not options.no_http2,
        "token": read_secret(options.token_file) if options.token_file else "",
        "authorities": options.ca_file,
        "certificate": (options.client_certificate, options.client_key) if options.client_key else None,
    }


def check_private(urls: list[str], token: bool, insecure: bool) -> None:
    """Raises InputError where prompts would go unencrypted to another machine and nobody allowed it, or a token would.

    Args:
        token: whether a bearer token goes with every request: nothing allows that to travel in clear.
        insecure: whether prompts and answers may.
    """
    from edge_runtime.settings.validators import is_in_clear

    for url in filter(is_in_clear, urls):
        if token:
            raise InputError(
                f"the token would go to {url} unencrypted, for everybody on the way to use: give the verifier's "
                "https:// URL, or leave the token out; --insecure does not allow this"
            )
        if not insecure:
            raise InputError(
                f"prompts and answers would go to {url} unencrypted: give the verifier's https:// URL; on a network "
                "that is yours alone, allow it with --insecure, or verifier.insecure = true in the configuration"
            )
