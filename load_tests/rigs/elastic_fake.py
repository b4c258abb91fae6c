"""A replica of the fake engine as a unit of load: how many answers it gives at once, how long one takes, and the
configuration of clusters made of it."""

from __future__ import annotations

from typing import Final

MODEL: Final = "fake"
SEQUENCES: Final = 8
"""One replica's capacity: so many answers at once."""
STEP_S: Final = 0.02
ANSWER_TOKENS: Final = 50
"""A second's."""


def fake_config(scaling: str, *, engine: str = "", other: str = "") -> str:
    """Return a TOML file. `scaling` and `engine` are lines of these sections, `other` whole sections."""
    return f"""
model = "{MODEL}"
[engine]
engine = "fake"
fake_step_s = {STEP_S}
max_num_sequences = {SEQUENCES}
{engine}
[scaling]
{scaling}
{other}
"""
