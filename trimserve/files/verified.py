"""What was hashed before: a large file is not hashed again while the system says that nobody wrote to it.

A file is known by its device, its number there, its size and the times of its last change, in nanoseconds;
each write moves them, and the time of the inode's change cannot be set back by a program. What is kept is an
empty file a verified one, whose name is a hash of all that. It is forgotten after `REMEMBERED_DAYS`.
"""

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

from trimserve.files.held import HeldFile

# A smaller file is hashed in less time than it is looked up.
REMEMBER_FROM_BYTES = 4 << 20
REMEMBERED_DAYS = 30
# Two writes within a tick of the system's clock leave the same time of change.
_SETTLED_SECONDS = 2.0
_MOST_ENTRIES = 4096


def is_remembered(file: HeldFile, sha256: str) -> bool:
    """Whether this file was found to have this hash before, and was not written to since."""
    if file.size < REMEMBER_FROM_BYTES:
        return False
    folder = _folder()
    try:
        _check_private(folder)
        age = time.time() - (folder / _key(file, sha256)).stat().st_mtime
    except OSError:
        return False
    return 0 <= age < REMEMBERED_DAYS * 86_400


def remember(file: HeldFile, sha256: str) -> None:
    """Note that a file was hashed and has this hash; does nothing where that cannot be known or noted."""
    status = file.status
    changed = max(status.st_mtime, status.st_ctime)
    if file.size < REMEMBER_FROM_BYTES or time.time() - changed < _SETTLED_SECONDS:
        return
    folder = _folder()
    with contextlib.suppress(OSError):  # a home that is read-only, or full: the file is hashed again
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        (folder / _key(file, sha256)).touch()
        _thin(folder)


def _key(file: HeldFile, sha256: str) -> str:
    status = file.status
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/Library/Caches")  # noqa: PTH111 - never fails
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never fails
    return Path(base or os.path.expanduser("~")) / "trimserve" / "verified"  # noqa: PTH111


def _check_private(folder: Path) -> None:
    """Raise an OSError where somebody else could have written the notes."""
    if not hasattr(os, "geteuid"):
        return
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is open to others")


def _thin(folder: Path) -> None:
    notes = list(folder.iterdir())
    if len(notes) > _MOST_ENTRIES:
        for note in sorted(notes, key=lambda note: note.stat().st_mtime)[: _MOST_ENTRIES // 2]:
            note.unlink(missing_ok=True)
