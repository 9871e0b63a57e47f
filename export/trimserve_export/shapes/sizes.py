"""Sizes of tensors: integers, or polynomials in the names of a graph's dimensions.

sympy, which onnx-ir builds on, keeps polynomials in a canonical form, so that equal sizes compare equal. A
size that nothing is known of is a symbol of its own, which equals itself alone: what is said here of
sizes is proven, never guessed.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import sympy

Size = int | Any  # an expression of sympy, which has no types
Sizes = tuple[Size, ...]


def unknown_size() -> Size:
    """A size that equals nothing but itself."""
    return sympy.Dummy("size", integer=True, nonnegative=True)


def unknown_integer() -> Size:
    """Like `unknown_size`, but it may be negative."""
    return sympy.Dummy("integer", integer=True)


def plain(size: Size) -> Size:
    """The canonical form: an int where it is a number, else the expanded polynomial."""
    if isinstance(size, int):
        return size
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def is_at_least(size: Size, other: Size) -> bool:
    """Whether a size is proven to be `other` or more."""
    difference = plain(sympy.sympify(size) - other)
    if isinstance(difference, int):
        return difference >= 0
    # Of S >= 1, sympy knows that S is positive, and not that S - 1 is nonnegative.
    return difference.is_nonnegative is True or sympy.Add(difference, 1).is_positive is True


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes; 1 of none."""
    return plain(sympy.Mul(*sizes))


def quotient(dividend: Size, divisor: Size) -> Size:
    """The integer that dividend / divisor is, or an unknown size where it does not cancel."""
    if divisor == 0:
        return unknown_size()
    found = plain(sympy.cancel(sympy.sympify(dividend) / divisor))
    return found if isinstance(found, int) or found.is_integer else unknown_size()


def broadcast(shapes: Sequence[Sizes]) -> Sizes:
    """The shape of an operation on shapes that are broadcast as NumPy does it."""
    return reduce(_broadcast_two, shapes)


def _broadcast_two(first: Sizes, second: Sizes) -> Sizes:
    rank = max(len(first), len(second))
    padded = ((1,) * (rank - len(sizes)) + sizes for sizes in (first, second))
    return tuple(map(_broadcast_size, *padded))


def _broadcast_size(first: Size, second: Size) -> Size:
    if first == second or second == 1:
        return first
    if first == 1:
        return second
    # A name may turn out to be 1, a number other than 1 decides.
    return next((size for size in (first, second) if isinstance(size, int)), unknown_size())


def slice_size(size: Size, start: Size, end: Size, step: int) -> Size:
    """How many of `size` entries a Slice takes."""
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, end, step).indices(size)))
    whole = step == 1 and is_at_least(start, 0) and is_at_least(size, start) and is_at_least(end, size)
    return plain(sympy.sympify(size) - start) if whole else unknown_size()
