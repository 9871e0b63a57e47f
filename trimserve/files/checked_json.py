"""JSON of strangers: parsed within limits, and checked against a dataclass of what it should hold."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from trimserve.errors import MismatchError, TrimserveError
from trimserve.files.held import HeldFile
from trimserve.foreign import reason

T = TypeVar("T")
# The largest known tokenizer.json has 33 MB.
MOST_BYTES = 512 << 20
AGAIN = "fetch or make it again."


def read_json(
    path: Path | HeldFile, *, advice: str = AGAIN, finite: bool = True, most_bytes: int = MOST_BYTES
) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Read a JSON file.

    Args:
        path: the file, or an opened one.
        advice: what the message says to do next.
        finite: refuse NaN and the infinities, which are not JSON; configs of transformers may have them.
        most_bytes: the largest file that is read.

    Raises:
        MismatchError: larger, not UTF-8, or see `parse_json`.
        OSError: it cannot be read.
    """
    content = read_bounded(path, advice=advice, most_bytes=most_bytes)
    shown = path.path if isinstance(path, HeldFile) else path
    return parse_json(content, str(shown), advice=advice, finite=finite)


def read_bounded(path: Path | HeldFile, *, advice: str = AGAIN, most_bytes: int = MOST_BYTES) -> bytes:
    """Read a file that somebody names: it may be a pipe, or a device without an end.

    Raises:
        MismatchError: it has more bytes than `most_bytes`.
        OSError: it cannot be read.
    """
    if isinstance(path, HeldFile):
        content, path = path.read(0, most_bytes + 1), path.path
    else:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise MismatchError(f"{path} has more than {most_bytes:,} bytes, too many for its kind: {advice}")
    return content


def parse_json(
    text: str | bytes,
    origin: str,
    *,
    advice: str = AGAIN,
    finite: bool = True,
    error: type[TrimserveError] = MismatchError,
) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Parse JSON text.

    Args:
        text: characters, or UTF-8 with or without a byte order mark.
        origin: where it stands, as the subject of the message.
        advice: what the message says to do next.
        finite: see `read_json`.
        error: the class to raise.

    Raises:
        TrimserveError: of the class `error`: not UTF-8, not JSON, nested too deeply, a key that stands twice
            in an object, a number beyond float64, or half of a surrogate pair.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
    try:
        characters = text if isinstance(text, str) else text.decode("utf-8-sig")
        content = json.loads(characters, object_pairs_hook=_distinct, **hooks)
        if "\\u" in characters:
            _check_surrogates(content)
    except RecursionError:
        raise error(f"{origin} is nested too deeply for JSON of its kind: {advice}") from None
    except ValueError as caught:  # UnicodeDecodeError and JSONDecodeError, too
        raise error(f"{origin} is not JSON ({reason(caught)}): {advice}") from caught
    return content


def convert_json(
    content: object, kind: type[T], origin: str, *, advice: str = AGAIN, exact: bool = True
) -> T:
    """Check parsed JSON against a type and make it one.

    Args:
        content: what `parse_json` gave.
        kind: a dataclass or any other type that msgspec knows; ranges are `Annotated[int,
            msgspec.Meta(ge=0)]`.
        origin: where it stands, as the subject of the message.
        advice: what the message says to do next.
        exact: refuse keys that the dataclass does not have; files of other libraries may have any.

    Raises:
        MismatchError: a type, a range, a missing or an unknown key, by its place.
    """
    if exact and dataclasses.is_dataclass(kind) and isinstance(content, dict):
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(set(content) - known):
            raise MismatchError(f"{origin} has a key that is not known, {unknown[0][:100]!r}: {advice}")
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError, ValueError, TypeError) as error:
        raise MismatchError(f"{origin} does not hold what it should ({reason(error)}): {advice}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)[:100]!r} stands twice in an object")
    return found


def _twice(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value - value != 0:
        raise ValueError(f"{digits[:20]} is beyond float64")
    return value


def _check_surrogates(content: object) -> None:
    json.dumps(content, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
