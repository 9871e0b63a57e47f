"""What is shared between the threads of a process, and what a forked child makes of it.

A fork copies the memory of all threads but only one of the threads. A lock that another one held stays
locked in the child for ever, and whatever it was changing stays half changed; the threads of a pool are gone.
So what is shared says here how it is renewed in a child.
"""

import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Renewable(Protocol):
    """Something that has to be renewed in a forked child."""

    def renew(self) -> None:
        """Become usable again. Runs in the child before any other code does: no waiting, no errors."""
        ...


_renewables: "weakref.WeakSet[Renewable]" = weakref.WeakSet()


def renew_in_child(thing: Renewable) -> None:
    """Have something renewed in every child that this process forks, as long as it exists."""
    _renewables.add(thing)


def _renew_all() -> None:
    # `tokenizers` has no threads in a child, and waits for them for ever where this variable asks for them.
    # Where nothing is said it works without them by itself.
    if "TOKENIZERS_PARALLELISM" in os.environ:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for thing in list(_renewables):
        thing.renew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)


class Lock:
    """A lock that is free in a forked child, and that the thread which holds it may take again.

    The second matters where the garbage collector, or a signal, can run the same code within the lock: it
    closes an abandoned stream, which counts what it did.

    Attributes:
        lost: whether a thread held it that this process does not have, because it was forked meanwhile. What
            the lock guards may be half changed then; who has put it right sets this to False.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.lost = False
        renew_in_child(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def renew(self) -> None:
        """See `Renewable`."""
        if self._lock.acquire(blocking=False):  # free, or held by the thread that forked
            self._lock.release()
        else:
            self._lock, self.lost = threading.RLock(), True

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        # What holds a lock can be copied; the copy has a lock of its own.
        return Lock, ()


class Once(Generic[T]):
    """A value that is made when it is first asked for, by whichever thread that is, and never again.

    It does not know how: whoever has it would keep itself alive by that.
    """

    def __init__(self) -> None:
        self._made: list[T] = []
        self._lock = Lock()

    def get(self, make: Callable[[], T]) -> T:
        """The value; `make` makes it. An error is not kept: who asks next tries again."""
        if not self._made:
            with self._lock:
                if not self._made:
                    self._made.append(make())
        return self._made[0]
