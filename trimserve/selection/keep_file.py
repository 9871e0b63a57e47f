"""Keep lists: files of ids or tokens that must stay, in the forms that this and other tools write."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trimserve.errors import MismatchError, UsageError
from trimserve.files.checked_json import parse_json, read_bounded

logger = logging.getLogger(__name__)

# A vocab of a million tokens has 20 MB.
_MOST_BYTES = 64 << 20

_FORMS = (
    "a text file with a token id a line, one with a token or text a line, or a .json file that holds a list "
    "of ids, a list of tokens or texts, or an object from token to id"
)


@dataclass(frozen=True, slots=True)
class KeepList:
    """What a keep file names.

    Attributes:
        ids: token ids.
        words: tokens of the vocabulary, or texts all of whose tokens are meant.
        named: token -> the id that the file says it has, to be checked against the tokenizer.
    """

    ids: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    named: dict[str, int] = field(default_factory=dict)


def read_keep_file(path: str | Path) -> KeepList:
    """Read a keep list.

    A text file whose every line is a whole number holds ids; any other holds a token or text a line. A
    .json file holds a list of whole numbers (ids), a list of strings, or an object ``{token: id}``, which is
    VocabTailor's form. Blank lines are skipped; nothing else is guessed.

    Raises:
        UsageError: no such file, not UTF-8, or in none of these forms.
        MismatchError: it is too large, or has no end.
    """
    file = Path(path)
    try:
        text = read_bounded(file, advice=f"expected {_FORMS}.", most_bytes=_MOST_BYTES).decode()
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: expected {_FORMS}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error}): convert it.") from error
    return _from_json(text, file) if file.suffix.lower() == ".json" else _from_lines(text, file)


def _from_lines(text: str, path: Path) -> KeepList:
    lines = tuple(line for line in text.splitlines() if line)
    if not all(line.strip().isdecimal() for line in lines):
        return KeepList(words=lines)
    if lines:
        logger.warning("%s: read as %d token ids, because every line is a whole number", path, len(lines))
    return KeepList(ids=tuple(map(int, lines)))


def _from_json(text: str, path: Path) -> KeepList:
    content = parse_json(text, str(path), advice=f"expected {_FORMS}.", error=UsageError)
    if isinstance(content, list) and all(map(_is_id, content)):
        return KeepList(ids=tuple(content))
    if isinstance(content, list) and all(isinstance(entry, str) for entry in content):
        return KeepList(words=tuple(content))
    if isinstance(content, dict) and all(map(_is_id, content.values())):
        return KeepList(named=content)
    raise UsageError(f"{path} holds JSON of another form: expected {_FORMS}.")


def _is_id(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, int) and not isinstance(value, bool)


def check_named(named: dict[str, int], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a token -> id list.

    Raises:
        MismatchError: a token has another id in this tokenizer, or is not in it.
    """
    for token, id_ in named.items():
        if (found := tokenizer.token_to_id(token)) != id_:
            raise MismatchError(
                f"the keep list says that {token!r} has id {id_:,}, in this tokenizer it has "
                f"{'none' if found is None else f'{found:,}'}: the list was made for another model."
            )
    return list(named.values())
