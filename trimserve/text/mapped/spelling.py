"""Which strings of symbols a text becomes before its tokenizer's model sees it: enough of them, cheaply.

The model is handed words. What is needed here is less: strings in which every word of the text stands, so
that every piece of a word is a piece of one of them. So pre-tokenizers that part texts or drop white space
need not be run, and one that spells a space or a byte otherwise is a translation.

Where the normalizer treats what is beside a space apart (see `trimserve.counting.encoding.joints`), a text is
parted before its spaces into *chunks*, and a chunk that was met before needs no look. A piece that stands
across such a place has a space behind another symbol; those few are always there. A chunk whose normalized
form does not begin with its space, or ends with another, is not used as one.

A text in which a special token may stand is parted at it before it is normalized. Such texts, and those of a
tokenizer with any other component, are spelled exactly: by the tokenizer itself, with a model of 256 bytes.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tokenizers import Tokenizer

Json = Mapping[str, Any]
# They act on each character, or on grapheme clusters and what composes: a space begins one of either.
_LOCAL = frozenset(
    {
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Lowercase",
        "StripAccents",
        "BertNormalizer",
        "Precompiled",
        "Prepend",
    }
)
_CUTTING = frozenset(
    {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Split", "UnicodeScripts"}
)
_PARTING = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
# A space is of one cluster with them: Grapheme_Cluster_Break=Prepend, Unicode 16.0 (UAX 29).
_PREPENDED = re.compile(
    "[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd\U000111c2\U000111c3\U000113d1"
    "\U0001193f\U00011941\U00011a3a\U00011a84-\U00011a89\U00011d46\U00011f02]"
)
_CHUNK = re.compile(" *[^ ]+| +")
_BYTE_SPACE = "\u0120"


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer's texts are spelled.

    Attributes:
        direct: by the normalizer and a translation; else always by the tokenizer itself.
        chunked: a text may be looked at chunk by chunk.
        by_bytes: each byte is a letter of the byte-level alphabet.
        parts_at_spaces: no word has white space in it.
        marks_spaces: the pre-tokenizer writes a space as U+2581.
        prefix: what the pre-tokenizer may put before a word; "" for nothing.
        anywhere: it may do so wherever a word begins, not only at the beginning of the text.
        inside: what pieces within a word begin with ("##" of WordPiece).
        literals: finds special tokens in a text; None without any.
        has_normalized_tokens: added tokens are looked for in the normalized text, too.
    """

    direct: bool
    chunked: bool
    by_bytes: bool
    parts_at_spaces: bool
    marks_spaces: bool
    prefix: str
    anywhere: bool
    inside: str
    literals: re.Pattern[str] | None
    has_normalized_tokens: bool

    @classmethod
    def of(cls, shell: Json, model: Json) -> Self:
        """Find out from a tokenizer.json without its model, and the model's settings."""
        normalizers = _members(shell.get("normalizer"), "normalizers")
        steps = _members(shell.get("pre_tokenizer"), "pretokenizers")
        kinds = [step["type"] for step in steps]
        normal = {step["type"] for step in normalizers}
        by_bytes, marks = "ByteLevel" in kinds, "Metaspace" in kinds
        known = all(kind in _CUTTING or kind in ("ByteLevel", "Metaspace") for kind in kinds)
        known = known and kinds.count("ByteLevel") + kinds.count("Metaspace") < 2
        known = known and all(step.get("replacement", "\u2581") == "\u2581" for step in steps)
        local = all(step["type"] in _LOCAL or _is_local_replace(step) for step in normalizers)
        tokens = shell.get("added_tokens") or ()
        contents = [re.escape(token["content"]) for token in tokens if not token.get("normalized")]
        return cls(
            direct=known and local,
            # A prefix hides whether a space became one of a cluster.
            chunked=known and local and not normal >= {"Prepend", "Precompiled"},
            by_bytes=by_bytes,
            parts_at_spaces=bool(kinds) and kinds[0] in _PARTING,
            marks_spaces=marks,
            prefix=_prefix(steps),
            anywhere=len(steps) > 1 or any(token.get("normalized") for token in tokens),
            inside=str(model.get("continuing_subword_prefix") or "") if model["type"] == "WordPiece" else "",
            literals=re.compile("|".join(contents)) if contents else None,
            has_normalized_tokens=any(token.get("normalized") for token in tokens),
        )

    @property
    def space(self) -> str:
        """The symbols that stand for a space."""
        return _BYTE_SPACE if self.by_bytes else " \u2581"

    def spell(self, normalized: str) -> str:
        """What the pre-tokenizer makes of a normalized text, but for parting it."""
        if self.by_bytes:
            return normalized.encode("utf-8", "surrogatepass").decode("latin-1").translate(_LETTERS)
        return normalized.replace(" ", "\u2581") if self.marks_spaces else normalized

    def is_apart(self, chunk: str, spelled: str) -> bool:
        """Whether no piece but those that are always there stands across the ends of a chunk."""
        if not spelled or _PREPENDED.match(chunk[-1]):
            return False
        begins = chunk[0] != " " or spelled[0] in self.space
        return begins and (self.parts_at_spaces or chunk[-1] == " " or spelled[-1] not in self.space)


def chunks(text: str) -> list[str]:
    """Part a text before its spaces: each part but the first begins with all spaces that stand there."""
    return _CHUNK.findall(text)


def crosses_words(piece: str, space: str) -> bool:
    """Whether a piece has a space behind another symbol."""
    return any(here in space and before not in space for before, here in itertools.pairwise(piece))


class Speller:
    """Spells texts exactly, by the tokenizer itself with a model that gives their bytes."""

    def __init__(self, shell: Json) -> None:
        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
        model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
        self.tokenizer = Tokenizer.from_str(json.dumps({**shell, "post_processor": None, "model": model}))

    def spell(self, text: str) -> str:
        """The words of a text, one behind the other."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return bytes(id_ for id_ in ids if id_ < 256).decode("utf-8", "replace")


def _members(component: Json | None, key: str) -> list[Json]:
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [member for nested in component[key] for member in _members(nested, key)]


def _is_local_replace(step: Json) -> bool:
    pattern = step.get("pattern") or {}
    text = pattern.get("String")
    if step["type"] != "Replace":
        return False
    single = text is not None and (len(text) == 1 or not any(character.isspace() for character in text))
    return single or pattern.get("Regex") == " {2,}"


def _prefix(steps: list[Json]) -> str:
    for step in steps:
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return _BYTE_SPACE
        if step["type"] == "Metaspace":
            return str(step["replacement"])
    return ""


def _byte_letters() -> dict[int, int]:
    """Code point of the letter of each byte: its own of a printable one, as GPT-2's encoder has them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(plain))
    return {byte: byte for byte in plain} | {byte: 256 + place for place, byte in enumerate(others)}


_LETTERS = _byte_letters()
