"""Run the benchmarks one after the other: `--quick` in minutes, else all of them within an hour on 2 cores.

Each is a process of its own; one that fails does not stop the others, and the exit code says so. The full run
appends to bench/results and then draws the figures and writes the tables of README.md and docs/. A benchmark
that reads corpora, tokenizers or models is left out, with a line, where `TRIMSERVE_DATA` has none.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass

from bench import harness
from trimserve.report import table


@dataclass(frozen=True, slots=True)
class Entry:
    """One benchmark of the suite.

    Attributes:
        module: its name in bench/.
        minutes: what a full run takes on 2 cores, about.
        full: arguments of the full run.
        quick: whether the quick run has it.
        needs_data: it reads `harness.data_folder()`.
        on_device: it takes ``--device cuda`` too.
    """

    module: str
    minutes: float
    full: tuple[str, ...] = ()
    quick: bool = True
    needs_data: bool = True
    on_device: bool = False


SUITE = (
    Entry("startup", 0.5, needs_data=False),
    # These two read what `make demo` wrote.
    Entry("encoder", 1, quick=False, needs_data=False),
    Entry("translate", 0.5, quick=False, needs_data=False),
    Entry("encoder_grid", 10, on_device=True),
    Entry("decode", 12, ("--model", "multidomain-qwen2", "gemma-3-270m"), needs_data=False, on_device=True),
    Entry("serving", 5, needs_data=False, on_device=True),
    Entry("scale", 3, on_device=True),
    Entry("paper", 3),
    Entry("quality", 5),
    Entry("stream", 2, quick=False, needs_data=False),
    Entry("trim", 4, quick=False, needs_data=False),
    Entry("profile", 3, quick=False),
    Entry("peers", 6, quick=False),
)


def command(entry: Entry, *, quick: bool, device: str) -> list[str]:
    """The command line of one benchmark."""
    words = [sys.executable, "-m", f"bench.{entry.module}", *(["--quick"] if quick else entry.full)]
    return words + (["--device", device] if device != "cpu" else [])


def main() -> int:
    """Run what is asked for; print a line a benchmark, exit with 1 if one failed."""
    parser = harness.parser(__doc__ or "", rounds=0)
    parser.add_argument("--only", nargs="+", choices=[entry.module for entry in SUITE], metavar="NAME")
    args = parser.parse_args()
    has_data = harness.data_folder().is_dir()
    results = []
    for entry in SUITE:
        if args.only and entry.module not in args.only:
            continue
        if (args.quick and not entry.quick) or (args.device != "cpu" and not entry.on_device):
            continue
        if entry.needs_data and not has_data:
            results.append({"name": entry.module, "result": "left out: no TRIMSERVE_DATA", "seconds": 0.0})
            continue
        print(f"\n== {entry.module}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        code = subprocess.run(
            command(entry, quick=args.quick, device=args.device), stdout=subprocess.DEVNULL, cwd=harness.ROOT
        ).returncode
        seconds = round(time.perf_counter() - begin, 1)
        results.append({"name": entry.module, "result": "ok" if code == 0 else "FAILED", "seconds": seconds})
    failed = any(one["result"] == "FAILED" for one in results)
    if not args.quick:
        for module in ("bench.plot", "bench.readme"):
            failed |= subprocess.run([sys.executable, "-m", module], cwd=harness.ROOT).returncode != 0
    lines = [(one["name"], one["result"], one["seconds"]) for one in results]
    print(table(("benchmark", "result", "seconds"), lines), file=sys.stderr)
    print(json.dumps({"benchmarks": results}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
