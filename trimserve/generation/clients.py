"""What async callers of a `Generator` go through: an engine, which `trimserve.load` gives it."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from trimserve.arrays import Ids
from trimserve.generation.options import GenerationOptions
from trimserve.generation.output import Generation

if TYPE_CHECKING:
    from trimserve.generation.generator import Generator


class AsyncClients(Protocol):
    """Runs requests of async code beside each other."""

    async def generate(self, prompts: Sequence[Ids], options: GenerationOptions) -> list[Generation]:
        """One result a prompt, int32 (T,) each, in order."""
        ...

    def stream(self, prompt: Ids, options: GenerationOptions) -> AsyncGenerator[str]:
        """The text of one, as it becomes certain."""
        ...


MakeClients = Callable[["Generator"], AsyncClients]
