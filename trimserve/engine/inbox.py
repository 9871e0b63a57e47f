"""The bounded queue between clients and the engine's thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from trimserve.engine.errors import EngineClosed, QueueFull
from trimserve.engine.settings import EngineSettings
from trimserve.engine.task import Task


@dataclass(slots=True, eq=False)
class Call:
    """Other work for the engine's thread: a function of the model.

    Attributes:
        function: what to do.
        tokens: how much it counts in the queue.
        future: where its result goes.
    """

    function: Callable[[Any], Any]
    tokens: int
    future: "Future[Any]" = field(default_factory=Future)


class Inbox:
    """What waits for the engine, in the order in which it came. From any thread.

    Attributes:
        rejected: how many requests found no room.
        aborted: whether what waits and runs should end.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._tasks: deque[Task] = deque()
        self._calls: deque[Call] = deque()
        self._closed: str | None = None
        self.aborted = False
        self._awake = False
        self._ended: deque[float] = deque(maxlen=32)  # when the last requests ended
        self.rejected = 0

    def put_task(self, task: Task) -> None:
        """Queue a request.

        Raises:
            QueueFull: too many wait, or too many tokens.
            EngineClosed: see `close`.
        """
        with self._changed:
            self._check(task.prompt_tokens)
            self._tasks.append(task)
            self._notify()

    def put_call(self, call: Call) -> None:
        """Queue other work; errors as of `put_task`."""
        with self._changed:
            self._check(call.tokens)
            self._calls.append(call)
            self._notify()

    def wake(self) -> None:
        """Have the engine look around."""
        with self._changed:
            self._notify()

    def wait(self, timeout: float | None) -> None:
        """Wait until something happens, for so many seconds at most; nothing is missed between two waits."""
        with self._changed:
            if not self._awake:
                self._changed.wait(timeout)
            self._awake = False

    def next_task(self, fits: Callable[[Task], bool]) -> Task | None:
        """Take the request that came first, if it fits."""
        with self._changed:
            if self._tasks and fits(self._tasks[0]):
                return self._tasks.popleft()
            return None

    def next_call(self) -> Call | None:
        """Take the oldest of the other work."""
        with self._changed:
            return self._calls.popleft() if self._calls else None

    def take_if(self, ends: Callable[[Task], bool]) -> Iterator[Task]:
        """Take those requests that have to end before they began."""
        with self._changed:
            taken = [task for task in self._tasks if ends(task)]
            for task in taken:
                self._tasks.remove(task)
        yield from taken

    def close(self, why: str) -> None:
        """Take nothing more; `why` is what clients are told."""
        with self._changed:
            self._closed = self._closed or why
            self._notify()

    def abort(self, why: str) -> None:
        """Close, and have the engine end what waits and runs."""
        self.aborted = True
        self.close(why)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closed is not None

    @property
    def size(self) -> int:
        """Requests and calls that wait."""
        return len(self._tasks) + len(self._calls)

    @property
    def tokens(self) -> int:
        """Their tokens."""
        with self._changed:
            return self._tokens()

    def ended(self) -> None:
        """Note that a request ended; see `QueueFull.retry_after`."""
        self._ended.append(time.monotonic())

    def _tokens(self) -> int:
        return sum(task.prompt_tokens for task in self._tasks) + sum(call.tokens for call in self._calls)

    def _notify(self) -> None:
        self._awake = True
        self._changed.notify_all()

    def _check(self, tokens: int) -> None:
        if self._closed is not None:
            raise EngineClosed(self._closed)
        settings, waiting = self._settings, self.size
        full = None
        if waiting >= settings.max_queued_requests:
            full = f"{waiting:,} requests wait, and {settings.max_queued_requests:,} may"
        elif waiting and (found := self._tokens() + tokens) > settings.max_queued_tokens:
            full = f"{found:,} prompt tokens would wait, and {settings.max_queued_tokens:,} may"
        if full is not None:
            self.rejected += 1
            after = self._retry_after()
            raise QueueFull(f"the queue is full, {full}: ask again in {after:.0f} s.", after)

    def _retry_after(self) -> float:
        """The time between the ends of two requests, in which one leaves the queue; 1 s at least."""
        if len(self._ended) < 2:
            return 1.0
        return max(1.0, (self._ended[-1] - self._ended[0]) / (len(self._ended) - 1))
