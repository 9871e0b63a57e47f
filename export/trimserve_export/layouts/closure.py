"""Ids that a rewritten tokenizer needs besides the selected ones, and the vocab with them.

A tokenizer that is cut to the kept ids makes a kept token only if everything on the way to it is kept:

- BPE: each piece that the merges go through. The pieces are those of the token's own derivation: inside a
  text, the merges within the characters of a token are the ones that make it alone.
- Unigram: the piece with the lowest score, from which the library derives the cost of an unknown character.
- SentencePiece models: the mark of a space.
- Without a byte alphabet or byte fallback: the single characters of the tokens that were seen, or a text that
  was spelled before could become unknown.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.errors import UnsupportedModelError
from trimserve.model.source import ModelSource
from trimserve.model.structural import structural_ids
from trimserve.profiles.profile import Profile
from trimserve.selection.ranking import round_up
from trimserve.selection.select_ids import count_reasons
from trimserve.vocab.map import Reason, VocabMap

logger = logging.getLogger(__name__)

MODEL_TYPES: Final = ("BPE", "Unigram", "WordPiece", "WordLevel")
# Key of a vocab's rule that says for which layout it is closed.
CLOSED_KEY = "closed_for"


class MergeTrees:
    """The pieces that a BPE model goes through to make a token.

    Args:
        model: the `model` part of a tokenizer.json of type BPE.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        # As in the library, the last of equal merges counts.
        self._rank = {pair: rank for rank, pair in enumerate(merge_pairs(model))}

    def symbols(self, token: str) -> list[str]:
        """The single characters that a token is made of, spelled as the vocab spells them."""
        inside = bool(self._prefix) and token.startswith(self._prefix)
        body = token.removeprefix(self._prefix) if inside else token
        last = self._suffix if self._suffix and body.endswith(self._suffix) else ""
        characters = list(body.removesuffix(last))
        marked = [
            character if not at else self._prefix + character for at, character in enumerate(characters)
        ]
        if inside and marked:
            marked[0] = self._prefix + marked[0]
        return [*marked[:-1], marked[-1] + last] if marked else [token]

    def merged(self, first: str, second: str) -> str:
        """What a merge makes of two pieces."""
        return first + second.removeprefix(self._prefix)

    def pieces(self, token: str) -> set[str]:
        """Every piece on the way to a token, itself included; nothing if the merges do not lead to it."""
        symbols = self.symbols(token)
        seen = set(symbols)
        while len(symbols) > 1:
            ranks = [self._rank.get(pair, -1) for pair in pairwise(symbols)]
            possible = [rank for rank in ranks if rank >= 0]
            if not possible:
                return set()
            at = ranks.index(min(possible))
            symbols[at : at + 2] = [self.merged(*symbols[at : at + 2])]
            seen.add(symbols[at])
        return seen if symbols == [token] else set()


def read_content(source: ModelSource) -> dict[str, Any]:
    """Read a tokenizer.json whose model can be cut; old files do not name its type, which is added.

    Raises:
        UnsupportedModelError: the model is of a type that cannot be cut.
    """
    content: dict[str, Any] = json.loads(source.effective.content)
    if "type" not in content["model"]:
        kind = json.loads(source.tokenizer().to_str())["model"]["type"]
        content["model"] = {"type": kind} | content["model"]
    if (kind := content["model"]["type"]) not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{source.name} has a tokenizer of type {kind!r}: the tokenizer layout rewrites "
            f"{', '.join(MODEL_TYPES)}. Use --layout runtime or graph."
        )
    return content


def merge_pairs(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the merges of a BPE model, stored as "a b" or, by newer versions, as ["a", "b"]."""
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


@dataclass(frozen=True)
class _Pieces:
    """A tokenizer as the closure sees it.

    Attributes:
        tokenizer: the loaded tokenizer.
        model: the `model` part of its tokenizer.json.
        ids: token -> id of every token that the model has a row for.
        added: ids of added tokens, which no segmentation makes.
    """

    tokenizer: Tokenizer
    model: Mapping[str, Any]
    ids: Mapping[str, int]
    added: frozenset[int]

    @classmethod
    def read(cls, source: ModelSource) -> "_Pieces":
        tokenizer = source.tokenizer()
        model = read_content(source)["model"]
        every = tokenizer.get_vocab(with_added_tokens=True)
        ids = {token: id_ for token, id_ in every.items() if id_ < source.vocab_size}
        return cls(tokenizer, model, ids, frozenset(tokenizer.get_added_tokens_decoder()))

    @property
    def spells_bytes(self) -> bool:
        """Whether any character can be spelled by bytes, so that none is ever unknown."""
        return bool(self.model.get("byte_fallback")) or "ByteLevel(" in str(self.tokenizer.pre_tokenizer)

    def characters(self, token: str) -> list[str]:
        """The pieces that spell a token a character at a time."""
        if self.model["type"] == "BPE":
            return MergeTrees({**self.model, "merges": []}).symbols(token)
        prefix = self.model.get("continuing_subword_prefix") or ""
        inside = bool(prefix) and token.startswith(prefix)
        body = token.removeprefix(prefix) if inside else token
        return [
            character if not at and not inside else prefix + character for at, character in enumerate(body)
        ]


def close_vocab(vocab: VocabMap, source: ModelSource, profile: Profile | None = None) -> VocabMap:
    """Add to a vocab what a tokenizer that is cut to it needs, and round K again.

    Ids without a token leave: no text and no decoder could name them. K is rounded as the vocab's rule says,
    with the next most frequent ids (without a profile: the lowest) whose own dependencies are kept.

    Args:
        vocab: the selected ids.
        source: the model with the tokenizer.
        profile: what the vocab was selected from; without it, the kept tokens stand for those seen.

    Returns:
        The closed vocab; `vocab` itself where it was closed before.

    Raises:
        UnsupportedModelError: the tokenizer is of a type that cannot be cut.
    """
    if vocab.rule.get(CLOSED_KEY) == "tokenizer":
        return vocab
    pieces = _Pieces.read(source)
    token_of = {id_: token for token, id_ in pieces.ids.items()}
    reason = np.full(vocab.vocab_size, -1, np.int8)
    reason[vocab.kept_ids] = vocab.reason
    named = np.zeros(vocab.vocab_size, np.bool_)
    named[list(token_of)] = True
    if lost := int((reason[~named] >= 0).sum()):
        logger.warning("%s kept ids name no token of the tokenizer: they leave this layout", f"{lost:,}")
    reason[~named] = -1
    needed = [*structural_ids(source, pieces.tokenizer), *_lowest_score(pieces), *_space(pieces)]
    needed += _character_ids(pieces, token_of, _seen(vocab, profile))
    _keep(reason, (id_ for id_ in needed if named[id_]), Reason.DEPENDENCY)
    requirements = _Requirements(pieces, token_of)
    kept = np.flatnonzero(reason >= 0).tolist()
    _keep(reason, chain.from_iterable(map(requirements, kept)), Reason.DEPENDENCY)
    widths = profile.linear_widths if profile else tuple(source.linear_widths())
    multiple = vocab.rule.get("options", {}).get("multiple_of", 1)
    _fill(reason, round_up(int((reason >= 0).sum()), multiple, widths), _ranked(named, profile), requirements)
    return _closed(vocab, reason, profile)


class _Requirements:
    """Ids that a token needs besides itself."""

    def __init__(self, pieces: _Pieces, token_of: Mapping[int, str]) -> None:
        self._pieces = pieces
        self._token_of = token_of
        self._trees = MergeTrees(pieces.model) if pieces.model["type"] == "BPE" else None

    def __call__(self, id_: int) -> list[int]:
        if self._trees is None or id_ in self._pieces.added:
            return []
        ids = self._pieces.ids
        return [ids[piece] for piece in self._trees.pieces(self._token_of[id_]) if piece in ids]


def _keep(reason: npt.NDArray[np.int8], ids: Iterable[int], why: Reason) -> None:
    for id_ in ids:
        if reason[id_] < 0:
            reason[id_] = why


def _lowest_score(pieces: _Pieces) -> list[int]:
    """The piece that an unknown character's cost depends on (Unigram)."""
    if pieces.model["type"] != "Unigram":
        return []
    scores = [score for _, score in pieces.model["vocab"]]
    return [scores.index(min(scores))]


def _space(pieces: _Pieces) -> list[int]:
    """SentencePiece's mark of a space: spelled by bytes, decoders would print the mark itself."""
    return [pieces.ids["\u2581"]] if "\u2581" in pieces.ids else []


def _seen(vocab: VocabMap, profile: Profile | None) -> npt.NDArray[np.intp]:
    if profile is not None:
        return np.flatnonzero(profile.counts)
    seen: npt.NDArray[np.intp] = vocab.kept_ids[vocab.reason != Reason.FILL].astype(np.intp)
    return seen


def _character_ids(pieces: _Pieces, token_of: Mapping[int, str], seen: Iterable[int]) -> list[int]:
    """Ids that spell the seen tokens a character at a time; tokens themselves where that cannot be."""
    if pieces.spells_bytes or pieces.model["type"] == "WordLevel":
        return []
    found: dict[int, None] = {}
    for id_ in seen:
        if id_ in pieces.added or id_ not in token_of:
            continue
        spelled = [pieces.ids.get(piece) for piece in pieces.characters(token_of[id_])]
        found |= dict.fromkeys(piece for piece in spelled if piece is not None)
        if None in spelled:
            found[id_] = None
    return list(found)


def _ranked(named: npt.NDArray[np.bool_], profile: Profile | None) -> npt.NDArray[np.intp]:
    mass = np.zeros(named.size) if profile is None else profile.mass
    order: npt.NDArray[np.intp] = np.lexsort((np.arange(named.size), -mass))
    ranked: npt.NDArray[np.intp] = order[named[order]]
    return ranked


def _fill(
    reason: npt.NDArray[np.int8], size: int, ranked: npt.NDArray[np.intp], requirements: _Requirements
) -> None:
    """Keep the first ids of a ranking whose requirements are kept, until K is `size`."""
    room = size - int((reason >= 0).sum())
    progress = True
    while room > 0 and progress:  # an id that needs a later one of the ranking has its turn again
        progress = False
        for id_ in ranked[reason[ranked] < 0].tolist():
            if room > 0 and all(reason[needed] >= 0 for needed in requirements(id_) if needed != id_):
                reason[id_] = Reason.FILL
                room, progress = room - 1, True
            if room == 0:
                return


def _closed(vocab: VocabMap, reason: npt.NDArray[np.int8], profile: Profile | None) -> VocabMap:
    kept_ids = np.flatnonzero(reason >= 0).astype(np.int32)
    rule = vocab.rule | {"reasons": count_reasons(reason), CLOSED_KEY: "tokenizer"}
    if profile is not None:
        rule["coverage"] = profile.coverage(kept_ids)
    return VocabMap(
        kept_ids=kept_ids,
        reason=reason[kept_ids].astype(np.uint8),
        vocab_size=vocab.vocab_size,
        tokenizer_sha256=vocab.tokenizer_sha256,
        rule=rule,
    )
