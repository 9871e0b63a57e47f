"""What the command line names: texts, profiles, and the names of tokens."""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trimserve.corpus.corpus import iter_documents
from trimserve.corpus.files import JSONL_SUFFIXES
from trimserve.errors import UsageError

if TYPE_CHECKING:
    from trimserve.profiles.profile import Profile
    from trimserve.text.names import TokenNames


def read_texts(name: str, text_column: str | None) -> list[str]:
    """Texts of a corpus to search in: the records of a .jsonl, else the lines that hold something."""
    if Path(name).suffix.lower() in JSONL_SUFFIXES:
        return [document.text for document in iter_documents([name], text_column=text_column)]
    return read_lines(name)


def read_lines(name: str) -> list[str]:
    """Read the non-empty lines of a UTF-8 file, or of stdin for ``-``.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or has no text.
    """
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{name} does not exist: pass a file with a text a line.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error}): convert it first.") from error
    lines = [line for line in content.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{name} holds no text: pass a file with a text a line.")
    return lines


log = logging.getLogger(__name__)


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
