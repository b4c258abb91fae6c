"""`make bench-elastic`: scaling with load and with nodes, changes under load, and what an idle cluster costs."""

from __future__ import annotations

import sys

from load_tests.rig_bench import Suite, main

SUITE = Suite(
    name="elastic",
    description="Scaling with load and with nodes, changes under load, and an idle cluster held to their bars.",
    families={
        "step": "elastic_step",
        "flap": "elastic_flap",
        "nodes": "elastic_nodes",
        "change": "elastic_change",
        "zero": "elastic_zero",
        "idle": "elastic_idle",
    },
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
