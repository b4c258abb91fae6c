"""Who a call comes from. The identity is the call's, never the request's: nothing that a client writes freely counts.

Without a tenant header everybody is the same tenant and shares its cached prefixes. With one (`router.tenant_header`),
the proxy that sets it is trusted: who can reach the port past it can be anybody. Remembers no tenant.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import grpc.aio

from router.violations import shown
from workers.errors import InvalidRequestError, Violation

MAX_TENANT_BYTES: Final = 128
SALT_BYTES: Final = 16


class Identity(NamedTuple):
    tenant: str = ""
    salt: bytes = b""
    """Keeps the tenant's cached prefixes apart from those of others."""


ANYBODY = Identity()


class Identities:
    """`header`: the metadata key that names the tenant; empty: nobody is told apart. `salt_key`: of `ClusterKeys`, so
    that every router gives a tenant the same salt and nobody outside knows it."""

    def __init__(self, header: str = "", *, salt_key: bytes = b"") -> None:
        self._header = header
        self._salt_key = salt_key

    def identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """Return who makes this call. Raises InvalidRequestError for what is no tenant's name."""
        return self.of(context.invocation_metadata() or ()) if self._header else ANYBODY

    def of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Identity:
        """Return who sends this metadata; without the header it is the tenant without a name. Raises
        InvalidRequestError."""
        values = [value for key, value in metadata if key == self._header]
        if not values:
            return ANYBODY
        if len(values) > 1:
            # A client's and the proxy's: who could say which is which?
            raise self._invalid("must be there once", f"{len(values)} values")
        tenant = values[0] if isinstance(values[0], str) else values[0].decode("latin-1")
        if len(tenant) > MAX_TENANT_BYTES or not (tenant.isascii() and tenant.isprintable()):
            raise self._invalid(f"must have at most {MAX_TENANT_BYTES} printable ASCII characters", shown(tenant))
        return (
            Identity(tenant, hmac.digest(self._salt_key, tenant.encode(), "sha256")[:SALT_BYTES]) if tenant else ANYBODY
        )

    def _invalid(self, rule: str, value: str) -> InvalidRequestError:
        violation = Violation(f"metadata[{self._header}]", f"{rule}, is {value}")
        return InvalidRequestError(f"{violation.field}: {violation.description}", violations=[violation])
