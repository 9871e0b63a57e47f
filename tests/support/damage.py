"""Damage to files: flips, cuts, additions, and what JSON and headers can hold that they should not."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# fmt: off
_VALUES: list[Any] = [
    -1, 0, 1, 2, 7, 37, 255, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 33, 1 << 62, 1 << 63, 1 << 80, -(1 << 63),
    None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "../x", "/etc/passwd", "a\0b", "x" * 5000, "\ud800", "model.onnx", "F32", "🙂",
    [], {}, [[]], [None], {"": 0}, [1] * 50,
]
# fmt: on


def damaged(content: bytes, name: str, random_: random.Random) -> bytes:
    """One damage of a file that differs from it.

    Args:
        content: the file.
        name: its name, which says what structure it has.
        random_: where chance comes from.
    """
    ways: list[Callable[[bytes, random.Random], bytes]] = [
        flip,
        flip_many,
        cut,
        append,
        remove,
        repeat,
        blank,
    ]
    if name.endswith(".json"):
        ways += [change_json] * 14
    if name.endswith(".safetensors"):
        ways += [change_header] * 10
    for _ in range(100):
        made = random_.choice(ways)(content, random_)
        if made != content:
            return made
    return content + b"x"


def flip(content: bytes, random_: random.Random) -> bytes:
    if not content:
        return b"\1"
    made = bytearray(content)
    made[random_.randrange(len(made))] ^= 1 << random_.randrange(8)
    return bytes(made)


def flip_many(content: bytes, random_: random.Random) -> bytes:
    for _ in range(random_.randrange(2, 60)):
        content = flip(content, random_)
    return content


def cut(content: bytes, random_: random.Random) -> bytes:
    return content[: random_.randrange(len(content) + 1)]


def append(content: bytes, random_: random.Random) -> bytes:
    return content + random_.randbytes(random_.choice([1, 8, 100, 5000]))


def remove(content: bytes, random_: random.Random) -> bytes:
    first, last = sorted(random_.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:]


def repeat(content: bytes, random_: random.Random) -> bytes:
    first, last = sorted(random_.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:]


def blank(content: bytes, random_: random.Random) -> bytes:
    first = random_.randrange(len(content) + 1)
    count = min(random_.choice([1, 4, 64, 4096]), len(content) - first)
    return content[:first] + bytes(count) + content[first + count :]


def change_json(content: bytes, random_: random.Random) -> bytes:
    """Change one place of a document, or the text of it."""
    try:
        document = json.loads(content)
    except ValueError:
        return flip(content, random_)
    which = random_.random()
    if which < 0.04:
        return b"[" * 5000 + content + b"]" * 5000
    if which < 0.08 and content.lstrip().startswith(b"{"):
        return content.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    if which < 0.1:
        return json.dumps(random_.choice([None, [], 3, "x", True, {}])).encode()
    return json.dumps(changed(document, random_)).encode()


def changed(document: Any, random_: random.Random) -> Any:
    """A copy of a document with another value, without a key, or with one more, at some place."""
    document = copy.deepcopy(document)
    places: list[tuple[Any, Any]] = []
    _collect(document, places)
    if not places:
        return random_.choice(_VALUES)
    # Places near the root are few, and say most.
    shallow = list(document.items()) if isinstance(document, dict) else []
    at: Any
    if shallow and random_.random() < 0.4:
        holder, at = document, random_.choice(shallow)[0]
    else:
        holder, at = random_.choice(places)
    which = random_.random()
    if which < 0.15:
        del holder[at]
    elif which < 0.25 and isinstance(holder, dict):
        holder["surprise"] = random_.choice(_VALUES)
    elif which < 0.35 and isinstance(holder[at], int):
        holder[at] = holder[at] + random_.choice([-1, 1, 1 << 20])
    else:
        holder[at] = copy.deepcopy(random_.choice(_VALUES))
    return document


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        places.append((node, key))
        _collect(value, places)


def change_header(content: bytes, random_: random.Random) -> bytes:
    """Change the header of a safetensors file, or only its length."""
    length = int.from_bytes(content[:8], "little")
    if random_.random() < 0.15:
        wrong = random_.choice([0, 1, length - 1, length + 1, 1 << 40, (1 << 64) - 1]) % (1 << 64)
        return wrong.to_bytes(8, "little") + content[8:]
    header = change_json(content[8 : 8 + length], random_)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
