"""How commands reach a router: a `Client` with what the environment says of trust.

    OCTAVO_TOKEN       a bearer token, as `octavo keys create` prints it
    OCTAVO_CA_FILE     certificates in PEM of who may sign the router's: TLS is spoken
    OCTAVO_CERT_FILE   the client's own certificate chain in PEM, and
    OCTAVO_KEY_FILE    its private key

A token is sent as it is: without TLS whoever sees the network can use it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
from octavo.client import Client, ClientOptions
from octavo.names import Metadata

from workers.errors import ConfigError

TOKEN, CA_FILE, CERT_FILE, KEY_FILE = "OCTAVO_TOKEN", "OCTAVO_CA_FILE", "OCTAVO_CERT_FILE", "OCTAVO_KEY_FILE"


def dial(
    targets: str | Sequence[str], *, options: ClientOptions | None = None, environ: Mapping[str, str] | None = None
) -> Client:
    """Raises ConfigError for files that cannot be read, or a certificate without its key."""
    environ = os.environ if environ is None else environ
    options = options or ClientOptions()
    if token := environ.get(TOKEN, "").strip():
        pairs = (*options.metadata, (Metadata.AUTHORIZATION, f"Bearer {token}"))
        options = dataclasses.replace(options, metadata=pairs)
        try:
            options.check()
        except ValueError:  # which has the token in it, in one way of writing it or another
            raise ConfigError(f"{TOKEN} must be a token, as `octavo keys create` prints it") from None
    return Client(targets, credentials=_credentials(environ), options=options)


def _credentials(environ: Mapping[str, str]) -> grpc.ChannelCredentials | None:
    authority, certificate, key = (_content(environ, name) for name in (CA_FILE, CERT_FILE, KEY_FILE))
    if (certificate is None) != (key is None):
        raise ConfigError(f"{CERT_FILE} and {KEY_FILE} must be given together")
    if authority is None:
        if certificate is not None:
            raise ConfigError(f"{CERT_FILE} needs {CA_FILE}")
        return None
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _content(environ: Mapping[str, str], name: str) -> bytes | None:
    path = environ.get(name, "")
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({name}): {error.strerror}") from error
