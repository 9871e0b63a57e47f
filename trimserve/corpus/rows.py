"""JSON records, and the documents that a row of any table holds."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

from trimserve.corpus.conversations import conversation
from trimserve.corpus.documents import (
    MAX_CHARACTERS,
    Document,
    Faults,
    Reading,
    cut_documents,
    split_units,
    too_long,
    undecodable,
)
from trimserve.corpus.files import Format
from trimserve.corpus.schemas import FIELDS, field_of, read_conversation
from trimserve.errors import UsageError
from trimserve.text.chat import ChatTemplate

Row = Mapping[str, Any]
# Names the place of a row by its number from 1.
Place = Callable[[int], str]
_LONGEST_LIST = 2000


def read_jsonl(stream: IO[bytes], place: Place, reading: Reading, faults: Faults) -> Iterator[Document]:
    """The documents of JSON records, one a line; blank lines are no rows.

    Raises:
        UsageError: a line is longer than `Reading.max_line`; or see `Faults.meet`.
    """
    most = reading.max_line
    # Most rows hold a short text and nothing is wrong with it: for these, `row_documents` is a detour.
    simple = reading.template is None and reading.output_column is None and reading.unit == "document"
    plain = reading.column if simple else None
    for number, line in enumerate(iter(partial(stream.readline, most + 1), b""), 1):
        if len(line) > most:
            raise too_long(place(number), "a line", most)
        if line.isspace():
            continue
        record = _record(line, number, place, faults)
        text = record.get(plain) if plain is not None and type(record) is dict else None
        if type(text) is str and _is_plain(text, line):
            yield Document(text, origin=partial(place, number))
        elif record is not None:
            yield from row_documents(record, reading, partial(place, number), faults)


def _is_plain(text: str, line: bytes) -> bool:
    # Only an escape spells half a surrogate pair, as the line itself is UTF-8.
    return 0 < len(text) <= MAX_CHARACTERS and (b"\\u" not in line or _unspelt(text) is None)


def _record(line: bytes, number: int, place: Place, faults: Faults) -> object | None:
    try:
        # Files with a byte order mark may have been joined.
        return json.loads(line.decode().removeprefix("\ufeff"))  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        faults.meet(Faults.UNDECODABLE, lambda: undecodable(place(number), byte))
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if b"\0" in line:
            faults.meet(Faults.UNDECODABLE, lambda: undecodable(place(number), 0))
            return None
        faults.meet(Faults.BROKEN, lambda: f"{place(number)}: broken JSON ({reason}): mend the line.")
    return None


def check_columns(names: Sequence[str], reading: Reading, origin: str) -> None:
    """Refuse a table without the columns that are to be read.

    Args:
        names: its columns.
        reading: what is to be read.
        origin: the table, for the message.

    Raises:
        UsageError: a column is missing; the message lists those there are.
    """
    for column in reading.columns:
        if column not in names and column.split(".")[0] not in names:
            raise no_field(origin, column, map(repr, names))
    if reading.template is not None and not reading.columns and not {*FIELDS} & {*names}:
        raise no_field(origin, FIELDS[0], map(repr, names))


def row_documents(
    row: object, reading: Reading, origin: Callable[[], str], faults: Faults
) -> Iterator[Document]:
    """The documents of one row: its text, the units of it, or the turns of its conversation.

    Raises:
        UsageError: the row lacks the field, or holds no text there; unless faults are skipped.
    """
    of_chats = reading.template is not None and reading.text_column is None
    column = field_of(row) if of_chats else reading.column or ""
    found = _field(row, column, origin, faults)
    if found is None:
        return
    if reading.template is not None:
        whole = row if isinstance(row, Mapping) else {}
        yield from _turns(reading.template, whole, column, found, origin, faults)
        return
    text = _text(found, column, origin, faults)
    if text is None:
        return
    if reading.unit != "document":
        yield from (Document(unit, origin=origin) for unit in split_units([text], reading.unit))
        return
    output = None
    if reading.output_column is not None:
        given = _field(row, reading.output_column, origin, faults)
        output = None if given is None else _text(given, reading.output_column, origin, faults)
        if output is None:
            return
    yield from cut_documents([text], origin=origin, most=reading.max_line)
    if output is not None:
        yield Document(output, 1, output=True, origin=origin)


def _turns(
    template: ChatTemplate,
    row: Row,
    field: str,
    value: object,
    origin: Callable[[], str],
    faults: Faults,
) -> Iterator[Document]:
    try:
        turns = list(conversation(template, read_conversation(row, field, value)))
        for turn in turns:
            turn.text.encode()
    except UsageError as error:
        reason = str(error)
        faults.meet(Faults.BROKEN, lambda: f"{origin()}: {reason}")
    except (UnicodeEncodeError, TypeError) as error:  # a template meets a message without its keys
        reason = str(error)
        faults.meet(Faults.BROKEN, lambda: f"{origin()}: messages that cannot be rendered ({reason}).")
    else:
        yield from turns


def _field(row: object, column: str, origin: Callable[[], str], faults: Faults) -> object | None:
    value: object = row
    names = [column] if isinstance(row, dict) and column in row else column.split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            keys = list(map(repr, value)) if isinstance(value, dict) else [type(value).__name__]
            faults.meet(Faults.NO_TEXT, lambda: str(no_field(origin(), column, keys)))  # noqa: B023
            return None
        value = value[name]
    if value is None or value == "" or value == []:
        kind = type(value).__name__
        faults.meet(Faults.EMPTY, lambda: f"{origin()}, field {column!r}: is empty ({kind}).")
        return None
    return value


def no_field(origin: str, column: str, keys: Iterable[str]) -> UsageError:
    """The error of a table or a row without a field; `keys` are those it has."""
    found = ", ".join(keys) or "none"
    if len(found) > _LONGEST_LIST:
        found = found[:_LONGEST_LIST] + "…"
    return UsageError(f"{origin}: no field {column!r} (found {found}): check --text-column.")


def _text(value: object, column: str, origin: Callable[[], str], faults: Faults) -> str | None:
    if not isinstance(value, str):
        kind = type(value).__name__
        faults.meet(Faults.NO_TEXT, lambda: f"{origin()}, field {column!r}: should be text but is {kind}.")
        return None
    return encodable(value, lambda: f"{origin()}, field {column!r}", faults)


def encodable(text: str, origin: Callable[[], str], faults: Faults) -> str | None:
    """The text if UTF-8 can spell it; JSON can hold half a surrogate pair, which it cannot."""
    error = _unspelt(text)
    if error is None:
        return text
    code = ord(text[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # what "surrogateescape" makes of a byte
        faults.meet(Faults.UNDECODABLE, lambda: undecodable(origin(), code & 0xFF))
    else:
        faults.meet(
            Faults.UNDECODABLE,
            lambda: f"{origin()}: holds half a surrogate pair ({error}): mend the text.",
        )
    return None


def _unspelt(text: str) -> UnicodeEncodeError | None:
    """Why UTF-8 cannot spell a text, if it cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return error
    return None


def is_table(format_: Format) -> bool:
    """Whether rows of a format have named fields."""
    return format_ != "text"
