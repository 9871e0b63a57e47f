"""The pieces that the texts met so far can need, as a small model of the `tokenizers` library.

What a model makes of a word depends on the pieces that stand in the word, and on nothing else of its vocab
but the unknown token, the bytes and the lowest score: Unigram's lattice holds the pieces that stand at each
place, BPE merges two neighbours if they are a merge of the vocab, WordPiece looks up parts of the word. A
model of those pieces alone, with their scores, ranks and ids, is the library's own code on the same numbers
in the same order. So it gives the same tokens to the last tie, at a fraction of the memory.

A text with a new piece gets a model of its own, until those have cost as much as a larger working set would:
then that is made. So all of them together cost at most twice what would have been best.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import models

from trimserve.text.mapped.spelling import Speller, Spelling, chunks
from trimserve.text.mapped.tables import Numbers, Tables
from trimserve.text.mapped.words import Words

# A piece takes 1.1 KB in a Unigram model, 0.3 KB in the others.
_MOST_PIECES = {"Unigram": 1 << 13}
_MOST_OTHERWISE = 1 << 15
# Longer chunks hardly come again, and more of them would take megabytes.
_LONGEST_CHUNK = 32
_MOST_CHUNKS = 1 << 15
_MOST_MET = 1 << 13
# More of them at a time are looked at together, and their pieces not told apart.
_FEW_CHUNKS = 48
# Of more new words all pieces are found together, which takes less than a model a word.
_FEW_WORDS = 48
# What stands in no piece: code point U+FFFF is no character. Were it in one, more pieces would be found.
_BETWEEN = "\uffff"
# Symbols that are looked at together.
_SLICE = 1 << 16


@dataclass(frozen=True)
class SmallModel:
    """A model of the library with some pieces.

    Attributes:
        model: of `tokenizers`.
        ids: the token id of each id that it gives, int32; None where they are the same.
    """

    model: Any
    ids: Numbers | None


class WorkingSet:
    """Gives models that are sure to have every piece of a text."""

    def __init__(
        self,
        tables: Tables,
        spelling: Spelling,
        speller: Callable[[], Speller],
        steps: tuple[Any, Any],
    ) -> None:
        """Begin with the pieces that every text needs.

        Args:
            tables: of the tokenizer.
            spelling: of its texts.
            speller: gives what spells exactly; called when first needed.
            steps: the tokenizer's normalizer and pre-tokenizer, of the library; None where it has none.
        """
        self._tables, self._spelling, self._make_speller = tables, spelling, speller
        self._normalizer = steps[0]
        self._speller: Speller | None = None
        trie = tables.trie
        roots = (spelling.inside, spelling.prefix if spelling.anywhere else "")
        nodes = (trie.node(root) for root in roots if root)
        self._roots = [trie.root, *(node for node in nodes if node is not None)]
        self._most = _MOST_PIECES.get(tables.model["type"], _MOST_OTHERWISE)
        self._inside = np.zeros(len(tables), np.bool_)
        self._inside[tables.always] = True
        self._count = len(tables.always)  # pieces inside
        self._pending: list[Numbers] = []  # pieces of texts that had models of their own
        self._ready: set[str] = set()  # chunks with all their pieces in the working set
        self._ready_words: set[str] = set()
        self._met: dict[str, Numbers] = {}  # the pieces of chunks
        self._spent = 0
        self._words = Words(tables, spelling, steps, self._segment, lambda word: self._find([word]))
        self.model = self._make(tables.always)

    @property
    def pieces(self) -> int:
        """Pieces in memory."""
        return self._count

    def cover(self, texts: Sequence[str], *, at_any_size: bool = False) -> SmallModel | None:
        """A model with every piece of these texts that they need.

        Args:
            texts: any number.
            at_any_size: also where they have more pieces than are kept in memory; else None is given then.
        """
        words, rest = self._in_words(texts)
        new_words = [word for word in words if word not in self._ready_words]
        if len(new_words) > _FEW_WORDS:
            found, needed = self._find(new_words), [self._tables.always]
        else:
            found, needed = _joined([self._words.pieces(word) for word in new_words]), [self._words.least]
        chunks_, whole = self._parts(rest)
        new = [chunk for chunk in chunks_ if chunk not in self._ready]
        if rest:
            found, needed = np.concatenate([found, self._pieces_of(new, whole)]), [self._tables.always]
        if self._inside[found].all():
            self._know(new, new_words)
            return self.model
        needed += [found, *(self._words.pieces(word) for word in words if word in self._ready_words)]
        needed.append(self._pieces_of([chunk for chunk in chunks_ if chunk in self._ready], []))
        numbers = np.unique(np.concatenate(needed))
        if len(numbers) > self._most:
            return self._make(numbers) if at_any_size else None
        return self._extended(numbers, new, new_words)

    def _extended(self, needed: Numbers, chunks_: list[str], words: list[str]) -> SmallModel:
        """A model of these pieces alone, or a larger working set with them."""
        self._pending.append(needed)
        self._spent += len(needed)
        if self._spent < self._count:
            return self._make(needed)
        wanted = self._inside.copy()
        wanted[np.concatenate(self._pending)] = True
        size = int(np.count_nonzero(wanted))
        if self._spent < size:
            return self._make(needed)
        if size > self._most:
            wanted[:] = False
            wanted[self._tables.always] = True
            wanted[needed] = True
            self._ready.clear()
            self._ready_words.clear()
        self._inside, self._count = wanted, int(np.count_nonzero(wanted))
        self._pending.clear()
        self._spent = 0
        self._know(chunks_, words)
        self.model = self._make(_numbers(wanted))
        return self.model

    def _in_words(self, texts: Sequence[str]) -> tuple[set[str], list[str]]:
        """The words of those texts that can be parted so, and the other texts."""
        words: set[str] = set()
        rest = []
        for text in texts:
            parts = self._words.of(text)
            if parts is None:
                rest.append(text)
            else:
                words.update(parts)
        return words, rest

    def _segment(self, numbers: Numbers, word: str) -> list[int]:
        """Token ids of a word by a model with some pieces; none where it leaves out, or refuses, a part."""
        small = self._make(numbers)
        try:
            tokens = small.model.tokenize(word)
        except Exception:  # an unknown character and no unknown token: the text itself will say so
            return []
        if self._tables.model["type"] == "BPE" and "".join(token.value for token in tokens) != word:
            return []  # without an unknown token, unknown characters are left out
        ids = [token.id for token in tokens]
        return ids if small.ids is None else small.ids[ids].tolist()

    def _parts(self, texts: Sequence[str]) -> tuple[set[str], list[str]]:
        """The chunks of those texts that may be looked at so, and the other texts spelled."""
        words: set[str] = set()
        whole = []
        literals = self._spelling.literals
        for text in texts:
            if not self._spelling.direct or (literals is not None and literals.search(text)):
                whole.append(self._exact().spell(text))
            elif self._spelling.chunked and all(map(self._is_apart, parts := chunks(text))):
                words.update(parts)
            else:
                whole.append(self._spell(text))
        return words, whole

    def _is_apart(self, chunk: str) -> bool:
        known = chunk in self._ready or chunk in self._met
        return known or self._spelling.is_apart(chunk, self._spell(chunk))

    def _know(self, chunks_: Iterable[str], words: Iterable[str]) -> None:
        for ready in (self._ready, self._ready_words):
            if len(ready) > _MOST_CHUNKS:
                ready.clear()
        self._ready.update(chunk for chunk in chunks_ if len(chunk) <= _LONGEST_CHUNK)
        self._ready_words.update(words)

    def _pieces_of(self, words: list[str], whole: list[str]) -> Numbers:
        """The pieces that stand in chunks and in spelled texts."""
        if len(words) > _FEW_CHUNKS:
            return self._find([*map(self._spell, words), *whole])
        if len(self._met) > _MOST_MET:
            self._met.clear()
        found = [self._find(whole)]
        for word in words:
            pieces = self._met.get(word)
            if pieces is None:
                pieces = self._find([self._spell(word)])
                if len(word) <= _LONGEST_CHUNK:
                    self._met[word] = pieces
            found.append(pieces)
        return np.concatenate(found)

    def _spell(self, text: str) -> str:
        normalized = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return self._spelling.spell(normalized)

    def _exact(self) -> Speller:
        if self._speller is None:
            self._speller = self._make_speller()
        return self._speller

    def _find(self, spelled: list[str]) -> Numbers:
        """The pieces that stand in any of these strings."""
        if not spelled:
            return np.empty(0, np.int32)
        text = (self._spelling.prefix or _BETWEEN).join(["", *spelled])
        symbols = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        trie, reach = self._tables.trie, self._tables.longest
        starts = range(0, len(symbols), _SLICE)
        parts = [trie.within(symbols[start : start + _SLICE + reach], self._roots) for start in starts]
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))

    def _make(self, numbers: Numbers) -> SmallModel:
        tables, kind = self._tables, self._tables.model["type"]
        spelled = tables.pieces(numbers.tolist())
        settings = dict(tables.model)
        del settings["type"]
        if kind == "Unigram":
            unknown = settings["unk_id"]
            place = None if unknown is None else int(np.searchsorted(numbers, unknown))
            scores = tables.scores[numbers].tolist()
            scored = list(zip(spelled, scores, strict=True))
            model = models.Unigram(scored, place, bool(settings["byte_fallback"]))
            return SmallModel(model, tables.ids[numbers])
        vocab = dict(zip(spelled, tables.ids[numbers].tolist(), strict=True))
        if kind == "WordPiece":
            return SmallModel(models.WordPiece(vocab, **settings), None)
        text_of = dict(zip(numbers.tolist(), spelled, strict=True))
        merges = tables.merges_into(numbers)
        pairs = zip(tables.left[merges].tolist(), tables.right[merges].tolist(), strict=True)
        named = [(text_of[one], text_of[other]) for one, other in pairs]
        given = {key: value for key, value in settings.items() if value is not None}
        return SmallModel(models.BPE(vocab, named, **given), None)


def _numbers(chosen: npt.NDArray[np.bool_]) -> Numbers:
    return np.flatnonzero(chosen).astype(np.int32)


def _joined(parts: list[Numbers]) -> Numbers:
    return np.concatenate([np.empty(0, np.int32), *parts])
