"""Writing a folder all or not at all: a hidden one, put in the target's place in one step at the end.

Where the staged folder lies and how it comes in place:

- Beside the target: one rename. A folder that is replaced changes places with it in one step (`exchange`);
  where the system has no such call it is moved aside first, and a run that is killed between the renames
  leaves it to the next run at that place, which moves it back (`files/claim.py`).
- In the target, where that is empty and cannot be renamed: a mount point, the current folder, a folder in one
  that may not be written. The files are moved up one by one, the manifest last, and the next run takes back
  what a killed one had moved.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trimserve.errors import UsageError
from trimserve.files.atomic import named, note_written, sync, sync_folder
from trimserve.files.claim import Claim, claim, hidden_prefix, remove
from trimserve.files.exchange import exchange
from trimserve.files.space import nearest_folder
from trimserve.folder.mounts import is_mount_point
from trimserve.folder.names import MANIFEST_NAME
from trimserve.interrupts import uninterrupted

logger = logging.getLogger(__name__)

# What a new file system has in it.
_NOTHING = ("lost+found",)


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder, put in the place of `target` when the block ends without an error.

    Args:
        target: the folder to make; a link is followed.
        overwrite: replace a folder that trimserve made (one that holds a `trimserve.json`).

    Raises:
        UsageError: see `check_target`.
        OSError: the disk is full, or cannot be written: what stood before still does.
    """
    path = _resolved(target)
    with named(target), _claimed(path, target, overwrite=overwrite) as held:
        staging = held.path("part")
        staging.mkdir()
        yield staging
        _sync_all(staging)
        with uninterrupted():
            _check_free(path, target, overwrite=overwrite)  # another process may have filled it meanwhile
            _place(held, staging, path, target)
            note_written(path)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target before the work; what killed runs have left at it is put right.

    Raises:
        UsageError: `target` is a file, a non-empty folder that may not be replaced, or at a place where
            nothing can be written; or another process is writing it.
        OSError: the disk is full.
    """
    with named(target), _claimed(_resolved(target), target, overwrite=overwrite):
        pass


def _resolved(target: Path) -> Path:
    try:
        return target.resolve()  # "." has neither a name nor a parent
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a null byte
        raise UsageError(f"{str(target)!r} is no place for a folder ({error}): choose another.") from error


@contextlib.contextmanager
def _claimed(path: Path, target: Path, *, overwrite: bool) -> Iterator[Claim]:
    """Hold a target's place, after all checks; folders above it that are made for it go again if unused."""
    with contextlib.ExitStack() as stack:
        try:
            held = _claim(stack, path, target)
            _check_free(path, target, overwrite=overwrite)
            _check_replaceable(path, target, held)
            _probe(held)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(
                f"{target} cannot be written ({error.strerror or error}): choose another folder."
            ) from error
        yield held


def _claim(stack: contextlib.ExitStack, path: Path, target: Path) -> Claim:
    _check_folder(path, target)
    if not (above := nearest_folder(path.parent)).is_dir():
        raise UsageError(f"{above} is a file, so {target} cannot be made in it: choose another folder.")
    if path.is_dir() and os.path.lexists(path / f"{hidden_prefix(path)}owner"):
        with claim(path, path):  # the last run wrote in it, and this one may take another way
            pass
    if path.is_dir() and _stays(path):
        return stack.enter_context(claim(path, path))
    stack.callback(_remove_empty, [place for place in path.parents if not place.exists()])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return stack.enter_context(claim(path))
    except OSError:
        if not path.is_dir():
            raise
        return stack.enter_context(claim(path, path))  # the target may be ours where its parent is not


def _stays(path: Path) -> bool:
    """Whether a folder cannot be renamed, or need not: a shell stands in it."""
    return is_mount_point(path) or (_is_current(path) and _is_empty(path))


def _is_current(path: Path) -> bool:
    try:
        return path.samefile(Path.cwd())
    except OSError:  # one of them is not there, or in a folder that another user's process may not look into
        return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _is_empty(path: Path) -> bool:
    ours = hidden_prefix(path)
    return all(entry.name in _NOTHING or entry.name.startswith(ours) for entry in path.iterdir())


def _check_folder(path: Path, target: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"{target} is a file: choose a folder that does not exist yet.")


def _check_free(path: Path, target: Path, *, overwrite: bool) -> None:
    _check_folder(path, target)
    if not path.exists() or _is_empty(path):
        return
    if not overwrite:
        raise UsageError(f"{target} is not empty: choose another folder or pass --overwrite.")
    if not (path / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{target} holds no {MANIFEST_NAME}, so it was not made by trimserve and --overwrite will not "
            "replace it: choose another folder."
        )


def _check_replaceable(path: Path, target: Path, held: Claim) -> None:
    if held.folder != path or _is_empty(path):
        return
    why = "is a mount point" if is_mount_point(path) else "lies in a folder that may not be written"
    raise UsageError(
        f"{target} {why}, so it cannot be replaced in one step: choose a folder in it that does not "
        "exist yet."
    )


def _probe(held: Claim) -> None:
    folder = held.path("part")
    folder.mkdir()
    folder.rmdir()


def _place(held: Claim, staging: Path, path: Path, target: Path) -> None:
    if held.folder == path:
        _move_in(held, staging, path)
        return
    current = _is_current(path)
    try:
        if not path.exists():
            staging.rename(path)
        else:
            staging.chmod(stat.S_IMODE(path.stat().st_mode))
            if _is_empty(path):
                _replace_empty(staging, path)
            elif not exchange(staging, path):
                _swap(held, staging, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UsageError(f"{target} was filled meanwhile: choose another folder.") from error
        raise
    sync_folder(path.parent)
    if current:
        os.chdir(path)
        logger.warning("%s is a new folder now: a shell in it still shows the old one until `cd .`.", path)


def _replace_empty(staging: Path, path: Path) -> None:
    if os.name == "nt":  # where nothing is renamed to what exists
        path.rmdir()
    staging.rename(path)


def _swap(held: Claim, staging: Path, path: Path) -> None:
    """The two steps of systems without `exchange`."""
    old = held.path("old")
    path.rename(old)
    try:
        staging.rename(path)
    except BaseException:
        old.rename(path)
        raise


def _move_in(held: Claim, staging: Path, path: Path) -> None:
    found = (entry.name for entry in staging.iterdir())
    names = sorted(found, key=lambda name: (name == MANIFEST_NAME, name))
    held.say(moving=names)
    try:
        for name in names:
            (staging / name).rename(path / name)
            sync_folder(path)
    except BaseException:
        for name in names:
            remove(path / name)
        raise


def _sync_all(staging: Path) -> None:
    for folder, _, files in os.walk(staging):
        for name in files:
            if not (file := Path(folder, name)).is_symlink():
                sync(file)
        sync_folder(Path(folder))
