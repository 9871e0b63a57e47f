"""Slices of a corpus: what one worker reads at a time, cut where no document or token is torn."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from trimserve.corpus.documents import CUT, Reading
from trimserve.corpus.files import CorpusFile
from trimserve.errors import require

SLICE_BYTES = 1 << 25
_BLOCK_BYTES = 1 << 20
_SCAN_BYTES = 1 << 16
_CUT_BYTES = 12
_CONTINUATION = bytes(range(0x80, 0xC0))


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of a file.

    Attributes:
        file: the file.
        start: where it begins, before it is moved to where a document or part begins; bytes of the file,
            row groups of a parquet file.
        end: where it ends, in the same sense.
        whole: whether it is the whole file.
        shared: whether it is a part of one document, which other slices of the file continue.
    """

    file: CorpusFile
    start: int
    end: int
    whole: bool
    shared: bool = False

    @property
    def bytes(self) -> int:
        """How much of the file it is; estimated for parquet."""
        if self.whole or self.file.format != "parquet":
            return self.file.bytes if self.whole else self.end - self.start
        return self.file.bytes * (self.end - self.start) // max(_row_groups(self.file.path), 1)


def plan_slices(files: Sequence[CorpusFile], reading: Reading, slice_bytes: int | None = None) -> list[Slice]:
    """Cut the files of a corpus into slices. The plan depends on the files alone, not on the machine."""
    return [piece for file in files for piece in _slices(file, reading, slice_bytes or SLICE_BYTES)]


def _slices(file: CorpusFile, reading: Reading, slice_bytes: int) -> Iterator[Slice]:
    if file.format == "parquet":
        groups = _row_groups(file.path)
        step = max(1, round(groups * slice_bytes / max(file.bytes, 1)))
        yield from _steps(file, groups, step, shared=False)
    elif file.compression or file.format in ("csv", "tsv") or file.bytes <= slice_bytes:
        # A quoted field of a csv file can hold line ends, so only its beginning is sure.
        yield Slice(file, 0, file.bytes, whole=True)
    else:
        shared = file.format == "text" and reading.unit == "document"
        yield from _steps(file, file.bytes, slice_bytes, shared=shared)


def _steps(file: CorpusFile, total: int, step: int, *, shared: bool) -> Iterator[Slice]:
    whole = total <= step
    for start in range(0, max(total, 1), step):
        yield Slice(file, start, min(start + step, total), whole, shared and not whole)


def _row_groups(path: str) -> int:
    parquet = require("pyarrow.parquet", extra="corpus", purpose=f"reading {path}")
    with parquet.ParquetFile(path) as file:
        return int(file.metadata.num_row_groups)


class Section(io.RawIOBase):
    """A stretch of a file that hashes what it gives.

    Attributes:
        digest: sha256 of the bytes read so far.
        count: their number.
    """

    def __init__(self, file: IO[bytes], end: int | None = None) -> None:
        """Read `file` from where it stands up to the offset `end`, or to its end."""
        self._file = file
        self._left = None if end is None else max(end - file.tell(), 0)
        self.digest = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        """Read up to the buffer's length."""
        wanted = len(buffer) if self._left is None else min(len(buffer), self._left)
        block = self._file.read(wanted)
        buffer[: len(block)] = block
        self.digest.update(block)
        self.count += len(block)
        if self._left is not None:
            self._left -= len(block)
        return len(block)


def open_section(section: Section, compression: str, name: str) -> IO[bytes]:
    """The content of a section, decompressed and buffered."""
    buffered = io.BufferedReader(section, _BLOCK_BYTES)
    if compression == ".gz":
        import gzip

        return io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BLOCK_BYTES)
    if compression == ".zst":
        zstandard = require("zstandard", extra="corpus", purpose=f"reading {name}")
        plain = zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True)
        return io.BufferedReader(plain, _BLOCK_BYTES)
    return buffered


def drain(section: Section) -> None:
    """Read a section to its end: a decompressor may leave bytes behind the last frame."""
    while section.read(_BLOCK_BYTES):
        pass


def boundary(file: IO[bytes], offset: int, reading: Reading, format_: str) -> int:
    """Where the slice that begins at `offset` really begins: an offset that both its neighbours find.

    A line begins there; with paragraphs, the line before it is blank; within one document, no token
    spans it.
    """
    if offset == 0:
        return 0
    if format_ == "text" and reading.unit == "document":
        return _document_cut(file, offset)
    file.seek(offset - 1)
    file.readline()
    if format_ == "text" and reading.unit == "paragraph":
        while file.readline().strip():
            pass
    return file.tell()


def _document_cut(file: IO[bytes], offset: int) -> int:
    file.seek(offset)
    content, start = b"", offset
    while block := file.read(_SCAN_BYTES):
        # A cut takes up to nine bytes (character, newline, character), which two blocks can share.
        kept = (content[-_CUT_BYTES:] + block).lstrip(_CONTINUATION)
        start += len(content) + len(block) - len(kept)
        content = kept
        # A character torn at the end of what was read decodes to no letter, so it gives no cut.
        text = content.decode("utf-8", "surrogateescape")
        if cut := CUT.search(text):
            return start + len(text[: cut.end()].encode("utf-8", "surrogateescape"))
    return start + len(content)
