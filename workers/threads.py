"""How many threads torch computes with in this process."""

from __future__ import annotations

import torch


def set_threads(count: int) -> None:
    """Compute every operator with `count` threads, in whichever thread of the process it is called from.

    Ray sets OMP_NUM_THREADS to the CPUs that it reserved, which are not those that a replica may use.
    """
    assert count >= 1
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
