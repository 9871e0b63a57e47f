"""What the benchmarks share: fresh processes in turn, robust statistics, result rows, memory of a process.

A benchmark compares variants. Each is measured in processes of its own that take turns, so that drift of the
machine (clock, caches, neighbours) meets every variant alike.
A row of `bench/results/*.jsonl` holds the raw samples and says where, when and with what they were taken.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCRATCH = ROOT / "build" / "bench"
_PACKAGES = (
    "trimserve",
    "numpy",
    "tokenizers",
    "safetensors",
    "onnxruntime",
    "onnx",
    "onnx-ir",
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
)
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process in bytes; a field is None where the system does not tell it apart."""

    resident: int
    anonymous: int | None = None
    file: int | None = None
    peak: int | None = None


def memory() -> Memory:
    """Measure this process: VmRSS, RssAnon, RssFile and VmHWM on Linux, psutil's RSS elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        import psutil  # Linux needs no package for this

        return Memory(int(psutil.Process().memory_info().rss))
    fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
    wanted = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
    return Memory(*(1024 * int(fields[name].split()[0]) for name in wanted))


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 5th and 95th percentile of `count` samples."""

    median: float
    p5: float
    p95: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Summarise samples; needs at least one."""
    p5, median, p95 = np.percentile(np.asarray(samples, np.float64), (5, 50, 95))
    return Spread(float(median), float(p5), float(p95), len(samples))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of medians with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Estimate median(numerator) / median(denominator) and its 95 % percentile-bootstrap interval.

    Args:
        numerator: one value a round, e.g. each process's own median, so that the samples are independent.
        denominator: the other variant's values.
        seed: of the resampling, so that a result file gives the same interval again.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    random = np.random.default_rng(seed)
    ratios = _resampled_medians(top, random) / _resampled_medians(bottom, random)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(float(np.median(top) / np.median(bottom)), float(low), float(high))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Estimate the median of numerator[i] / denominator[i] and its 95 % percentile-bootstrap interval.

    For variants that took turns within each round: a slow round is slow for both, and cancels.

    Args:
        numerator: one value a round.
        denominator: the other variant's values of the same rounds.
        seed: of the resampling.
    """
    ratios = np.asarray(numerator, np.float64) / np.asarray(denominator, np.float64)
    low, high = np.percentile(_resampled_medians(ratios, np.random.default_rng(seed)), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _resampled_medians(
    values: npt.NDArray[np.float64], random: np.random.Generator
) -> npt.NDArray[np.float64]:
    picks = random.integers(0, len(values), (_RESAMPLES, len(values)))
    medians: npt.NDArray[np.float64] = np.median(values[picks], axis=1)
    return medians


def fresh_process(arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``python ARGUMENTS`` from the repository root and parse the last line of its stdout as JSON.

    Raises:
        RuntimeError: it failed; the message is the end of its stderr.
    """
    command = [sys.executable, *arguments]
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


class Worker:
    """A fresh process that writes a line of JSON when it is ready and one for each line it is sent."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start ``python ARGUMENTS`` from the repository root and wait until it is ready.

        Raises:
            RuntimeError: it ended; its stderr, which is ours, says why.
        """
        command = [sys.executable, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.ready = self._answer()

    def ask(self, request: str) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        stdin = self._process.stdin
        if stdin is None:  # cannot be: Popen was asked for a pipe
            raise RuntimeError("the worker has no stdin")
        stdin.write(f"{request}\n")
        stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the process ended with exit code {self._process.wait()} and no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def alternately(workers: Mapping[str, Worker], request: str, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Send a request to idle workers in turn, `steps` times each, in an order that reverses every step."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(steps):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            answers[name].append(workers[name].ask(request))
    return answers


class Neighbours:
    """Watches what share of the CPUs other processes use meanwhile: what a measurement must not be near to.

    Workers count as ours once they have ended, so end them first. None where the system does not tell.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), sum(os.times()[:4])

    def share(self) -> float | None:
        """Share of all CPU time since the beginning that went to processes that are not ours."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = (busy - self._busy) - (sum(os.times()[:4]) - self._own)
        return max(0.0, foreign) / ((time.perf_counter() - self._start) * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the system started, summed over CPUs."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq = map(int, path.read_text("utf-8").split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def circumstances() -> dict[str, Any]:
    """When, where and with which versions a row was measured."""
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git": _git_revision(),
        "hardware": f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} {_machine_kind()}",
        "cpu": _cpu_model(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() or "unknown"


def _machine_kind() -> str:
    info = Path("/proc/cpuinfo")
    virtual = info.exists() and " hypervisor" in info.read_text("utf-8")
    return "VM" if virtual else "machine"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has.

    Args:
        description: what is measured.
        rounds: fresh processes a variant, by default.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=rounds, help=f"processes a variant (default {rounds})")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (default: all cores)")
    made.add_argument("--quick", action="store_true", help="two rounds, result in build/bench only")
    return made


def save_row(name: str, row: Mapping[str, Any], *, quick: bool) -> Path:
    """Append a row with its circumstances to ``bench/results/NAME.jsonl``, or to build/bench if quick."""
    folder = SCRATCH if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"benchmark": name, **circumstances(), **row}, sort_keys=True) + "\n")
    return path


def last_row(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read the newest row of a result file."""
    lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def report(text: str, document: Mapping[str, Any]) -> None:
    """Print the table for people on stderr and the document as the last line of stdout."""
    print(text, file=sys.stderr)
    print(json.dumps(document, sort_keys=True))
