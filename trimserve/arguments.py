"""Arguments of public functions: checked against the annotations that their readers see.

One mechanism for every public function: `@checked` reads the annotations, ranges included
(``Annotated[int, Meta(ge=1)]``), refuses what they do not allow in one sentence, and names the option that
was probably meant by an unknown one. numpy's numbers count as numbers, and a bool as none.
"""

import inspect
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from msgspec import Meta

from trimserve.errors import UsageError
from trimserve.other_words import meant

P = ParamSpec("P")
R = TypeVar("R")
# Annotations that public functions share.
Count = Annotated[int, Meta(ge=1)]
# More threads than any machine has processors end the process, not the call.
Threads = Annotated[int, Meta(ge=1, le=1024)]
Share = Annotated[float, Meta(ge=0, le=1)]
AnyPath = str | os.PathLike[str]
_LONGEST_QUOTE = 48
# What file systems take as the name of a file, in bytes.
_LONGEST_NAME = 255
_SIGNS: tuple[tuple[str, str, Callable[[Any, Any], bool]], ...] = (
    ("ge", "{} or more", operator.ge),
    ("gt", "above {}", operator.gt),
    ("le", "at most {}", operator.le),
    ("lt", "below {}", operator.lt),
)


class WrongError(Exception):
    """A value is not what it should be: the value or the wrong part of it, and its range if only that is."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value should be.

    Attributes:
        words: as a message says it, e.g. "a whole number, 1 or more".
        read: gives the value, numbers as Python's own; raises `WrongError`.
        is_tuple: of a fixed number of entries; a list is one only where it is nothing else.
    """

    words: str
    read: Callable[[Any], Any]
    is_tuple: bool = False


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of each call before the function, or the generator that it makes, begins.

    Raises:
        UsageError: an unknown, missing, wrong or surplus argument.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given, named = _form_of(function).read(args, kwargs)
        return function(*given, **named)

    return call


def read_options(options: Mapping[str, Any], kinds: type, where: str) -> dict[str, Any]:
    """Check options against a TypedDict.

    Args:
        options: by name.
        kinds: a TypedDict whose annotations say what each should be.
        where: who takes them, for the message, e.g. "generate".

    Raises:
        UsageError: an unknown one, or a wrong value.
    """
    known = option_kinds(kinds)
    for name in options:
        if name not in known:
            raise UsageError(meant(name, known, where))
    return {name: read_value(name, value, known[name]) for name, value in options.items()}


def read_value(name: str, value: object, kind: Kind) -> Any:  # noqa: ANN401 - what its kind says
    """Check one value.

    Raises:
        UsageError: it is another.
    """
    try:
        return kind.read(value)
    except WrongError as wrong:
        found, *range_ = wrong.args
        expected = range_[0] if range_ else kind.words
        raise UsageError(f"{name} should be {expected}, found {_quoted(found)}.") from None


@cache
def option_kinds(kinds: type) -> dict[str, Kind]:
    """What the options of a TypedDict should be, by name."""
    return {name: kind_of(hint) for name, hint in get_type_hints(kinds, include_extras=True).items()}


@dataclass(frozen=True, slots=True)
class _Form:
    """The parameters of a function."""

    name: str
    positional: tuple[str, ...]
    required: frozenset[str]
    kinds: Mapping[str, Kind]
    is_open: bool  # passes further options on, to a function that checks them

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        if len(args) > len(self.positional):
            raise UsageError(
                f"{self.name}() takes {len(self.positional)} values in a row, found {len(args)}: give the "
                "others by their names."
            )
        for name in kwargs:
            if name not in self.kinds and not self.is_open:
                raise UsageError(meant(name, self.kinds, self.name))
        placed = self.positional[: len(args)]
        if twice := kwargs.keys() & set(placed):
            raise UsageError(f"{self.name}() got {min(twice)} twice: give it once.")
        if missing := sorted(self.required - set(placed) - kwargs.keys()):
            raise UsageError(f"{self.name}() needs {missing[0]}: give it.")
        given = [read_value(name, value, self.kinds[name]) for name, value in zip(placed, args, strict=True)]
        named = {
            name: read_value(name, value, self.kinds[name]) if name in self.kinds else value
            for name, value in kwargs.items()
        }
        return given, named


@cache
def _form_of(function: Callable[..., Any]) -> _Form:
    parameters = inspect.signature(function).parameters.values()
    hints = _hints(function)
    kinds: dict[str, Kind] = {}
    is_open = False
    for parameter in parameters:
        hint = hints.get(parameter.name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = hint is Any
            kinds |= {} if is_open else option_kinds(get_args(hint)[0])  # of Unpack[...]
        else:
            kinds[parameter.name] = kind_of(hint)
    single = [found for found in parameters if found.kind is not found.VAR_KEYWORD]
    return _Form(
        name=function.__name__,
        positional=tuple(found.name for found in single if found.kind is found.POSITIONAL_OR_KEYWORD),
        required=frozenset(found.name for found in single if found.default is found.empty),
        kinds=kinds,
        is_open=is_open,
    )


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters' annotations, one by one: some names are there for type checkers alone."""
    found: dict[str, Any] = {}
    names = inspect.unwrap(function).__globals__
    for name, hint in function.__annotations__.items():
        if name != "return":
            holder = types.SimpleNamespace(__annotations__={name: hint})
            try:
                found |= get_type_hints(holder, names, include_extras=True)
            except NameError:
                continue
    return found


def kind_of(hint: Any) -> Kind:  # noqa: ANN401 - any annotation
    """What values an annotation allows."""
    plain = {
        bool: Kind("True or False", _bool),
        int: Kind("a whole number", _int),
        float: Kind("a number", _float),
        str: Kind("a text", _text),
        type(None): Kind("None", _none),
        None: Kind("None", _none),
        Path: Kind("a path", _path),
    }
    if isinstance(hint, type | None) and hint in plain:
        return plain[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(kind_of(args[0]), args[1:])
    if origin is Literal:
        return _choice(args)
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is os.PathLike:
        return Kind("a path", _path)
    return _container(hint, origin, args)


def _container(hint: Any, origin: Any, args: tuple[Any, ...]) -> Kind:  # noqa: ANN401
    if origin is tuple and not (len(args) == 2 and args[1] is ...):
        return _tuple(args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(kind_of(args[0]), kind_of(args[1]))
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _sequence(kind_of(args[0]), tuple if origin is tuple else list)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Iterable):
        return _iterable(kind_of(args[0]), eager=args == (int,))
    if origin is Callable or hint is Callable:
        return Kind("a function", _callable)
    expected = origin or hint
    if expected in (Any, object) or not isinstance(expected, type):
        return Kind("anything", lambda value: value)
    if getattr(expected, "_is_protocol", False):
        return Kind("anything", lambda value: value)
    return Kind(_article(expected.__name__), _instance(expected))


def _union(args: tuple[Any, ...]) -> Kind:
    if any(arg is Path or get_origin(arg) is os.PathLike for arg in args):
        args = tuple(arg for arg in args if arg is not str)
    kinds = [kind_of(arg) for arg in args]
    tuples_last = sorted(kinds, key=lambda kind: kind.is_tuple)

    def read(value: Any) -> Any:  # noqa: ANN401
        nearest: tuple[Any, ...] = (value,)
        # Two texts in a list are two texts, and in a tuple a pair.
        for kind in tuples_last if isinstance(value, list) else kinds:
            try:
                return kind.read(value)
            except WrongError as wrong:
                # One of its entries is wrong, or its range alone.
                if wrong.args[0] is not value or len(wrong.args) > 1:
                    nearest = wrong.args
        raise WrongError(*nearest)

    words = list(dict.fromkeys(kind.words for kind in kinds))
    return Kind(" or ".join(words), read)


def _bounded(kind: Kind, marks: tuple[Any, ...]) -> Kind:
    (meta,) = (mark for mark in marks if isinstance(mark, Meta))
    bounds: list[tuple[str, Callable[[Any, Any], bool], Any]] = [
        (words.format(bound), holds, bound)
        for sign, words, holds in _SIGNS
        if (bound := getattr(meta, sign)) is not None
    ]

    def read(value: Any) -> Any:  # noqa: ANN401
        found = kind.read(value)
        if not all(holds(found, bound) for _, holds, bound in bounds):
            raise WrongError(value, limits)
        if meta.min_length and len(found) < meta.min_length:
            raise WrongError(value)
        return found

    limits = " and ".join(words for words, _, _ in bounds)
    if meta.ge is not None and meta.le is not None:
        limits = f"from {meta.ge:g} to {meta.le:g}"
    words = f"{kind.words}, {limits}" if limits else f"{kind.words} that is not empty"
    return Kind(words, read)


def _choice(values: tuple[Any, ...]) -> Kind:
    def read(value: Any) -> Any:  # noqa: ANN401
        if not any(type(value) is type(each) and value == each for each in values):
            raise WrongError(value)
        return value

    return Kind("one of " + ", ".join(map(str, values)), read)


def _sequence(entry: Kind, made: Callable[[Iterable[Any]], Any]) -> Kind:
    def read(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
            raise WrongError(value)
        if getattr(value, "ndim", 1) == 0:  # an array of one number
            raise WrongError(value)
        return made(map(entry.read, value))

    return Kind(f"a list of {_plural(entry.words)}", read)


def _tuple(parts: tuple[Any, ...]) -> Kind:
    kinds = [kind_of(part) for part in parts]

    def read(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise WrongError(value)
        return tuple(kind.read(part) for kind, part in zip(kinds, value, strict=True))

    return Kind(f"({', '.join(kind.words for kind in kinds)})", read, is_tuple=True)


def _mapping(key: Kind, entry: Kind) -> Kind:
    def read(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Mapping):
            raise WrongError(value)
        return {key.read(name): entry.read(inner) for name, inner in value.items()}

    return Kind(f"a dict of {_plural(key.words)} and {_plural(entry.words)}", read)


def _instance(expected: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, expected):
            raise WrongError(value)
        return value

    return read


def _bool(value: Any) -> bool:  # noqa: ANN401 - whatever a caller gives, as below
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):  # numpy's
        raise WrongError(value)
    return bool(value)


def _int(value: Any) -> int:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise WrongError(value)
    return int(value)


def _float(value: Any) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongError(value)
    try:
        number = float(value)
    except OverflowError:
        raise WrongError(value) from None
    if number - number != 0:  # NaN and the infinities
        raise WrongError(value)
    return number


def _text(value: Any) -> str:  # noqa: ANN401
    if not isinstance(value, str):
        raise WrongError(value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"text {_quoted(value)} holds half a surrogate pair, which is no character: clean the text."
            ) from None
    return value


def _none(value: Any) -> None:  # noqa: ANN401
    if value is not None:
        raise WrongError(value)


def _path(value: Any) -> Any:  # noqa: ANN401
    """A path as it was given: a hub id is one, too."""
    if not isinstance(value, str | os.PathLike) or isinstance(value, bytes):
        raise WrongError(value)
    try:
        name = os.fspath(value)
        bad = isinstance(name, bytes) or not name or b"\0" in os.fsencode(name)
    except UnicodeEncodeError:
        bad = True
    if bad:
        raise WrongError(value)
    if any(len(part) > _LONGEST_NAME for part in os.fsencode(name).split(os.fsencode(os.sep))):
        raise UsageError(
            f"the path {_quoted(name)} has a part of more than {_LONGEST_NAME} bytes: shorten it."
        )
    return value


@dataclass(frozen=True, slots=True)
class _Entries:
    """What is read once, and perhaps larger than memory: its entries are checked when they come."""

    values: Iterable[Any]
    kind: Kind

    def __iter__(self) -> Iterator[Any]:
        return (read_value("an entry of a list", value, self.kind) for value in self.values)


def _iterable(entry: Kind, *, eager: bool) -> Kind:
    listed = _sequence(entry, list)

    def read(value: Any) -> Any:  # noqa: ANN401
        if eager or isinstance(value, list | tuple):
            return listed.read(value)
        if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
            raise WrongError(value)
        return _Entries(value, entry)

    return Kind(listed.words, read)


def _callable(value: Any) -> Any:  # noqa: ANN401
    if not callable(value):
        raise WrongError(value)
    return value


def _quoted(value: object) -> str:
    """A value as a message shows it: short, and with its type where it may be mistaken."""
    if value is None or isinstance(value, bool | str | int | float):
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else _shown(value)
        return shown if len(shown) <= _LONGEST_QUOTE else shown[: _LONGEST_QUOTE - 1] + "…"
    return _article(type(value).__name__)


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1024:
        return "a number of more than 300 digits"
    return repr(value)


def _article(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIOUaeio' else 'a'} {name}"


def _plural(words: str) -> str:
    nouns = {"a text": "texts", "a whole number": "whole numbers", "a number": "numbers"}
    for one, many in nouns.items():
        if words.startswith(one):
            return many + words.removeprefix(one)
    return f"entries that are each {words}"
