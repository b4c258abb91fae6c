"""`make bench-trust`: isolation, resume, several routers and the cost of trust held to their bars."""

from __future__ import annotations

import sys

from load_tests.rig_bench import Suite, main

SUITE = Suite(
    name="trust",
    description="Isolation, resume, several routers and the cost of trust held to their bars.",
    families={
        "isolation": "trust_isolation",
        "resume": "trust_resume",
        "death": "trust_router_death",
        "routers": "trust_routers",
        "cost": "trust_cost",
        "fuzz": "trust_fuzz",
    },
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
