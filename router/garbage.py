"""How often Python looks for garbage in a router's process.

A router makes some hundred objects for each request, and what waits and runs keeps them alive for a while: by the
interpreter's own measure that is a search for cycles every few requests, each through what many requests have, and now
and then through all modules and the tokenizer. That was 10 to 15 % of the processor time of a router
without its gRPC, by turns with and without it; cycles are rare here, and few objects each.
"""

from __future__ import annotations

import gc
from typing import Final

NUM_NEW_OBJECTS: Final = 20_000
"""So many more objects than at the last search: the requests of a full Session, or a few megabytes."""


def settle() -> None:
    """Call it once, before the first request: what is there now will stay and is not searched any more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NUM_NEW_OBJECTS, 10, 10)
