"""`make bench-telemetry`: what telemetry costs, dead collectors, traces, a slow step and queries held to their bars."""

from __future__ import annotations

import sys

from load_tests.rig_bench import Suite, main

SUITE = Suite(
    name="telemetry",
    description="What telemetry costs, dead collectors, whole traces, a slow step and queries held to their bars.",
    families={
        "cost": "telemetry_cost",
        "record_cost": "telemetry_record_cost",
        "collector": "telemetry_collector",
        "trees": "telemetry_trees",
        "slow_step": "telemetry_slow_step",
        "queries": "telemetry_queries",
        "backend": "telemetry_backend",
    },
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
