"""Accuracy, memory and time of each way to fine-tune MiniLM on banking77, from examples/finetune_small.py.

Times are CPU seconds of one thread, so that neighbours change them little. A row a method: its seeds and what
each gave.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness
from examples.finetune_small import BASELINE, HEADER, METHODS, compare, lines
from trimserve.console import table

TEXTS, TESTS, SEEDS = 1600, 1540, (0, 1, 2)


def rows_of(runs: Sequence[Mapping[str, Any]], texts: int) -> Iterator[dict[str, Any]]:
    """A result row of each method and rate."""
    for key in dict.fromkeys((run["method"], run["rate"]) for run in runs):
        own = [run for run in runs if (run["method"], run["rate"]) == key]
        yield {
            "method": key[0],
            "rate": key[1],
            "texts": texts,
            "tests": own[0]["tests"],
            "steps": len(own[0]["losses"]),
            "threads": 1,
            "trained": own[0]["trained"],
            "saved": own[0]["saved"],
            "peak": int(statistics.median(run["peak"] for run in own)),
            "cpu_seconds": statistics.median(value for run in own for value in run["seconds"][1:]),
            "seeds": [run["seed"] for run in own],
            "accuracies": [run["accuracy"] for run in own],
        }


def main() -> int:
    """Train each method with each seed, save a row a method, print the example's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", choices=[BASELINE, *METHODS], nargs="+", default=[BASELINE, *METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"training texts (default {TEXTS})")
    parser.add_argument("--tests", type=int, default=TESTS, help=f"test texts (default {TESTS})")
    parser.add_argument("--quick", action="store_true", help="result in build/bench only")
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        help="take what finetune_small.py --format json printed, train nothing",
    )
    args = parser.parse_args()
    if args.runs:
        printed = [line for path in args.runs for line in path.read_text("utf-8").splitlines()]
        runs = [json.loads(line) for line in printed if line.startswith("{")]
    else:
        data = harness.data_folder() / "corpora" / "banking77-en"
        runs = list(compare(data, args.methods, args.texts, args.tests, args.seeds))
    for row in rows_of(runs, args.texts):
        harness.save_row("finetune_small", row, quick=args.quick)
    print(table(HEADER, lines(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
