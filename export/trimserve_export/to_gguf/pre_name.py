"""Find the name in `tokenizer.ggml.pre`: which of llama.cpp's ways to part a text is a tokenizer's own.

llama.cpp's converter knows a tokenizer by a hash of the ids that it gives for a text, which a cut tokenizer
does not have. Here the original tokenizer's own parting of texts is compared with each of the ways that
`trimserve.model.gguf.pre_tokenizers` knows: one that parts all of them alike is the one.
"""

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tokenizers import Tokenizer

from trimserve.errors import UnsupportedModelError
from trimserve.model.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from trimserve.text.tokenizer import parse_tokenizer

# Of the names that stand for one way, the one that llama.cpp's converter mostly writes.
NAMES: Final = ("llama-bpe", "dbrx", "qwen2", "smollm", "gpt-2", "gpt-4o", "tekken", "seed-coder")
# What tells the ways apart: contractions, runs of digits, marks, spaces and line ends, scripts. Letters that
# llama.cpp's tables lack, and capitals outside ASCII, are left out: there it differs from all originals.
# fmt: off
PROBES: Final = (
    "", " ", "a", "The cat sat on the mat.", "I'm you'RE we'll THEY'D it's IT'S don't", "'s 'S ''s",
    "12345678", "a1b22c333d4444", "3.14159 1,000,000 50%", " 1", " 12 345 6789", "1a", "a1", "1 2", "١٢٣ ٤",
    "x  y   z", " a", "  b", "c ", "d  ", "\n", "\n\n", "a\nb", "a \n b", "a\n\n\nb",
    "a\r\nb\r\n", "\tx\t\ty", " \n \n x", "!!", " !?", "a!b", "(x) [y] {z}", "foo_bar-baz/qux", "/usr/bin",
    "a/\nb", "!/\n\n", "...\n\n", "http://example.org/?a=1&b=2", "x == y && z != 0;",
    "#include <stdio.h>\n", "camelCaseWord HTTPServer",
    "ABCdef ABC def", "Abc'sX", "naïve café été", "αβγ δε", "привет мир", "漢字 かな", "한국어", "🎉🎉 🎉",
    "a🎉b", "€5", "«x»", "\u00a0x", "\u3000x", "a\u200db", "end.\n", "x'y'z", '"q"',
)
# fmt: on
_RANDOM: Final = 300
_PIECES: Final = (*"aAbBzZ0129 \n\t.,!?'/-_", "'s", "'LL", "  ", "\r\n", "🎉", " the", "The")


def find_pre(document: Mapping[str, Any], origin: str) -> str:
    """The name of the way in which a byte-level tokenizer parts a text.

    Args:
        document: a tokenizer.json.
        origin: what to name in messages.

    Raises:
        UnsupportedModelError: llama.cpp has none that is the same, or none that is known here.
    """
    tokenizer = _parting(document["pre_tokenizer"])
    ignores = bool(document["model"].get("ignore_merges"))
    wanted = [_parts(tokenizer, text) for text in probe_texts()]
    for name in NAMES:
        kind = PRE_TOKENIZERS[name]
        if kind.ignore_merges == ignores and _is_same(kind, wanted):
            return name
    raise UnsupportedModelError(
        f"{origin} parts texts in a way that none of llama.cpp's is known to ({', '.join(NAMES)}): use --to "
        "safetensors and llama.cpp's own converter, or another layout."
    )


def probe_texts() -> Iterator[str]:
    """Texts on which ways of parting differ."""
    yield from PROBES
    source = random.Random(0)
    for _ in range(_RANDOM):
        yield "".join(source.choices(_PIECES, k=source.randrange(1, 12)))


def _is_same(kind: PreTokenizer, wanted: list[list[str]]) -> bool:
    tokenizer = _parting(kind.to_json())
    return all(_parts(tokenizer, text) == parts for text, parts in zip(probe_texts(), wanted, strict=True))


def _parting(pre_tokenizer: Any) -> Tokenizer:  # noqa: ANN401 - JSON
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    document = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer, "model": model}
    return parse_tokenizer(json.dumps(document).encode())


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
