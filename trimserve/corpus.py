"""Texts of a corpus, whole documents with their newlines; nothing here knows a tokenizer."""

import codecs
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from trimserve.errors import UsageError

STDIN = "-"
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
# A long document is cut into parts of this length, so that all cores share it.
MAX_CHARACTERS = 1 << 18
_BLOCK_BYTES = 1 << 20
# Where a long document may be cut: after a lone newline with a letter or digit behind it. The
# pre-tokenizers of the byte-level BPE families all end a piece there, so no token spans the cut.
_CUT = re.compile(r"(?<=\S)\n(?=\w)")


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the corpus, or a part of a long one.

    Attributes:
        text: the characters, newlines as they stand in the file.
        origin: where it begins, for messages: file, or file and line.
        part: 0 for the beginning of a document, counted up for its further parts.
    """

    text: str
    origin: str
    part: int = 0


@dataclass(frozen=True, slots=True)
class CorpusSource:
    """A file that was read: its name as given, the sha256 and the number of its bytes."""

    name: str
    sha256: str
    bytes: int


@dataclass
class Corpus:
    """Files to read as documents.

    Attributes:
        paths: .txt (one document), .jsonl (a record a line, needs `text_column`), or "-" for stdin
            (a document; records if `text_column` is given).
        text_column: the field of a record that holds its text.
        stdin: what "-" reads; the process's own stdin by default.
        texts: further documents, from memory.
        bytes_read: how far `documents` has come.
        sources: what was read to its end, in order.
    """

    paths: Sequence[str]
    text_column: str | None = None
    stdin: IO[bytes] | None = None
    texts: Iterable[str] | None = None
    bytes_read: int = 0
    sources: list[CorpusSource] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.paths and self.texts is None:
            raise UsageError("the corpus is empty: name at least one .txt or .jsonl file, or - for stdin.")
        for path in self.paths:
            _check_path(path, self.text_column)
        if list(self.paths).count(STDIN) > 1:
            raise UsageError("stdin (-) can be read only once: name it once.")

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files; None when stdin or texts from memory are among them."""
        if STDIN in self.paths or self.texts is not None:
            return None
        return sum(Path(path).stat().st_size for path in self.paths)

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order, reading in blocks.

        Raises:
            UsageError: undecodable bytes, a broken record, or no text at all.
        """
        empty = True
        for document in itertools.chain(*map(self._read, self.paths), self._read_texts()):
            empty = empty and not document.text
            yield document
        if empty:
            named = ", ".join(self.paths) or "the texts given"
            raise UsageError(f"the corpus ({named}) holds no text: name a file that does.")

    def _read(self, path: str) -> Iterator[Document]:
        if path == STDIN:
            yield from self._parse(self.stdin or sys.stdin.buffer, "stdin", self.text_column is not None)
            return
        with Path(path).open("rb") as file:
            yield from self._parse(file, path, Path(path).suffix.lower() in JSONL_SUFFIXES)

    def _parse(self, file: IO[bytes], name: str, records: bool) -> Iterator[Document]:
        digest, before = hashlib.sha256(), self.bytes_read
        blocks = self._hashed(file if records else iter(lambda: file.read(_BLOCK_BYTES), b""), digest)
        if records:
            for number, line in enumerate(blocks, 1):
                if line.strip():
                    origin = f"{name}, line {number:,}"
                    text = _record_text(line, self.text_column or "", origin)
                    yield from _cut_documents([text], origin)
        else:
            yield from _cut_documents(_decode(blocks, name), name)
        self.sources.append(CorpusSource(name, digest.hexdigest(), self.bytes_read - before))

    def _read_texts(self) -> Iterator[Document]:
        if self.texts is None:
            return
        digest, before = hashlib.sha256(), self.bytes_read
        for number, text in enumerate(self.texts, 1):
            origin = f"text {number:,}"
            encoded = _encodable(text, origin).encode()
            for _ in self._hashed([len(encoded).to_bytes(8, "little"), encoded], digest):
                pass
            yield from _cut_documents([text], origin)
        self.sources.append(CorpusSource("texts", digest.hexdigest(), self.bytes_read - before))

    def _hashed(self, blocks: Iterable[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
        for block in blocks:
            digest.update(block)
            self.bytes_read += len(block)
            yield block


def iter_documents(
    paths: Sequence[str], *, text_column: str | None = None, stdin: IO[bytes] | None = None
) -> Iterator[Document]:
    """Yield the documents of a corpus; see `Corpus`, which also tells what was read."""
    return Corpus(paths, text_column, stdin).documents()


def _check_path(path: str, text_column: str | None) -> None:
    if path == STDIN:
        return
    file, suffix = Path(path), Path(path).suffix.lower()
    if file.is_dir():
        raise UsageError(f"{path} is a folder: name its .txt or .jsonl files (reading folders comes later).")
    if not file.is_file():
        raise UsageError(f"{path} does not exist: name a .txt or .jsonl file, or - for stdin.")
    if suffix in JSONL_SUFFIXES:
        if text_column is None:
            raise UsageError(f"{path} holds records: say which field is the text with --text-column.")
    elif suffix not in TEXT_SUFFIXES:
        raise UsageError(
            f"{path} is neither text ({', '.join(TEXT_SUFFIXES)}) nor records ({', '.join(JSONL_SUFFIXES)}): "
            "convert it or pipe it in as - (csv, parquet and compressed files come later)."
        )


def _decode(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    # A byte order mark is an encoding's mark, not text.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    for block in itertools.chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise UsageError(_undecodable(f"{name}, line {line:,}", error)) from error
        line += text.count("\n")
        yield text


def _undecodable(origin: str, error: UnicodeDecodeError) -> str:
    return (
        f"{origin}: byte 0x{error.object[error.start]:02x} is not UTF-8: convert the file, "
        "for example with iconv."
    )


def _record_text(line: bytes, column: str, origin: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(_undecodable(origin, error)) from error
    except ValueError as error:
        raise UsageError(f"{origin}: broken JSON ({error}): mend or remove the line.") from error
    if not isinstance(record, dict) or column not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise UsageError(f"{origin}: no field {column!r} (found {found or 'none'}): check --text-column.")
    text = record[column]
    return _encodable(text, f"{origin}, field {column!r}")


def _encodable(text: object, origin: str) -> str:
    if not isinstance(text, str):
        raise UsageError(f"{origin}: should be text but is {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone: JSON can spell it, UTF-8 cannot
        raise UsageError(f"{origin}: holds half a surrogate pair ({error}): mend the text.") from error
    return text


def _cut_documents(pieces: Iterable[str], origin: str) -> Iterator[Document]:
    """Join the pieces of one document and cut it where it grows too long."""
    text, part, searched = "", 0, 0
    for piece in pieces:
        text += piece
        while len(text) > MAX_CHARACTERS:
            end = _cut_position(text, searched)
            if end == 0:
                searched = len(text) - 1  # a cut needs one character behind it
                break
            yield Document(text[:end], origin, part)
            text, part, searched = text[end:], part + 1, 0
    if text or part == 0:
        yield Document(text, origin, part)


def _cut_position(text: str, searched: int) -> int:
    """The last place to cut up to `MAX_CHARACTERS`, else the first one after it, else 0."""
    last = 0
    for match in _CUT.finditer(text, searched, MAX_CHARACTERS + 1):
        last = match.end()
    if last == 0 and (later := _CUT.search(text, max(searched, MAX_CHARACTERS))):
        last = later.end()
    return last
