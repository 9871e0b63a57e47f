"""Encode each distinct word once: the same ids as encoding the text, and the tokenizer rarely runs.

Texts are parted where `joints` proves that it changes no id, beside characters that are
solid. Everything that is not parted is encoded as it stands.
"""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.counting.encoding.encoders import EncoderName, Flat, PlainEncoder
from trimserve.counting.encoding.joints import components, find_joint

_PROBES = ("a", "1", "Z.")
# What BertNormalizer takes for Chinese characters.
_CJK_RANGES = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
_LEAST_CJK = 0x3400
_RARE_SPACES = 32
_MAX_WORDS = 1 << 17
# Encoded at a time: what tokenizers gives takes many times the text until its ids are read.
_NEW_CHARACTERS = 1 << 17
_MAX_CHARACTERS = 1 << 22
# Pieces to hold as strings, and characters to part at once: a text may be a book without a line end.
_MOST_PIECES = 1 << 14
_SEGMENT_CHARACTERS = 1 << 16

Indices = npt.NDArray[np.int64]


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

    name: EncoderName = "words"
    batch_characters = 1 << 19
    beside = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out how texts may be parted.

        Raises:
            UsageError: see `trimserve.counting.encoding.joints.find_joint`.
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
        index, counts = self._look_up(texts)
        self._judge()
        units, per_text = self._units(index, counts)
        self._encode_new(units)
        return _gather(words, units, per_text)

    def parts_most_of(self, texts: Sequence[str]) -> bool:
        """Whether most of the texts, by characters, are parted into words at all."""
        whole = sum(len(text) for text in texts if self._joint != "any" and _hardly_spaced(text))
        return 2 * whole < sum(map(len, texts))

    def _look_up(self, texts: Sequence[str]) -> tuple[Indices, Indices]:
        """Indices of the pieces of texts, and their number a text."""
        found = [np.empty(0, np.int64)]
        counts = np.zeros(len(texts), np.int64)
        waiting: list[str] = []
        for number, text in enumerate(texts):
            for pieces in self._pieces(text):
                counts[number] += len(pieces)
                waiting += pieces
                if len(waiting) > _MOST_PIECES:
                    found.append(self._words.look_up(waiting))
                    waiting = []
        return np.concatenate([*found, self._words.look_up(waiting)]), counts

    def _pieces(self, text: str) -> Iterator[list[str]]:
        if self._joint == "any":
            for space in "\t\n\r":  # BertNormalizer makes them spaces
                text = text.replace(space, " ")
            if self._parts_cjk and not text.isascii():
                text = _space_cjk(text)
        elif _hardly_spaced(text):
            yield [text]
            return
        start = 0
        while (end := text.find(" ", start + _SEGMENT_CHARACTERS)) >= 0:
            yield text[start:end].split(" ")
            start = end + 1
        yield text[start:].split(" ")

    def _judge(self) -> None:
        """Find out which new pieces begin and end with a character that leaves a space a joint."""
        unjudged = self._words.unjudged()
        free = self._free_of_added(unjudged)
        if self._joint == "any":
            self._words.judge(unjudged, free, free)
            return
        begins = self._solid.among([piece[:1] for piece in unjudged])
        ends = self._solid.among([piece[-1:] for piece in unjudged])
        self._words.judge(unjudged, np.logical_and(begins, free), np.logical_and(ends, free))

    def _free_of_added(self, pieces: list[str]) -> list[bool]:
        """Whether no added token stands in each piece."""
        # All at once, as there is hardly ever one: none holds a space (see `joints`).
        if self._added is None or self._added.search(" ".join(pieces)) is None:
            return [True] * len(pieces)
        return [self._added.search(piece) is None for piece in pieces]

    def _units(self, index: Indices, counts: Indices) -> tuple[Indices, Indices]:
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
        ends = starts + lengths
        bounds = zip(starts[literal].tolist(), ends[literal].tolist(), leads[literal].tolist(), strict=True)
        piece = words.keys.__getitem__
        keys = [f" {lead}{' '.join(map(piece, index[start:end].tolist()))}" for start, end, lead in bounds]
        units[literal] = words.look_up(keys)
        unjudged = words.unjudged()
        words.judge(unjudged, [False] * len(unjudged), [False] * len(unjudged))
        owner = np.searchsorted(np.cumsum(counts), starts, side="right")
        return units, np.bincount(owner, minlength=len(counts)).astype(np.int64)

    def _encode_new(self, units: Indices) -> None:
        words = self._words
        new = np.unique(units[words.lengths[units] < 0])
        lengths = (len(words.keys[number]) for number in new.tolist())
        ends = np.cumsum(np.fromiter(lengths, np.int64, len(new)))
        cuts = np.flatnonzero(np.diff(ends // _NEW_CHARACTERS)) + 1
        for fresh in np.split(new, cuts) if new.size else ():
            self._encode_words(fresh)

    def _encode_words(self, fresh: Indices) -> None:
        words = self._words
        keys = [words.keys[number] for number in fresh.tolist()]
        texts = [key[1:] if key.startswith(" ") else self._lead + key for key in keys]
        encoded = self._plain.encode(texts)
        words.lengths[fresh] = encoded.lengths
        words.starts[fresh] = len(words.ids) + np.cumsum(encoded.lengths) - encoded.lengths
        words.ids = np.append(words.ids, encoded.ids.astype(np.int32))


def _hardly_spaced(text: str) -> bool:
    """Whether a text is in a script without spaces, as hardly a piece of it would be met again."""
    return len(text) > _RARE_SPACES * (text.count(" ") + 1)


def _cjk_table() -> npt.NDArray[np.bool_]:
    table = np.zeros(_CJK_RANGES[-1][1] + 2, np.bool_)
    for first, last in _CJK_RANGES:
        table[first : last + 1] = True
    return table


_IS_CJK = _cjk_table()


def _space_cjk(text: str) -> str:
    """Part Chinese characters from their neighbours by a space, as BertNormalizer's spaces around them do."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    if characters.max(initial=0) < _LEAST_CJK:
        return text
    cjk = _IS_CJK[np.minimum(characters, len(_IS_CJK) - 1)]
    parted = cjk.copy()
    parted[1:] |= cjk[:-1]
    spaced = np.full(len(characters) + np.count_nonzero(parted), ord(" "), np.uint32)
    spaced[np.arange(len(characters)) + np.cumsum(parted)] = characters
    return spaced.tobytes().decode("utf-32-le", "surrogatepass")


def _gather(words: _Words, units: Indices, per_text: Indices) -> Flat:
    lengths = words.lengths[units]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    places = np.repeat(words.starts[units] - (ends - lengths), lengths)
    places += np.arange(total)
    bounds = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(per_text)])]
    return Flat(words.ids[places], np.diff(bounds))
