"""The area under the ROC curve, and that the attack sees a cache which is shared and none which is not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from octavo.client import NotFoundError

from cluster.cli_dial import dial
from cluster.isolation import probe, roc_auc
from router import key_file
from router.config import RouterConfig
from router.keyring import Keyring
from router.server import RouterServer
from tests.data_plane.rig import KEYS, Replica, ready_cluster
from tests.router.rig import served_model


@pytest.mark.parametrize(
    ("lower", "higher", "expected"),
    [([1, 2], [3, 4], 1.0), ([3, 4], [1, 2], 0.0), ([1, 2], [1, 2], 0.5), ([1], [1], 0.5), ([1, 3], [2], 0.5)],
)
def test_the_area_under_the_curve(lower: list[float], higher: list[float], expected: float) -> None:
    assert roc_auc(lower, higher) == expected


def test_random_times_give_about_a_half() -> None:
    rng = random.Random(3)
    one, two = ([rng.random() for _ in range(2_000)] for _ in range(2))
    assert roc_auc(one, two) == pytest.approx(0.5, abs=0.03)


async def test_only_who_is_of_the_tenant_finds_its_prompts(tmp_path: Path) -> None:
    path, tokens = tmp_path / "keys.json", {}

    def add(keyring: Keyring) -> Keyring:
        for tenant in ("victim", "attacker"):
            keyring, _, tokens[tenant] = keyring.with_key(tenant, time.time())
        return keyring

    key_file.change(path, add)
    async with ready_cluster(Replica("one")) as dispatcher:
        server = RouterServer(
            RouterConfig(keys_file=str(path)),
            {"toy": served_model()},
            dispatcher,
            router_id="router-1",
            version="0.0",
            salt_key=KEYS.tenant_salt,
        )
        address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
        await server.start()
        environ = {name: {"OCTAVO_TOKEN": token} for name, token in tokens.items()}
        async with (
            dial(address, environ=environ["victim"]) as victim,
            dial(address, environ=environ["attacker"]) as attacker,
        ):
            within = await probe(victim, victim, rounds=5, num_tokens=32, rng=random.Random(1))
            across = await probe(victim, attacker, rounds=5, num_tokens=32, rng=random.Random(2))
            with pytest.raises(NotFoundError, match="must be one of the served models"):
                await probe(victim, attacker, rounds=1, num_tokens=32, rng=random.Random(3), model="none")
        await server.stop()
    assert min(within.cached_tokens) >= 24
    assert across.cached_tokens == [0] * 5
    assert len(across.asked_s) == len(across.new_s) == 5
    assert min(across.asked_s) > 0
