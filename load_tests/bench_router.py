"""`make bench-router`: the router held to its bars; 24 minutes on a quiet machine of two cores."""

from __future__ import annotations

import sys

from load_tests.rig_bench import Suite, main

SUITE = Suite(
    name="router",
    description="The router held to its bars.",
    families={
        "speed": "router_speed",
        "serve": "router_beside_serve",
        "latency": "router_latency",
        "batching": "router_batching",
        "prefixes": "router_prefixes",
        "model": "router_with_model",
        "overload": "router_overload",
        "storm": "router_storm",
        "fairness": "router_fairness",
        "index": "router_index",
    },
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
