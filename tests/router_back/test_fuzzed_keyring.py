"""Keyrings that `octavo keys` never wrote: a ConfigError, or one that can be used."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.keyring import Keyring, Terms, parse
from router.quotas import Quotas
from workers.errors import ConfigError, OctavoError

quick = settings(max_examples=250, deadline=None)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, -(10**400), 2**63, 10**4_200]),
)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def whole() -> tuple[Any, str]:
    """Return the tree of a keyring with two keys, and the token of one."""
    ring, _, token = Keyring().with_key("a", 1.0, expires_at=9e10)
    ring, key, _ = ring.with_key("b", 2.0)
    ring = ring.without(key.key_id, 3.0).with_terms("a", Terms(group="g", requests_per_minute=5.0))
    return json.loads(ring.to_text()), token


def use(text: str, token: str) -> None:
    """Do with a keyring what a router does with it, if it is one."""
    with contextlib.suppress(ConfigError):
        ring = parse(text)
        now = time.time()
        for tenant in ("a", "b"):
            with contextlib.suppress(OctavoError):
                Quotas().charge(tenant, ring.terms(tenant), 10, 1.0)
        with contextlib.suppress(OctavoError):
            ring.authenticate(token, now)
        assert parse(ring.to_text()) == ring


@quick
@given(
    part=st.sampled_from(["keys", "tenants", "key", "terms", "all"]),
    name=st.sampled_from(["created_at", "expires_at", "revoked_at", "key_id", "tenant", "digest", "another"]),
    quota=st.sampled_from(["group", "requests_per_minute", "tokens_per_minute", "another"]),
    value=anything,
)
def test_keyrings_of_any_value(part: str, name: str, quota: str, value: object) -> None:
    tree, token = whole()
    match part:
        case "key":
            tree["keys"][0][name] = value
        case "terms":
            tree["tenants"]["a"][quota] = value
        case "all":
            tree = value
        case _:
            tree[part] = value
    use(json.dumps(tree), token)


@quick
@given(at=st.floats(0, 1), piece=st.text(max_size=3), num_dropped=st.integers(0, 5))
def test_keyrings_with_other_characters(at: float, piece: str, num_dropped: int) -> None:
    tree, token = whole()
    text = json.dumps(tree)
    place = int(at * len(text))
    use(text[:place] + piece + text[place + num_dropped :], token)


@pytest.mark.parametrize("name", ["created_at", "expires_at"])
def test_a_time_that_no_float_holds(name: str) -> None:
    """An integer of 400 digits was an OverflowError."""
    tree, _ = whole()
    tree["keys"][0][name] = 10**400
    with pytest.raises(ConfigError, match=f"{name} of key .* must be in seconds since 1970"):
        parse(json.dumps(tree))
