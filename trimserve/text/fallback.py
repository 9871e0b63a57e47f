"""Split a cold token into kept pieces, for folders without cold rows (`--no-cold`).

The pieces are those that the tokenizer's own model would fall back on if the token did not exist: the parts
of its merge for BPE, the best-scored segmentation for Unigram, the longest match for WordPiece, and bytes
where the model has them. Their text is the token's own text, but not its segmentation: outputs are near the
full model's, not equal to them.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.errors import UnknownIdError
from trimserve.text.tokenizer import is_byte_token, special_ids
from trimserve.vocab.map import VocabMap

Splitter = Callable[[str], list[int] | None]

# What the library takes off the worst score for a character that no piece covers: kUnkPenalty of
# SentencePiece's unigram_model.cc.
_UNKNOWN_PENALTY = 10.0


class Fallback:
    """Kept pieces of the cold tokens of one tokenizer, computed when first asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab: VocabMap) -> None:
        self._tokenizer = tokenizer
        special = special_ids(tokenizer)
        tokens = ((tokenizer.id_to_token(id_), id_) for id_ in vocab.kept_ids.tolist() if id_ not in special)
        self._kept = {token: id_ for token, id_ in tokens if token is not None}
        self._splitter = _splitter(json.loads(tokenizer.to_str())["model"], self._kept)
        self._anchor = self._find_anchor(vocab.vocab_size)
        self._cache: dict[int, Ids] = {}

    def pieces(self, cold_id: int) -> Ids:
        """Give the kept ids (at least one) that spell a cold token.

        Raises:
            UnknownIdError: the kept pieces cannot spell it.
        """
        found = self._cache.get(cold_id)
        if found is None:  # two threads may find the same pieces: either will do
            found = self._cache[cold_id] = self._find(cold_id)
        return found

    def split(self, ids: Ids, cold: npt.NDArray[np.bool_]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Replace the cold tokens of a sequence.

        Args:
            ids: token ids, int32 (T,).
            cold: where they are cold, (T,).

        Returns:
            The longer sequence, int32, and how many of its tokens stand for each of `ids`, int64 (T,).

        Raises:
            UnknownIdError: see `pieces`.
        """
        parts = [self.pieces(id_) for id_ in ids[cold].tolist()]
        repeats = np.ones(ids.shape, np.int64)
        repeats[cold] = [part.size for part in parts]
        longer = np.repeat(ids, repeats)
        longer[np.repeat(cold, repeats)] = np.concatenate(parts)
        return longer, repeats

    def _find(self, cold_id: int) -> Ids:
        token = self._tokenizer.id_to_token(cold_id)
        pieces = self._splitter(token) if token is not None else None
        if not pieces or not self._spell_the_same(pieces, cold_id):
            raise UnknownIdError(
                f"token {token!r} (id {cold_id:,}) has no compact row, and the kept pieces cannot spell it: "
                "export the folder without --no-cold, or keep more ids."
            )
        return np.array(pieces, np.int32)

    def _spell_the_same(self, pieces: list[int], cold_id: int) -> bool:
        # Without a decoder the library puts a space between tokens, whatever they are.
        return self._tokenizer.decoder is None or self._decode(pieces) == self._decode([cold_id])

    def _decode(self, ids: list[int]) -> str:
        # Decoders treat the first token of a text apart.
        text: str = self._tokenizer.decode([*self._anchor, *ids], skip_special_tokens=False)
        return text

    def _find_anchor(self, rows: int) -> list[int]:
        tokens = ((self._tokenizer.id_to_token(id_), id_) for id_ in range(rows))
        plain = (id_ for token, id_ in tokens if token and token.isascii() and token.isalpha())
        return list(itertools.islice(plain, 1))


def _splitter(model: Mapping[str, Any], kept: Mapping[str, int]) -> Splitter:
    if model["type"] == "BPE":
        return _BpeSplitter(model, kept)
    if model["type"] == "Unigram":
        return _UnigramSplitter(model, kept)
    if model["type"] == "WordPiece":
        return _WordPieceSplitter(model, kept)
    return _no_parts  # WordLevel


class _BpeSplitter:
    """Undo merges until every part is kept; a character without a row becomes bytes."""

    def __init__(self, model: Mapping[str, Any], kept: Mapping[str, int]) -> None:
        self._kept = kept
        self._bytes = _byte_pieces(kept) if model.get("byte_fallback") else {}
        prefix = len(model.get("continuing_subword_prefix") or "")
        self._parts: dict[str, tuple[str, str]] = {}
        for merge in model["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            # The merge of the lowest rank is the one that made the token.
            self._parts.setdefault(first + second[prefix:], (first, second))

    def __call__(self, token: str) -> list[int] | None:
        if token in self._kept:
            return [self._kept[token]]
        if parts := self._parts.get(token):
            return _joined(self(part) for part in parts)
        if len(token) == 1:
            return _spell_bytes(token, self._bytes)
        return _joined(self(character) for character in token)


class _UnigramSplitter:
    """Viterbi over kept pieces with the model's scores, as SentencePiece segments; bytes where none fits."""

    def __init__(self, model: Mapping[str, Any], kept: Mapping[str, int]) -> None:
        vocab = model["vocab"]
        self._kept = {token: id_ for token, id_ in kept.items() if id_ < len(vocab)}
        self._score = {token: float(vocab[id_][1]) for token, id_ in self._kept.items()}
        self._longest = max(map(len, self._kept), default=0)
        self._bytes = _byte_pieces(kept) if model.get("byte_fallback") else {}
        self._byte_score = min(score for _, score in vocab) - _UNKNOWN_PENALTY

    def __call__(self, token: str) -> list[int] | None:
        # best[end]: score of the best segmentation of token[:end], and where its last piece starts.
        best: list[tuple[float, int]] = [(0.0, 0)]
        for end in range(1, len(token) + 1):
            starts = range(max(0, end - self._longest), end)
            options = [(best[start][0] + self._score_of(token[start:end]), start) for start in starts]
            best.append(max(options, default=(-np.inf, end - 1)))
        if best[-1][0] == -np.inf:
            return None
        cuts = [len(token)]
        while cuts[-1]:
            cuts.append(best[cuts[-1]][1])
        cuts.reverse()
        return _joined(self._spell(token[a:b]) for a, b in itertools.pairwise(cuts))

    def _score_of(self, piece: str) -> float:
        uncovered = self._byte_score if len(piece) == 1 and self._bytes else -np.inf
        return self._score.get(piece, uncovered)

    def _spell(self, piece: str) -> list[int] | None:
        return [self._kept[piece]] if piece in self._kept else _spell_bytes(piece, self._bytes)


class _WordPieceSplitter:
    """Longest match first, as WordPiece itself; a shorter one where the longest leads to a dead end."""

    def __init__(self, model: Mapping[str, Any], kept: Mapping[str, int]) -> None:
        self._kept = kept
        self._prefix: str = model["continuing_subword_prefix"]

    def __call__(self, token: str) -> list[int] | None:
        inside = token.startswith(self._prefix)
        return self._match(token.removeprefix(self._prefix), inside, set())

    def _match(self, text: str, inside: bool, dead: set[int]) -> list[int] | None:
        """Spell `text`; `dead` collects the lengths of ends that cannot be spelled."""
        if not text:
            return []
        for length in range(len(text), 0, -1):
            piece = self._prefix * inside + text[:length]
            if piece in self._kept and len(text) - length not in dead:
                rest = self._match(text[length:], True, dead)
                if rest is not None:
                    return [self._kept[piece], *rest]
        dead.add(len(text))
        return None


def _no_parts(_: str) -> None:
    return None


def _byte_pieces(kept: Mapping[str, int]) -> dict[int, int]:
    return {int(token[3:5], 16): id_ for token, id_ in kept.items() if is_byte_token(token)}


def _spell_bytes(character: str, byte_ids: Mapping[int, int]) -> list[int] | None:
    # SentencePiece writes a space as U+2581; the byte it stands for is the space's.
    data = (" " if character == "\u2581" else character).encode()
    return [byte_ids[byte] for byte in data] if all(byte in byte_ids for byte in data) else None


def _joined(parts: Iterable[list[int] | None]) -> list[int] | None:
    """Concatenate parts; None as soon as one of them is None."""
    joined: list[int] = []
    for part in parts:
        if part is None:
            return None
        joined += part
    return joined
