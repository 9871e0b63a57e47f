"""Async code as a client of the engine: `Generator.agenerate`, `astream`, `achat`, `astream_chat`."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Sequence

from trimserve.arrays import Ids
from trimserve.engine.engine import Engine
from trimserve.engine.events import Failed, Finished
from trimserve.engine.settings import EngineSettings, GenerationRequest
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator
from trimserve.generation.options import GenerationOptions
from trimserve.generation.output import Generation

# A library does not turn its own process away: what waits is what that process has asked for.
_SETTINGS = EngineSettings(max_queued_requests=sys.maxsize, max_queued_tokens=sys.maxsize)


class EngineClients:
    """The `AsyncClients` of a generator, with an engine of its own."""

    def __init__(self, generator: Generator) -> None:
        self._engine = Engine(generator, _SETTINGS)
        self._generator = generator

    async def generate(self, prompts: Sequence[Ids], options: GenerationOptions) -> list[Generation]:
        """See `AsyncClients`; where one fails, or the caller leaves, the others are cancelled."""
        handles = [self._engine.submit(GenerationRequest(prompt, options)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*(handle.aresult() for handle in handles)))
        finally:
            for handle in handles:
                handle.cancel()

    async def stream(self, prompt: Ids, options: GenerationOptions) -> AsyncGenerator[str]:
        """See `AsyncClients`; leaving it cancels the request."""
        if self._generator.plan(options).beams is not None:
            raise UsageError("beams are known when the search is over: use agenerate, or num_beams=1.")
        events = self._engine.submit(GenerationRequest(prompt, options)).aevents()
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if event.text:
                    yield event.text
                if isinstance(event, Finished):
                    return
