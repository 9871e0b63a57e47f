"""Encode each distinct word once: the same ids as encoding the text, and the tokenizer rarely runs.

A *joint* is a single space where a text may be parted so that the parts encode to the ids of the whole. Most
tokenizers make every space between solid characters one:

- WordPiece, after BertPreTokenizer or WhitespaceSplit: no token spans white space.
- Unigram and BPE behind Metaspace(split): each word is segmented by itself, behind its "▁".
- Byte-level BPE with one of the known expressions: a match begins before each single space.
- SentencePiece BPE without pre-tokenizer, if no token of its vocab has "▁" behind another character: no
  merge can cross such a place.

Normalizers act on characters or grapheme clusters, of which a space between solid characters begins one. That
a character is solid is tried on the tokenizer itself, once a character. Pieces with added tokens are never
solid, since these reach out for white space or change what stands beside them. Everything that is not parted
is encoded as it stands. A tokenizer with any component not named here is refused.
"""

import itertools
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.counting.encoders import Engine, Flat, PlainEncoder
from trimserve.errors import UsageError

# "lead": the space before a word is a part of it. "drop": a word alone encodes as behind a space.
# "any": as "drop", and any space parts, whatever stands beside it.
Joint = Literal["lead", "drop", "any"]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# In each of them white space stands only at the beginning of an alternative, or makes up all of it.
_EXPRESSIONS = frozenset({_GPT2, _LLAMA3, _LLAMA3.replace("{1,3}", "")})
_NORMALIZERS = frozenset(
    {
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "StripAccents",
        "BertNormalizer",
        "Precompiled",
        "Nmt",
        "Prepend",
    }
)
_PROBES = ("a", "1", "Z.")
_CJK = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_HAS_CJK = re.compile(f"[{_CJK}]")
_CJK_PIECES = re.compile(f"[{_CJK}]|[^ {_CJK}]+")
_SPACES = str.maketrans("\t\n\r", "   ")  # BertNormalizer makes them spaces
_RARE_SPACES = 32
_MAX_WORDS = 1 << 18
_MAX_CHARACTERS = 1 << 23

Indices = npt.NDArray[np.int64]


def components(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says about a tokenizer, without its vocab and merges, which take long to write."""
    model = tokenizer.model
    steps = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    return {
        "model": {
            "type": type(model).__name__,
            "dropout": getattr(model, "dropout", None),
            "end_of_word_suffix": getattr(model, "end_of_word_suffix", None),
        },
        "added_tokens": [
            {"content": token.content} for token in tokenizer.get_added_tokens_decoder().values()
        ],
    } | {name: step and json.loads(step.__getstate__()) for name, step in steps.items()}


def find_joint(parts: dict[str, Any], vocab: Callable[[], Iterable[str]]) -> Joint:
    """How texts may be parted at spaces, by the components of a tokenizer.

    Args:
        parts: what `components` gives.
        vocab: gives the tokens, where they have to be looked at.

    Raises:
        UsageError: a component is not known to be local to words.
    """
    _demand(not parts["model"].get("dropout"), "dropout")
    _demand(not any(_reaches_out(token["content"]) for token in parts["added_tokens"]), "added tokens")
    joint = _pre_tokenizer_joint(parts, vocab)
    for normalizer in _members(parts["normalizer"], "normalizers"):
        kind, pattern = normalizer["type"], normalizer.get("pattern") or {}
        known = kind in _NORMALIZERS or (kind == "Strip" and joint != "lead")
        single = len(pattern.get("String", "")) == 1 or pattern.get("Regex") == " {2,}"
        _demand(known or (kind == "Replace" and single), f"normalizer {kind} {pattern or ''}")
    return joint


def _reaches_out(content: str) -> bool:
    return "▁" in content or any(character.isspace() for character in content)


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise UsageError(
            f"this tokenizer's {what.strip()} is not known to keep words apart: take another engine."
        )


def _members(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [member for nested in component[key] for member in _members(nested, key)]


def _pre_tokenizer_joint(parts: dict[str, Any], vocab: Callable[[], Iterable[str]]) -> Joint:
    steps = _members(parts["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not steps:
        return _sentencepiece_joint(parts, vocab)
    if kinds == ["BertPreTokenizer"]:
        normalizers = _members(parts["normalizer"], "normalizers")
        return "any" if [step["type"] for step in normalizers] == ["BertNormalizer"] else "drop"
    if kinds in (["WhitespaceSplit"], ["WhitespaceSplit", "Metaspace"]):
        _demand(steps[-1].get("prepend_scheme", "always") != "first", "Metaspace behind WhitespaceSplit")
        return "drop"
    if kinds == ["Metaspace"] and steps[0].get("split", True):
        return "lead" if steps[0].get("prepend_scheme", "always") == "never" else "drop"
    splits, last = steps[:-1], steps[-1]
    known = all(
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _EXPRESSIONS
        and step["behavior"] == "Isolated"
        and not step["invert"]
        for step in splits
    )
    by_regex = last["type"] == "ByteLevel" and (len(splits) == 1) != bool(last.get("use_regex", True))
    _demand(known and by_regex and len(splits) <= 1, "pre-tokenizer " + ", ".join(kinds))
    return "lead"


def _sentencepiece_joint(parts: dict[str, Any], vocab: Callable[[], Iterable[str]]) -> Joint:
    model = parts["model"]
    _demand(model["type"] == "BPE" and not model.get("end_of_word_suffix"), "lack of a pre-tokenizer")
    steps = _members(parts["normalizer"], "normalizers")
    spaces = [step for step in steps if step["type"] == "Replace" and step.get("pattern") == {"String": " "}]
    _demand(bool(spaces) and spaces[0]["content"] == "▁", "lack of a pre-tokenizer")
    _demand(not any("▁" in piece.lstrip("▁") for piece in vocab()), "vocab, which has tokens across words,")
    return "drop" if any(step == {"type": "Prepend", "prepend": "▁"} for step in steps) else "lead"


class _Solid:
    """Which characters leave a single space beside them a joint; tried when they are first met."""

    def __init__(self, plain: PlainEncoder, lead: str) -> None:
        self._plain, self._lead = plain, lead
        self._known: dict[str, bool] = {"": False}

    def among(self, characters: Sequence[str]) -> list[bool]:
        """Whether each character is solid; "" is not."""
        new = [character for character in dict.fromkeys(characters) if character not in self._known]
        candidates = [character for character in new if unicodedata.category(character)[0] in "LNPS"]
        self._known |= dict.fromkeys(new, False)
        if candidates:
            self._try(candidates)
        return [self._known[character] for character in characters]

    def _try(self, characters: Sequence[str]) -> None:
        pairs = [
            pair
            for character in characters
            for pair in (
                (character, character),
                *((p, character) for p in _PROBES),
                *((character, p) for p in _PROBES),
            )
        ]
        whole = self._plain.encode([f"{left} {right}" for left, right in pairs])
        parted = self._plain.encode([part for left, right in pairs for part in (left, self._lead + right)])
        joined = parted.lengths.reshape(-1, 2).sum(axis=1)
        fits = (
            np.split(whole.ids, np.cumsum(whole.lengths)[:-1]),
            np.split(parted.ids, np.cumsum(joined)[:-1]),
        )
        same = np.array([np.array_equal(one, other) for one, other in zip(*fits, strict=True)])
        solid = [bool(tried.all()) for tried in same.reshape(len(characters), -1)]
        self._known |= dict(zip(characters, solid, strict=True))


class _Words:
    """The distinct words met so far, with their ids in one buffer.

    A key without a leading space is a word behind a joint; a key " text" stands for just that text.
    """

    def __init__(self) -> None:
        self.index: defaultdict[str, int] = defaultdict(itertools.count().__next__)
        self.begins_solid = np.empty(0, np.bool_)
        self.ends_solid = np.empty(0, np.bool_)
        self.starts = np.empty(0, np.int64)
        self.lengths = np.empty(0, np.int64)  # -1: not encoded yet
        self.ids = np.empty(0, np.int32)
        self.keys: list[str] = []
        self.characters = 0

    def look_up(self, keys: Sequence[str]) -> Indices:
        return np.fromiter(map(self.index.__getitem__, keys), np.int64, len(keys))

    def unjudged(self) -> list[str]:
        """The keys that were looked up for the first time, in the order of their indices."""
        return list(itertools.islice(self.index, len(self.keys), None))

    def judge(self, keys: list[str], begins_solid: npt.ArrayLike, ends_solid: npt.ArrayLike) -> None:
        """Enter what is known of new keys; they are not encoded yet."""
        self.keys += keys
        self.characters += sum(map(len, keys))
        self.begins_solid = np.append(self.begins_solid, np.asarray(begins_solid, np.bool_))
        self.ends_solid = np.append(self.ends_solid, np.asarray(ends_solid, np.bool_))
        self.starts = np.append(self.starts, np.zeros(len(keys), np.int64))
        self.lengths = np.append(self.lengths, np.full(len(keys), -1, np.int64))


class WordEncoder:
    """Looks words up, and encodes only those that are met for the first time."""

    name: Engine = "words"
    batch_characters = 1 << 21

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out how texts may be parted.

        Raises:
            UsageError: see `find_joint`.
        """
        parts = components(tokenizer)
        self._joint = find_joint(parts, tokenizer.get_vocab)
        self._lead = " " if self._joint == "lead" else ""
        self._plain = PlainEncoder(tokenizer)
        self._solid = _Solid(self._plain, self._lead)
        added = [re.escape(token["content"]) for token in parts["added_tokens"]]
        self._added = re.compile("|".join(added)) if added else None
        normalizer = parts["normalizer"] or {}
        self._parts_cjk = self._joint == "any" and bool(normalizer.get("handle_chinese_chars"))
        self._words = _Words()

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encode texts."""
        words = self._words
        if len(words.index) > _MAX_WORDS or words.characters > _MAX_CHARACTERS:
            self._words = words = _Words()
        pieces: list[str] = []
        counts = np.empty(len(texts), np.int64)
        for number, text in enumerate(texts):
            parted = self._pieces(text)
            counts[number] = len(parted)
            pieces += parted
        index = words.look_up(pieces)
        self._judge()
        units, per_text = self._units(index, pieces, counts)
        self._encode_new(units)
        return _gather(words, units, per_text)

    def _pieces(self, text: str) -> list[str]:
        if self._joint == "any":
            text = text.translate(_SPACES)
            if self._parts_cjk and not text.isascii() and _HAS_CJK.search(text):
                return _CJK_PIECES.findall(text)  # what BertNormalizer's spaces around them do
        elif len(text) > _RARE_SPACES * (text.count(" ") + 1):
            return [text]  # a script without spaces: hardly a piece would be met again
        return text.split(" ")

    def _judge(self) -> None:
        """Find out which new pieces begin and end with a character that leaves a space a joint."""
        unjudged = self._words.unjudged()
        free = [self._added is None or self._added.search(piece) is None for piece in unjudged]
        if self._joint == "any":
            self._words.judge(unjudged, free, free)
            return
        begins = self._solid.among([piece[:1] for piece in unjudged])
        ends = self._solid.among([piece[-1:] for piece in unjudged])
        self._words.judge(unjudged, np.logical_and(begins, free), np.logical_and(ends, free))

    def _units(self, index: Indices, pieces: list[str], counts: Indices) -> tuple[Indices, Indices]:
        """Join pieces where there is no joint between them: indices of the units, and their number a text."""
        words = self._words
        text_starts = np.cumsum(counts) - counts
        joint = np.ones(len(index), np.bool_)
        joint[1:] = words.ends_solid[index[:-1]] & words.begins_solid[index[1:]]
        joint[text_starts[counts > 0]] = True
        starts = np.flatnonzero(joint)
        lengths = np.diff(starts, append=len(index))
        units = index[starts]
        # A unit at the beginning of a text has no space before it, and one of several pieces is no word.
        leads = np.full(len(starts), self._lead)
        first = np.searchsorted(starts, text_starts[counts > 0])
        leads[first] = ""
        literal = lengths > 1
        literal[first] = True
        bounds = zip(
            starts[literal].tolist(), lengths[literal].tolist(), leads[literal].tolist(), strict=True
        )
        keys = [f" {lead}{' '.join(pieces[start : start + length])}" for start, length, lead in bounds]
        units[literal] = words.look_up(keys)
        unjudged = words.unjudged()
        words.judge(unjudged, [False] * len(unjudged), [False] * len(unjudged))
        owner = np.searchsorted(np.cumsum(counts), starts, side="right")
        return units, np.bincount(owner, minlength=len(counts)).astype(np.int64)

    def _encode_new(self, units: Indices) -> None:
        words = self._words
        fresh = np.unique(units[words.lengths[units] < 0])
        if not fresh.size:
            return
        keys = [words.keys[number] for number in fresh.tolist()]
        texts = [key[1:] if key.startswith(" ") else self._lead + key for key in keys]
        encoded = self._plain.encode(texts)
        words.lengths[fresh] = encoded.lengths
        words.starts[fresh] = len(words.ids) + np.cumsum(encoded.lengths) - encoded.lengths
        words.ids = np.append(words.ids, encoded.ids.astype(np.int32))


def _gather(words: _Words, units: Indices, per_text: Indices) -> Flat:
    lengths = words.lengths[units]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    places = np.repeat(words.starts[units] - (ends - lengths), lengths)
    places += np.arange(total)
    bounds = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(per_text)])]
    return Flat(words.ids[places], np.diff(bounds))
