"""TLS between routers and replicas without anybody's certificates: an authority that follows from the cluster's secret.

Every process of a cluster derives the same authority's key, signs a certificate for a key of its own, and trusts nobody
who has none of that authority. So both ends are sure of each other before a byte of the protocol is read; the proof in
Hello comes on top, and says which router it is.

Elliptic curve P-256; the private number is 48 bytes of HMAC-SHA256 under the seed, reduced into the order of the
curve: a bias below 2^-128 (FIPS 186-5, A.2.1). The authority's certificate is made anew by everyone: only its name and
key count.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PEER_NAME: Final = "peer.octavo.internal"
"""In every certificate, whatever the address: who has one is of this cluster."""
CHANNEL_OPTION: Final = ("grpc.ssl_target_name_override", PEER_NAME)
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_AUTHORITY: Final = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "octavo cluster")])
_PEER: Final = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, PEER_NAME)])
_SKEW: Final = datetime.timedelta(days=1)
_LIFE: Final = datetime.timedelta(days=10 * 365)
"""The key of a certificate ends with its process."""


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """In PEM: the authority, and a certificate of it with its key."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def peer_certificate(seed: bytes) -> PeerCertificate:
    """Return a new certificate for this process; `seed` is `ClusterKeys.data_plane_tls`. Takes some milliseconds."""
    wide = b"".join(hmac.digest(seed, bytes([part]), hashlib.sha256) for part in range(2))[:48]
    signer = ec.derive_private_key(int.from_bytes(wide, "big") % (_ORDER - 1) + 1, ec.SECP256R1())
    own = ec.generate_private_key(ec.SECP256R1())
    authority = _signed(_AUTHORITY, signer, signer, x509.BasicConstraints(ca=True, path_length=0))
    certificate = _signed(_PEER, own, signer, x509.SubjectAlternativeName([x509.DNSName(PEER_NAME)]))
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return PeerCertificate(authority, certificate, key)


def server_credentials(seed: bytes) -> grpc.ServerCredentials:
    """Return what a replica's port shows, and what it wants to see of routers."""
    own = peer_certificate(seed)
    return grpc.ssl_server_credentials([(own.key, own.certificate)], own.authority, require_client_auth=True)


def channel_credentials(seed: bytes) -> grpc.ChannelCredentials:
    """Return what a router shows replicas. The channel needs `CHANNEL_OPTION`, too."""
    own = peer_certificate(seed)
    return grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)


def _signed(
    subject: x509.Name,
    owner: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_AUTHORITY)
        .public_key(owner.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFE)
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    )
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
