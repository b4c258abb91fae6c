"""The certificates of the public port, read from files again whenever a connection finds them changed.

Certificates are renewed while a router runs: no restart. A pair that cannot be read, or whose key is not the
certificate's, is told in the log, and the last good one stays.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from router.config import RouterConfig
from workers.errors import ConfigError

_log = logging.getLogger(__name__)


class _Files(NamedTuple):
    """What the files have: certificate chain, key, and the clients' authorities or nothing."""

    certificates: bytes
    key: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificates)], self.client_ca)


def server_credentials(config: RouterConfig) -> grpc.ServerCredentials | None:
    """Return what the public port proves itself with; None without TLS. Raises ConfigError."""
    if not config.tls_cert_file:
        return None
    source = CertificateSource(config)
    return grpc.dynamic_ssl_server_credentials(
        source.current(),
        source.changed,  # type: ignore[arg-type]  # None is "as before", which the stubs do not know
        require_client_authentication=bool(config.tls_client_ca_file),
    )


class CertificateSource:
    """`changed` is called by gRPC for each new connection, on a thread of its own."""

    def __init__(self, config: RouterConfig) -> None:
        self._paths = (config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file)
        self._stamps = self._look()
        self._files = self._read()

    def current(self) -> grpc.ServerCertificateConfiguration:
        return self._files.configuration()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new certificates; None if they are those of before. Raises nothing."""
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return None
            self._stamps = stamps
            files = self._read()
        except ConfigError as error:
            _log.warning("the certificates stay as they were: %s", error)
            return None
        if files == self._files:
            return None
        self._files = files
        _log.info("new certificates from %s", self._paths[0])
        return files.configuration()

    def _look(self) -> list[tuple[int, int, int]]:
        stamps = []
        for path in filter(None, self._paths):
            try:
                found = Path(path).stat()
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from error
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return stamps

    def _read(self) -> _Files:
        cert_path, key_path, ca_path = self._paths
        chain, key = _content(cert_path), _content(key_path)
        certificate = _certificates(chain, cert_path)[0]
        if _public_bytes(_private_key(key, key_path).public_key()) != _public_bytes(certificate.public_key()):
            raise ConfigError(f"router.tls_key_file {key_path} must have the key of {cert_path}, has another's")
        client_ca = None
        if ca_path:
            client_ca = _content(ca_path)
            _certificates(client_ca, ca_path)
        return _Files(chain, key, client_ca)


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _certificates(pem: bytes, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} must have certificates in PEM: {error}") from error


def _private_key(pem: bytes, path: str) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} must have a private key in PEM without a password: {error}") from error


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
