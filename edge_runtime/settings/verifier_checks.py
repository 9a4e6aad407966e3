"""Checks that the verifier's settings fit together and send nothing private unencrypted."""

from __future__ import annotations

from edge_runtime.protocol.errors import InputError
from edge_runtime.settings.table import VerifierSettings
from edge_runtime.settings.validators import is_in_clear


def check_verifier_settings(verifier: VerifierSettings) -> None:
    """Raise InputError if the client would refuse these settings."""
    if bool(verifier.certificate_file) != bool(verifier.key_file):
        raise InputError("--client-certificate and --client-key go together (verifier.certificate_file and .key_file)")
    check_encryption(verifier.urls, has_token=verifier.token_file is not None, insecure=verifier.insecure)


def check_encryption(urls: list[str], *, has_token: bool, insecure: bool) -> None:
    """Refuse URLs to which prompts or a token would be sent unencrypted over the network.

    Args:
        has_token: whether every request carries a bearer token, which is never sent unencrypted.
        insecure: whether prompts and answers may be sent unencrypted.

    Raises:
        InputError: something would be sent unencrypted to one of the URLs.
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
