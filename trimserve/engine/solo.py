"""Requests that cannot share a run of the graph: a loop and a cache each, one after the other."""

from collections.abc import Iterator
from typing import Self

from trimserve.decoding.logprobs import LogprobMeter, MeteredChecker
from trimserve.decoding.request import Request
from trimserve.engine.task import Task
from trimserve.generation.generator import Generator


class SoloRunner:
    """A `Runner` that advances one request after the other by a check.

    Attributes:
        batching: see `EngineMetrics`.
        strict: always: nothing is shared.
        decode_steps: see `EngineMetrics`.
        decode_rows: see `EngineMetrics`.
    """

    strict = True

    def __init__(self, generator: Generator, why: str) -> None:
        self._why = why
        self.batching = f"one by one: {why}"
        self.decode_steps = self.decode_rows = 0
        self.kv_used_bytes = self.kv_bytes = 0
        self._generator = generator
        self._meters: dict[Task, MeteredChecker] = {}
        self._runs: dict[Task, Iterator[tuple[Request, list[int]]]] = {}

    def anew(self) -> Self:
        """See `Runner`."""
        return type(self)(self._generator, self._why)

    @property
    def live(self) -> list[Task]:
        """What it works on."""
        return list(self._runs)

    def takes(self, task: Task) -> bool:  # noqa: ARG002 - see `Runner`
        """Whether a request is for this runner: whatever no other one takes."""
        return True

    def fits(self, task: Task) -> bool:  # noqa: ARG002 - see `Runner`
        """Whether another request can start: one after the other, so that each is over as early as it can."""
        return not self._runs

    def admit(self, task: Task) -> None:
        """Start a request."""
        checker = None if task.plan.beams else self._generator.checker(task.plan)
        if task.top_logprobs is not None:
            meter = LogprobMeter(
                self._generator.cold_head("top_logprobs"), self._generator.folder.vocab.head.kept_ids
            )
            checker = self._meters[task] = MeteredChecker(checker, meter, task.top_logprobs)
        self._runs[task] = self._generator.run([task.request], task.plan, checker)

    def drop(self, task: Task) -> None:
        """End a request before its time."""
        self._meters.pop(task, None)
        self._runs.pop(task).close()  # type: ignore[attr-defined] # it is a generator

    def step(self) -> list[tuple[Task, Exception | None]]:
        """Advance each request; gives those that ended, with their errors."""
        ended: list[tuple[Task, Exception | None]] = []
        for task, run in list(self._runs.items()):
            try:
                made = next(run, None)
                if made is not None:
                    meter = self._meters.get(task)
                    task.push(made[1], meter.found if meter else ())
                self.decode_steps += 1
                self.decode_rows += 1
            except Exception as error:
                ended.append((task, error))
                continue
            if made is None:
                ended.append((task, None))
        for task, _ in ended:
            del self._runs[task]
            self._meters.pop(task, None)
        return ended
