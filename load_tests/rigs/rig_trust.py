"""What a rig needs to be trusted: an authority, a certificate of it for 127.0.0.1, and a file with one tenant's key.

    with RigTrust() as trust, RouterRig(RigConfig(router=trust.router, is_encrypted=True)) as rig:
        Client(rig.address, credentials=trust.credentials(), options=ClientOptions(metadata=trust.metadata))

Made on the spot in a folder of its own, which is gone when it is left. The authority's key is never written.
"""

from __future__ import annotations

import datetime
import ipaddress
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from router import key_file
from router.keyring import Keyring

TENANT: Final = "rig"
_DAY: Final = datetime.timedelta(days=1)


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
        names = {"ca_file": "ca.crt", "cert_file": "router.crt", "key_file": "router.key", "keys_file": "keys.json"}
        paths = {name: folder / file for name, file in names.items()}
        authority, certificate, key = make_certificates()
        paths["ca_file"].write_bytes(authority)
        paths["cert_file"].write_bytes(certificate)
        paths["key_file"].write_bytes(key)
        key_file.change(paths["keys_file"], self._with_key)
        self.ca_file = str(paths["ca_file"])
        self.router = {
            "tls_cert_file": str(paths["cert_file"]),
            "tls_key_file": str(paths["key_file"]),
            "keys_file": str(paths["keys_file"]),
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def _with_key(self, keyring: Keyring) -> Keyring:
        keyring, _, self.token = keyring.with_key(TENANT, time.time())
        return keyring


def make_certificates() -> tuple[bytes, bytes, bytes]:
    """Return, in PEM, an authority's certificate, one that it signed for 127.0.0.1, and that one's key."""
    signer, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer, subject = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("rig", "router"))
    authority = (
        _builder(issuer, issuer, signer)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(signer, hashes.SHA256())
    )
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        _builder(subject, issuer, own)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem = serialization.Encoding.PEM
    return authority.public_bytes(pem), certificate.public_bytes(pem), key


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
    )
