"""The rig that times what telling of a request costs finds a figure for each bar."""

from __future__ import annotations

from load_tests.notes import Notes
from load_tests.rigs.bar_command import Settings
from load_tests.rigs.telemetry_record_cost import bars, measure


async def test_each_bar_has_a_figure() -> None:
    notes = Notes()
    await measure(Settings(is_quick=True), notes)
    assert all(bar.value is not None and bar.value > 0 for bar in bars(notes))
    assert {bar.limit for bar in bars(notes)} == {25.0, 1.0, 10.0}
    assert all(bar.value is None for bar in bars(Notes()))
