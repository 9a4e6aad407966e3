"""Options and construction of the verifier client, and the check that nothing private is sent unencrypted."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edge_runtime.cli.settings_options import add_settings
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings import VerifierSettings, is_in_clear, read_secret

# Imported by every command; the client is slow to import.
if TYPE_CHECKING:
    from edge_runtime.verifier import VerifierClient


VERIFIER_KEYS = (
    "verifier.urls",
    "verifier.model",
    "verifier.deadline_seconds",
    "service.on_link_loss",
    "verifier.proxy",
    "verifier.http2",
    "verifier.token_file",
    "verifier.ca_file",
    "verifier.certificate_file",
    "verifier.key_file",
    "verifier.insecure",
)


def add_verifier_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose verifiers and the connection to them."""
    add_settings(parser.add_argument_group("verifier"), *VERIFIER_KEYS)


def check_verifier_settings(verifier: VerifierSettings) -> None:
    """Check what the types of the settings do not. Raises InputError."""
    if verifier.deadline_seconds <= 0:
        raise InputError(f"--deadline {verifier.deadline_seconds:g}: must be more than 0 seconds")
    if bool(verifier.certificate_file) != bool(verifier.key_file):
        raise InputError("--client-certificate and --client-key go together (verifier.certificate_file and .key_file)")
    check_encryption(verifier.urls, has_token=verifier.token_file is not None, insecure=verifier.insecure)


def read_token(verifier: VerifierSettings) -> str:
    """Read the bearer token; empty if there is none. Raises InputError."""
    return read_secret(verifier.token_file) if verifier.token_file else ""


def make_client(verifier: VerifierSettings) -> VerifierClient:
    """Create the client. Raises InputError: the settings are unusable, or would send something private unencrypted."""
    from edge_runtime.verifier import VerifierClient

    check_verifier_settings(verifier)
    certificate = None
    if verifier.certificate_file and verifier.key_file:
        certificate = (verifier.certificate_file, verifier.key_file)
    return VerifierClient(
        verifier.urls,
        deadline=verifier.deadline_seconds,
        http2=verifier.http2,
        token=read_token(verifier),
        authorities=verifier.ca_file,
        certificate=certificate,
        proxy=verifier.proxy,
    )


def check_encryption(urls: list[str], *, has_token: bool, insecure: bool) -> None:
    """Refuse URLs to which prompts or a token would be sent unencrypted over the network.

    Args:
        has_token: whether every request carries a bearer token, which is never sent unencrypted.
        insecure: whether prompts and answers may be sent unencrypted.

    Raises:
        InputError: one of the URLs is such a URL.
    """
    for url in filter(is_in_clear, urls):
        if has_token:
            raise InputError(
                f"the token would be sent to {url} unencrypted, and anyone on the way could use it: give the "
                "verifier's https:// URL, or omit the token; --insecure does not allow this"
            )
        if not insecure:
            raise InputError(
                f"prompts and answers would be sent to {url} unencrypted: give the verifier's https:// URL; on a "
                "network of your own, allow it with --insecure, or verifier.insecure = true in the configuration"
            )
