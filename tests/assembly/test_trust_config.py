"""Keys and credentials on the command line, and what a configuration of trust allows."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.boot import forwarded
from cluster.cli import app
from cluster.cli_dial import dial
from cluster.config import from_tree, load
from cluster.lifecycle import check_trust
from router import key_file
from router.config import RouterConfig
from workers.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def keys(*arguments: str) -> str:
    """Run `octavo keys` and return what it prints."""
    result = CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_made_listed_and_revoked(path: Path) -> None:
    token = keys("create", "acme", "--days", "1", "--file", str(path)).strip()
    key = key_file.read(path).authenticate(token, time.time())
    assert key.tenant == "acme"
    assert key.expires_at == pytest.approx(time.time() + 24 * 3600, abs=60)
    keys("limit", "acme", "--tokens-per-minute", "1000", "--group", "g", "--file", str(path))
    keys("limit", "acme", "--requests-per-minute", "5", "--file", str(path))
    shown = json.loads(keys("list", "--json", "--file", str(path)))
    assert (shown["key_id"], shown["group"], shown["is_valid"]) == (key.key_id, "g", True)
    assert (shown["tokens_per_minute"], shown["requests_per_minute"]) == (1000, 5)
    assert "digest" not in shown
    assert "1000 tokens per minute" in keys("list", "--file", str(path))
    keys("limit", "acme", "--tokens-per-minute", "0", "--file", str(path))
    keys("revoke", key.key_id, "--file", str(path))
    assert "revoked" in keys("list", "--file", str(path))
    assert json.loads(keys("list", "--json", "--file", str(path)))["tokens_per_minute"] is None


def test_without_a_file_it_is_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--file"):
        keys("create", "acme")
    monkeypatch.setenv("OCTAVO_ROUTER__KEYS_FILE", str(path))
    assert keys("create", "acme").startswith("octavo_")
    with pytest.raises(ConfigError, match="printable"):
        keys("create", "a\nb")


def test_beyond_loopback_takes_tls_and_proofs() -> None:
    public = {"host": "0.0.0.0"}
    tls = {"tls_cert_file": "c", "tls_key_file": "k"}
    for router in ({}, tls, {"keys_file": "keys"}):
        with pytest.raises(ConfigError, match="--insecure"):
            from_tree({"serve": public, "router": router})
    from_tree({"serve": public, "router": {**tls, "keys_file": "keys"}})
    from_tree({"serve": public, "router": {**tls, "tls_client_ca_file": "ca"}})
    from_tree({"serve": {**public, "insecure": True}})


def test_files_that_routers_could_not_read_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        check_trust(RouterConfig(keys_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="cannot read"):
        check_trust(RouterConfig(tls_cert_file=str(tmp_path / "none"), tls_key_file=str(tmp_path / "none")))
    check_trust(RouterConfig())


def test_credentials_are_no_configuration_and_go_to_no_replica(path: Path) -> None:
    own = {"OCTAVO_TOKEN": "t", "OCTAVO_CA_FILE": "a", "OCTAVO_CERT_FILE": "c", "OCTAVO_KEY_FILE": "k"}
    own |= {"OCTAVO_VICTIM_TOKEN": "v", "OCTAVO_ATTACKER_TOKEN": "a"}
    load(None, own, {})
    assert not own.keys() & forwarded({**own, "OCTAVO_CACHE_DIR": "d"}).keys()


async def test_what_cannot_be_a_credential_is_refused_and_not_repeated(tmp_path: Path) -> None:
    for token in ("geheim\u00e9", "geheim\u200b", "geheim\x00"):
        with pytest.raises(ConfigError, match="must be a token") as caught:
            dial("127.0.0.1:1", environ={"OCTAVO_TOKEN": token})
        assert "geheim" not in str(caught.value)
        assert caught.value.__suppress_context__
    for environ in (
        {"OCTAVO_CA_FILE": str(tmp_path / "none")},
        {"OCTAVO_CERT_FILE": str(tmp_path)},
        {"OCTAVO_CERT_FILE": __file__, "OCTAVO_KEY_FILE": __file__},
        {"OCTAVO_CA_FILE": __file__, "OCTAVO_KEY_FILE": __file__},
    ):
        with pytest.raises(ConfigError, match="OCTAVO_"):
            dial("127.0.0.1:1", environ=environ)
