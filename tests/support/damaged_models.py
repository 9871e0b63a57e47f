"""Damage to files, at random but repeatable, and what an attempt to use them may end in."""

import collections
import contextlib
import copy
import json
import math
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimserve.errors import TrimserveError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
SECONDS = 10  # of the processor's time
_PATIENCE = 6  # so many times as long, where other processes have the processor
# Values of the wrong type, out of range, or with a meaning elsewhere.
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    1e9,
    -1e300,
    0.5,
    math.nan,
    math.inf,
    "",
    "abc",
    "9",
    "..",
    "../x",
    "/etc/passwd",
    "a\\b",
    "\0",
    "\ud800",
    "x" * 100_000,
    "{{ 1 }}",
    [],
    [[1]],
    [None],
    [-1],
    ["a"],
    [10**12],
    {},
    {"a": 1},
    {"content": 3},
    {"1": {"2": []}},
)


class Hang(BaseException):
    """An attempt took longer than `SECONDS`."""


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A damaged copy of a file's bytes, and how it was damaged."""
    parts = _json_part(content)
    if parts is not None and rng.random() < 0.8:
        before, document, after = parts
        text, what = damaged_json(document, rng)
        if before:  # a safetensors header
            return len(text).to_bytes(8, "little") + text + after, what
        return text, what
    return _damaged_bytes(content, rng)


def _json_part(content: bytes) -> tuple[bytes, Any, bytes] | None:
    with contextlib.suppress(ValueError):
        return b"", json.loads(content), b""
    length = int.from_bytes(content[:8], "little")
    if 8 < length < len(content):
        with contextlib.suppress(ValueError):
            return content[:8], json.loads(content[8 : 8 + length]), content[8 + length :]
    return None


def _damaged_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    place = rng.randrange(len(content) + 1)
    kind = rng.choice(("cut", "empty", "lfs", "utf8", "flip", "flip", "zeros", "head", "twice"))
    changed = bytearray(content)
    if kind == "cut":
        return content[:place], f"cut at {place}"
    if kind == "empty":
        return b"", "empty"
    if kind == "lfs":
        return LFS_POINTER, "Git LFS pointer"
    if kind == "utf8":
        return content[:place] + b"\xff\xfe" + content[place:], f"no UTF-8 at {place}"
    if kind == "twice":
        return content + content, "twice"
    if kind == "head":
        changed[: min(8, len(changed))] = rng.randbytes(min(8, len(changed)))
    elif kind == "zeros":
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    else:
        for _ in range(rng.randrange(1, 5)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed), f"{kind} at {place}"


def damaged_json(document: Any, rng: random.Random) -> tuple[bytes, str]:
    """JSON text of a document with something wrong in it."""
    kind = rng.choice(("value",) * 6 + ("missing", "added", "twice", "deep", "whole", "renamed"))
    document = copy.deepcopy(document)
    if kind == "whole":
        value = rng.choice(ODD)
        return _text(value), f"is {_short(value)}"
    if kind == "deep":
        word = rng.choice(("[", '{"a":'))
        return (word * rng.choice((50, 900, 100_000))).encode(), "deep"
    places = list(_places(document))
    if not places:
        return b"{}", "is {}"
    # The outer places say more than the ten thousand entries of a vocab.
    depth = rng.choice(sorted({len(place) for place in places}))
    place = rng.choice([place for place in places if len(place) == depth])
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    key, what = place[-1], "/".join(map(str, place))
    if kind == "missing":
        del parent[key]
    elif kind == "renamed" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
    elif kind == "twice" and isinstance(parent, dict):
        return _text(document).replace(b"{", b'{"zz": 1, "zz": 2, ', 1), "a key twice"
    elif kind == "added" and isinstance(parent, dict):
        parent["unknown_key"] = rng.choice(ODD)
    else:
        value = parent[key] = rng.choice(ODD)
        what += f" = {_short(value)}"
    return _text(document), f"{kind} {what}"


def _places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield (*prefix, key)
        if len(prefix) < 6:
            yield from _places(entry, (*prefix, key))


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _short(value: Any) -> str:
    return repr(value)[:40]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    timers = {
        signal.SIGALRM: (signal.ITIMER_REAL, _PATIENCE * SECONDS),
        signal.SIGPROF: (signal.ITIMER_PROF, SECONDS),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def outcome_of(attempt: Callable[[], object]) -> str | None:
    """None where an attempt succeeds or ends in one sentence; else what is wrong."""
    try:
        with _limited():
            attempt()
    except TrimserveError as error:
        words = str(error)
        if "\n" in words or len(words) > 2_000:
            return f"not one sentence: {type(error).__name__}: {words[:300]!r}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "trimserve" in f.filename]
        last = frames[-1] if frames else None
        where = "" if last is None else f"{Path(last.filename).name}:{last.lineno} {last.name}"
        return f"{type(error).__name__} at {where}: {str(error)[:120]!r}"
    return None


class Counter:
    """How many were tried, and the faults by what they are."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tried = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.faults: dict[str, str] = {}

    def add(self, name: str, what: str, fault: str | None) -> None:
        """Count one attempt."""
        self.tried += 1
        self.kinds[name] += 1
        if fault is not None:
            self.faults.setdefault(":".join(fault.split(":")[:3])[:90], f"{fault} [{name}: {what}]")

    def report(self, title: str) -> str:
        """What CI prints."""
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.kinds.items()))
        lines = [f"{title}: {self.tried} tried, seed {self.seed}, {len(self.faults)} faults ({kinds})"]
        return "\n".join([*lines, *self.faults.values()])
