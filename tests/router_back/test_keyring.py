"""The key file: what is written can be read, what is broken is refused with its rule, several writers lose nothing."""

from __future__ import annotations

import json
import math
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from octavo.names import Reason

from router import key_file
from router.keyring import Keyring, Terms, parse
from workers.errors import ConfigError, UnauthenticatedError

NOW = 1_000.0


def test_a_token_is_known_by_its_hash_alone() -> None:
    keyring, key, token = Keyring().with_key("acme", NOW)
    assert keyring.authenticate(token, NOW) == key
    assert token not in keyring.to_text()
    other = Keyring().with_key("acme", NOW)[2]
    for wrong in (other, token[:-1], token.upper(), token[:16] + other[16:], "", "octavo__"):
        with pytest.raises(UnauthenticatedError) as caught:
            keyring.authenticate(wrong, NOW)
        assert caught.value.reason == Reason.BAD_CREDENTIALS


def test_expiry_and_revocation() -> None:
    keyring, key, token = Keyring().with_key("acme", NOW, expires_at=NOW + 5)
    keyring.authenticate(token, NOW + 4.9)
    with pytest.raises(UnauthenticatedError) as caught:
        keyring.authenticate(token, NOW + 5)
    assert caught.value.reason == Reason.KEY_EXPIRED
    with pytest.raises(UnauthenticatedError) as caught:
        keyring.without(key.key_id, NOW).check(key.key_id, NOW)
    assert caught.value.reason == Reason.KEY_REVOKED
    with pytest.raises(UnauthenticatedError):
        Keyring().check(key.key_id, NOW)
    with pytest.raises(ConfigError, match="must be one of"):
        keyring.without("ffffffff", NOW)


@pytest.mark.parametrize("expires_at", [math.nan, math.inf, 1e12])
def test_a_key_that_could_not_be_read_is_not_written(expires_at: float, tmp_path: Path) -> None:
    """`octavo keys create --days nan` wrote a file that nobody could read any more, nor any key in it be revoked."""
    path = tmp_path / "keys.json"
    with pytest.raises(ConfigError, match="before the year 10000"):
        key_file.change(path, lambda keyring: keyring.with_key("a", NOW, expires_at=expires_at)[0])
    assert not path.exists()


def test_what_is_written_can_be_read() -> None:
    keyring, key, _ = Keyring().with_key("acme", NOW, expires_at=NOW + 5)
    keyring, _, _ = keyring.without(key.key_id, NOW + 1).with_key("other tenant", NOW)
    keyring = keyring.with_terms("acme", Terms(group="g", requests_per_minute=5))
    assert parse(keyring.to_text()) == keyring
    assert keyring.terms("acme").tokens_per_minute == math.inf
    assert keyring.terms("unknown") == Terms()


KEY = {"key_id": "00000000", "tenant": "a", "digest": "0" * 64, "created_at": 0}


@pytest.mark.parametrize(
    ("tree", "rule"),
    [
        ([], "version 1"),
        ({"version": 2}, "version 1"),
        ({"version": 1, "keys": {}}, "keys a list"),
        ({"version": 1, "keys": [{**KEY, "key_id": "x"}]}, "8 hexadecimal"),
        ({"version": 1, "keys": [{**KEY, "digest": "x"}]}, "64 hexadecimal"),
        ({"version": 1, "keys": [{**KEY, "tenant": 5}]}, "must be a name"),
        ({"version": 1, "keys": [{**KEY, "tenant": "a\n"}]}, "printable"),
        ({"version": 1, "keys": [{**KEY, "created_at": "x"}]}, "created_at"),
        ({"version": 1, "keys": [{**KEY, "expires_at": True}]}, "expires_at"),
        ({"version": 1, "keys": [{**KEY, "expires_at": math.inf}]}, "expires_at"),
        ({"version": 1, "keys": [{**KEY, "revoked_at": -1}]}, "revoked_at"),
        ({"version": 1, "keys": [{**KEY, "colour": 1}]}, "colour"),
        ({"version": 1, "keys": [5]}, "an object"),
        ({"version": 1, "keys": [KEY, KEY]}, "different key_id"),
        ({"version": 1, "tenants": {"": {}}}, "1 to 128"),
        ({"version": 1, "tenants": {"a": {"group": 5}}}, "group"),
        ({"version": 1, "tenants": {"a": {"group": "é"}}}, "group"),
        ({"version": 1, "tenants": {"a": {"requests_per_minute": 0}}}, "> 0"),
        ({"version": 1, "tenants": {"a": {"tokens_per_minute": "x"}}}, "> 0"),
        ({"version": 1, "tenants": {"a": {"tokens_per_minute": math.nan}}}, "> 0"),
    ],
)
def test_what_is_no_keyring_is_refused_with_its_rule(tree: Any, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=rule) as caught:
        key_file.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_text_of_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        key_file.read(path)


def test_several_writers_lose_no_key_and_others_may_not_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: key_file.change(path, lambda keyring: keyring.with_key(f"t{n}", NOW)[0]), range(40)))
    assert {key.tenant for key in key_file.read(path).keys.values()} == {f"t{n}" for n in range(40)}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {each.name for each in path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_an_edit_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key_file.change(path, lambda keyring: keyring.with_key("a", NOW)[0])
    before = path.read_bytes()
    with pytest.raises(ConfigError):
        key_file.change(path, lambda keyring: keyring.without("ffffffff", NOW))
    assert path.read_bytes() == before


async def test_a_router_reads_a_changed_file_again_and_keeps_what_it_has_of_a_broken_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(ConfigError, match="cannot read"):
        key_file.KeyFile(path)
    key_file.change(path, lambda keyring: keyring.with_key("a", NOW)[0])
    file = key_file.KeyFile(path)
    first = file.keyring
    assert not file.refresh()
    for broken in (lambda: path.write_text("{"), path.unlink):
        broken()
        assert not file.refresh()
        assert not file.refresh()
        assert file.keyring is first
    assert len(caplog.records) == 2, "each complaint once"
    key_file.change(path, lambda keyring: keyring.with_key("b", NOW)[0])
    assert file.refresh()
    assert [key.tenant for key in file.keyring.keys.values()] == ["b"]
