"""Rows of csv and tsv files, strictly: a damaged file shows in its quotes and in the number of its fields."""

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO

from trimserve.corpus.documents import MARK, Document, Faults, Reading, too_long, undecodable
from trimserve.corpus.rows import Place, check_columns, encodable, row_documents
from trimserve.errors import UsageError

# Of csv.field_size_limit, which takes a C long. The limit of a row is the one that is met.
_CSV_FIELD = (1 << 31) - 1
_UNCLOSED = "unexpected end of data"  # as the module words it


def read_csv(
    stream: IO[bytes], delimiter: str, place: Place, reading: Reading, faults: Faults
) -> Iterator[Document]:
    """The documents of a csv file with a header; blank lines are no rows.

    Raises:
        UsageError: the file ends within quotes, has no header with the columns wanted, or a row is longer
            than `Reading.max_line`; or see `Faults.meet`.
    """
    lines = _Lines(stream, place, reading.max_line)
    header: list[str] = []
    for number, row in _rows(lines, delimiter, place, faults):
        if not header:
            header = row
            _check_header(header, place(number), reading, has_nul=lines.has_nul)
        elif len(row) != len(header):
            fields = len(row)
            faults.meet(Faults.BROKEN, lambda: _uneven(place(number), fields, len(header)))  # noqa: B023
        elif lines.has_nul:
            faults.meet(Faults.UNDECODABLE, lambda: undecodable(place(number), 0))  # noqa: B023
        else:
            record = dict(zip(header, row, strict=True))
            yield from row_documents(record, reading, partial(place, number), faults)
    if not header:
        raise UsageError(f"{place(1)}: there is no header, the first line of a csv file: take the file out.")


class _Lines:
    """Decoded lines for the csv module, which takes several for a row with line ends in quotes.

    Attributes:
        size: characters read for the row so far.
        has_nul: whether a NUL is among them.
    """

    def __init__(self, stream: IO[bytes], place: Callable[[int], str], most: int) -> None:
        self._text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
        self._place, self._most, self._number = place, most, 0
        self.begin()

    def begin(self) -> None:
        """Begin a row."""
        self.size, self.has_nul, self.first = 0, False, self._number + 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._most + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self.size += len(line)
        if self.size > self._most:
            raise too_long(self._place(self.first), "a row", self._most)
        self.has_nul = self.has_nul or "\0" in line
        return line.removeprefix(MARK) if self._number == 1 else line


def _rows(lines: _Lines, delimiter: str, place: Place, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """Rows with the numbers of their last lines."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = True
    while True:
        lines.begin()
        csv.field_size_limit(_CSV_FIELD)  # of the process; the default is less than a long document
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            reason, number = str(error), rows.line_num
            if reason == _UNCLOSED:
                raise UsageError(
                    f"{place(lines.first)}: the file ends within a quoted field that begins in this row: it "
                    "was cut short, or a quote is missing; mend the file."
                ) from error
            broken = Faults(skip=False) if header else faults
            broken.meet(Faults.BROKEN, lambda: f"{place(number)}: broken csv ({reason}): mend the file.")  # noqa: B023
            continue
        if row:
            header = False
            yield rows.line_num, row


def _check_header(header: list[str], origin: str, reading: Reading, *, has_nul: bool) -> None:
    if has_nul:
        raise UsageError(undecodable(origin, 0))
    for name in header:
        encodable(name, lambda: origin, Faults(skip=False))
    check_columns(header, reading, origin)
    twice = [name for name in reading.columns if header.count(name) > 1]
    if twice:
        raise UsageError(f"{origin}: {len(header)} columns, two of them {twice[0]!r}: rename one.")


def _uneven(origin: str, found: int, expected: int) -> str:
    return (
        f"{origin}: the row has {found} fields, the header {expected}: mend the file (a field with the "
        "delimiter or a line end in it stands in quotes)."
    )
