"""Temporary folders that the next run at their place removes where this one was killed."""

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimserve.files.claim import claim, clear_dead


@contextlib.contextmanager
def scratch_folder(name: str, near: Path | None = None) -> Iterator[Path]:
    """Give an empty folder for the block; those of the same name whose process is dead are removed first.

    Args:
        name: what it is for, as a part of its name, e.g. ``"full"``.
        near: the existing folder to make it in; the system's temporary one by default.
    """
    place = Path(tempfile.gettempdir()) if near is None else near
    clear_dead(place, f"trimserve-{name}-")
    target = place.resolve() / f"trimserve-{name}-{secrets.token_hex(4)}"
    with claim(target) as held:
        folder = held.path("part")
        folder.mkdir(0o700)
        yield folder


@contextlib.contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """Give an empty folder beside one that is being written, under a name that belongs to it.

    Args:
        output: a staged or temporary folder: what removes that after a kill removes this too.
    """
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f"{output.name}.") as folder:
        yield Path(folder)
