"""What the benchmarks share: fresh processes in turn, robust statistics, result rows, memory of a process.

A benchmark compares variants. Each is measured in processes of its own that take turns, so that drift of the
machine (clock, caches, neighbours) meets every variant alike.
A row of `bench/results/*.jsonl` holds the raw samples and says where, when and with what they were taken.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.machine import ROOT, SCHEMA_VERSION, Neighbours, bandwidth, circumstances
from bench.realdata import data_folder
from trimserve.benchmark import measuring
from trimserve.benchmark.measuring import Ratio, Spread, alternately, paired_ratio, ratio, spread
from trimserve.errors import TrimserveError
from trimserve.process import Memory, memory
from trimserve.runtime.session import DEVICES, providers

__all__ = [
    "MIN_STEPS",
    "RESULTS",
    "ROOT",
    "SCHEMA_VERSION",
    "SCRATCH",
    "Memory",
    "Neighbours",
    "Ratio",
    "Spread",
    "Worker",
    "alternately",
    "bandwidth",
    "circumstances",
    "data_folder",
    "fresh_process",
    "in_turn",
    "last_row",
    "memory",
    "newest_rows",
    "paired_ratio",
    "parser",
    "ratio",
    "report",
    "save_row",
    "scratch_folder",
    "spread",
    "without_samples",
]

RESULTS = ROOT / "bench" / "results"
SCRATCH = ROOT / "build" / "bench"
# Timed steps below which a median is not published.
MIN_STEPS = 30


def fresh_process(arguments: Sequence[str], *, python: str | Path = sys.executable) -> dict[str, Any]:
    """Run ``python ARGUMENTS`` from the repository root and parse the last line of its stdout as JSON.

    Raises:
        RuntimeError: it failed; the message is the end of its stderr.
    """
    command = [str(python), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def in_turn(variants: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run each variant's command in a fresh process, `rounds` times, reversing the order every round.

    Args:
        variants: name -> arguments for `fresh_process`.
        rounds: processes a variant.

    Returns:
        name -> the JSON results, one a round.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for number in range(rounds):
        order = list(variants)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            results[name].append(fresh_process(variants[name]))
            print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr)
    return results


class Worker(measuring.Worker):
    """A worker process that finds the modules of this folder."""

    def __init__(self, arguments: Sequence[str], *, python: str | Path = sys.executable) -> None:
        """Start ``python ARGUMENTS`` from the repository root and wait until it is ready."""
        super().__init__(arguments, python=python, cwd=ROOT)


def parser(description: str, *, rounds: int, work: str | None = None) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has.

    Args:
        description: what is measured.
        rounds: fresh processes a variant, by default.
        work: what ``--work`` has to hold, the parent of `scratch_folder`; without it there is no such option.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"processes a variant (default {rounds})")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (default: all cores)")
    made.add_argument("--quick", action="store_true", help="two rounds, result in build/bench only")
    made.add_argument(
        "--device", type=_device, default="cpu", metavar="{cpu,cuda}", help="where models run (default cpu)"
    )
    if work:
        made.add_argument("--work", type=Path, help=f"folder for {work} (default: temporary)")
    return made


@contextmanager
def scratch_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder for a benchmark's models and exports, gone afterwards.

    Args:
        name: of the benchmark.
        parent: an existing folder with room for it; the system's temporary one by default.
    """
    with tempfile.TemporaryDirectory(
        prefix=f"trimserve-{name}-", dir=parent, ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


def _device(name: str) -> str:
    if name not in DEVICES:
        raise argparse.ArgumentTypeError(f"choose one of {', '.join(DEVICES)}")
    if name != "cpu":
        try:
            providers(importlib.import_module("onnxruntime"), name)
        except TrimserveError as error:  # its message names the pip command
            raise argparse.ArgumentTypeError(str(error)) from error
    return name


def save_row(name: str, row: Mapping[str, Any], *, quick: bool, device: str = "cpu") -> Path:
    """Append a row with its circumstances to ``bench/results/NAME.jsonl``, or to build/bench if quick."""
    folder = SCRATCH if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    line = json.dumps({"benchmark": name, **circumstances(device), **row}, sort_keys=True) + "\n"
    with path.open("ab", buffering=0) as file:  # one call: no other process and no kill parts a row
        file.write(line.encode())
    return path


def last_row(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Read the newest row of a result file."""
    lines = ((folder or RESULTS) / f"{name}.jsonl").read_text("utf-8").splitlines()
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def newest_rows(name: str, *keys: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Read the newest row of each combination of keys, in the order in which these first came."""
    lines = ((folder or RESULTS) / f"{name}.jsonl").read_text("utf-8").splitlines()
    newest = {tuple(str(row.get(key)) for key in keys): row for row in map(json.loads, lines)}
    return list(newest.values())


def without_samples(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row less its raw samples, which only the result file needs."""
    return {
        key: without_samples(value) if isinstance(value, dict) else value
        for key, value in row.items()
        if not key.endswith("_samples")
    }


def report(text: str, document: Mapping[str, Any]) -> None:
    """Print the table for people on stderr and the document as the last line of stdout."""
    print(text, file=sys.stderr)
    print(json.dumps(document, sort_keys=True))
