"""What a rig needs to be trusted: an authority, a certificate of it for 127.0.0.1, and a file with one tenant's key.

    with RigTrust() as trust, RouterRig(RigConfig(router=trust.router, is_encrypted=True)) as rig:
        Client(rig.address, credentials=trust.credentials(), options=ClientOptions(metadata=trust.metadata))

Made on the spot in a folder of its own, which is gone when it is left. The authority's key is never written.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc

from load_tests.rigs.certificates import Authority
from router import key_file
from router.keyring import Keyring

TENANT: Final = "rig"


class RigTrust:
    """Made when entered."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="octavo-rig-")
        self.ca_file = ""
        """The authority, in PEM: whom clients trust."""
        self.token = ""
        """The tenant's bearer token."""
        self.router: dict[str, str] = {}
        """Fields of RouterConfig: TLS, and calls need a key."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a client sends with every call."""
        return (("authorization", f"Bearer {self.token}"),)

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(Path(self.ca_file).read_bytes())

    def __enter__(self) -> Self:
        folder = Path(self._folder.name)
        authority = Authority()
        certificate, key = authority.server().write(folder, "router")
        ca, keys = folder / "ca.crt", folder / "keys.json"
        ca.write_bytes(authority.certificate)
        key_file.change(keys, self._with_key)
        self.ca_file = str(ca)
        self.router = {"tls_cert_file": certificate, "tls_key_file": key, "keys_file": str(keys)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def _with_key(self, keyring: Keyring) -> Keyring:
        keyring, _, self.token = keyring.with_key(TENANT, time.time())
        return keyring
