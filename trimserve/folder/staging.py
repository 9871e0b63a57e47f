"""Writing a folder all or not at all: a temporary one beside the target, moved in its place at the end."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimserve.errors import UsageError
from trimserve.files.atomic import umask
from trimserve.folder.names import MANIFEST_NAME


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target`, moved in its place when the block ends without an error.

    Args:
        target: the folder to make.
        overwrite: replace a folder that trimserve made (one that holds a `trimserve.json`).

    Raises:
        UsageError: `target` exists, is not empty, and may not be replaced.
    """
    check_target(target, overwrite=overwrite)
    target = target.resolve()  # "." has neither a name nor a parent
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        error.filename = str(target.parent)  # the temporary name says nothing to a user
        raise
    staging.chmod(0o777 & ~umask())  # mkdtemp makes a private one
    try:
        yield staging
        check_target(target, overwrite=overwrite)  # another process may have filled it meanwhile
        _swap(staging, target)
    except OSError as error:
        error.filename = error.filename or str(target)  # a full disk is reported without a name
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that cannot be written without losing something that is not ours.

    Raises:
        UsageError: `target` is a file, or a non-empty folder that may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file: choose a folder that does not exist yet.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target} is not empty: choose another folder or pass --overwrite.")
    if not (target / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{target} holds no {MANIFEST_NAME}, so it was not made by trimserve and --overwrite will not "
            "replace it: choose another folder."
        )


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    # A folder cannot be replaced in one step: keep the old one until the new one stands.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        staging.rename(target)
    except BaseException:  # Ctrl-C too must not leave the target missing
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
