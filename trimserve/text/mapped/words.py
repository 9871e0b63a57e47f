"""The words of a text, and the few pieces that a word's tokens are made of.

A text's words are what the library's own normalizer and pre-tokenizer make of it. A word is segmented once,
by a model of all pieces that stand in it; from then on the pieces of its tokens are enough, in any text,
because whatever a model with fewer pieces can do, the whole model can do, too, and it chose these:

- Unigram: the best path is in the smaller lattice, the others that are there were there, with the same sums.
  An unknown character scores 10 below the lowest piece, which is always there.
- BPE: each step takes the lowest rank there is. The merges that were taken are there (all merges that make a
  token, and their parts, down to characters), and any other that is there was not taken in the whole model.
- WordPiece: the longest piece that fits is there, longer ones did not fit.

A word with an unknown part keeps all pieces that stand in it, and those that every text needs. A text in
which an added token may stand is not parted so.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import PreTokenizedString

from trimserve.text.mapped.spelling import Spelling, crosses_words
from trimserve.text.mapped.tables import Numbers, Tables

_SPACED = re.compile("[ \u2581]*[^ \u2581]+|[ \u2581]+")
# Finding all pieces of a longer word costs more than it saves: it hardly comes again.
_LONGEST_WORD = 64
_MOST_WORDS = 1 << 13


class Words:
    """Parts texts into words and remembers the pieces of those that were met."""

    def __init__(
        self,
        tables: Tables,
        spelling: Spelling,
        steps: tuple[Any, Any],
        segment: Callable[[Numbers, str], list[int]],
        find: Callable[[str], Numbers],
    ) -> None:
        """Prepare.

        Args:
            tables: of the tokenizer.
            spelling: of its texts.
            steps: the tokenizer's normalizer and pre-tokenizer, of the library; None where it has none.
            segment: token ids of a word by a model with some pieces.
            find: all pieces that stand in a string.
        """
        self._tables, self._spelling = tables, spelling
        self._normalizer, self._pre_tokenizer = steps
        self._segment, self._find = segment, find
        self._met: dict[str, Numbers] = {}
        kind, settings = tables.model["type"], tables.model
        unknown = (
            settings.get("unk_id") if kind == "Unigram" else tables.trie.find(settings["unk_token"] or "")
        )
        self._unknown = None if unknown is None else int(tables.ids[unknown])
        least = [] if unknown is None else [int(unknown)]
        if tables.scores.size:
            least.append(int(np.argmin(tables.scores)))
        self.least: Numbers = np.unique(np.array(least, np.int32))
        self._at_spaces = self._pre_tokenizer is None and self._parts_at_spaces()
        self._usable = not spelling.has_normalized_tokens and (
            self._pre_tokenizer is not None or self._at_spaces
        )

    def of(self, text: str) -> list[str] | None:
        """The words of a text; None where they cannot be told, or are too long to be remembered."""
        literals = self._spelling.literals
        if not self._usable or (literals is not None and literals.search(text)):
            return None
        parts = PreTokenizedString(text)
        if self._normalizer is not None:
            parts.normalize(self._normalizer.normalize)
        if self._pre_tokenizer is not None:
            self._pre_tokenizer.pre_tokenize(parts)
        words = [word for word, *_ in parts.get_splits()]
        if self._at_spaces:
            words = [part for word in words for part in _SPACED.findall(word)]
        return None if any(len(word) > _LONGEST_WORD for word in words) else words

    def pieces(self, word: str) -> Numbers:
        """The pieces that a model needs for a word, besides `least`."""
        found = self._met.get(word)
        if found is None:
            if len(self._met) >= _MOST_WORDS:
                self._met.clear()
            found = self._met[word] = self._used(word)
        return found

    def _used(self, word: str) -> Numbers:
        standing = self._find(word)
        ids = self._segment(np.union1d(self.least, standing), word)
        if self._unknown in ids or not ids:
            return np.union1d(self._tables.always, standing)
        numbers = {number for id_ in ids if (number := self._tables.number(id_)) is not None}
        if self._tables.left.size:
            self._add_parts(numbers)
        return np.array(sorted(numbers), np.int32)

    def _add_parts(self, numbers: set[int]) -> None:
        """Add what the pieces are merged from, down to characters."""
        open_ = list(numbers)
        while open_:
            for part in self._tables.merged_from(open_.pop()):
                if part not in numbers:
                    numbers.add(part)
                    open_.append(part)

    def _parts_at_spaces(self) -> bool:
        """Whether no piece stands across the beginning of a word, in a model whose word is the whole text."""
        if self._tables.model["type"] != "BPE" or not self._spelling.chunked:
            return False
        always = self._tables.pieces(self._tables.always.tolist())
        return not any(crosses_words(piece, self._spelling.space) for piece in always)
