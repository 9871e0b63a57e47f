"""The right to write at a place, held by one process at a time, and what dead ones left there.

Whatever a run makes beside its target `NAME` is called `.NAME.trimserve.…`. Before any of it there is
`.NAME.trimserve.owner`, which says whose it is, and which the process holds locked. The system drops the lock
when the process ends, however it ends, so the next run at that place knows what it finds there: under a lock
that it cannot have it is alive, and left alone; else it is left over, and removed.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from trimserve.errors import UsageError
from trimserve.files.owner import Owner
from trimserve.interrupts import uninterrupted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_MARK = ".trimserve."
# Of the 255 bytes that a name may have, what is left to the target's own.
_LONGEST_STEM = 160
_PAUSE = 0.02
_LONGEST_OWNER = 1 << 20
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class BusyError(UsageError):
    """Another process is writing at the place."""


@dataclass(slots=True)
class Claim:
    """A place held by this process.

    Attributes:
        target: what is to be made.
        folder: where everything lies until then.
        descriptor: of the owner file.
    """

    target: Path
    folder: Path
    descriptor: int

    def path(self, ending: str) -> Path:
        """A name beside the target that the next run knows as ours."""
        return self.folder / (hidden_prefix(self.target) + ending)

    def say(self, moving: Sequence[str] = ()) -> None:
        """Write the owner file, and what is about to be moved."""
        owner = dataclasses.replace(Owner.this(), moving=tuple(moving))
        os.ftruncate(self.descriptor, 0)
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        os.write(self.descriptor, owner.to_bytes())
        if moving:
            os.fsync(self.descriptor)

    def clear(self) -> list[str]:
        """Remove everything beside the target that is ours; gives the names."""
        names = leftovers(self.folder, self.target)
        for name in names:
            remove(self.folder / name)
        return names


@contextlib.contextmanager
def claim(target: Path, folder: Path | None = None, *, wait: float = 1.0) -> Iterator[Claim]:
    """Hold a place for the block; what is still beside the target at its end is removed.

    What a dead process left there is put right first: an old folder that it had moved aside comes back where
    the target is missing, all else is removed, and both are said.

    Args:
        target: the file or folder to be made, resolved.
        folder: where to put what is ours; the target's parent by default.
        wait: seconds to wait for another process.

    Raises:
        BusyError: another process holds the place.
        OSError: the folder may not be written, or the disk is full.
    """
    place = folder or target.parent
    descriptor, former = _take(place / (hidden_prefix(target) + "owner"), target, wait)
    held = Claim(target, place, descriptor)
    try:
        _recover(held, former)
        held.say()
        yield held
    finally:
        with uninterrupted():
            with contextlib.suppress(OSError):  # the folder itself may be gone
                held.clear()
            _give_back(place / (hidden_prefix(target) + "owner"), descriptor)


def hidden_prefix(target: Path) -> str:
    """What the names of everything beside a target begin with."""
    name = target.name or "root"
    if len(raw := os.fsencode(name)) > _LONGEST_STEM:
        name = raw[: _LONGEST_STEM - 17].decode(errors="ignore") + "-" + sha256(raw).hexdigest()[:16]
    return f".{name}{_MARK}"


def leftovers(folder: Path, target: Path) -> list[str]:
    """Names in a folder that belong to a target, its owner file apart."""
    prefix = hidden_prefix(target)
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.startswith(prefix))
    return [name for name in names if name != prefix + "owner"]


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as the system lets us: it hides no other error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def clear_dead(folder: Path, stem: str) -> None:
    """Remove what dead processes left in a folder under any name that begins with `stem`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        ending = f"{_MARK}owner"
        found = [entry.name for entry in entries if entry.name.startswith(f".{stem}")]
        for name in found:
            if name.endswith(ending):
                with contextlib.suppress(OSError, BusyError), claim(folder / name[1 : -len(ending)], wait=0):
                    pass


def _take(path: Path, target: Path, wait: float) -> tuple[int, Owner | None]:
    """Open and lock an owner file; gives the owner that it named before, who is dead."""
    deadline = time.monotonic() + wait
    while True:
        descriptor = os.open(path, _FLAGS, 0o666)
        try:
            former = _read(descriptor)
            locked = _lock(descriptor)
            if locked is None:  # no locks here: what it says must do
                if former is not None and former.is_untold:
                    raise _untold(former, path, target)
                locked = former is None or not former.runs
            # Between opening and locking the last owner may have removed it: then this lock is worth nothing.
            if locked and _is_at(descriptor, path):
                former = _read(descriptor)
                if former is not None and former.is_elsewhere:
                    raise _untold(former, path, target)
                return descriptor, former
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{former or 'another process'} is writing {target}: wait until it is done, or choose "
                "another name."
            )
        time.sleep(_PAUSE)


def _read(descriptor: int) -> Owner | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return Owner.read(os.read(descriptor, _LONGEST_OWNER))


def _untold(former: Owner, path: Path, target: Path) -> BusyError:
    # A lock may not reach from machine to machine, so it proves nothing of theirs.
    return BusyError(
        f"{former} was writing {target}, and whether it still does cannot be told from here: remove {path} "
        "if it does not, or choose another name."
    )


def _lock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where there is no such thing."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _give_back(path: Path, descriptor: int) -> None:
    windows = os.name == "nt"  # where an open file cannot be removed
    if windows:
        os.close(descriptor)
    with contextlib.suppress(OSError):  # removed by hand meanwhile
        path.unlink()
    if not windows:
        os.close(descriptor)


def _recover(held: Claim, former: Owner | None) -> None:
    """Put right what the former owner of a place left."""
    who = f"{former or 'a process'}, which ended before it was done,"
    old, target = held.path("old"), held.target
    if old.is_dir() and _is_missing(target):
        with uninterrupted():
            old.rename(target)
        logger.warning("%s had moved %s aside: the folder is back in its place.", who, target)
    moved = () if former is None else former.moving
    if moved and not (held.folder / moved[-1]).exists():
        for name in moved:
            remove(held.folder / name)
    if names := held.clear():
        logger.warning("%s left %s in %s: removed.", who, ", ".join(names), held.folder)


def _is_missing(target: Path) -> bool:
    return not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))
