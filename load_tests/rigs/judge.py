"""`python -m load_tests.rigs.judge --weights FILE`: judges answers by the oracle's rules (`answer_rules`).

Reads a JSON list of {"arithmetic", "prompt", "answer"} from stdin, writes the list of verdicts to stdout, in the same
order. A process of its own, so that whoever measures never has the reference's gigabytes and threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from load_tests.rigs.answer_rules import judge
from load_tests.rigs.reference import load_reference
from workers.weights.checkpoint import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.judge", description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="the model's file or directory")
    arguments = parser.parse_args()
    model = load_reference(open_checkpoint(arguments.weights))
    verdicts = [judge(model, case["prompt"], case["answer"], case["arithmetic"]) for case in json.load(sys.stdin)]
    json.dump([dataclasses.asdict(verdict) for verdict in verdicts], sys.stdout)


if __name__ == "__main__":
    main()
