"""How long `import trimserve` and `trimserve --version` take in a fresh process.

The target is 0.3 s for the import. Public names are imported when they are first used, numpy with them: the
two that most programs use are measured as well.
"""

import sys
import time
from dataclasses import asdict

from bench import harness
from trimserve.console import table

_TIMED_IMPORT = """
import json, time
begin = time.perf_counter_ns()
{statement}
print(json.dumps({{"ms": (time.perf_counter_ns() - begin) / 1e6}}))
"""
_TIMED_COMMAND = """
import json, subprocess, sys, time
begin = time.perf_counter_ns()
subprocess.run([sys.executable, "-m", "trimserve", "--version"], check=True, stdout=subprocess.DEVNULL)
print(json.dumps({"ms": (time.perf_counter_ns() - begin) / 1e6}))
"""
VARIANTS = {
    **{
        statement: ["-c", _TIMED_IMPORT.format(statement=statement)]
        for statement in (
            "import numpy",
            "import trimserve",
            "from trimserve import load",
            "from trimserve import profile",
        )
    },
    "trimserve --version": ["-c", _TIMED_COMMAND],
}


def main() -> int:
    """Measure, save the row, print the table."""
    args = harness.parser(__doc__ or "", rounds=30).parse_args()
    begin = time.perf_counter()
    harness.in_turn(VARIANTS, 1)  # fills the page cache and writes the .pyc files
    results = harness.in_turn(VARIANTS, 2 if args.quick else args.rounds)
    samples = {name: [run["ms"] for run in runs] for name, runs in results.items()}
    spreads = {name: harness.spread(values) for name, values in samples.items()}
    row = {"samples_ms": samples, "ms": {name: asdict(value) for name, value in spreads.items()}}
    harness.save_row("startup", row, quick=args.quick)
    lines = [
        (name, f"{value.median:.0f}", f"{value.p5:.0f}", f"{value.p95:.0f}")
        for name, value in spreads.items()
    ]
    harness.report(
        table(("fresh process", "median ms", "p5", "p95"), lines),
        {"ms": row["ms"], "seconds": round(time.perf_counter() - begin, 1)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
