"""The engine's thread: takes requests from the queue, advances them step by step, tells their clients."""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from trimserve.concurrency import Lock, renew_in_child
from trimserve.encoder.encoder import Encoder
from trimserve.engine.batch import BatchRunner
from trimserve.engine.errors import EngineClosed
from trimserve.engine.handle import Handle
from trimserve.engine.inbox import Call, Inbox
from trimserve.engine.metrics import EngineMetrics
from trimserve.engine.preparing import prepare
from trimserve.engine.runner import Runner
from trimserve.engine.settings import EngineSettings, GenerationRequest
from trimserve.engine.solo import SoloRunner
from trimserve.engine.strict import prove
from trimserve.engine.task import Task
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator

logger = logging.getLogger(__name__)
T = TypeVar("T")
# An idle thread ends after so many seconds, and another one starts with the next request.
_IDLE_SECONDS = 5.0
_CLOSED = "this engine is closed: open another one."
_DRAINING = "this engine finishes what it has and takes no more requests: ask another one, or later."


class Engine:
    """Runs the requests of any number of clients on one model, in one thread of its own.

    See the package's docstring for how it is used. In a forked child it starts empty.

    Attributes:
        model: the folder's `Generator` or `Encoder`.
        settings: its limits.
    """

    def __init__(self, model: Generator | Encoder, settings: EngineSettings | None = None) -> None:
        """Make an engine of a model that was loaded."""
        self.model = model
        self.settings = settings or EngineSettings()
        self._runners = _runners_for(model, self.settings)
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Start empty: in a forked child neither the thread nor the clients are there; see `Renewable`."""
        self._starting = Lock()
        self._inbox = Inbox(self.settings)
        self._thread: threading.Thread | None = None
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._cached_tokens = 0
        self._runners = [runner.anew() for runner in self._runners]
        # When the interpreter ends, so does the thread: it must not be within ONNX Runtime then.
        self._end = weakref.finalize(self, _end, self._inbox)

    def submit(self, request: GenerationRequest) -> Handle:
        """Queue a request; does not wait.

        Raises:
            QueueFull: there is no room for it.
            EngineClosed: the engine is drained or closed.
            UsageError: it cannot be honoured.
            UnknownIdError: its prompt holds a token that the model has no row for.
        """
        handle = Handle(self._inbox.wake)
        task = prepare(self._generator(), request, handle)
        self._runner_for(task)
        self._inbox.put_task(task)
        self._ensure_thread()
        return handle

    def call(self, function: Callable[[Generator | Encoder], T], tokens: int = 0) -> "Future[T]":
        """Have the engine's thread do anything else with the model, between two steps.

        Args:
            function: of the model.
            tokens: what it counts in the queue, against `max_queued_tokens`.

        Raises:
            QueueFull: there is no room for it.
            EngineClosed: the engine is drained or closed.
        """
        call = Call(function, tokens)
        self._inbox.put_call(call)
        self._ensure_thread()
        return call.future

    def metrics(self) -> EngineMetrics:
        """What it does and has done."""
        runners, inbox = self._runners, self._inbox
        common = {
            "running": len(self._live()),
            "waiting": inbox.size,
            "waiting_tokens": inbox.tokens,
            "kv_limit_bytes": self.settings.kv_memory,
            "finished": dict(self._finished),
            "rejected": inbox.rejected,
            "strict": all(runner.strict for runner in runners),
            "batching": runners[0].batching if runners else "",
        }
        if not isinstance(self.model, Generator):
            return EngineMetrics(**common)  # type: ignore[arg-type] # by name
        stats, reads = self.model.stats, self.model.stats.cold_reads
        return EngineMetrics(
            **common,  # type: ignore[arg-type] # by name
            kv_used_bytes=sum(runner.kv_used_bytes for runner in runners),
            kv_bytes=sum(runner.kv_bytes for runner in runners),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generation_tokens=stats.tokens,
            cold_tokens=stats.cold_tokens,
            drafted=stats.drafted,
            accepted=stats.accepted,
            checked_steps=reads.steps,
            certified_steps=reads.certified,
            cold_bytes=reads.bytes,
            decode_steps=sum(runner.decode_steps for runner in runners),
            decode_rows=sum(runner.decode_rows for runner in runners),
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing more and wait until all that was taken is finished.

        Args:
            timeout: seconds to wait, at most.

        Returns:
            Whether all is finished.
        """
        self._inbox.close(_DRAINING)
        return self._join(timeout)

    def close(self) -> None:
        """Take nothing more, cancel what waits and runs, and wait for the thread."""
        self._end()
        self._join(None)

    def _generator(self) -> Generator:
        if not isinstance(self.model, Generator):
            raise UsageError(f"{self.model.folder.path} is an encoder, which generates nothing: use call.")
        return self.model

    def _join(self, timeout: float | None) -> bool:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def _ensure_thread(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="trimserve-engine", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while self._has_work() or self._waits():
            try:
                self._sweep()
                self._call()
                self._admit()
                self._step()
            except Exception as error:
                logger.exception("the engine's step failed")
                self._fail_all(error)

    def _has_work(self) -> bool:
        return bool(self._inbox.size or self._live())

    def _live(self) -> list[Task]:
        return [task for runner in self._runners for task in runner.live]

    def _runner_for(self, task: Task) -> Runner:
        return next(runner for runner in self._runners if runner.takes(task))

    def _waits(self) -> bool:
        """Wait for work; tells whether the thread goes on."""
        if not self._inbox.is_closed:
            self._inbox.wait(_IDLE_SECONDS)
        with self._starting:
            # Who submits from now on starts another thread.
            if not self._has_work():
                self._thread = None
                return False
        return True

    def _sweep(self) -> None:
        """End what was cancelled or ran out of time, at work or not."""
        now = time.monotonic()
        aborted = self._inbox.aborted
        for runner in self._runners:
            for task in runner.live:
                if aborted or task.due(now) is not None:
                    runner.drop(task)
                    self._finish(task, None)
        for task in self._inbox.take_if(lambda task: aborted or task.due(now) is not None):
            self._finish(task, None)

    def _call(self) -> None:
        call = self._inbox.next_call()
        if call is None or not call.future.set_running_or_notify_cancel():
            return
        if self._inbox.aborted:
            call.future.set_exception(EngineClosed(_CLOSED))
            return
        try:
            call.future.set_result(call.function(self.model))
        except BaseException as error:
            call.future.set_exception(error)
        self._inbox.ended()

    def _admit(self) -> None:
        while (task := self._inbox.next_task(lambda task: self._runner_for(task).fits(task))) is not None:
            task.start()
            self._runner_for(task).admit(task)

    def _step(self) -> None:
        for runner in self._runners:
            for task, error in runner.step():
                self._finish(task, error)

    def _finish(self, task: Task, error: Exception | None) -> None:
        self._prompt_tokens += task.prompt_tokens
        self._cached_tokens += task.cached_tokens
        self._inbox.ended()
        if error is not None:
            self._finished["error"] += 1
            task.fail(error)
            return
        head_vocab = self._generator().folder.vocab.head
        reason = None if task.request.finished else task.due(time.monotonic()) or "cancelled"
        finished = task.finish(head_vocab, strict=self._runner_for(task).strict, reason=reason)
        self._finished[finished.reason] += 1

    def _fail_all(self, error: Exception) -> None:
        for task in self._live():
            self._finish(task, error)
        self._runners = [runner.anew() for runner in self._runners]


def _runners_for(model: Generator | Encoder, settings: EngineSettings) -> list[Runner]:
    """What runs a model's requests; each takes those that the ones before it do not."""
    if not isinstance(model, Generator):
        return []
    found = model.decoder.no_rows_because or prove(model, settings)
    if isinstance(found, str):
        return [SoloRunner(model, found)]
    return [BatchRunner(model, settings, found), SoloRunner(model, "beams, or the mass of cold ids")]


def _end(inbox: Inbox) -> None:
    inbox.abort(_CLOSED)
