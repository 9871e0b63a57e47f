"""What a parquet file's footer and page headers say, read without decompressing anything.

A footer of a few bytes can announce anything, and a page of a few kilobytes can decompress to gigabytes.
What a page takes stands in its header (thrift's compact protocol), which Arrow believes and checks. The
footer is read here because pyarrow's own access to a damaged one can end the process.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_HEADER_BYTES = 1 << 12
_LONGEST_HEADER = 1 << 24  # Arrow's own limit
_MOST_DEPTH = 16


class Chunk(NamedTuple):
    """A column of a row group: its path, what it holds, and where."""

    path: str
    num_values: int
    total_compressed_size: int
    data_page_offset: int
    dictionary_page_offset: int | None


class Page(NamedTuple):
    """A page: how many values it has, its bytes decompressed, whether it is a dictionary."""

    values: int
    bytes: int
    dictionary: bool


@functools.lru_cache(maxsize=4)
def read_chunks(path: str, size: int, modified: int) -> tuple[tuple[Chunk, ...], ...] | None:  # noqa: ARG001
    """The columns of each row group, or None where the footer cannot be followed.

    Args:
        path: of the file.
        size: its bytes.
        modified: when it was written: the footer of a changed file is read anew.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(size - 8)
            length = int.from_bytes(file.read(4), "little")
            file.seek(size - 8 - length)
            footer, _ = _struct(file.read(length), 0, 0)
        return tuple(tuple(_chunk(column[3]) for column in group[1]) for group in footer[4])
    except (LookupError, TypeError, ValueError, OSError):
        return None


def _chunk(facts: dict[int, Any]) -> Chunk:
    path = ".".join(part.decode() for part in facts[3])
    return Chunk(path, facts[5], facts[7], facts[9], facts.get(11))


def read_pages(file: IO[bytes], chunk: Chunk) -> list[Page] | None:
    """The pages of a column chunk, or None where their headers cannot be followed.

    Args:
        file: the parquet file.
        chunk: which column of which row group.
    """
    offset = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        offset = min(offset, chunk.dictionary_page_offset)
    pages: list[Page] = []
    left = chunk.num_values
    try:
        while left > 0:
            header, length = _read_header(file, offset)
            kind, data = header[1], header.get(5, header.get(8, header.get(7, {})))
            values = data[1] if kind in (_DATA, _DATA_V2, _DICTIONARY) else 0
            if header[2] < 0 or header[3] < 0 or (kind != _DICTIONARY and values < 1):
                return None
            pages.append(Page(values, header[2], kind == _DICTIONARY))
            left -= 0 if kind == _DICTIONARY else values
            offset += length + header[3]
    except (IndexError, KeyError, TypeError, ValueError, OSError):
        return None
    return pages


def most_bytes(pages: Sequence[Page], rows: int) -> int:
    """The most that so many neighbouring values can take, dictionary entries written out."""
    data = [page for page in pages if not page.dictionary]
    largest = end = size = within = 0
    for begin, page in enumerate(data):
        # All pages that values from the last one of `page` on can lie in.
        while end < len(data) and (end <= begin or within - page.values + 1 < rows):
            size += data[end].bytes
            within += data[end].values
            end += 1
        largest = max(largest, size)
        size -= page.bytes
        within -= page.values
    return largest + rows * max((page.bytes for page in pages if page.dictionary), default=0)


def _read_header(file: IO[bytes], offset: int) -> tuple[dict[int, Any], int]:
    wanted = _HEADER_BYTES
    while True:
        file.seek(offset)
        content = file.read(wanted)
        try:
            return _struct(content, 0, 0)
        except IndexError:
            if len(content) < wanted or wanted >= _LONGEST_HEADER:
                raise
            wanted *= 16


def _struct(content: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct as field number -> value, and where it ends."""
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while head := content[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        fields[number], at = _value(content, at, head & 15, depth)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return content[at], at + 1
    if kind in (4, 5, 6):
        return _integer(content, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        size, at = _varint(content, at)
        if size > len(content) - at:
            raise IndexError
        return content[at : at + size], at + size
    if kind in (9, 10):
        return _list(content, at, depth)
    if kind == 12:
        return _struct(content, at, depth + 1)
    raise ValueError(f"no type {kind}")


def _list(content: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    size, of = content[at] >> 4, content[at] & 15
    at += 1
    if size == 15:
        size, at = _varint(content, at)
    if size > len(content) - at:
        raise IndexError
    entries = []
    for _ in range(size):
        entry, at = (None, at + 1) if of in (1, 2) else _value(content, at, of, depth + 1)
        entries.append(entry)
    return entries, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while content[at] & 0x80:
        value |= (content[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | content[at] << shift, at + 1


def _integer(content: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    return (value >> 1) ^ -(value & 1), at
