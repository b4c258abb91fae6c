"""How often Python looks for garbage in a replica's process.

An engine makes some hundred objects a step, which live until the next one, and by the interpreter's own measure a
search for cycles is due in nearly every step. With the books of 65,000 blocks and the modules of torch in its way, one
through everything held a step of an H200 up for 106 ms. What is there when the engine is ready stays, and need not be
searched.
"""

from __future__ import annotations

import gc
from typing import Final

NUM_NEW_OBJECTS: Final = 20_000
"""So many more objects than at the last search: those of some forty steps of 256 sequences."""


def settle() -> None:
    """Call it once, when the engine is ready."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NUM_NEW_OBJECTS, 10, 10)
