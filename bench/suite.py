"""Run the benchmarks one after the other: `--quick` in minutes, else all of them within an hour on 2 cores.

Each is a process of its own; one that fails does not stop the others, and the exit code says so. The full run
appends to bench/results and then draws the figures and writes the tables of README.md and docs/. A benchmark
that reads corpora, tokenizers or models is left out, with a line, where `TRIMSERVE_DATA` has none.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass

from bench import harness
from trimserve.console import table

_FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Entry:
    """One benchmark of the suite.

    Attributes:
        module: its name in bench/.
        minutes: what a full run takes on 2 cores, about.
        full: arguments of the full run.
        quick: whether the quick run has it.
        needs_data: it reads `harness.data_folder()`.
        quick_needs_data: so does its quick run, which else makes a tiny model.
        on_device: it takes ``--device cuda`` too.
    """

    module: str
    minutes: float
    full: tuple[str, ...] = ()
    quick: bool = True
    needs_data: bool = True
    quick_needs_data: bool = True
    on_device: bool = False


# Minutes are sums of the committed rows' own timings and of the exports before them.
SUITE = (
    Entry("startup", 0.5, needs_data=False),
    # These two read what `make demo` wrote.
    Entry("encoder", 2.5, ("--rounds", "5"), quick=False, needs_data=False),
    Entry("translate", 0.5, quick=False, needs_data=False),
    Entry("encoder.grid", 8, ("--rounds", "3", "--seconds", "3", "--most-tokens", "1024"), on_device=True),
    Entry(
        "decode",
        9,
        ("--rounds", "5", "--model", "multidomain-qwen2", "gemma-3-270m"),
        quick_needs_data=False,
        on_device=True,
    ),
    Entry("serving", 12, ("--steps", "2"), needs_data=False, on_device=True),
    Entry("memory", 1.5, quick_needs_data=False),
    Entry("scale", 1.5, ("--seconds", "0.5"), on_device=True),
    Entry("paper", 2),
    Entry("quality", 5, ("--texts", "16")),
    Entry("stream", 1.5, ("--rounds", "3"), quick=False, needs_data=False),
    # The largest model alone takes as long as the two before it.
    Entry("trim", 2.5, ("--rounds", "1", "--models", "0.27B", "0.6B"), quick=False, needs_data=False),
    Entry("profile", 3, quick=False),
    # The environments of the other tools are five minutes more, once.
    Entry("peers", 5, quick=False),
    Entry("segmentation", 3, quick=False),
    # Its models come from PyPI packages; without them it says so.
    Entry("quantize", 2.5),
)


def command(entry: Entry, *, quick: bool, device: str) -> list[str]:
    """The command line of one benchmark."""
    words = [sys.executable, "-m", f"bench.{entry.module}", *(["--quick"] if quick else entry.full)]
    return words + (["--device", device] if device != "cpu" else [])


def chosen(args: argparse.Namespace) -> list[Entry]:
    """The benchmarks that are asked for and that run on the device."""
    return [
        entry
        for entry in SUITE
        if (entry.module in args.only if args.only else True)
        and (entry.quick or not args.quick)
        and (entry.on_device or args.device == "cpu")
    ]


def run(entry: Entry, args: argparse.Namespace) -> tuple[str, str, float]:
    """Run one benchmark, or leave it out; returns its name, what became of it, and seconds."""
    reads_data = entry.needs_data and (entry.quick_needs_data or not args.quick)
    if reads_data and not harness.data_folder().is_dir():
        return entry.module, "left out: no TRIMSERVE_DATA", 0.0
    print(f"\n== {entry.module}", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    words = command(entry, quick=args.quick, device=args.device)
    code = subprocess.run(words, stdout=subprocess.DEVNULL, cwd=harness.ROOT).returncode
    return entry.module, _FAILED if code else "ok", round(time.perf_counter() - begin, 1)


def main() -> int:
    """Run what is asked for; print a line a benchmark, exit with 1 if one failed."""
    parser = harness.parser(__doc__ or "", rounds=0)
    parser.add_argument("--only", nargs="+", choices=[entry.module for entry in SUITE], metavar="NAME")
    args = parser.parse_args()
    results = [run(entry, args) for entry in chosen(args)]
    failed = any(result == _FAILED for _, result, _ in results)
    if not args.quick:
        for module in ("bench.plot", "bench.readme"):
            failed |= subprocess.run([sys.executable, "-m", module], cwd=harness.ROOT).returncode != 0
    names = ("name", "result", "seconds")
    harness.report(
        table(("benchmark", *names[1:]), results),
        {"benchmarks": [dict(zip(names, result, strict=True)) for result in results]},
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
