"""This process: its CPUs, its memory, and giving free memory back to the system."""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a process in bytes; a field is None where the system does not tell it apart.

    Attributes:
        resident: all of it.
        anonymous: private to the process: it cannot be dropped.
        file: pages of mapped files, which the system drops when it needs room.
        peak: the largest `resident` so far.
    """

    resident: int
    anonymous: int | None = None
    file: int | None = None
    peak: int | None = None


def available_cpus() -> int:
    """CPUs this process may run on (cgroup affinity counts where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> Memory:
    """Measure this process: VmRSS, RssAnon, RssFile and VmHWM on Linux, psutil's RSS elsewhere."""
    if not _STATUS.exists():
        import psutil  # Linux needs no package for this

        return Memory(int(psutil.Process().memory_info().rss))
    fields = dict(line.split(":", 1) for line in _STATUS.read_text("utf-8").splitlines() if ":" in line)
    wanted = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
    return Memory(*(1024 * int(fields[name].split()[0]) for name in wanted))


def peak_resident() -> int:
    """Largest resident memory of this process so far in bytes; 0 where the system does not tell.

    On Linux this is VmHWM: getrusage's maximum is inherited from the process that started this one.
    """
    if _STATUS.exists():
        return memory().peak or 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_free_memory() -> None:
    """Give free pages of the C heap back to the system.

    Reading a tokenizer.json of 5 MB frees some 50 MB that glibc would otherwise keep for the life of the
    process, because they lie below blocks still in use. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)
