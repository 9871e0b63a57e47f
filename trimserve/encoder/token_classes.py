"""Entities of a text: what transformers' token-classification pipeline makes of a head's numbers.

The strategies are the pipeline's: `none` gives every token, `simple` joins neighbours of one label, `first`,
`average` and `max` let the tokens of a word agree before that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from tokenizers import Encoding, Tokenizer

from trimserve.arrays import Floats
from trimserve.encoder.activations import softmax
from trimserve.encoder.classification import label_names
from trimserve.errors import UsageError

Aggregation = Literal["none", "simple", "first", "average", "max"]
# An entity with the pipeline's keys: entity or entity_group, score, word, start, end, and index of a token.
Entity = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token, or a word of several.

    Attributes:
        scores: float32 (labels,).
        start: its first character in the text.
        end: the one behind its last.
        tokens: as the tokenizer writes them.
        index: place among the tokens that were fed.
        continues: whether it goes on a word.
    """

    scores: Floats
    start: int
    end: int
    tokens: tuple[str, ...]
    index: int
    continues: bool = False


def tag(
    text: str,
    encoding: Encoding,
    logits: Floats,
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
    *,
    aggregation: Aggregation = "none",
    ignore_labels: Sequence[str] = ("O",),
    unk_id: int | None = None,
) -> list[Entity]:
    """The entities of a text.

    Args:
        text: as it was given.
        encoding: its tokens with their offsets, special ones included.
        logits: float32 (T, labels).
        tokenizer: that made them.
        config: config.json, which names the labels.
        aggregation: see above.
        ignore_labels: labels that are left out.
        unk_id: the token that stands for what the vocab cannot say, by which a word is quoted from the text.

    Raises:
        UsageError: an unknown strategy.
    """
    if aggregation not in get_args(Aggregation):
        raise UsageError(
            f"aggregation should be one of {', '.join(get_args(Aggregation))}, found {aggregation!r}."
        )
    names = label_names(config, logits.shape[-1])
    pieces = _pieces(text, encoding, softmax(logits), tokenizer, unk_id)
    if aggregation == "none":
        found = [_of_token(piece, names) for piece in pieces]
        return [entity for entity in found if entity["entity"] not in ignore_labels]
    if aggregation != "simple":
        pieces = [_join(word, _AGREEMENTS[aggregation]) for word in _words(pieces)]
    spell = _speller(tokenizer)
    groups = [
        _of_group(group, names, spell, words=aggregation != "simple") for group in _groups(pieces, names)
    ]
    return [entity for entity in groups if entity["entity_group"] not in ignore_labels]


def _pieces(
    text: str, encoding: Encoding, scores: Floats, tokenizer: Tokenizer, unk_id: int | None
) -> list[_Piece]:
    knows_words = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
    pieces = []
    special = encoding.special_tokens_mask
    for place in np.flatnonzero(np.array(special) == 0).tolist():
        token, (start, end) = encoding.tokens[place], encoding.offsets[place]
        quoted = text[start:end]
        if knows_words:
            continues = len(token) != len(quoted)
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        if encoding.ids[place] == unk_id:
            token, continues = quoted, False
        pieces.append(_Piece(scores[place], start, end, (token,), place, continues))
    return pieces


def _words(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    words: list[list[_Piece]] = []
    for piece in pieces:
        if words and piece.continues:
            words[-1].append(piece)
        else:
            words.append([piece])
    return words


def _first(scores: Floats) -> Floats:
    first: Floats = scores[0]
    return first


def _most_certain(scores: Floats) -> Floats:
    best: Floats = scores[scores.max(axis=1).argmax()]
    return best


def _mean(scores: Floats) -> Floats:
    mean: Floats = np.nanmean(scores, axis=0)
    return mean


_AGREEMENTS: dict[str, Callable[[Floats], Floats]] = {
    "first": _first,
    "average": _mean,
    "max": _most_certain,
}


def _join(word: Sequence[_Piece], agree: Callable[[Floats], Floats]) -> _Piece:
    scores = agree(np.stack([piece.scores for piece in word]))
    tokens = tuple(token for piece in word for token in piece.tokens)
    return _Piece(scores, word[0].start, word[-1].end, tokens, word[0].index)


def _groups(pieces: Sequence[_Piece], names: Sequence[str]) -> list[list[_Piece]]:
    """Neighbours of one label; one that begins (``B-``) begins a group."""
    labels = [names[int(piece.scores.argmax())] for piece in pieces]
    parts = [_parts(label) for label in labels]
    starts = [0] + [
        place
        for place, ((_, before), (begins, kind)) in enumerate(pairwise(parts), 1)
        if begins or kind != before
    ]
    return [list(pieces[start:end]) for start, end in pairwise([*starts, len(pieces)])] if pieces else []


def _parts(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and its kind."""
    if label.startswith(("B-", "I-")):
        return label.startswith("B-"), label[2:]
    return False, label


def _of_token(piece: _Piece, names: Sequence[str]) -> Entity:
    best = int(piece.scores.argmax())
    return {
        "entity": names[best],
        "score": float(piece.scores[best]),
        "index": piece.index,
        "word": piece.tokens[0],
        "start": piece.start,
        "end": piece.end,
    }


def _of_group(
    group: Sequence[_Piece], names: Sequence[str], spell: Callable[[Sequence[str]], str], *, words: bool
) -> Entity:
    label = names[int(group[0].scores.argmax())]
    # The pipeline spells words first, and then the group as if they were its tokens.
    tokens = [spell(piece.tokens) if words else piece.tokens[0] for piece in group]
    return {
        "entity_group": label.split("-", 1)[-1],
        "score": float(np.mean([piece.scores.max() for piece in group])),
        "word": spell(tokens),
        "start": group[0].start,
        "end": group[-1].end,
    }


def _speller(tokenizer: Tokenizer) -> Callable[[Sequence[str]], str]:
    decoder = tokenizer.decoder
    if decoder is None:
        return " ".join

    def spell(tokens: Sequence[str]) -> str:
        text: str = decoder.decode(list(tokens))
        return text

    return spell
