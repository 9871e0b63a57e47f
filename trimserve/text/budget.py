"""What one rendering of a chat template may cost: processor time, characters, memory.

A template is a program of strangers. Nothing from outside can stop a thread that computes, so the sandbox
(`trimserve.text.sandbox`) asks here before each step that could be long, and after each that made something:
every block, call, operator and filter. What is checked before a step bounds the step; the clock is read as
often as the steps since the last reading add up to about a millisecond.
"""

import time
from collections import deque
from collections.abc import Mapping, Set, Sized
from typing import Any

# Seconds of the thread's own processor time: those of other threads and programs do not count.
SECONDS = 1.0
# Characters of a text, and of all that one step looks at: four times what a million tokens take.
MOST_CHARACTERS = 1 << 24
# Entries of a list that a template makes, and of all nested ones that one step looks at.
MOST_ENTRIES = 1 << 18
# Bytes of all texts and lists together that a template makes.
MOST_BYTES = 1 << 29
MOST_BITS = 4096  # of an integer
MOST_NUMBER = 10_000  # of a width, an indent, a size of batches
MOST_CALLS = 100  # within each other
# Two texts of which each character of one is compared with each of the other.
_MOST_PRODUCT = 1 << 26
_UNITS_BETWEEN_READINGS = 2000  # a unit is about half a microsecond
TEXTS = (str, bytes, bytearray)
_LISTS = (list, tuple, Set, deque)


class ExcessError(Exception):
    """A template would go beyond its budget; the message completes "it ..."."""


class Budget:
    """The account of one rendering."""

    __slots__ = ("_deadline", "_made", "_next_reading", "_spent", "calls")

    def __init__(self) -> None:
        self._spent = 0
        self._next_reading = _UNITS_BETWEEN_READINGS
        self._made = 0
        self._deadline = time.thread_time() + SECONDS
        self.calls = 0

    def spend(self, units: int) -> None:
        """Count a step.

        Raises:
            ExcessError: the time is over.
        """
        self._spent += units
        if self._spent >= self._next_reading:
            self._next_reading = self._spent + _UNITS_BETWEEN_READINGS
            if time.thread_time() > self._deadline:
                raise ExcessError(f"computes for more than {SECONDS:g} s of processor time")

    def made(self, value: object) -> None:
        """Count what a step made."""
        if isinstance(value, TEXTS):
            check_size(len(value))
            self.hold(value.__sizeof__())
            self.spend(1 + (len(value) >> 8))
        elif isinstance(value, list | tuple):
            check_entries(len(value))
            self.hold(8 * len(value))
            self.spend(1 + (len(value) >> 4))
        elif isinstance(value, int):
            check_integer(value)

    def hold(self, size: int) -> None:
        """Count bytes of memory, which are never given back: whether they are is the template's affair."""
        self._made += size
        if self._made > MOST_BYTES:
            raise ExcessError(f"makes more than {MOST_BYTES >> 20:,} MiB of text")

    def weigh(self, value: object) -> int:
        """Count a look at a whole value: to compare, print or hash it; gives its characters and entries."""
        if isinstance(value, str):
            self.spend(1 + (len(value) >> 8))
            return len(value)
        if value is None or isinstance(value, int | float):
            self.spend(1)
            return 1
        entries, characters = size_of(value)
        self.spend(entries + (characters >> 8))
        return entries + characters

    def look(self, value: object) -> None:
        """Count a look at a value's own entries."""
        self.spend(1 + (len(value) >> 4 if isinstance(value, Sized) else 0))


def size_of(value: object) -> tuple[int, int]:
    """Entries and characters of a value with all that it holds, as often as it would be printed.

    Lists that hold one list several times are counted as the tree that they print, which can be larger than
    any memory.

    Raises:
        ExcessError: there are too many.
    """
    entries = characters = 0
    rest: list[Any] = [value]
    while rest:
        item = rest.pop()
        entries += 1
        if isinstance(item, TEXTS):
            characters += len(item)
        elif isinstance(item, Mapping):
            check_entries(entries + len(rest) + len(item))
            rest.extend(item)
            rest.extend(item.values())
        elif isinstance(item, _LISTS):
            check_entries(entries + len(rest) + len(item))
            rest.extend(item)
        elif type(item).__name__ == "Namespace":  # jinja2's: it prints its attributes
            rest.extend(item._Namespace__attrs.values())
        if characters > MOST_CHARACTERS or entries > MOST_ENTRIES:
            check_size(characters)
            check_entries(entries)
    return entries, characters


def check_size(characters: int) -> None:
    """Refuse a text of so many characters."""
    if characters > MOST_CHARACTERS:
        raise ExcessError(f"makes or reads a text of more than {MOST_CHARACTERS:,} characters")


def check_entries(entries: int) -> None:
    """Refuse a list of so many entries."""
    if entries > MOST_ENTRIES:
        raise ExcessError(f"makes or reads a list of more than {MOST_ENTRIES:,} entries")


def check_integer(value: object) -> None:
    """Refuse an integer that takes long to compute with."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ExcessError(f"computes with an integer of more than {MOST_BITS:,} bits")


def check_number(value: object) -> int:
    """Refuse a width or a count that is out of reason; gives it, and 0 for what is no number."""
    if isinstance(value, float):
        value = int(value) if abs(value) <= MOST_NUMBER else MOST_NUMBER + 1
    if not isinstance(value, int):
        return 0
    if abs(value) > MOST_NUMBER:
        raise ExcessError(f"asks for a width or a count beyond {MOST_NUMBER:,}")
    return abs(value)


def check_product(text: Sized, other: object) -> None:
    """Refuse a search that compares each character of one text with each of another."""
    if isinstance(other, TEXTS) and len(text) * len(other) > _MOST_PRODUCT:
        raise ExcessError("searches one long text for the characters of another")
