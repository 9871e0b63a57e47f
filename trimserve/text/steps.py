"""Which steps of a chat template would cost too much: operators, calls, filters, before they are made."""

import re
from collections.abc import Callable, Iterable, Set
from typing import Any

from trimserve.text.budget import (
    MOST_BITS,
    TEXTS,
    Budget,
    ExcessError,
    check_entries,
    check_integer,
    check_number,
    check_product,
    check_size,
)

Text = str | bytes | bytearray
Given = tuple[Any, ...]
# Filters that look at no more than the entries of what they are given.
SHALLOW = frozenset(
    (
        *("length", "count", "first", "last", "default", "d", "list", "map", "select", "reject", "safe"),
        *("selectattr", "rejectattr", "attr", "items", "reverse", "batch", "slice", "random", "int", "float"),
        *("abs", "round"),
    )
)
# Python code for each character or entry: a text of more is not for them.
_SLOW = frozenset(
    ("urlize", "pprint", "xmlattr", "wordwrap", "striptags", "title", "wordcount", "urlencode", "unescape")
)
_MOST_FOR_SLOW = 1 << 18
_MOST_SPLIT = 1 << 21  # by white space: how many words there are shows when they are made
# Filters and methods whose numbers are sizes of what they make.
_SIZED = frozenset(
    (
        *("center", "indent", "batch", "slice", "round", "tojson", "wordwrap", "truncate"),
        *("ljust", "rjust", "zfill", "expandtabs", "to_bytes"),
    )
)
_QUADRATIC = frozenset(("strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rsplit", "rpartition"))
_DIGITS = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")


def check_operator(operator: str, left: object, right: object, budget: Budget) -> None:
    """Refuse an operation whose result is too large, before it is made."""
    check_integer(left)
    check_integer(right)
    if operator == "%" and isinstance(left, TEXTS):
        check_format(left, budget.weigh(right), "%")
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > MOST_BITS:
            raise ExcessError(f"computes with an integer of more than {MOST_BITS:,} bits")
    elif operator in "+*":
        for text, other in ((left, right), (right, left)):
            times = isinstance(other, int)
            if isinstance(text, TEXTS):
                check_size(len(text) * int(other) if times else len(text))  # type: ignore[call-overload]
            elif isinstance(text, list | tuple):
                check_entries(len(text) * int(other) if times else len(text))  # type: ignore[call-overload]
    elif operator == "-" and isinstance(left, Set):
        budget.weigh(left)
        budget.weigh(right)


def check_format(pattern: str | bytes | bytearray, size: int, kind: str) -> None:
    """Refuse a format whose numbers, or whose fields times what they print, are too large.

    Args:
        pattern: of ``%`` or of ``str.format``.
        size: characters and entries of all arguments.
        kind: ``"%"`` or ``"{"``.
    """
    text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
    nested = "*" in text if kind == "%" else _NESTED_FIELD.search(text.replace("{{", "")) is not None
    if nested:
        raise ExcessError("formats with a width that is an argument")
    widths = sum(check_number(int(digits[:9])) for digits in _DIGITS.findall(text))
    check_size(len(text) + widths + text.count(kind) * size)


def check_sizes(name: str, given: Given) -> list[int]:
    """Refuse sizes that are out of reason; gives them, of a filter or method that takes some."""
    return [check_number(value) for value in given] if name in _SIZED else []


def check_call(function: object, args: Given, kwargs: dict[str, Any], budget: Budget) -> None:
    """Refuse a call whose result, or whose search, is too large."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    owner = getattr(method, "__self__", None)
    name = getattr(method, "__name__", "")
    given = (*args, *kwargs.values())
    size = sum(budget.weigh(value) for value in given if not isinstance(value, int))
    if isinstance(owner, TEXTS):
        budget.spend(1 + (len(owner) >> 8))
        if name in ("format", "format_map"):
            check_format(owner, size + len(given), "{")
        _check_text(name, owner, given)
    elif isinstance(owner, list | tuple) and name in ("index", "count"):
        budget.weigh(owner)
    elif isinstance(owner, int):
        check_sizes(name, given)


def check_filter(name: str, values: Given, kwargs: dict[str, Any], budget: Budget) -> None:
    """Refuse a filter, not one of `SHALLOW`, whose work or result is too large."""
    if not values:
        return
    value, others = values[0], (*values[1:], *kwargs.values())
    size = budget.weigh(value)
    given = sum(budget.weigh(other) for other in others if not isinstance(other, int))
    if name in _SLOW and size > _MOST_FOR_SLOW:
        raise ExcessError(f"gives {name} more than {_MOST_FOR_SLOW:,} characters")
    if name == "format":
        check_format(str(value), given + len(others), "%")
    elif name == "join":
        count = len(value) if hasattr(value, "__len__") else 1
        check_size(size + count * max((len(str(by)) for by in others if not isinstance(by, int)), default=0))
    elif name == "sum" and not all(isinstance(item, int | float) for item in _entries(value)):
        check_size(len(value) * (size + given))
    elif name == "tojson":
        widths = [len(by) if isinstance(by, str) else check_number(by) for by in others]
        if any(widths):
            check_size(size + _indents(value) * max(widths))
    else:
        _check_text(name, value if isinstance(value, str) else str(value), others)


def _check_text(name: str, text: Text, given: Given) -> None:
    """Refuse a method or filter of a text with these arguments."""
    if name in _SLOW and len(text) > _MOST_FOR_SLOW:
        raise ExcessError(f"gives {name} more than {_MOST_FOR_SLOW:,} characters")
    check_sizes(name, given)
    if name in _GROWTH:
        check_size(_GROWTH[name](text, given))
    if name in ("split", "rsplit", "splitlines"):
        _check_split(text, given[0] if given else None)
    if name in _QUADRATIC:
        for value in given:
            check_product(text, value)


def _check_split(text: Any, by: Any) -> None:  # noqa: ANN401 - both text, or both bytes
    if isinstance(by, TEXTS) and by:
        check_entries(text.count(by))
    elif len(text) > _MOST_SPLIT:
        raise ExcessError(f"splits a text of more than {_MOST_SPLIT:,} characters into words or lines")


def _longest(values: Iterable[object], least: int) -> int:
    """The largest number, or length of a text."""
    sizes = (len(value) if isinstance(value, TEXTS) else check_number(value) for value in values)
    return max((least, *sizes))


def _replaced(text: Any, given: Given) -> int:  # noqa: ANN401
    if len(given) < 2 or not isinstance(given[0], TEXTS):
        return 0
    times = text.count(given[0]) if given[0] else len(text) + 1
    return len(text) + times * (len(given[1]) if isinstance(given[1], TEXTS) else 0)


def _indented(text: Text, given: Given) -> int:
    lines = max(text.count("\n" if isinstance(text, str) else b"\n"), 1) + 1  # type: ignore[arg-type]
    return len(text) + lines * _longest(given, 4)


def _joined(text: Text, given: Given) -> int:
    return len(text) * len(given[0]) if given and hasattr(given[0], "__len__") else 0


def _translated(text: Text, given: Given) -> int:
    table = given[0] if given and isinstance(given[0], dict) else {}
    return len(text) * _longest((value for value in table.values() if isinstance(value, str)), 1)


# Characters of the result, at most.
_GROWTH: dict[str, Callable[[Text, Given], int]] = {
    "expandtabs": lambda text, given: (len(text) + 1) * _longest(given, 8),
    "indent": _indented,
    "join": _joined,
    "replace": _replaced,
    "translate": _translated,
    "wordwrap": lambda text, given: (
        (len(text) + 1) * (1 + _longest((value for value in given if isinstance(value, str)), 1))
    ),
}


def _entries(value: object) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else ()


def _indents(value: object) -> int:
    """Steps by which the lines of a value's JSON are indented, all together."""
    steps = 0
    rest = [(value, 0)]
    while rest:
        item, depth = rest.pop()
        steps += depth
        inner = item.values() if isinstance(item, dict) else _entries(item)
        rest.extend((entry, depth + 1) for entry in inner)
    return 2 * steps
