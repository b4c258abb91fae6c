"""vLLM's cache events in our names: chains, salts, copies, gaps."""

from __future__ import annotations

from typing import Any

import pytest

from workers.prefix import PrefixHasher
from workers.types import KvEvent, KvEventKind
from workers.vllm_engine import versions
from workers.vllm_engine.block_map import BlockMap
from workers.vllm_engine.cache_feed import CacheFeed

msgpack = pytest.importorskip("msgpack")
HASHER = PrefixHasher(b"key", 4)
PROMPT = list(range(12))
SALT = b"\x01\x02"


def ours(salt: bytes = b"", tokens: list[int] = PROMPT) -> list[bytes]:
    return HASHER.blocks(HASHER.root(salt), tokens)


def stored(*hashes: bytes) -> list[KvEvent]:
    return [KvEvent(KvEventKind.STORED, block) for block in hashes]


def removed(*hashes: bytes) -> list[KvEvent]:
    return [KvEvent(KvEventKind.REMOVED, block) for block in hashes]


def test_blocks_have_the_names_that_a_router_computes() -> None:
    blocks = BlockMap(HASHER)
    assert blocks.stored([b"A", b"B"], None, PROMPT[:8], SALT) == stored(*ours(SALT)[:2])
    assert blocks.stored([b"C"], b"B", PROMPT[8:], b"") == stored(ours(SALT)[2])
    assert blocks.num_blocks == 3


def test_tenants_blocks_differ() -> None:
    blocks = BlockMap(HASHER)
    assert blocks.stored([b"A"], None, PROMPT[:4], b"") != blocks.stored([b"B"], None, PROMPT[:4], SALT)


def test_what_follows_an_unknown_block_is_left_out() -> None:
    blocks = BlockMap(HASHER)
    assert blocks.stored([b"C"], b"B", PROMPT[8:], b"") == []
    assert blocks.stored([b"A"], None, PROMPT[:3], b"") == []
    assert blocks.removed([b"C"]) == []


def test_a_block_is_gone_with_its_last_copy() -> None:
    blocks = BlockMap(HASHER)
    (block,) = ours()[:1]
    assert blocks.stored([b"A"], None, PROMPT[:4], b"") == stored(block)
    assert blocks.stored([b"A"], None, PROMPT[:4], b"") == []
    assert blocks.removed([b"A"]) == []
    assert blocks.removed([b"A"]) == removed(block)
    assert blocks.removed([b"A"]) == []
    assert blocks.num_blocks == 0


def test_a_block_may_come_again_and_all_may_be_told_anew() -> None:
    blocks = BlockMap(HASHER)
    blocks.stored([b"A", b"B"], None, PROMPT[:8], b"")
    blocks.removed([b"A"])
    assert blocks.anew() == [KvEvent(KvEventKind.CLEARED), *stored(ours()[1])]
    assert blocks.stored([b"A"], None, PROMPT[:4], b"") == stored(ours()[0])
    assert blocks.cleared() == [KvEvent(KvEventKind.CLEARED)]
    assert blocks.anew() == [KvEvent(KvEventKind.CLEARED)]


# Messages as they come.


def message(*events: Any) -> bytes:
    packed: bytes = msgpack.packb([0.0, list(events), None])
    return packed


def block_stored(hashes: list[bytes], parent: bytes | None, tokens: list[int], **more: Any) -> dict[str, Any]:
    about = {"block_size": 4, "lora_id": None, "medium": "GPU", "lora_name": None}
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        **about,
        **more,
    }


def make_feed() -> CacheFeed:
    return CacheFeed("", HASHER, lambda events: None)


def test_messages_become_events() -> None:
    pytest.importorskip("msgspec")
    feed = make_feed()
    first = block_stored([b"A", b"B"], None, PROMPT[:8], extra_keys=[[SALT.hex()], None])
    assert feed.take(0, message(first)) == stored(*ours(SALT)[:2])
    gone = {"type": "BlockRemoved", "block_hashes": [b"B"], "medium": "GPU"}
    assert feed.take(1, message(gone, {"type": "AllBlocksCleared"})) == [
        *removed(ours(SALT)[1]),
        KvEvent(KvEventKind.CLEARED),
    ]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"locality": "LOCAL"},
        {"locality": None, "ownership": "OWNED"},
        {"ownership": None, "session_id": "s"},
        {"session_id": None, "lookahead_token_ids": [[1, 2]]},
    ],
    ids=["least", "0.26 to 0.28", "0.29", "0.30 to 0.32", "0.33"],
)
def test_what_a_release_says_besides_changes_nothing(more: dict[str, Any]) -> None:
    pytest.importorskip("msgspec")
    told = block_stored([b"A", b"B"], None, PROMPT[:8], extra_keys=[[SALT.hex()], None], group_idx=0, **more)
    assert make_feed().take(0, message(told)) == stored(*ours(SALT)[:2])


def test_a_gap_makes_all_uncertain() -> None:
    pytest.importorskip("msgspec")
    feed = make_feed()
    feed.take(0, message(block_stored([b"A"], None, PROMPT[:4])))
    events = feed.take(2, message(block_stored([b"C"], None, PROMPT[4:8])))
    assert events == [KvEvent(KvEventKind.CLEARED), *stored(*ours(tokens=PROMPT[4:8]))]


def test_other_groups_and_other_memory_are_left_out() -> None:
    pytest.importorskip("msgspec")
    feed = make_feed()
    second = block_stored([b"A"], None, PROMPT[:4], group_idx=1)
    host = block_stored([b"A"], None, PROMPT[:4]) | {"medium": "CPU"}
    assert feed.take(0, message(second, host)) == []


def test_events_of_releases_that_are_too_old_are_refused() -> None:
    """They were arrays, and did not say whose a block is."""
    pytest.importorskip("msgspec")
    with pytest.raises(ValueError, match="must be a map, is list"):
        versions.events(message(["BlockStored", [b"A"], None, PROMPT[:4], 4, None, "GPU"]))


def test_a_message_that_is_none_is_refused() -> None:
    pytest.importorskip("msgspec")
    with pytest.raises(ValueError, match="no batch"):
        versions.events(b"\xc1")
