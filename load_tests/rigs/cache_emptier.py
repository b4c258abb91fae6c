"""Empties the prefix cache of a replica of `octavo serve` without a word to anybody, as a fault would.

    python -m load_tests.rigs.cache_emptier RAY_ADDRESS
    in    a replica's pid, a line each
    out   "attached", then for each pid how many blocks were forgotten

It reaches into the replica's process through Ray and into its block pool past every interface: no event tells routers.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from typing import Any

from cluster.config_sections import RayConfig
from cluster.ray_connection import connected

REPLICAS = "SERVE_REPLICA::"
WAIT_S = 10.0


def empty(_: Any, pid: int) -> int | None:
    """Forget what this process caches, if it has this pid; return how many blocks that were. Runs in the replica."""
    if os.getpid() != pid:
        return None
    from workers.prefix import toggle
    from workers.thread import EngineThread

    owners = [getattr(getattr(each, "_target", None), "__self__", None) for each in threading.enumerate()]
    thread = next(each for each in owners if isinstance(each, EngineThread))
    done, forgotten = threading.Event(), list[int]()

    def forget() -> None:
        pool: Any = thread._engine._pool  # type: ignore[attr-defined]
        for number in pool._free:
            block = pool._blocks[number]
            if block.hash is not None:
                del pool._resident[block.hash]
                pool._digest = toggle(pool._digest, block.hash)
                block.hash = None
                forgotten.append(number)
        done.set()

    thread._inbox.put(forget)  # between two steps, by the only thread that may
    done.wait(WAIT_S)
    return len(forgotten)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.cache_emptier")
    parser.add_argument("ray_address")
    with connected(RayConfig(address=parser.parse_args().ray_address), lambda text: print(text, file=sys.stderr)):
        import ray  # not before `connected` has said how: Ray reads its variables when it is imported
        from ray.util import list_named_actors

        named = [each for each in list_named_actors(all_namespaces=True) if each["name"].startswith(REPLICAS)]
        actors = [ray.get_actor(each["name"], namespace=each["namespace"]) for each in named]
        print("attached", flush=True)
        for line in sys.stdin:
            said = ray.get([actor.__ray_call__.remote(empty, int(line)) for actor in actors])
            print(sum(number for number in said if number is not None), flush=True)


if __name__ == "__main__":
    main()
