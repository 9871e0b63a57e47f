"""Hostile texts for tokenizers, and a random mixture of them."""

import random

# fmt: off
HOSTILE = (
    "", "  ", " a", " \t \n\n x", "\r\n\r\n", "a\u00a0b", "\u3000 x", "🎉👩\u200d👩\u200d👧", "\x00\x01\x7f",
    "''s 'S it'S WE'LL", "12345678 ٣٤٥", "ﬀ ǅ ß", "e\u0301 नमस्ते", "x" * 300, "a b" * 50,
    "\u200b\u200d\ufeff", "▁▁ ▁", "<0x0A>", "\n\n\n\n\t\t", "     x     ", "The cat sat on the mat.",
    "int main() {\n\treturn 0;\n}", "\U0001d518\U0001d52b \U00013624's \u1c89's",
)
# fmt: on


def random_texts(count, specials, seed=0):
    """Texts of characters of every plane, spaces, letters, special tokens and contractions."""
    rng = random.Random(seed)
    planes = ((1, 0x80), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000))
    pieces = ["'s", "'LL", " the", "▁", "   ", "      "]
    kinds = [
        lambda: chr(rng.randrange(*rng.choice(planes))),
        lambda: rng.choice(" \n\t\r"),
        lambda: rng.choice("aAzZ09'.,/"),
        lambda: rng.choice(specials) if specials else "x",
        lambda: rng.choice(pieces),
    ]
    return ["".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 30))) for _ in range(count)]
