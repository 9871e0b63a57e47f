"""What a client holds of a request: its events, for threads and for async code, and its end."""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator

from trimserve.engine.events import Event, Failed, Finished
from trimserve.generation.output import Generation


class Handle:
    """One submitted request. Its events can be read once, by `events`, `aevents`, `result` or `aresult`.

    Attributes:
        cancelled: whether its client asked for its end.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        """Make a handle.

        Args:
            wake: tells the engine that something was asked for.
        """
        self.cancelled = False
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener: Callable[[], None] | None = None

    def cancel(self) -> None:
        """End the request before the next step; harmless where it has ended. From any thread."""
        self.cancelled = True
        self._wake()

    def put(self, event: Event) -> None:
        """Hand an event to the client; for the engine alone."""
        self._events.put(event)
        listener = self._listener
        if listener is not None:
            listener()

    def events(self) -> Iterator[Event]:
        """Give the events as they come, the last one being `Finished` or `Failed`.

        Leaving the iterator early cancels the request.
        """
        ended = False
        try:
            while not ended:
                event = self._events.get()
                ended = not _is_open(event)
                yield event
        finally:
            if not ended:
                self.cancel()

    async def aevents(self) -> AsyncIterator[Event]:
        """The same for async code: the event loop goes on while the engine works."""
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def listen() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed, and nobody is left who could read
                self.cancel()

        self._listener = listen
        ended = False
        try:
            while not ended:
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    await arrived.wait()
                    arrived.clear()
                    continue
                ended = not _is_open(event)
                yield event
        finally:
            self._listener = None
            if not ended:
                self.cancel()

    def result(self) -> Generation:
        """Wait for the end.

        Raises:
            Exception: the error that ended the request.
        """
        for event in self.events():
            if isinstance(event, Finished | Failed):
                return _generation(event)
        raise RuntimeError("the events of this request were read before")

    async def aresult(self) -> Generation:
        """Wait for the end in async code; errors as of `result`."""
        async for event in self.aevents():
            if isinstance(event, Finished | Failed):
                return _generation(event)
        raise RuntimeError("the events of this request were read before")


def _is_open(event: Event) -> bool:
    return not isinstance(event, Finished | Failed)


def _generation(event: Finished | Failed) -> Generation:
    if isinstance(event, Failed):
        raise event.error
    return event.generation
