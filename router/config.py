"""How a router is set up; `cluster` fills it from TOML and environment and checks it with `check`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from workers.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    max_queued_tokens: int = 262_144
    """Prompt tokens that may wait for replicas of one model; more is refused with RESOURCE_EXHAUSTED."""
    max_queued_requests: int = 4_096
    """Requests that may wait for replicas of one model, each counted once for every choice that is generated for it."""
    max_batch_tokens: int = 8_192
    """Prompt tokens of requests that go to one replica together."""
    max_batch_requests: int = 64
    """Of those that go together."""
    max_batch_wait_s: float = 0.004
    """After a lack of credit a batch goes when it is full, or when its oldest request has waited for so long."""
    batching: bool = True
    """False: first come, first served, one by one, whatever the priority, tenant and beginning, and no deadline is
    foreseen: for comparison."""
    tenant_header: str = ""
    """The metadata key of Generate and Session calls that says who pays. Empty: everybody is one tenant. Whoever can
    reach the port can write it: name one only if a trusted proxy in front sets it and removes what clients wrote."""
    keys_file: str = ""
    """The file that `octavo keys` writes, at the same place on every node with a router: calls without a certificate
    need one of its bearer tokens, and it says which tenants form a group and what their quotas are. Read again when it
    changes. Empty: no tokens."""
    tls_cert_file: str = ""
    """The router's certificate chain in PEM, at the same place on every node with a router. Empty: no TLS."""
    tls_key_file: str = ""
    """The certificate's private key in PEM."""
    tls_client_ca_file: str = ""
    """Certificates in PEM of who may sign clients' certificates, which every client must have then; the one subject
    alternative name of a client's is its tenant. Empty: clients need none."""
    health_port: int = 0
    """Where routers answer `grpc.health.v1` without TLS, and nothing else, beside the public port: for Kubernetes'
    probes, which speak none. On serve.host. Routers of one node share it. 0: none."""
    decision_log: str = ""
    """A file to which every placement decision goes as a line of JSON (router/decision_log.py says what is in it), with
    PATH.1 at most 128 MiB. Routers of one node may share it. Empty: none."""
    default_max_tokens: int = 256
    """For requests that name none; never more than the context leaves."""
    default_timeout_s: float = 600.0
    """For requests that bring no deadline."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Of one gRPC message, either way."""
    max_choices: int = 16
    """Of one request: `n`, and `best_of`."""
    max_stop_strings: int = 16
    """Of one request."""
    max_stop_bytes: int = 256
    """Of one stop string, in UTF-8."""
    max_session_requests: int = 4_096
    """Live requests of one Session."""
    session_grace_s: float = 30.0
    """How long requests outlive their broken Session."""
    slow_consumer_s: float = 30.0
    """A request whose answer nobody takes for this long is cancelled."""
    drain_grace_s: float = 30.0
    """How long running requests may go on after SIGTERM."""
    no_replica_wait_s: float = 30.0
    """How long a request waits while no replica is ready."""
    keepalive_s: float = 30.0
    """How often a quiet connection is asked whether its other end is there."""
    max_connection_age_s: float = 1800.0
    """After about so long clients are told to connect anew, so that they spread over routers that have come since; what
    runs on the old connection goes on."""
    max_concurrent_calls: int = 4_096
    """Calls at once on one connection; clients let more of them wait."""
    max_metadata_bytes: int = 16_384
    """Of a call's metadata."""

    @property
    def has_proofs(self) -> bool:
        """Whether clients must prove who they are."""
        return bool(self.keys_file or self.tls_client_ca_file)

    @property
    def is_private(self) -> bool:
        """Whether anybody may reach the port: what goes over it is encrypted, and clients prove who they are."""
        return bool(self.tls_cert_file) and self.has_proofs

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        _check_header(self.tenant_header)
        _check_trust(self)
        if not 0 <= self.health_port <= 65535:
            raise ConfigError(f"router.health_port must be in [0, 65535], is {self.health_port!r}")
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, bool | str) and not value > 0 and name != "health_port":
                raise ConfigError(f"router.{name} must be > 0, is {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverConfig:
    """What is told of requests that have ended."""

    max_kept_requests: int = 2_048
    """So many are remembered, for `octavo trace`."""
    max_tenants: int = 50
    """So many tenants have series of their own in metrics."""
    logs_requests: bool = False
    """A line for each of them."""
    logs_prompts: bool = False
    """The texts of prompts and answers in that line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSetup:
    """What a router's process is given of the configuration."""

    config: RouterConfig
    observer: ObserverConfig
    listen: tuple[str, int]
    """The public host and port; 0: any."""


def _check_trust(config: RouterConfig) -> None:
    if bool(config.tls_cert_file) != bool(config.tls_key_file):
        raise ConfigError("router.tls_cert_file and router.tls_key_file must be given together")
    if config.tls_client_ca_file and not config.tls_cert_file:
        raise ConfigError("router.tls_client_ca_file needs router.tls_cert_file and router.tls_key_file")
    if config.tenant_header and config.has_proofs:
        raise ConfigError(
            f"router.tenant_header must be empty where tenants prove who they are (router.keys_file, "
            f"router.tls_client_ca_file), is {config.tenant_header!r}"
        )


def _check_header(key: str) -> None:
    is_key = re.fullmatch(r"[a-z0-9_.-]{1,64}", key) is not None
    if key and (not is_key or key.endswith("-bin") or key.startswith(("grpc-", ":"))):
        raise ConfigError(
            f"router.tenant_header must be empty or a metadata key of at most 64 characters [a-z0-9_.-] that neither "
            f"begins with grpc- nor ends with -bin, is {key!r}"
        )
