"""Texts of a corpus, whole documents with their newlines; nothing here knows a tokenizer."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from trimserve.corpus.documents import Document, Faults, Reading
from trimserve.corpus.files import STDIN, CorpusFile, CorpusSource, check_unchanged, find_files
from trimserve.corpus.reader import SliceReader, TextsReader, read_stream
from trimserve.corpus.rows import is_table
from trimserve.corpus.slices import Slice, plan_slices
from trimserve.corpus.streams import Section, open_section
from trimserve.errors import UsageError


@dataclass
class Corpus:
    """What to read as documents.

    Attributes:
        paths: files, folders, globs, hub datasets (see `trimserve.corpus.files.find_files`), or "-" for
            stdin (a document; JSON records if there is a column to read).
        text_column: the field of a row that holds its text.
        stdin: what "-" reads; the process's own stdin by default.
        texts: further documents, from memory.
        reading: how rows become documents; by default texts of `text_column`, whole.
        files: the files found, in order.
        bytes_read: how far `documents` has come.
        sources: what was read to its end, in order.
        faults: what was left out, by kind.
    """

    paths: Sequence[str]
    text_column: str | None = None
    stdin: IO[bytes] | None = None
    texts: Iterable[str] | None = None
    reading: Reading | None = None
    files: list[CorpusFile] = field(default_factory=list, init=False)
    bytes_read: int = field(default=0, init=False)
    sources: list[CorpusSource] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.paths and self.texts is None:
            raise UsageError("the corpus is empty: name at least one file or folder, or - for stdin.")
        if list(self.paths).count(STDIN) > 1:
            raise UsageError("stdin (-) can be read only once: name it once.")
        if STDIN in self.paths and self.stdin is None and sys.stdin is None:
            raise UsageError("stdin is closed: name a file, or pipe the text in.")
        reading = self.options
        self.files = find_files([path for path in self.paths if path != STDIN])
        for file in self.files:
            if is_table(file.format) and reading.column is None:
                raise UsageError(
                    f"{file.name} holds records: say which field is the text with --text-column."
                )
        if reading.apart and any(not is_table(file.format) for file in self.files):
            raise UsageError(
                "plain text has no prompts and completions: leave --chat and --output-column out."
            )
        self.faults = Faults(skip=reading.skip_bad)

    @property
    def options(self) -> Reading:
        """How rows become documents."""
        return self.reading or Reading(self.text_column)

    @property
    def streams(self) -> bool:
        """Whether there is more to read than files: stdin, or texts from memory."""
        return STDIN in self.paths or self.texts is not None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files; None when stdin or texts from memory are among them."""
        return None if self.streams else sum(file.bytes for file in self.files)

    def check_first_rows(self) -> None:
        """Read the beginning of a file of each format, which shows a missing column before hours of work.

        Raises:
            UsageError: it cannot be read.
        """
        reading = self.options
        for file in {file.format: file for file in reversed(self.files)}.values():
            (whole,) = plan_slices([file], reading, max(file.bytes, 1))
            with contextlib.closing(
                SliceReader(whole, reading, Faults(skip=reading.skip_bad)).documents()
            ) as rows:
                next(rows, None)

    def slices(self, **options: int) -> list[Slice]:
        """The files in slices, for several workers; see `trimserve.corpus.slices.plan_slices`."""
        return plan_slices(self.files, self.options, **options)

    def documents(self) -> Iterator[Document]:
        """Yield all documents in order, reading in blocks.

        Raises:
            UsageError: undecodable bytes, a broken record, or no text at all.
        """
        empty = True
        for document in itertools.chain(self._file_documents(), self.stream_documents()):
            empty = empty and not document.text
            yield document
        if empty:
            raise self.no_text()

    def no_text(self) -> UsageError:
        """The error of a corpus without text."""
        named = ", ".join(self.paths) or "the texts given"
        return UsageError(f"the corpus ({named}) holds no text: name a file that does.")

    def stream_documents(self) -> Iterator[Document]:
        """Yield the documents of stdin, then those from memory."""
        if STDIN in self.paths:
            yield from self._stdin_documents()
        if self.texts is not None:
            before = self.bytes_read
            texts = TextsReader(self.texts, self.options, self.faults)
            for document in texts.documents():
                self.bytes_read = before + texts.count
                yield document
            self.sources.append(texts.source)

    def _file_documents(self) -> Iterator[Document]:
        from trimserve.files.hashes import sha256_file

        for file in self.files:
            before = self.bytes_read
            (whole,) = plan_slices([file], self.options, max(file.bytes, 1))
            reader = SliceReader(whole, self.options, self.faults)
            for document in reader.documents():
                self.bytes_read = before + reader.count
                yield document
            self.bytes_read = before + file.bytes
            check_unchanged(file)
            digest = reader.sha256 or sha256_file(Path(file.path))
            self.sources.append(CorpusSource(file.name, digest, file.bytes))

    def _stdin_documents(self) -> Iterator[Document]:
        before, section = self.bytes_read, Section(self.stdin or sys.stdin.buffer)
        stream = open_section(section, "", "stdin")
        format_ = "jsonl" if self.options.column is not None else "text"
        place = lambda line: f"stdin, line {line:,}"  # noqa: E731
        for document in read_stream(stream, format_, place, self.options, self.faults):
            self.bytes_read = before + section.count
            yield document
        self.bytes_read = before + section.count
        self.sources.append(CorpusSource("stdin", section.digest.hexdigest(), section.count))


def can_read(path: Path, reading: Reading) -> bool:
    """Whether a file's format is known, and goes with a reading."""
    try:
        Corpus([str(path)], reading=reading)
    except UsageError:
        return False
    return True


def iter_documents(
    paths: Sequence[str], *, text_column: str | None = None, stdin: IO[bytes] | None = None
) -> Iterator[Document]:
    """Yield the documents of a corpus; see `Corpus`, which also tells what was read."""
    return Corpus(paths, text_column, stdin).documents()
