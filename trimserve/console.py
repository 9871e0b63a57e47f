"""What people see: aligned terminal tables, sizes with units, progress bars on stderr."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_UNITS = ("B", "kB", "MB", "GB", "TB")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format rows as an aligned table: the first column to the left, the others to the right.

    Example:
        >>> print(table(["model", "rows"], [["full", "30,522"], ["trimmed", "6,144"]]))
        model      rows
        -------  ------
        full     30,522
        trimmed   6,144
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [_line(row, widths) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join((first, *rest)).rstrip()


def human_bytes(count: float) -> str:
    """Format a byte count with three significant digits and a decimal unit.

    Example:
        >>> human_bytes(90_868_376), human_bytes(512)
        ('90.9 MB', '512 B')
    """
    size = float(count)
    for unit in _UNITS:
        if abs(size) < 999.5 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def percent(share: float) -> str:
    """Format a share of one as a percentage with two decimals.

    Example:
        >>> percent(0.99954)
        '99.95 %'
    """
    return f"{100 * share:.2f} %"


def progress(total: int | None, description: str, unit: str, *, show: bool = True) -> "tqdm[Any]":
    """A progress bar on stderr that shows only on a terminal and leaves no trace."""
    from tqdm import tqdm  # a fifth of the time of `import trimserve`, and seldom shown

    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        leave=False,
        disable=not (show and sys.stderr.isatty()),
        file=sys.stderr,
    )
