"""What the command line names: texts, profiles, and the names of tokens."""

import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import MARK, Faults, Reading
from trimserve.corpus.files import HUB, STDIN, find_files
from trimserve.corpus.rows import encodable, is_table
from trimserve.errors import UsageError

if TYPE_CHECKING:
    from trimserve.profiles.profile import Profile
    from trimserve.text.names import TokenNames
    from trimserve.vocab.map import VocabMap

# A plain text of so many lines, in its first so many bytes, may be a list of texts.
_MANY_LINES, _HEAD_BYTES = 20, 64 << 10
_PLAIN = (".txt", ".text")
log = logging.getLogger(__name__)


def read_texts(name: str, options: Mapping[str, Any]) -> list[str]:
    """Texts of a corpus to search in: the rows of tables, or the lines of text files that hold something.

    Args:
        name: a file, a folder, a glob, an hf:// dataset, or - for stdin; as `profile` reads it.
        options: text_column, unit, skip_bad and max_line, as far as they were given.

    Raises:
        UsageError: it cannot be read, or holds no text.
    """
    unit = options.get("unit")
    corpus = Corpus([name], reading=Reading(**dict(options) | {"unit": unit or "document"}))
    kinds = {is_table(file.format) for file in corpus.files} or {corpus.options.column is not None}
    if kinds == {False} and corpus.options.column is not None:
        raise UsageError(f"{name} is plain text and has no fields: leave --text-column out.")
    if unit is None and len(kinds) > 1:
        raise UsageError(f"{name} has tables and text files: say with --unit what one text is.")
    if unit is None and kinds == {False}:
        corpus = Corpus([name], reading=replace(corpus.options, unit="line"))
    texts: list[list[str]] = []
    for document in corpus.documents():
        if document.part == 0:
            texts.append([])
        texts[-1].append(document.text)  # a long one comes in parts
    if corpus.faults.found:
        log.warning("left out of %s: %s", name, corpus.faults.listed())
    return ["".join(parts) for parts in texts]


def read_lines(name: str) -> list[str]:
    """Read the non-empty lines of a UTF-8 file, or of stdin for ``-``.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or has no text.
    """
    if name != "-" and not Path(name).exists():
        raise UsageError(f"{name} does not exist: pass a file with a text a line.")
    content = read_stdin() if name == "-" else _decoded(Path(name).read_bytes(), name)
    lines = [line for line in content.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{name} holds no text: pass a file with a text a line.")
    return lines


def read_stdin() -> str:
    """Read the text on stdin, with newlines as line ends.

    Raises:
        UsageError: it is closed, or its bytes are not UTF-8.
    """
    if sys.stdin is None:  # the caller closed it
        raise UsageError("stdin is closed: pass the text as an argument.")
    if sys.stdin.isatty():
        log.warning("reading stdin, up to the end of input (Ctrl-D)")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode().removeprefix(MARK).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: byte 0x{content[error.start]:02x} at {error.start:,} is not UTF-8: convert the "
            "text, for example with iconv."
        ) from error


def encodable_word(word: str) -> str:
    """A word of the command line.

    Raises:
        UsageError: its bytes are not UTF-8.
    """
    if encodable(word, lambda: "a text of the command line", Faults(skip=True)) is None:
        raise UsageError(f"the text {word!r} of the command line is not UTF-8: convert it, or pipe it in.")
    return word


def load_named_vocab(path: Path) -> "VocabMap":
    """Read a vocab file, or the vocab of a trimmed folder.

    Raises:
        UsageError: there is no such file, or the folder is no trimmed one.
        MismatchError: it is no vocab.
    """
    from trimserve.folder.manifest import is_trimmed
    from trimserve.folder.names import VOCAB_NAME
    from trimserve.vocab.file import load_vocab

    if not path.is_dir():
        return load_vocab(path)
    if not is_trimmed(path):
        raise UsageError(f"{path} is a folder, but no trimmed one: name such a folder, or a vocab file.")
    return load_vocab(path / VOCAB_NAME)


def lines_as_one(names: Iterable[str]) -> str | None:
    """A file of texts a line that counts as one document, in a sentence; None where there is none.

    Prose has blank lines between its paragraphs; what has many lines and none of them blank is a list.
    """
    for file in find_files([name for name in names if name != STDIN and not name.startswith(HUB)]):
        if not file.path.lower().endswith(_PLAIN):  # Markdown has lists, and packed files are not opened
            continue
        try:
            with Path(file.path).open("rb") as opened:
                head = opened.read(_HEAD_BYTES)
        except OSError:  # counting says it
            continue
        lines = head.rstrip().splitlines()
        if len(lines) >= _MANY_LINES and all(line.strip() for line in lines):
            return (
                f"{file.name} has many lines, none of them blank, and counts as one document: pass "
                "--unit line if each line is a text of its own."
            )
    return None


def find_names(profile: "Profile", model: str | None) -> "TokenNames | None":
    """Names of the tokens, or None with a note where the tokenizer is not at hand."""
    from trimserve.profiles.model import find_source
    from trimserve.text.names import TokenNames

    source = find_source(profile, model)
    if source is None:
        log.warning("%s is not at hand: tokens are shown by id (pass -m)", profile.tokenizer_name)
        return None
    return TokenNames(source.tokenizer())


def load_profiles(given: Iterable[str | Path]) -> "dict[str, Profile]":
    """Read profiles by name, in the order given; one without a name is called by its stem, else its path.

    Raises:
        UsageError: none is given, two are given one name, or a file does not exist.
    """
    from trimserve.profiles.profile import Profile

    loaded: dict[str, Profile] = {}
    for number, (name, path) in enumerate(map(_parted, map(str, given)), 1):
        if name is not None and name in loaded:
            raise UsageError(f"two profiles are called {name}: give {path} another name.")
        free = (known for known in (name or Path(path).stem, path) if known not in loaded)
        loaded[next(free, f"{path} ({number})")] = Profile.load(path)
    if not loaded:
        raise UsageError("there is no profile: name at least one.")
    return loaded


def _parted(entry: str) -> tuple[str | None, str]:
    name, equals, path = entry.partition("=")
    return (name, path) if equals and not Path(entry).exists() else (None, entry)
