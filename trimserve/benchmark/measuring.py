"""Measuring fairly: memory of a process, robust statistics, and worker processes that take turns.

`trimserve bench` and the scripts in bench/ use the same functions.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000


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


class Worker:
    """A fresh process that writes a line of JSON when it is ready and one for each line it is sent."""

    def __init__(
        self, arguments: Sequence[str], *, python: str | Path = sys.executable, cwd: Path | None = None
    ) -> None:
        """Start ``python ARGUMENTS`` and wait until it is ready.

        Args:
            arguments: of the interpreter.
            python: the interpreter, e.g. that of another environment.
            cwd: where it starts.

        Raises:
            RuntimeError: it ended; its stderr, which is ours, says why.
        """
        command = [str(python), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd
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


def alternately(
    workers: Mapping[str, Worker], request: str | Mapping[str, str], steps: int
) -> dict[str, list[dict[str, Any]]]:
    """Send requests to idle workers in turn, `steps` times each, in an order that reverses every step.

    Args:
        workers: name -> worker.
        request: the line that all are sent, or name -> line.
        steps: how often.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(steps):
        for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
            line = request if isinstance(request, str) else request[name]
            answers[name].append(workers[name].ask(line))
    return answers
