"""The exception hierarchy of FlexSpec. Subclasses that belong to one package are defined there, as noted.

    FlexSpecError
    ├── InputError               the request cannot be served: empty prompt, bad sampling parameters, unreadable file
    │   ├── ProfileError             a device profile does not exist or parse (`planning.board_profile`)
    │   ├── ConfigurationError       an error in the configuration file or the environment (`settings`)
    │   ├── GrammarError             a grammar is invalid or too costly
    │   ├── BodyRefused              the body of a request is too long or too slow
    │   ├── DamagedMessage           a message whose checksum is wrong (`protocol.messages`)
    │   └── UnknownVersion           the registry has no such version or alias (`cloud_verifier.registry.catalog`)
    ├── ProbeError               a sensor file does not parse (`probes.reader`); counted, never raised to callers
    ├── BundleError              the draft bundle on disk is unusable
    │   ├── BundleMissing            the directory or one of its files does not exist
    │   ├── BundleCorrupt            a hash, a length or the manifest is wrong
    │   ├── BundleUntrusted          no signature, or not the configured key's (`bundles.signatures`)
    │   ├── BundleUnfit              the self-test failed (`bundles.self_test`)
    │   └── StoreError               the bundle cannot be put into the store (`bundles.archive`)
    ├── DraftError               the draft model cannot be loaded or run
    │   └── ContextOverflow          more tokens than the draft's context
    ├── ArchiveError             a tar archive is damaged or hostile (`common.tar_stream`); its readers say which
    ├── ServiceUnreachable       the board's local service does not answer (`cli.top`)
    ├── UpdateError              an update of the program cannot be used (`updates.package`)
    ├── ImageError               an image could not be built or changed (`device_profiles.image.programs`)
    ├── FlashError               a card was not written as it should have been (`device_profiles.flash.writing`)
    ├── ServiceError             systemd did not do what it was asked (`systemd.units`)
    ├── TargetError              the verifier cannot serve this checkpoint
    │   ├── RegistryError            the registry cannot be read or written (`cloud_verifier.registry.registry`)
    │   └── IncompatibleVersion      deployed drafts do not fit this version (`cloud_verifier.registry.compatibility`)
    └── VerifierError            communication with the verifier failed
        ├── VerifierUnreachable      no usable answer within the deadline (`fault`: see `verifier.link_faults.Fault`)
        └── VerifierRefused          the verifier answered with an error (`code`: see `protocol.messages.ErrorCode`)

Every message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations


class FlexSpecError(Exception):
    """Base of all errors that FlexSpec raises on purpose.

    Attributes:
        exit_code: exit status of a command that ends with this error.
    """

    exit_code = 1


class InputError(FlexSpecError):
    """The request cannot be served: an empty prompt, a negative temperature, an unreadable file."""

    exit_code = 2


class GrammarError(InputError):
    """The grammar is invalid or too costly, or the model cannot write any text that matches it."""


class BodyRefused(InputError):
    """The body of a request is too long or too slow.

    Attributes:
        status: HTTP status of the answer, 408 or 413.
        limit: bytes that it may have; None if the length is not the reason.
    """

    def __init__(self, status: int, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.limit = limit


class BundleError(FlexSpecError):
    """The draft bundle on disk is unusable."""

    exit_code = 3


class BundleMissing(BundleError):
    """The bundle directory, or a file that its manifest names, does not exist."""


class BundleCorrupt(BundleError):
    """A file does not have the length or hash that the manifest records, or the manifest does not parse."""


class DraftError(FlexSpecError):
    """The draft model cannot be loaded or run."""

    exit_code = 3


class ContextOverflow(DraftError):
    """The text has more tokens than the draft's context."""


class TargetError(FlexSpecError):
    """The verifier cannot serve this checkpoint."""

    exit_code = 3


class VerifierError(FlexSpecError):
    """Communication between board and verifier failed."""

    exit_code = 4


class VerifierUnreachable(VerifierError):
    """No usable answer within the deadline, for a cause below the protocol.

    Attributes:
        fault: the cause, a value of `verifier.link_faults.Fault`.
    """

    def __init__(self, message: str, fault: str = "timed_out") -> None:
        super().__init__(message)
        self.fault = fault


class VerifierRefused(VerifierError):
    """The verifier answered with an error.

    Attributes:
        code: a value of `protocol.messages.ErrorCode`.
        status: HTTP status of the answer; by default the one that belongs to an `ErrorCode`.
        detail: the fields that `ErrorCode` documents for this code, such as the expected position.
        retry_after: seconds after which a retry is worthwhile; None if the answer does not say.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        detail: dict[str, object] | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code
        self.status: int = getattr(code, "status", 0) if status is None else status
        self.detail = detail or {}
        self.retry_after = retry_after
