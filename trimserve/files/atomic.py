"""Files that are written whole or not at all.

Each is staged beside its place, brought to the disk, and moved there in one step; for folders see
`folder/staging.py`.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trimserve.errors import UsageError
from trimserve.files.claim import claim
from trimserve.interrupts import uninterrupted

# Seconds that a file waits for another process that is writing it: longer than writing one takes.
_WAIT = 60.0
_recorders: list[list[Path]] = []


@contextlib.contextmanager
def atomic_path(path: Path, *, follow: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`, moved in place when the block ends without an error.

    Args:
        path: the file to write.
        follow: where `path` is a link, write the file that it points to; else the link is replaced.

    Raises:
        UsageError: its folder does not exist.
        OSError: it may not be written, or the disk is full: what stood before still does.
    """
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: create it first.")
    target = path.resolve() if follow else path.parent.resolve() / path.name
    with named(path), claim(target, wait=_WAIT) as held:
        temporary = held.path("part")
        temporary.touch(exist_ok=False)
        yield temporary
        sync(temporary)
        with uninterrupted():
            temporary.replace(target)
            sync_folder(target.parent)
            note_written(path)


def check_place(path: Path) -> None:
    """Refuse a file that cannot be written, before the work; what killed runs have left there is put right.

    Raises:
        UsageError: its folder does not exist or may not be written, or the name is none; or another process
            is writing it.
        OSError: the disk is full.
    """
    try:
        if not path.parent.is_dir():
            raise UsageError(f"the folder {path.parent} does not exist: create it first.")
        with named(path), claim(path.resolve()), contextlib.suppress(FileNotFoundError):
            path.stat()  # a name may be too long for the file and not for what lies beside it
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be written ({why}): choose another name.") from error


def replace_in_order(folder: Path, steps: Sequence[tuple[str, bytes]]) -> None:
    """Replace files of a folder one after the other, after all of them lie on the disk.

    A full disk or a kill before the first step changes nothing; between two steps the folder is as the steps
    so far have left it, each file whole. A file may be in several steps.

    Args:
        folder: the folder.
        steps: name and content.

    Raises:
        OSError: see `atomic_path`.
    """
    with named(folder), claim(folder.resolve() / steps[0][0], wait=_WAIT) as held:
        staged = [held.path(f"{number}.part") for number in range(len(steps))]
        for path, (_, content) in zip(staged, steps, strict=True):
            path.write_bytes(content)
            sync(path)
        with uninterrupted():
            for path, (name, _) in zip(staged, steps, strict=True):
                path.replace(folder / name)
                sync_folder(folder)  # the order holds on the disk too
            note_written(folder)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Let errors of the system name the path that the user knows: a full disk is reported without any."""
    try:
        yield
    except OSError as error:
        # One without a number is a library's own, and its reason is all it has: a name would replace it.
        # Of a copy the second name is where it is written.
        hidden = any(".trimserve." in str(name) for name in (error.filename, error.filename2))
        if error.errno is not None and (hidden or error.filename is None):
            error.filename, error.filename2 = str(path), None
        raise


def sync(path: Path) -> None:
    """Bring a file's content to the disk, so that no loss of power leaves its name with less."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk, where the system can; what was done stands in any case."""
    if os.name != "nt":  # which opens no folders
        with contextlib.suppress(OSError):
            sync(path)


@contextlib.contextmanager
def recording() -> Iterator[list[Path]]:
    """Give a list of what is written in the block, for a message about what stands."""
    written: list[Path] = []
    _recorders.append(written)
    try:
        yield written
    finally:
        _recorders.remove(written)


def note_written(path: Path) -> None:
    """Enter a file or folder that stands in its place now."""
    for written in _recorders:
        written.append(path.absolute())
