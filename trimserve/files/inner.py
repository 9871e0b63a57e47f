"""The one check of paths that a model's own files name: they stay within the model's folder."""

from pathlib import Path, PurePosixPath, PureWindowsPath

from trimserve.errors import MismatchError

_LONGEST = 1024


def inner_path(folder: Path, name: str, origin: str) -> Path:
    """The path of a file or folder that a model's file names.

    A link to a file is that file: who made it could have put the file there. Links to folders are followed
    within the folder, and into the blobs of the hub's cache that the folder belongs to.

    Args:
        folder: the model's folder.
        name: what stands in the file: plain names with ``/`` between them.
        origin: the file that names it, as the subject of the message.

    Raises:
        MismatchError: the name is empty or absolute, has a ``..``, a backslash, a drive or a NUL in it, or is
            a link to a folder elsewhere.
    """
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    plain = 0 < len(name) < _LONGEST and "\0" not in name and "\\" not in name and name.isprintable()
    if not plain or path.is_absolute() or windows.drive or windows.root or ".." in path.parts:
        shown = name if len(name) <= 100 else f"{name[:100]}…"
        raise MismatchError(
            f"{origin} names the file {shown!r}, which is not a plain name inside the folder: "
            "do not use this folder unless you know who made it."
        )
    found = folder / path
    if not _stays(found, folder):
        raise MismatchError(
            f"{found} is a link out of the folder: put what it leads to there itself, if you know who made "
            "it."
        )
    return found


def _stays(path: Path, folder: Path) -> bool:
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # links in a circle; Python before 3.13 has a RuntimeError for them
        return False
    if real.is_file() or real.is_relative_to(home):
        return True
    # The hub's cache: models--owner--name/snapshots/REVISION/… are links into models--owner--name/blobs.
    caches = [above.parent for above in home.parents if above.name == "snapshots"]
    return any(real.parent == cache / "blobs" for cache in caches)
