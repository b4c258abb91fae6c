"""The garbage collector of a replica's process."""

from __future__ import annotations

import gc

from workers import garbage


def test_what_was_there_before_the_first_request_is_not_searched() -> None:
    thresholds = gc.get_threshold()
    try:
        garbage.settle()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] == garbage.NUM_NEW_OBJECTS
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
