"""What advances the requests of an engine, in the engine's thread alone."""

from typing import Protocol

from trimserve.engine.task import Task


class Runner(Protocol):
    """Advances requests.

    Attributes:
        batching: how sequences run together, and where they do not, why.
        strict: whether a request's tokens are those it has alone.
        decode_steps: runs of the graph for decoding.
        decode_rows: sequences in all of these.
        kv_used_bytes: keys and values of what runs.
        kv_bytes: buffers that are held.
    """

    batching: str
    strict: bool
    decode_steps: int
    decode_rows: int

    @property
    def kv_used_bytes(self) -> int:
        """See above."""
        ...

    @property
    def kv_bytes(self) -> int:
        """See above."""
        ...

    def anew(self) -> "Runner":
        """One like it that has nothing to do; what this one did is forgotten with it."""
        ...

    @property
    def live(self) -> list[Task]:
        """The requests at work."""
        ...

    def takes(self, task: Task) -> bool:
        """Whether it is for requests of this kind.

        Raises:
            UsageError: it is, and this one is too large for it.
        """
        ...

    def fits(self, task: Task) -> bool:
        """Whether a request that it takes can start now."""
        ...

    def admit(self, task: Task) -> None:
        """Start a request that fits."""
        ...

    def drop(self, task: Task) -> None:
        """End a request before its time."""
        ...

    def step(self) -> list[tuple[Task, Exception | None]]:
        """Do a little for every request; gives those that ended, with their errors."""
        ...
