"""When something hangs: by the processor's time that it took, which is the same on a busy machine."""

import contextlib
import signal
from collections.abc import Iterator

SECONDS = 10  # of the processor's time
# What waits for ever takes none of it: so many seconds of the clock end that, on any machine.
PATIENCE = 180


class Hang(BaseException):
    """A block took longer than `SECONDS`, or waited longer than `PATIENCE`."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise `Hang` in a block of the main thread that hangs."""

    def stop(*_: object) -> None:
        raise Hang

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    timers = {
        signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE),
        signal.SIGPROF: (signal.ITIMER_PROF, SECONDS),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def limit_this_process() -> None:
    """Have the system end this process when it has taken `SECONDS` more of the processor's time."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
