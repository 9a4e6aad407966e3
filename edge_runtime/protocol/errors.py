"""The one error tree of FlexSpec.

    FlexSpecError
    ├── InputError              the caller asked for something impossible: empty prompt, bad sampling, bad file
    │   ├── ProfileError            a device profile that does not exist or does not parse (`planning.board_profile`)
    │   ├── ConfigurationError      the configuration file or the environment (`configuration.reading`)
    │   └── Unknown                 the registry has no such version or alias (`cloud_verifier.registry.catalog`)
    ├── ProbeError              a sensor's file that makes no sense (`probes.roots`); counted, never raised to callers
    ├── BundleError             the draft bundle on disk
    │   ├── BundleMissing           no such directory, or a file of it is gone
    │   ├── BundleCorrupt           a hash, a length or the manifest is wrong
    │   ├── BundleUntrusted         no signature, or not the configured key's (`bundles.signatures`)
    │   ├── BundleUnfit             its self-test failed (`bundles.selftest`)
    │   └── StoreError              it cannot be put into the store (`bundles.unpacking`)
    ├── DraftError              the draft model at work
    │   └── ContextOverflow         more tokens than the draft's context holds
    ├── ServiceUnreachable      no local service of a board answers (`service.top`)
    ├── ServiceError            systemd did not do what it was asked (`systemd.units`)
    ├── TargetError             the verifier cannot serve this checkpoint
    │   ├── RegistryError           the registry cannot be read or written (`cloud_verifier.registry.registry`)
    │   └── Incompatible            deployed drafts do not fit this version (`cloud_verifier.registry.compatibility`)
    └── VerifierError           talking to the verifier
        ├── VerifierUnreachable     no answer within the deadline (`fault`, see `link_faults.Fault`)
        └── VerifierRefused         it answered with a typed error (`code`, see `wire.ErrorCode`)

Every message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations


class FlexSpecError(Exception):
    """Root of all errors that FlexSpec raises on purpose; `exit_code` is what a command line ends with."""

    exit_code = 1


class InputError(FlexSpecError):
    """The request itself cannot be served: an empty prompt, a negative temperature, an unreadable file."""

    exit_code = 2


class BundleError(FlexSpecError):
    """The draft bundle on disk is unusable."""

    exit_code = 3


class BundleMissing(BundleError):
    """The bundle directory, or a file that its manifest names, does not exist."""


class BundleCorrupt(BundleError):
    """A file does not have the length or hash that the manifest records, or the manifest does not parse."""


class DraftError(FlexSpecError):
    """The draft model could not be loaded or run."""

    exit_code = 3


class ContextOverflow(DraftError):
    """More tokens than the draft's context holds."""


class TargetError(FlexSpecError):
    """The verifier cannot serve this checkpoint."""

    exit_code = 3


class VerifierError(FlexSpecError):
    """Something between the board and the verifier."""

    exit_code = 4


class VerifierUnreachable(VerifierError):
    """No answer within the deadline, for a cause below the protocol.

    Attributes:
        fault: which: one of `link_faults.Fault`.
    """

    def __init__(self, message: str, fault: str = "timed_out") -> None:
        super().__init__(message)
        self.fault = fault


class VerifierRefused(VerifierError):
    """The verifier answered with a typed error.

    Attributes:
        code: one of `wire.ErrorCode`.
        status: the HTTP status that carried it.
        detail: what the code documents, such as the expected position.
        retry_after: seconds after which another attempt is worth while; None where it does not say.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int,
        detail: dict[str, object] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code
        self.status = status
        self.detail = detail or {}
        self.retry_after = retry_after
