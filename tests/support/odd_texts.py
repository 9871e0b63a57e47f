"""Texts that tokenizers differ in: scripts, marks, controls, added tokens, runs of spaces, known pieces."""

import random
import unicodedata
from collections.abc import Iterator, Sequence

# First and last code points of scripts and signs; each is taken as often as any other.
_RANGES = (
    (0x00, 0x1F), (0x20, 0x7E), (0x7F, 0xA0), (0xA1, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF),
    (0x400, 0x52F), (0x530, 0x5FF), (0x600, 0x6FF), (0x700, 0x7FF), (0x890, 0x97F), (0x980, 0xDFF),
    (0xE00, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x17FF), (0x1800, 0x1CFF),
    (0x1D00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x2BFF), (0x2C00, 0x2FFF), (0x3000, 0x30FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xABFF), (0xAC00, 0xD7FF), (0xE000, 0xF8FF),
    (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFF), (0x10000, 0x10FFF), (0x11000, 0x11FFF),
    (0x12000, 0x1D7FF), (0x1F000, 0x1FAFF), (0x20000, 0x2FA1F), (0xE0000, 0xE01EF), (0x100000, 0x10FFFF),
)  # fmt: skip
_SPACES = " \t\n\r\u00a0\u1680\u2003\u2028\u3000\u200b\ufeff\u2581\u0085"
# What a space is of one cluster with, what composes, what joins clusters.
_JOINING = "\u0600\u0605\u06dd\u0d4e\U000110bd\u0301\u0308\u20dd\ufe0f\u200d\u0345\u093c\u3099\u1161\u11a8"


def odd_text(rng: random.Random, pieces: Sequence[str], literals: Sequence[str]) -> str:
    """A text of a few parts, each of another sort; pieces of the vocab and added tokens among them."""
    return "".join(_part(rng, pieces, literals) for _ in range(rng.choice((1, 2, 3, 5, 8, 13))))


def odd_texts(
    rng: random.Random, pieces: Sequence[str], literals: Sequence[str], count: int
) -> Iterator[str]:
    """So many of them."""
    for _ in range(count):
        yield odd_text(rng, pieces, literals)


def _part(rng: random.Random, pieces: Sequence[str], literals: Sequence[str]) -> str:
    sort = rng.randrange(12)
    if sort == 0:
        return rng.choice(literals) if literals else "<s>"
    if sort == 1:
        return rng.choice(_SPACES) * rng.choice((1, 1, 2, 3, 5, 16))
    if sort == 2:
        return " " * rng.choice((1, 2, 3, 4, 7, 12)) + rng.choice(_JOINING)
    if sort == 3:
        return "".join(rng.choices(_JOINING + _SPACES + "ae ", k=rng.randint(1, 6)))
    if sort == 4:
        return unicodedata.normalize(rng.choice(("NFD", "NFC", "NFKC")), _letters(rng))
    if sort == 5:
        return rng.choice("aA1.!中が한ก😀") * rng.choice((2, 9, 70, 210))
    if sort == 6:
        return str(rng.random())
    if sort < 9:
        return _letters(rng)
    joined = "".join(rng.choices(pieces, k=rng.randint(1, 4)))
    return joined if sort == 9 else f" {joined}".replace("\u2581", " ").replace("\u0120", " ")


def _letters(rng: random.Random) -> str:
    first, last = rng.choice(_RANGES)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 9)))
