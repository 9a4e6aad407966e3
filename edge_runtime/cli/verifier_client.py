"""Options and construction of the verifier client."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edge_runtime.cli.settings_options import add_settings
from edge_runtime.settings import VerifierSettings, check_verifier_settings, read_secret

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
