"""Authentication and authorization of requests by bearer token."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request

from cloud_verifier.engine.principals import ANONYMOUS, Principal, Role, hash_token, read_principals
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode


class Authenticator:
    """Maps the bearer token of a request to a principal and checks its role.

    Without a token file every request is anonymous, with the rights of a board and of a monitor; there are no admins.

    Attributes:
        file: the token file; None if requests need no token.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Read the token file. Raises InputError, see `read_principals`."""
        self.file = file
        self._by_hash: dict[str, Principal] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._by_hash)

    def reload(self) -> None:
        """Read the token file again. On InputError the previous principals stay in force."""
        if self.file is not None:
            self._by_hash = {principal.sha256: principal for principal in read_principals(self.file).values()}

    def authorize(self, request: Request, *roles: Role) -> Principal:
        """Return the principal of `request`, which must have one of `roles` or be an admin.

        Raises:
            VerifierRefused: `unauthorized` or `forbidden`.
        """
        if self.file is None:
            if Role.BOARD in roles or Role.MONITOR in roles:
                return ANONYMOUS
            raise VerifierRefused(
                ErrorCode.FORBIDDEN, "this verifier has no admins; start it with --tokens to define some"
            )
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        principal = self._by_hash.get(hash_token(token.strip()))
        if scheme.lower() != "bearer" or principal is None:
            raise VerifierRefused(
                ErrorCode.UNAUTHORIZED,
                "this verifier requires a known token (Authorization: Bearer TOKEN); its operator creates one with "
                "`cloud-verifier token add`",
            )
        if principal.role not in (*roles, Role.ADMIN):
            raise VerifierRefused(
                ErrorCode.FORBIDDEN,
                f"the token of {principal.name} has the role {principal.role}; this request needs {' or '.join(roles)}",
            )
        return principal
