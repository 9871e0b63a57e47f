"""Slices of a corpus: what one worker reads at a time, cut where no document or token is torn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from trimserve.corpus.documents import CUT, Reading, too_long, uncut
from trimserve.corpus.files import CorpusFile
from trimserve.corpus.parquet import row_groups

SLICE_BYTES = 1 << 25
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
        return self.file.bytes * (self.end - self.start) // max(row_groups(self.file), 1)


def plan_slices(files: Sequence[CorpusFile], reading: Reading, slice_bytes: int | None = None) -> list[Slice]:
    """Cut the files of a corpus into slices. The plan depends on the files alone, not on the machine."""
    return [piece for file in files for piece in _slices(file, reading, slice_bytes or SLICE_BYTES)]


def _slices(file: CorpusFile, reading: Reading, slice_bytes: int) -> Iterator[Slice]:
    if file.format == "parquet":
        groups = row_groups(file)
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


def boundary(file: IO[bytes], offset: int, reading: Reading, of: CorpusFile) -> int:
    """Where the slice that begins at `offset` really begins: an offset that both its neighbours find.

    A line begins there; with paragraphs, the line before it is blank; within one document, no token
    spans it.

    Raises:
        UsageError: a line is longer than `Reading.max_line`.
    """
    if offset == 0:
        return 0
    if of.format == "text" and reading.unit == "document":
        return _document_cut(file, offset, reading, of)
    file.seek(offset - 1)
    _line(file, reading, of)
    if of.format == "text" and reading.unit == "paragraph":
        while _line(file, reading, of).strip():
            pass
    return file.tell()


def _line(file: IO[bytes], reading: Reading, of: CorpusFile) -> bytes:
    line = file.readline(reading.max_line + 1)
    if len(line) > reading.max_line:
        raise too_long(f"{of.name}, in front of byte {file.tell():,}", "a line", reading.max_line)
    return line


def _document_cut(file: IO[bytes], offset: int, reading: Reading, of: CorpusFile) -> int:
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
        if start - offset > reading.max_line:
            raise uncut(f"{of.name}, behind byte {offset:,}", reading.max_line)
    return start + len(content)
