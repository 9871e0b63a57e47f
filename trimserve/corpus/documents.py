"""A corpus as documents: units of text, long documents in parts, and what is wrong with a row."""

import codecs
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trimserve.errors import UsageError
from trimserve.text.chat import ChatTemplate

Unit = Literal["document", "line", "paragraph"]
UNITS: tuple[Unit, ...] = ("document", "line", "paragraph")
# A long document is cut into parts of this length, so that all cores share it, and because encoding a text
# takes many times its bytes (bench.profile --memory).
MAX_CHARACTERS = 1 << 16
# Where a long document may be cut: after a lone newline with a letter or digit behind it. The
# pre-tokenizers of the byte-level BPE families all end a piece there, so no token spans the cut.
CUT = re.compile(r"(?<=\S)\n(?=\w)")
CUT_CONTEXT = "\n"
# The longest line, row or cell that is read by default, so that no file can take all the memory.
MAX_LINE = 1 << 26
# Text without a place to cut it may have this part of it: encoding takes some 60 times its bytes.
_UNCUT_PART = 4


class Document(NamedTuple):
    """A text of the corpus, or a part of a long one.

    Attributes:
        text: the characters, newlines as they stand in the file.
        part: 0 for the beginning of a document, counted up for its further parts.
        context: end of what stands before a further part; it decides how the part's first token reads,
            and its own tokens are not counted.
        output: whether the part is a completion.
        cut: whether the text ends in a newline at which a long document was cut.
        origin: tells where the document begins: file, or file and line. In a slice of a file that takes a
            reading of all before it, so it is for messages.
    """

    text: str
    part: int = 0
    context: str = ""
    output: bool = False
    cut: bool = False
    origin: Callable[[], str] = str


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become documents.

    Attributes:
        text_column: the field with the text (or the messages), dots between the names of nested fields.
        output_column: the field with the completion, counted apart.
        template: the chat template for rows of messages.
        unit: what counts as one document: a text of the corpus, a line or a paragraph of it.
        skip_bad: leave bad rows and bytes out and count them, instead of refusing them.
        max_line: the longest line, row, cell or uncut text that is read, in bytes or characters.
    """

    text_column: str | None = None
    output_column: str | None = None
    template: ChatTemplate | None = None
    unit: Unit = "document"
    skip_bad: bool = False
    max_line: int = MAX_LINE

    def __post_init__(self) -> None:
        if self.max_line < 1:
            raise UsageError(f"max_line should be 1 or more but is {self.max_line}.")
        if self.output_column is not None and self.output_column == self.text_column:
            raise UsageError(
                f"--text-column and --output-column both name {self.text_column!r}: prompt and completion "
                "are two fields."
            )
        if self.unit not in UNITS:
            raise UsageError(f"the unit of text should be one of {', '.join(UNITS)} but is {self.unit!r}.")
        if self.unit != "document" and self.apart:
            raise UsageError(
                f"a unit of {self.unit}s would tear prompts from their completions: leave --unit out."
            )
        if self.template is not None and self.output_column is not None:
            raise UsageError("the messages of --chat hold the completions: leave --output-column out.")
        if self.output_column is not None and self.text_column is None:
            raise UsageError("--output-column needs --text-column, the field of the prompt.")

    @property
    def apart(self) -> bool:
        """Whether completions are counted apart from prompts."""
        return self.template is not None or self.output_column is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields that were named."""
        return tuple(name for name in (self.text_column, self.output_column) if name is not None)

    @property
    def column(self) -> str | None:
        """The field to read, "messages" by default for chats."""
        return self.text_column or ("messages" if self.template is not None else None)


class Faults:
    """What is wrong with a corpus: refused at once, or counted by kind.

    Attributes:
        skip: whether to count and go on.
        found: kind -> how many were skipped.
    """

    UNDECODABLE, BROKEN, EMPTY, NO_TEXT = "undecodable", "broken", "empty", "no text"

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.found: Counter[str] = Counter()

    def listed(self) -> str:
        """What was left out, for people."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.found.items()))

    def meet(self, kind: str, message: Callable[[], str], count: int = 1) -> None:
        """Count a fault of a kind.

        Raises:
            UsageError: faults are not to be skipped; `message` names file and line.
        """
        if not self.skip:
            raise UsageError(f"{message()} Or leave such places out with --skip-bad.")
        self.found[kind] += count


def decode(blocks: Iterable[bytes], place: Callable[[int], str], faults: Faults) -> Iterator[str]:
    """Decode UTF-8 without its byte order mark, which is an encoding's mark and not text.

    Args:
        blocks: the bytes, cut anywhere.
        place: names a line by its number from 1.
        faults: undecodable bytes are met one by one, and left out of the text if skipped.
    """
    # Not "utf-8-sig": it takes the first bytes of a mark for a whole one where the text ends there.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    line, first = 1, True
    for block in itertools.chain(blocks, [b""]):
        text = decoder.decode(block, final=not block)
        if first and text:
            text, first = text.removeprefix(MARK), False
        if ("\0" in text or not text.isascii()) and (bad := _ESCAPED.search(text)):
            at, byte = line + text.count("\n", 0, bad.start()), ord(bad[0]) & 0xFF
            text, count = _ESCAPED.subn("", text)
            faults.meet(Faults.UNDECODABLE, lambda: undecodable(place(at), byte), count)  # noqa: B023
        line += text.count("\n")
        yield text


MARK = "\ufeff"
# Bytes that are not UTF-8, and NUL, which no text has and every other byte of UTF-16 is.
_ESCAPED = re.compile("[\udc80-\udcff\0]")


def undecodable(origin: str, byte: int) -> str:
    """The message about a byte that is not UTF-8, or not text."""
    if byte == 0:
        return (
            f"{origin}: holds a NUL byte, as UTF-16 without a mark does: convert the file to UTF-8, for "
            "example with iconv -f UTF-16LE -t UTF-8."
        )
    return f"{origin}: byte 0x{byte:02x} is not UTF-8: convert the file, for example with iconv."


def too_long(origin: str, what: str, most: int) -> UsageError:
    """The error of something longer than `Reading.max_line`."""
    return UsageError(f"{origin}: {what} of more than {most:,} characters: take it out, or raise --max-line.")


def uncut(origin: str, reading_most: int) -> UsageError:
    """The error of text that cannot be cut and is too long to be encoded whole."""
    return UsageError(
        f"{origin}: more than {reading_most // _UNCUT_PART:,} characters without a place to cut them (a "
        "single line end between two words): take the text out, break its lines, or raise --max-line, a "
        "quarter of which it may have."
    )


def split_units(
    pieces: Iterable[str], unit: Unit, *, most: int = MAX_LINE, origin: Callable[[], str] = str
) -> Iterator[str]:
    """Lines or paragraphs of one text, without the line ends that part them; none of them blank.

    Args:
        pieces: the text, cut anywhere.
        unit: "line" or "paragraph".
        most: longest unit.
        origin: see `Document`.

    Raises:
        UsageError: a unit is too long.
    """
    paragraph: list[str] = []
    size = 0
    for line in _lines(pieces, most, origin):
        if unit == "line" or line.isspace():
            yield from _joined([line] if unit == "line" else paragraph)
            paragraph, size = [], 0
        else:
            paragraph.append(line)
            size += len(line)
            if size > most:
                raise too_long(origin(), "a paragraph", most)
    yield from _joined(paragraph)


def _lines(pieces: Iterable[str], most: int, origin: Callable[[], str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        text = rest + piece
        *whole, rest = text.split("\n")
        if len(text) > most and max(map(len, (*whole, rest))) > most:
            raise too_long(origin(), "a line", most)
        yield from (line + "\n" for line in whole)
    if rest:
        yield rest


def _joined(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).rstrip("\r\n")
    if text and not text.isspace():
        yield text


def cut_documents(
    pieces: Iterable[str],
    *,
    first_part: int = 0,
    cut: bool = False,
    origin: Callable[[], str] = str,
    most: int | None = None,
) -> Iterator[Document]:
    """Join the pieces of one document and cut it where it grows too long.

    Args:
        pieces: the text, cut anywhere.
        first_part: the number of its first part; not 0 where the text continues a document.
        cut: whether a further text continues it, behind the newline that it ends in.
        origin: see `Document`.
        most: see `Reading.max_line`; None for texts of the caller's own.

    Raises:
        UsageError: see `uncut`.
    """
    text, part, searched = "", first_part, 0
    for piece in pieces:
        text += piece
        while len(text) > MAX_CHARACTERS:
            end = _cut_position(text, searched)
            if end == 0:
                searched = len(text) - 1  # a cut needs one character behind it
                if most is not None and len(text) > most // _UNCUT_PART:
                    raise uncut(origin(), most)
                break
            yield _part(text[:end], part, cut=True, origin=origin)
            text, part, searched = text[end:], part + 1, 0
    if text or part == 0:
        yield _part(text, part, cut=cut, origin=origin)


def _part(text: str, part: int, *, cut: bool, origin: Callable[[], str]) -> Document:
    return Document(text, part, CUT_CONTEXT if part else "", cut=cut, origin=origin)


def _cut_position(text: str, searched: int) -> int:
    """The last place to cut up to `MAX_CHARACTERS`, else the first one after it, else 0."""
    last = 0
    for match in CUT.finditer(text, searched, MAX_CHARACTERS + 1):
        last = match.end()
    if last == 0 and (later := CUT.search(text, max(searched, MAX_CHARACTERS))):
        last = later.end()
    return last
