"""The cluster's one secret: 32 bytes that are never sent and never stand in an argument.

From the file that OCTAVO_SECRET_FILE names on every node, which a Ray of our own makes for itself; else made once and
kept in the detached actor ``octavo-secret`` (namespace ``octavo``), so that every later build of the application gets
the same one. What travels is a `SecretSource`: the name of the place, not the secret.
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from workers.errors import ConfigError
from workers.handshake import SECRET_BYTES

SECRET_FILE = "OCTAVO_SECRET_FILE"
ACTOR = "octavo-secret"
NAMESPACE = "octavo"
ON_HEAD = {"node:__internal_head__": 0.001}
"""What only the head node has, as Serve's controller asks for it: other nodes may be taken away when they are idle, and
with one the secret would be gone."""
_PATIENCE_S = 30.0


class SecretKeeper:
    """The actor's class: makes a secret when it starts and tells it to whoever may call it."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(SECRET_BYTES)

    def secret(self) -> bytes:
        return self._secret


@dataclass(frozen=True, slots=True)
class SecretSource:
    """Where a process of this cluster finds the secret. Picklable; calling it blocks, so call it off the event loop."""

    actor: str = ACTOR
    namespace: str = NAMESPACE

    def __call__(self) -> bytes:
        """Return the secret. Raises ConfigError when the file is no secret or the actor is gone."""
        if path := os.environ.get(SECRET_FILE):
            return read_secret(Path(path))
        import ray

        try:
            keeper = ray.get_actor(self.actor, namespace=self.namespace)
            secret: bytes = ray.get(keeper.secret.remote(), timeout=_PATIENCE_S)
        except (ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(
                f"the actor {self.actor} with the cluster's secret does not answer ({error}); start the cluster anew,"
                f" or set {SECRET_FILE} on every node"
            ) from error
        return secret


def ensure_secret() -> SecretSource:
    """Return the source of this cluster's secret; makes the actor unless a file or an earlier build did.

    Ray must be connected; nobody waits for the actor here, for its process starts beside the replicas'. Raises
    ConfigError.
    """
    if path := os.environ.get(SECRET_FILE):
        read_secret(Path(path))
        return SecretSource()
    import ray

    ray.remote(SecretKeeper).options(
        name=ACTOR, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, resources=ON_HEAD
    ).remote()
    return SecretSource()


def write_secret(path: Path) -> None:
    """Make a secret of its own for a file, readable for its owner alone; one that is there is replaced."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(SECRET_BYTES))


def read_secret(path: Path) -> bytes:
    """Return the 32 bytes of a file that has them as they are or as 64 hexadecimal digits. Raises ConfigError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the secret {path} ({SECRET_FILE}): {error.strerror}") from error
    if len(content) == SECRET_BYTES:
        return content
    digits = content.strip()
    if re.fullmatch(rb"[0-9a-fA-F]{64}", digits):
        return bytes.fromhex(digits.decode())
    raise ConfigError(
        f"{SECRET_FILE} must name a file of {SECRET_BYTES} bytes or {2 * SECRET_BYTES} hexadecimal digits;"
        f" {path} has {len(content)} bytes"
    )
