"""Room on a disk, asked for before the work."""

import shutil
from pathlib import Path

from trimserve.console import human_bytes
from trimserve.errors import TrimserveError


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse work whose result cannot fit.

    Args:
        folder: where it will be written; it need not exist yet.
        needed: bytes that it takes at least.
        what: the subject of the message, e.g. ``"the restored checkpoint"``.

    Raises:
        TrimserveError: fewer bytes are free.
    """
    place = nearest_folder(folder)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise TrimserveError(
            f"{what} takes at least {human_bytes(needed)}, and {place} has {human_bytes(free)} free: free "
            "some space or choose another folder."
        )


def nearest_folder(path: Path) -> Path:
    """The path itself, or what is nearest above it and exists."""
    return next(place for place in (path, *path.parents) if place.exists())
