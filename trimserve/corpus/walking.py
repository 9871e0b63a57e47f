"""Files below a folder and globs with `**`: links are followed, and no folder is visited twice."""

import glob
from collections.abc import Iterator
from pathlib import Path

_ANY_DEPTH = "**"


def walk(folder: Path) -> Iterator[Path]:
    """Yield a folder and those below it, sorted by path; hidden ones are left out.

    Links to folders are followed. A folder that links lead to again (a loop, or two links to one folder) is
    yielded where it is met first.
    """
    seen: set[tuple[int, int]] = set()
    open_folders = [folder]
    while open_folders:
        current = open_folders.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield current
        below = [path for path in current.iterdir() if path.name[0] != "." and path.is_dir()]
        open_folders += sorted(below, reverse=True)


def files_below(folder: Path) -> list[Path]:
    """The regular files below a folder, sorted by path; hidden ones are left out."""
    found = [
        path
        for current in walk(folder)
        for path in current.iterdir()
        if path.name[0] != "." and path.is_file()
    ]
    return sorted(found)


def glob_paths(pattern: str) -> list[str]:
    """What a pattern matches, sorted; ``**`` is any number of folders, each visited once."""
    parts = Path(pattern).parts
    if _ANY_DEPTH not in parts:
        return sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob takes no absolute patterns
    at = parts.index(_ANY_DEPTH)
    before, after = str(Path(*parts[:at])), parts[at + 1 :]
    roots = [before] if not glob.has_magic(before) else sorted(glob.glob(before))  # noqa: PTH207
    found: set[str] = set()
    for root in roots:
        if Path(root).is_dir():
            for folder in walk(Path(root)):
                found.update(glob_paths(str(Path(glob.escape(str(folder)), *(after or ("*",))))))
    return sorted(found)
