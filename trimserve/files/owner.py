"""Who writes at a place: the process that an owner file names, and whether it still runs."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Owner:
    """The content of an owner file.

    Attributes:
        pid: of the process.
        host: name of its machine; each container has its own.
        boot: what the system calls the time since it was started, the same in all containers of a machine;
            empty where it has no such name.
        started: when the process began, in the system's own clock: another process that gets the same number
            has another; empty where that is not known.
        moving: names that are being moved into the target one by one, the last one last.
    """

    pid: int
    host: str
    boot: str
    started: str
    moving: tuple[str, ...] = field(default=())

    @classmethod
    def this(cls) -> Self:
        """The process that asks."""
        return cls(os.getpid(), platform.node(), _boot(), _started(os.getpid()))

    @classmethod
    def read(cls, content: bytes) -> Self | None:
        """Parse an owner file; None where it holds none, as after a kill before it was written."""
        try:
            raw = json.loads(content)
            names = tuple(map(str, raw["moving"]))
            owner = cls(int(raw["pid"]), str(raw["host"]), str(raw["boot"]), str(raw["started"]), names)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        # The names are removed in the target: none may lead out of it.
        plain = all(name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"} for name in names)
        return owner if plain else None

    def to_bytes(self) -> bytes:
        """The content of an owner file."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def is_elsewhere(self) -> bool:
        """Whether it ran on a machine that cannot be asked: another host, and another start of a system."""
        return self.host != platform.node() and (not self.boot or self.boot != _boot())

    @property
    def is_untold(self) -> bool:
        """Whether nothing but a lock could tell if it still runs; Windows ends a process that is asked."""
        return self.is_elsewhere or os.name == "nt"

    @property
    def runs(self) -> bool:
        """Whether it still runs, by its number and start alone: for file systems that have no locks."""
        if self.is_untold:
            return True
        if self.boot != _boot():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return not self.started or self.started == _started(self.pid)

    def __str__(self) -> str:
        where = "" if self.host == platform.node() else f" on {self.host}"
        return f"process {self.pid}{where}"


def _boot() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]  # field 22; the name before may hold anything
