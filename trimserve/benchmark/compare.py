"""Compare a trimmed folder with the full model's in processes that take turns: memory, time, results.

Both are run by this runtime. Memory is that of whole processes, the interpreter and the imports too.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trimserve.arguments import checked
from trimserve.benchmark.measuring import Ratio, Spread, Worker, alternately, paired_ratio, spread
from trimserve.errors import UsageError
from trimserve.folder.manifest import stored_weight_bytes
from trimserve.folder.names import COLD_NAME
from trimserve.folder.opening import TrimmedFolder, open_folder
from trimserve.folder.tasks import GENERATOR_TASKS
from trimserve.process import Memory
from trimserve.runtime.session import MemoryUse

FULL = "full"
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: fresh processes of each variant; at least 1.
        steps: timed steps a process; at least 1.
        max_new_tokens: tokens an answer (generators).
        threads: of one operator.
        device: ``"cpu"`` or ``"cuda"``.
        memory: see `loading.load`.
    """

    rounds: int = 3
    steps: int = 10
    max_new_tokens: int = 64
    threads: int = 1
    device: str = "cpu"
    memory: MemoryUse = "fast"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one variant took.

    Attributes:
        weight_bytes: of the graphs and their data; cold rows are not weights that a step reads.
        load_ms: from nothing to ready.
        load: memory when loaded; `peak` is the largest until then.
        memory: after the last step; medians over the processes.
        ms: a batch (encoders) or a token after the first (generators).
        first_ms: to the first token (generators).
        stood: share of tokens whose draft stood (generators).
        digests: of the results, one a distinct result.
    """

    weight_bytes: int
    load_ms: Spread
    load: Memory
    memory: Memory
    ms: Spread
    first_ms: Spread | None
    stood: float | None
    digests: frozenset[str | None]
    round_ms: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The variant's part of the JSON document."""
        document = asdict(self)
        del document["digests"]
        return document | {"round_ms": list(self.round_ms)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The full model and the trimmed one's variants: ``trimmed``, or ``compact`` and ``exact``."""

    variants: dict[str, Measured]
    removed_bytes: int

    def time_ratio(self, name: str) -> Ratio:
        """Time of a variant to that of the full model; rounds are compared pairwise."""
        return paired_ratio(self.variants[name].round_ms, self.variants[FULL].round_ms)

    def saved_share(self, name: str) -> float | None:
        """Of the removed weight bytes, the share that is missing from the variant's process."""
        saved = self.variants[FULL].memory.resident - self.variants[name].memory.resident
        return saved / self.removed_bytes if self.removed_bytes > 0 else None

    def same_results(self, name: str) -> bool | None:
        """Whether a variant gave the full model's results, bit for bit; None where they cannot be told."""
        digests = self.variants[name].digests | self.variants[FULL].digests
        return None if None in digests else len(digests) == 1


@checked
def compare(full: Path, trimmed: Path, texts: Sequence[str], settings: Settings) -> Comparison:
    """Measure two folders.

    Args:
        full: a folder that keeps every id.
        trimmed: the trimmed folder.
        texts: one batch for an encoder, prompts for a generator; not empty.
        settings: how to measure.

    Raises:
        UsageError: no answer has two tokens, so that there is no token to time.
        RuntimeError: a process ended; its own message is on stderr.
    """
    folders = {FULL: open_folder(full), "trimmed": open_folder(trimmed)}
    modes = _variants(folders["trimmed"])
    runs: dict[str, list[_Run]] = {name: [] for name in modes}
    for _ in range(settings.rounds):
        for name, run in _round(folders, modes, texts, settings).items():
            runs[name].append(run)
    weights = {name: stored_weight_bytes(folder.manifest.files) for name, folder in folders.items()}
    variants = {
        name: _summary(found, weights[FULL if name == FULL else "trimmed"]) for name, found in runs.items()
    }
    return Comparison(variants, weights[FULL] - weights["trimmed"])


@dataclass(frozen=True, slots=True)
class _Run:
    ready: dict[str, Any]
    answers: list[dict[str, Any]]

    @property
    def times(self) -> list[float]:
        return [answer["ms"] for answer in self.answers if answer["ms"] is not None]


def _variants(trimmed: TrimmedFolder) -> dict[str, str | None]:
    """Name -> the mode it generates in."""
    if trimmed.manifest.task not in GENERATOR_TASKS:
        return {FULL: None, "trimmed": None}
    exact = {"exact": "exact"} if COLD_NAME in trimmed.manifest.files else {}
    return {FULL: None, "compact": "compact", **exact}


def _round(
    folders: Mapping[str, TrimmedFolder],
    modes: Mapping[str, str | None],
    texts: Sequence[str],
    settings: Settings,
) -> dict[str, _Run]:
    """Start a process a variant, let them take turns, end them."""
    requests = {
        name: json.dumps({"texts": list(texts), "mode": mode, "max_new_tokens": settings.max_new_tokens})
        for name, mode in modes.items()
    }
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                Worker(_command(folders[FULL if name == FULL else "trimmed"].path, settings))
            )
            for name in modes
        }
        answers = alternately(workers, requests, WARM_UP + settings.steps)
    return {name: _Run(worker.ready, answers[name][WARM_UP:]) for name, worker in workers.items()}


def _command(folder: Path, settings: Settings) -> list[str]:
    words = ["-m", "trimserve.benchmark.worker", str(folder), "--device", settings.device]
    return [*words, "--threads", str(settings.threads), "--memory", settings.memory]


def _summary(runs: Sequence[_Run], weights: int) -> Measured:
    if not all(run.times for run in runs):
        raise UsageError(
            "no answer has two tokens, so there is no token to time: pass other --texts, which the model "
            "answers at length."
        )
    answers = [answer for run in runs for answer in run.answers]
    generated = "first_ms" in answers[0]
    return Measured(
        weight_bytes=weights,
        load_ms=spread([run.ready["load_ms"] for run in runs]),
        load=_median_memory([run.ready["memory"] for run in runs]),
        memory=_median_memory([run.answers[-1]["memory"] for run in runs]),
        ms=spread([ms for run in runs for ms in run.times]),
        first_ms=spread([answer["first_ms"] for answer in answers]) if generated else None,
        stood=float(np.mean([answer["stood"] for answer in answers])) if generated else None,
        digests=frozenset(answer["digest"] for answer in answers),
        round_ms=tuple(float(np.median(run.times)) for run in runs),
    )


def _median_memory(found: Sequence[dict[str, int | None]]) -> Memory:
    def middle(name: str) -> int | None:
        values = [one[name] for one in found]
        return None if None in values else int(np.median(np.array(values, np.int64)))

    return Memory(middle("resident") or 0, middle("anonymous"), middle("file"), middle("peak"))
