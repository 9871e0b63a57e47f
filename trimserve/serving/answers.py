"""The answers to one HTTP request: one engine request a choice, their events read as one stream."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from trimserve.decoding.logprobs import TokenLogprob
from trimserve.engine.engine import Engine
from trimserve.engine.events import Event, Failed, Finished, Piece, Usage
from trimserve.engine.handle import Handle
from trimserve.engine.settings import GenerationRequest


class Answers(AbstractAsyncContextManager["Answers"]):
    """Submits requests and reads their events; whatever is not finished at the end of the block is cancelled.

    The end of the block comes with the last event, with an error, or when the client has gone: the task that
    serves it is then cancelled, in the middle of a prompt, too.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[GenerationRequest], count: Callable[[Usage], None]
    ) -> None:
        """Submit requests, all or none.

        Args:
            engine: does them.
            requests: one an answer.
            count: is told what each finished answer took.

        Raises:
            UsageError: one of them cannot be honoured.
            QueueFull: there is no room for them.
            EngineClosed: the model takes no more.
        """
        self._count = count
        self._handles: list[Handle] = []
        self._readers: list[asyncio.Task[None]] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        try:
            for request in requests:
                self._handles.append(engine.submit(request))
        except BaseException:
            self._cancel()
            raise

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Every event with the number of its answer, until all have finished.

        Raises:
            Exception: what ended one of them.
        """
        self._readers = [asyncio.create_task(self._read(*each)) for each in enumerate(self._handles)]
        open_answers = len(self._handles)
        while open_answers:
            index, event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                open_answers -= 1
                self._count(event.usage)
            yield index, event

    async def _read(self, index: int, handle: Handle) -> None:
        async for event in handle.aevents():
            self._events.put_nowait((index, event))


class Answer:
    """One answer, put together from its events.

    Attributes:
        text: so far.
        logprobs: of its tokens, where they were asked for.
        end: its last event, when it has come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[TokenLogprob] = []
        self._end: Finished | None = None

    @property
    def end(self) -> Finished:
        """The last event."""
        if self._end is None:
            raise RuntimeError("an answer was read before it was finished")
        return self._end

    def take(self, event: Piece | Finished) -> None:
        """Add an event."""
        self.text += event.text
        if isinstance(event, Piece):
            self.logprobs += event.logprobs
        else:
            self._end = event


async def collect(answers: Answers, count: int) -> list[Answer]:
    """Wait for all answers, so many of them."""
    found = [Answer() for _ in range(count)]
    async for index, event in answers.events():
        found[index].take(event)
    return found
