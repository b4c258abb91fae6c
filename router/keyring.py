"""Who may call, and on what terms: bearer tokens by their hashes, tenants with their groups and quotas. Pure values.

    token   octavo_KEYID_SECRET: 8 and 64 hexadecimal digits

A token has 256 random bits, so one SHA-256 of it is as good as a slow hash: there is nothing to guess. The text form
(`parse`, `to_text`) is JSON, written by `octavo keys` and by nobody else. Knows no files and no gRPC.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from octavo.names import Reason

from workers.errors import ConfigError, UnauthenticatedError

VERSION: Final = 1
MAX_NAME_BYTES: Final = 128
END_OF_TIME: Final = 253_402_300_800.0
"""The year 10000, which no date has."""
T = TypeVar("T")
_TOKEN: Final = re.compile(r"octavo_([0-9a-f]{8})_[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One token of a tenant. Times are seconds since 1970; None: never."""

    key_id: str
    tenant: str
    digest: str
    """SHA-256 of the whole token, hexadecimal."""
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def is_valid(self, now: float) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for a tenant, whichever way it proves who it is."""

    group: str = ""
    """Tenants of one group share cached prefixes, and so can find out which of them were asked for. Empty: shares with
    nobody."""
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    """Prompt tokens and generated ones."""


DEFAULT_TERMS: Final = Terms()


@dataclass(frozen=True, slots=True)
class Keyring:
    """`keys` by their ids, `tenants` by their names. Never changed: a new one takes its place."""

    keys: Mapping[str, Key] = field(default_factory=dict)
    tenants: Mapping[str, Terms] = field(default_factory=dict)

    def terms(self, tenant: str) -> Terms:
        return self.tenants.get(tenant, DEFAULT_TERMS)

    def authenticate(self, token: str, now: float) -> Key:
        """Return the key of `token`. Raises UnauthenticatedError: unknown, revoked or expired."""
        match = _TOKEN.fullmatch(token)
        key = self.keys.get(match[1]) if match else None
        if key is None or not hmac.compare_digest(_digest(token), key.digest):
            raise UnauthenticatedError(
                "authorization: the bearer token must be a key of this cluster", reason=Reason.BAD_CREDENTIALS
            )
        return self.check(key.key_id, now)

    def check(self, key_id: str, now: float) -> Key:
        """Return the key that was authenticated before, if it holds still. Raises UnauthenticatedError."""
        key = self.keys.get(key_id)
        if key is None or key.revoked_at is not None:
            raise UnauthenticatedError(f"authorization: the key {key_id} was revoked", reason=Reason.KEY_REVOKED)
        if not key.is_valid(now):
            raise UnauthenticatedError(f"authorization: the key {key_id} has expired", reason=Reason.KEY_EXPIRED)
        return key

    def with_key(self, tenant: str, now: float, *, expires_at: float | None = None) -> tuple[Keyring, Key, str]:
        """Return a keyring with a new key of `tenant`, the key, and its token, which is nowhere else. Raises
        ConfigError for what is no tenant's name and for what is no time."""
        check_name("tenant", tenant)
        key_id = secrets.token_hex(4)
        while key_id in self.keys:
            key_id = secrets.token_hex(4)
        token = f"octavo_{key_id}_{secrets.token_hex(32)}"
        key = Key(key_id=key_id, tenant=tenant, digest=_digest(token), created_at=now, expires_at=expires_at)
        _check_times(key)
        return Keyring({**self.keys, key_id: key}, self.tenants), key, token

    def without(self, key_id: str, now: float) -> Keyring:
        """Return a keyring in which the key is revoked. Raises ConfigError if there is none."""
        key = self.keys.get(key_id)
        if key is None:
            raise ConfigError(f"the key must be one of {', '.join(self.keys) or 'none'}, is {key_id!r}")
        revoked = dataclasses.replace(key, revoked_at=key.revoked_at or now)
        return Keyring({**self.keys, key_id: revoked}, self.tenants)

    def with_terms(self, tenant: str, terms: Terms) -> Keyring:
        """Return a keyring with these terms of `tenant`. Raises ConfigError."""
        check_name("tenant", tenant)
        _check_terms(tenant, terms)
        return Keyring(self.keys, {**self.tenants, tenant: terms})

    def to_text(self) -> str:
        tree = {
            "version": VERSION,
            "tenants": {name: _without_defaults(terms) for name, terms in sorted(self.tenants.items())},
            "keys": [_without_defaults(key) for key in self.keys.values()],
        }
        return json.dumps(tree, indent=1) + "\n"


def parse(text: str) -> Keyring:
    """Return the keyring that `Keyring.to_text` wrote. Raises ConfigError with the rule and the value."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the keys are not JSON: {error}") from error
    if not isinstance(tree, dict) or tree.get("version") != VERSION:
        raise ConfigError(f"the keys must be an object of version {VERSION}, as `octavo keys` writes it")
    tenants, keys = tree.get("tenants", {}), tree.get("keys", [])
    if not isinstance(tenants, dict) or not isinstance(keys, list):
        raise ConfigError("tenants must be an object and keys a list")
    terms = {name: _terms(name, fields) for name, fields in tenants.items()}
    known = [_key(fields) for fields in keys]
    if len({key.key_id for key in known}) != len(known):
        raise ConfigError("keys must have different key_id")
    return Keyring({key.key_id: key for key in known}, terms)


def check_name(what: str, name: str) -> None:
    """Raises ConfigError unless `name` can be a tenant's or a group's."""
    if not (0 < len(name) <= MAX_NAME_BYTES and name.isascii() and name.isprintable()):
        raise ConfigError(f"{what} must have 1 to {MAX_NAME_BYTES} printable ASCII characters, is {name[:200]!r}")


def _terms(name: str, fields: object) -> Terms:
    check_name("tenant", name)
    terms = _built(Terms, fields, f"tenants[{name}]")
    _check_terms(name, terms)
    return terms


def _check_terms(name: str, terms: Terms) -> None:
    if not isinstance(terms.group, str):
        raise ConfigError(f"tenants[{name}].group must be a name, is {terms.group!r}")
    if terms.group:
        check_name(f"tenants[{name}].group", terms.group)
    for quota in ("requests_per_minute", "tokens_per_minute"):
        if not (_is_number(value := getattr(terms, quota)) and value > 0):
            raise ConfigError(f"tenants[{name}].{quota} must be > 0, is {value!r}")


def _key(fields: object) -> Key:
    key = _built(Key, fields, "a key")
    if not (isinstance(key.key_id, str) and re.fullmatch(r"[0-9a-f]{8}", key.key_id)):
        raise ConfigError(f"key_id must have 8 hexadecimal digits, is {key.key_id!r}")
    if not isinstance(key.tenant, str):
        raise ConfigError(f"the tenant of key {key.key_id} must be a name, is {key.tenant!r}")
    check_name(f"the tenant of key {key.key_id}", key.tenant)
    if not (isinstance(key.digest, str) and re.fullmatch(r"[0-9a-f]{64}", key.digest)):
        raise ConfigError(f"the digest of key {key.key_id} must have 64 hexadecimal digits")
    _check_times(key)
    return key


def _check_times(key: Key) -> None:
    for name in ("created_at", "expires_at", "revoked_at"):
        value = getattr(key, name)
        is_time = _is_number(value) and 0 <= value < END_OF_TIME
        if not (is_time or (value is None and name != "created_at")):
            raise ConfigError(
                f"{name} of key {key.key_id} must be in seconds since 1970 and before the year 10000, is {value!r}"
            )


def _built(kind: type[T], fields: object, what: str) -> T:
    if not isinstance(fields, dict):
        raise ConfigError(f"{what} must be an object, is {fields!r}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"{what} must have the fields of {kind.__name__}: {error}") from error


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:  # of an integer that no float holds
        return False


def _without_defaults(value: Key | Terms) -> dict[str, Any]:
    fields = dataclasses.fields(value)
    return {each.name: getattr(value, each.name) for each in fields if getattr(value, each.name) != each.default}


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
