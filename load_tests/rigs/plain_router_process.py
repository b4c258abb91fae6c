"""A `PlainRouter` in a process of its own.

in    {"target", "replica_id", "secret"}, then {"after_s": S} again and again
out   to each {"tokens", "messages"}: what has come by then, S seconds later
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from load_tests.rigs.gpu_ladder import ANSWERS
from load_tests.rigs.plain_router import PlainRouter


async def main() -> None:
    job = await _hear()
    router = PlainRouter(job["replica_id"], bytes.fromhex(job["secret"]), ANSWERS)
    await router.connect(job["target"])
    while job:
        await asyncio.sleep(job.get("after_s", 0.0))
        if router.failure:
            raise RuntimeError(router.failure)
        print(json.dumps({"tokens": router.num_tokens, "messages": router.num_messages}), flush=True)
        job = await _hear()
    router.close()


async def _hear() -> dict[str, Any]:
    """Return the next line; nothing at the end of the input."""
    line = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(line) if line else {}


if __name__ == "__main__":
    asyncio.run(main())
