"""A file that is there by name and not by content: what an unfinished download or a bare clone leaves."""

from pathlib import Path

from trimserve.errors import MismatchError
from trimserve.files.held import HeldFile

_LFS_MARK = b"version https://git-lfs.github.com/spec/"


def check_content(path: Path | HeldFile) -> None:
    """Refuse a file that is not there in truth: empty, or the pointer that Git LFS leaves in its place.

    Raises:
        MismatchError: see above.
    """
    file = path if isinstance(path, HeldFile) else HeldFile(path)
    path, begin = file.path, file.read(0, len(_LFS_MARK))
    if not begin:
        raise MismatchError(f"{path} is empty: fetch it again.")
    if begin == _LFS_MARK:
        raise MismatchError(
            f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its repository, or "
            "fetch it from the hub."
        )
