"""Whether a folder is where a file system is mounted, so that no rename can replace it."""

import os
from pathlib import Path


def is_mount_point(path: Path) -> bool:
    """Tell whether an existing folder is a mount point, also of a part of the same file system (bind)."""
    if os.path.ismount(path):
        return True
    here, above = _mount(path), _mount(path.parent)
    return here is not None and above is not None and here != above


def _mount(path: Path) -> str | None:
    """What Linux calls the mount that a folder lies in."""
    if not hasattr(os, "O_PATH"):
        return None
    try:
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text("ascii").splitlines()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), None)
