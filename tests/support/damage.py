"""Damage to files, at random but repeatable: what a disk, a copy, an editor or an attacker makes of them."""

import contextlib
import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
# Values of the wrong type, out of range, or with a meaning elsewhere.
# fmt: off
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 37, 255, 1 << 20, 2**31 - 1, 2**31, 2**33, 2**62, 2**63, -(2**63),
    10**30, 0.5, -0.0, 1e9, 1e308, -1e300, math.nan, math.inf,
    "", "abc", "9", "..", "../x", "/etc/passwd", "a\\b", "\0", "a\0b", "\ud800", "🙂", "x" * 5_000,
    "x" * 100_000, "{{ 1 }}", "model.onnx", "F32",
    [], [[]], [[1]], [None], [-1], ["a"], [10**12], [1] * 50, {}, {"": 0}, {"a": 1}, {"content": 3},
    {"1": {"2": []}},
)
# fmt: on


def damage(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file's bytes, damaged in one way, and how; they always differ from the file's.

    JSON, also that of a safetensors header, is changed as JSON most of the time.
    """
    parts = _json_part(content)
    for _ in range(100):
        if parts is None or rng.random() < 0.2:
            made, what = _damaged_bytes(content, rng)
        elif parts[0]:
            made, what = _damaged_header(content, parts, rng)
        else:
            made, what = damaged_json(parts[1], rng)
        if made != content:
            return made, what
    return content + b"x", "a byte more"


def _json_part(content: bytes) -> tuple[bytes, Any, bytes] | None:
    with contextlib.suppress(ValueError):
        return b"", json.loads(content), b""
    length = int.from_bytes(content[:8], "little")
    if 8 < length < len(content):
        with contextlib.suppress(ValueError):
            return content[:8], json.loads(content[8 : 8 + length]), content[8 + length :]
    return None


def _damaged_header(content: bytes, parts: tuple[bytes, Any, bytes], rng: random.Random) -> tuple[bytes, str]:
    length, document, tensors = parts
    if rng.random() < 0.15:
        known = int.from_bytes(length, "little")
        wrong = rng.choice([0, 1, known - 1, known + 1, 1 << 40, (1 << 64) - 1])
        return wrong.to_bytes(8, "little") + content[8:], f"a header of {wrong} bytes"
    text, what = damaged_json(document, rng)
    return len(text).to_bytes(8, "little") + text + tensors, what


def _damaged_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    if rng.random() < 0.4:
        return _overwritten(content, rng)
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    ways = {
        f"cut at {first}": content[:first],
        "empty": b"",
        "Git LFS pointer": LFS_POINTER,
        f"no UTF-8 at {first}": content[:first] + b"\xff\xfe" + content[first:],
        "more behind": content + rng.randbytes(rng.choice((1, 8, 100, 5_000))),
        f"without {first} to {last}": content[:first] + content[last:],
        f"{first} to {last} twice": content[:last] + content[first:],
        "twice": content + content,
    }
    what = rng.choice(list(ways))
    return ways[what], what


def _overwritten(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed = bytearray(content)
    kind, count = rng.choice((("bit", 1), ("bit", 1), ("bits", 60), ("bytes", 4), ("zeros", 0), ("head", 0)))
    place = rng.randrange(len(changed) + 1)
    if kind == "head":
        changed[:8] = rng.randbytes(min(8, len(changed)))
    elif kind == "zeros":
        size = min(rng.choice((1, 4, 64, 4_096)), len(changed) - place)
        changed[place : place + size] = bytes(size)
    for _ in range(rng.randrange(count) + 1 if count and changed else 0):
        place = rng.randrange(len(changed))
        changed[place] = rng.randrange(256) if kind == "bytes" else changed[place] ^ 1 << rng.randrange(8)
    return bytes(changed), f"{kind} at {place}"


def damaged_json(document: Any, rng: random.Random) -> tuple[bytes, str]:
    """JSON text of a document with something wrong in it."""
    kind = rng.choice(("value",) * 6 + ("missing", "added", "near", "twice", "deep", "whole", "renamed"))
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
    elif kind == "near" and isinstance(parent[key], int):
        parent[key] += rng.choice((-1, 1, 1 << 20))
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
