"""Read a slice of a file, a stream, or texts from memory as documents."""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trimserve.corpus.csv_rows import read_csv
from trimserve.corpus.documents import Document, Faults, Reading, cut_documents, decode, split_units
from trimserve.corpus.files import CorpusFile, CorpusSource, changed
from trimserve.corpus.parquet import read_parquet
from trimserve.corpus.rows import encodable, read_jsonl
from trimserve.corpus.slices import Slice, boundary
from trimserve.corpus.streams import Section, drain, open_section

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which part of a document a text begins with, and whether it is cut at its end."""

    first_part: int = 0
    cut: bool = False


WHOLE = Bounds()


class SliceReader:
    """The documents of a slice.

    Attributes:
        slice: the slice.
        faults: what was wrong with it, when it has been read.
        count: bytes read so far; for parquet, of the file's share at the end.
    """

    def __init__(self, piece: Slice, reading: Reading, faults: Faults) -> None:
        self.slice = piece
        self.faults = faults
        self._reading = reading
        self._section: Section | None = None
        self._done = 0

    @property
    def count(self) -> int:
        """Bytes of the file read so far; those of a parquet slice count at its end."""
        return self._section.count if self._section is not None else self._done

    @property
    def sha256(self) -> str | None:
        """The hash of what was read, once it was; None for parquet, which is not read in order."""
        return self._section.digest.hexdigest() if self._section is not None else None

    def documents(self) -> Generator[Document]:
        """Yield the documents in order.

        Raises:
            UsageError: a file that is damaged or ends early; or see `Faults.meet`.
            MismatchError: a file that changed since the slice was planned.
            MissingExtraError: the format needs a package that is not installed.
        """
        file = self.slice.file
        if file.format == "parquet":
            groups = range(self.slice.start, self.slice.end)
            place = lambda number: f"{file.name}, row {number:,}"  # noqa: E731
            yield from read_parquet(file, groups, place, self._reading, self.faults)
            self._done = self.slice.bytes
            return
        with Path(file.path).open("rb") as raw:
            start, end = 0, None
            if not self.slice.whole:
                end = _end(raw, self.slice, self._reading)
                start = min(boundary(raw, self.slice.start, self._reading, file), end)
                raw.seek(start)
            self._section = Section(raw, end)
            stream = open_section(self._section, file.compression, file.name)
            place = _places(file, start)
            bounds = Bounds(int(start > 0), cut=end is not None and end < file.bytes)
            yield from read_stream(stream, file.format, place, self._reading, self.faults, bounds)
            drain(self._section)
        if self._section.count != (file.bytes if end is None else end) - start:
            raise changed(file)


def _end(raw: IO[bytes], piece: Slice, reading: Reading) -> int:
    if piece.end >= piece.file.bytes:
        return piece.file.bytes
    return boundary(raw, piece.end, reading, piece.file)


def _places(file: CorpusFile, start: int) -> Callable[[int], str]:
    def place(line: int) -> str:
        with Path(file.path).open("rb") as raw:  # only for messages, so it may take its time
            before = 0
            while raw.tell() < start:
                before += raw.read(min(_BLOCK_BYTES, start - raw.tell())).count(b"\n")
        return f"{file.name}, line {before + line:,}"

    return place if start else lambda line: f"{file.name}, line {line:,}"


def read_stream(
    stream: IO[bytes],
    format_: str,
    place: Callable[[int], str],
    reading: Reading,
    faults: Faults,
    bounds: Bounds = WHOLE,
) -> Iterator[Document]:
    """The documents of a stream of a format other than parquet.

    Args:
        stream: decompressed bytes.
        format_: "text", "jsonl", "csv" or "tsv".
        place: names a line by its number from 1.
        reading: how rows become documents.
        faults: what to do about bad rows.
        bounds: where a text begins and ends in its document.
    """
    if format_ == "jsonl":
        yield from read_jsonl(stream, place, reading, faults)
    elif format_ in ("csv", "tsv"):
        yield from read_csv(stream, "\t" if format_ == "tsv" else ",", place, reading, faults)
    else:
        origin = lambda: place(1).rpartition(", ")[0]  # noqa: E731
        pieces = decode(iter(lambda: stream.read(_BLOCK_BYTES), b""), place, faults)
        most = reading.max_line
        if reading.unit == "document":
            first, cut = bounds.first_part, bounds.cut
            yield from cut_documents(pieces, first_part=first, cut=cut, origin=origin, most=most)
        else:
            units = split_units(pieces, reading.unit, most=most, origin=origin)
            yield from (Document(unit, origin=origin) for unit in units)


class TextsReader:
    """Documents from memory, hashed with their borders."""

    def __init__(self, texts: Iterable[str], reading: Reading, faults: Faults) -> None:
        self._texts, self._reading, self._faults = texts, reading, faults
        self._digest = hashlib.sha256()
        self.count = 0

    @property
    def source(self) -> CorpusSource:
        """What was read so far."""
        return CorpusSource("texts", self._digest.hexdigest(), self.count)

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order; an empty text is one."""
        for number, text in enumerate(self._texts, 1):
            if encodable(text, lambda: f"text {number:,}", self._faults) is None:  # noqa: B023
                continue
            encoded = text.encode()
            for block in (len(encoded).to_bytes(8, "little"), encoded):
                self._digest.update(block)
                self.count += len(block)
            if self._reading.unit == "document":
                yield from cut_documents([text])
            else:
                yield from map(Document, split_units([text], self._reading.unit))
