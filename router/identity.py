"""Who a call comes from. The identity is the call's, never the request's: nothing that a client writes freely counts.

    keys           the bearer token in `authorization` is one of the key file's, which says whose
    certificates   TLS has verified the client's; its one subject alternative name is the tenant
    both           a certificate is enough; a token that comes with it must be the same tenant's
    tenant header  a trusted proxy in front says it: who can reach the port past it can be anybody
    none of these  everybody is the same tenant and shares its cached prefixes

Tenants of one group share cached prefixes; all others are kept apart by a salt that nobody outside can compute.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, NamedTuple

import grpc.aio
from octavo.names import Metadata, Reason

from router.key_file import KeyFile
from router.keyring import DEFAULT_TERMS, MAX_NAME_BYTES, Terms
from router.violations import shown
from workers.errors import ForbiddenError, InvalidRequestError, UnauthenticatedError, Violation

SALT_BYTES: Final = 16
_BEARER: Final = "bearer "
_SAN: Final = "x509_subject_alternative_name"


class Identity(NamedTuple):
    tenant: str = ""
    salt: bytes = b""
    """Keeps the tenant's cached prefixes apart from those of others."""
    key_id: str = ""
    """Of the key that proved it; empty: none did."""
    group: str = ""
    """That it shares them with; empty: with nobody."""


ANYBODY = Identity()


class Identities:
    """`header`: the metadata key that names the tenant; empty: none does. `salt_key`: of `ClusterKeys`, so that every
    router gives a tenant the same salt and nobody outside knows it. `has_certificates`: TLS demands clients'.
    """

    def __init__(
        self,
        header: str = "",
        *,
        salt_key: bytes = b"",
        keys: KeyFile | None = None,
        has_certificates: bool = False,
    ) -> None:
        self._header = header
        self._salt_key = salt_key
        self.keys = keys
        self._has_certificates = has_certificates
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for new keys; `stop` must follow."""
        if self.keys is not None:
            self._watch = asyncio.create_task(self.keys.watch())

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch

    def identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
        """Return who makes this call. Raises UnauthenticatedError, ForbiddenError if its proofs do not agree, and
        InvalidRequestError for what is no tenant's name."""
        if self._has_certificates:
            owner = _certified(context.auth_context())
            if self.keys is None:
                return self._identity(owner)
            identity = self._by_key(context.invocation_metadata() or (), is_needed=False)
            if identity is None:
                return self._identity(owner)
            if identity.tenant != owner:
                raise ForbiddenError(
                    f"authorization: the token must be of the certificate's tenant {owner!r}, "
                    f"is of {identity.tenant!r}",
                    reason=Reason.TENANT_MISMATCH,
                )
            return identity
        if self.keys is not None:
            identity = self._by_key(context.invocation_metadata() or ())
            assert identity is not None
            return identity
        return self.of(context.invocation_metadata() or ()) if self._header else ANYBODY

    def current(self, identity: Identity) -> Identity:
        """Return what a call that began as `identity` is by the keys of now: its tenant may have changed its group.
        Raises UnauthenticatedError if what proved it does not hold any more."""
        if self.keys is None:
            return identity
        if identity.key_id:
            self.keys.keyring.check(identity.key_id, time.time())
        if self.terms(identity.tenant).group == identity.group:
            return identity
        return self._identity(identity.tenant, identity.key_id)

    def terms(self, tenant: str) -> Terms:
        return DEFAULT_TERMS if self.keys is None else self.keys.keyring.terms(tenant)

    def of(self, metadata: Iterable[tuple[str, str | bytes]]) -> Identity:
        """Return who sends this metadata by the tenant header; without it, it is the tenant without a name. Raises
        InvalidRequestError."""
        values = _values(metadata, self._header)
        if not values:
            return ANYBODY
        if len(values) > 1:
            # A client's and the proxy's: who could say which is which?
            raise self._invalid("must be there once", f"{len(values)} values")
        tenant = values[0]
        if len(tenant) > MAX_NAME_BYTES or not (tenant.isascii() and tenant.isprintable()):
            raise self._invalid(f"must have at most {MAX_NAME_BYTES} printable ASCII characters", shown(tenant))
        return self._identity(tenant) if tenant else ANYBODY

    def _by_key(self, metadata: Iterable[tuple[str, str | bytes]], *, is_needed: bool = True) -> Identity | None:
        assert self.keys is not None
        values = _values(metadata, Metadata.AUTHORIZATION)
        if not values and not is_needed:
            return None
        if len(values) != 1 or not values[0].lower().startswith(_BEARER):
            raise UnauthenticatedError(
                f"authorization must be there once, as 'Bearer KEY'; this call has {len(values)} values",
                reason=Reason.NO_CREDENTIALS,
            )
        key = self.keys.keyring.authenticate(values[0][len(_BEARER) :].strip(), time.time())
        return self._identity(key.tenant, key.key_id)

    def _identity(self, tenant: str, key_id: str = "") -> Identity:
        group = self.terms(tenant).group
        # A zero byte cannot be in a name, so no tenant's salt is a group's.
        shared_by = f"group\0{group}" if group else tenant
        salt = hmac.digest(self._salt_key, shared_by.encode(), "sha256")[:SALT_BYTES]
        return Identity(tenant, salt, key_id, group)

    def _invalid(self, rule: str, value: str) -> InvalidRequestError:
        violation = Violation(f"metadata[{self._header}]", f"{rule}, is {value}")
        return InvalidRequestError(f"{violation.field}: {violation.description}", violations=[violation])


def _values(metadata: Iterable[tuple[str, str | bytes]], key: str) -> list[str]:
    found = (value for name, value in metadata if name == key)
    return [value if isinstance(value, str) else value.decode("latin-1") for value in found]


def _certified(auth_context: Any) -> str:
    """Return the tenant of a verified certificate."""
    names: list[str] = [name.decode("utf-8", "replace") for name in auth_context.get(_SAN, ())]
    if len(names) != 1:
        raise UnauthenticatedError(
            f"the client's certificate must have one subject alternative name, the tenant; this one has {len(names)}",
            reason=Reason.BAD_CREDENTIALS,
        )
    name = names[0]
    if not (0 < len(name) <= MAX_NAME_BYTES and name.isascii() and name.isprintable()):
        raise UnauthenticatedError(
            f"the certificate's subject alternative name must have 1 to {MAX_NAME_BYTES} printable ASCII characters, "
            f"is {shown(name)}",
            reason=Reason.BAD_CREDENTIALS,
        )
    return name
