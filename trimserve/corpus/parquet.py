"""Rows of parquet files: what the footer says is checked against itself and against what is read."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trimserve.corpus.documents import Document, Faults, Reading, too_long
from trimserve.corpus.files import CorpusFile
from trimserve.corpus.page_headers import Chunk, most_bytes, read_chunks, read_pages
from trimserve.corpus.rows import Place, Row, check_columns, row_documents
from trimserve.corpus.schemas import FIELDS as CHAT_COLUMNS
from trimserve.corpus.streams import AGAIN
from trimserve.errors import UsageError, require
from trimserve.foreign import foreign

# Rows read at a time: as many as take at most this much memory.
_BATCH_ROWS = (256, 64, 16, 4, 1)
_BATCH_BYTES = 1 << 29
# Above it, a column of lists that decompresses to so many times its bytes is no text.
_MOST_RATIO = 1000


def row_groups(file: CorpusFile) -> int:
    """Number of row groups.

    Raises:
        UsageError: the file is no parquet file, or a damaged one.
        MissingExtraError: pyarrow is not installed.
    """
    with _open(file) as opened:
        return int(opened.metadata.num_row_groups)


def read_parquet(
    file: CorpusFile, groups: range, place: Place, reading: Reading, faults: Faults
) -> Iterator[Document]:
    """The documents of some row groups of a parquet file.

    Raises:
        UsageError: the file is damaged or lacks the column, or a row is longer than `Reading.max_line`; or
            see `Faults.meet`.
    """
    with _open(file) as opened:
        with _damaged(file):
            names = opened.schema_arrow.names
        check_columns(names, reading, file.name)
        columns = list(reading.columns)
        if reading.template is not None:
            columns += [name for name in CHAT_COLUMNS if name in names]
        roots = list(dict.fromkeys(_root(column, names) for column in columns))
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
        number = sum(sizes[: groups.start])
        for group in groups:
            begin = number
            for batch in _batches(opened, group, roots, file, reading.max_line):
                for row in _rows(batch, partial(_from, place, number), reading, faults, file):
                    number += 1
                    if row is not None:
                        yield from row_documents(row, reading, partial(place, number), faults)
            if number - begin != sizes[group]:
                raise UsageError(
                    f"{file.name} holds {number - begin:,} rows in row group {group:,}, not {sizes[group]:,} "
                    f"as its footer says: {AGAIN}"
                )


def _open(file: CorpusFile) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Open a file whose footer agrees with itself."""
    parquet = require("pyarrow.parquet", extra="corpus", purpose=f"reading {file.name}")
    with _damaged(file):
        opened = parquet.ParquetFile(file.path, page_checksum_verification=True)
    try:
        with _damaged(file):
            _check_footer(opened.metadata, file)
    except BaseException:
        opened.close()
        raise
    return opened


def _damaged(file: CorpusFile) -> Any:  # noqa: ANN401 - a context
    return foreign(f"{file.name} is no whole parquet file", advice=AGAIN, error=UsageError)


def _check_footer(metadata: Any, file: CorpusFile) -> None:  # noqa: ANN401
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows != metadata.num_rows or any(group.num_rows < 0 for group in groups):
        raise UsageError(
            f"{file.name} says in its footer that it has {metadata.num_rows:,} rows, and its row groups have "
            f"{rows:,}: {AGAIN}"
        )
    lists = [metadata.schema.column(index).max_repetition_level > 0 for index in range(metadata.num_columns)]
    for number, chunks in enumerate(read_chunks(file.path, file.bytes, file.modified) or ()):
        for chunk, is_list in zip(chunks, lists, strict=True):
            if not is_list and chunk.num_values != groups[number].num_rows:  # a list has any number of them
                raise UsageError(
                    f"{file.name} says in its footer that column {chunk.path!r} has {chunk.num_values:,} "
                    f"values in row group {number:,}, which has {groups[number].num_rows:,} rows: {AGAIN}"
                )


def _batches(
    opened: Any,  # noqa: ANN401
    group: int,
    roots: list[str],
    file: CorpusFile,
    most: int,
) -> Iterator[Any]:
    rows = opened.metadata.row_group(group).num_rows
    if rows == 0:
        return
    known = read_chunks(file.path, file.bytes, file.modified)
    size = 1
    if known is not None:
        wanted = [chunk for chunk in known[group] if chunk.path.split(".")[0] in roots or chunk.path in roots]
        size = _batch_rows(file, wanted, rows, group, most)
    with _damaged(file):
        batches = opened.iter_batches(batch_size=size, row_groups=[group], columns=roots)
    while True:
        with _damaged(file):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _batch_rows(file: CorpusFile, chunks: Sequence[Chunk], rows: int, group: int, most: int) -> int:
    """How many rows can be read at a time.

    Raises:
        UsageError: a page takes more memory than text of that length can.
    """
    bound = max(_BATCH_BYTES, 2 * most)
    with Path(file.path).open("rb") as raw:
        columns = [(chunk, read_pages(raw, chunk)) for chunk in chunks]
    for chunk, pages in columns:
        for page in pages or ():
            if page.bytes > bound:
                raise UsageError(
                    f"{file.name} has a page of {page.bytes:,} bytes in column {chunk.path!r} of "
                    f"row group {group:,}, more than {bound:,}: write it anew with smaller pages, or raise "
                    "--max-line."
                )
        total = sum(page.bytes for page in pages or ())
        # How many values a row of a list has is not known before they are decompressed.
        if chunk.num_values != rows and total > max(bound, _MOST_RATIO * chunk.total_compressed_size):
            raise UsageError(
                f"{file.name} takes {total:,} bytes to decompress column {chunk.path!r} of row "
                f"group {group:,}, over {_MOST_RATIO:,} times its size: that is no text; take the file out."
            )
    if any(pages is None for _, pages in columns):
        return 1
    known = [pages for _, pages in columns if pages is not None]
    fits = (size for size in _BATCH_ROWS if sum(most_bytes(pages, size) for pages in known) <= _BATCH_BYTES)
    return next(fits, 1)


def _rows(
    batch: Any,  # noqa: ANN401
    place: Place,
    reading: Reading,
    faults: Faults,
    file: CorpusFile,
) -> list[Row | None]:
    """The rows of a batch; None for one with bytes that are not UTF-8.

    Args:
        batch: a RecordBatch.
        place: names a row by its number in the batch, from 0.
        reading: for the longest row.
        faults: what to do about bad bytes.
        file: where it comes from, for messages.
    """
    if batch.nbytes > reading.max_line:
        for index in range(batch.num_rows):
            if batch.slice(index, 1).nbytes > reading.max_line:
                raise too_long(place(index), "a row", reading.max_line)
    found = _pylist(batch, file)
    if found is not None:
        return found
    rows: list[Row | None] = []
    for index in range(batch.num_rows):
        row = _pylist(batch.slice(index, 1), file)
        if row is None:
            faults.meet(Faults.UNDECODABLE, lambda: f"{place(index)}: holds bytes that are not UTF-8.")  # noqa: B023
        rows += [None] if row is None else row
    return rows


def _pylist(batch: Any, file: CorpusFile) -> list[Row | None] | None:  # noqa: ANN401
    """The rows; None if some of their bytes are not UTF-8."""
    with _damaged(file):
        try:
            rows: list[Row | None] = batch.to_pylist()
        except UnicodeDecodeError:
            return None
    return rows


def _from(place: Callable[[int], str], before: int, index: int) -> str:
    return place(before + index + 1)


def _root(column: str, names: list[str]) -> str:
    return column if column in names else column.split(".")[0]
