"""Cross encoders: one score, or one for each label, of two texts that are read together."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import numpy as np

from trimserve.arrays import Floats
from trimserve.encoder.activations import activate, softmax
from trimserve.errors import UsageError

Pair = tuple[str, str] | list[str]


class RankedDocument(TypedDict):
    """A document's place in the list that was ranked, its score, and its text where asked for."""

    corpus_id: int
    score: float
    text: NotRequired[str]


def scored_pairs(pairs: Pair | Sequence[Pair], prompt: str) -> tuple[list[tuple[str, str]], bool]:
    """Pairs as the tokenizer takes them.

    Args:
        pairs: one pair or any number of them.
        prompt: put before the first text of each.

    Returns:
        The pairs, and whether one was given by itself.

    Raises:
        UsageError: something is no pair of texts.
    """
    single = len(pairs) > 0 and isinstance(pairs[0], str)
    several = cast(Sequence[Pair], [pairs] if single else pairs)
    for pair in several:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise UsageError(f"expected a pair of texts, found {pair!r}: pass (query, document).")
    return [(prompt + first, second) for first, second in several], single


def to_scores(values: Floats, activation: str, *, apply_softmax: bool = False) -> Floats:
    """Scores of what a head gives.

    Args:
        values: float32 (n, labels).
        activation: of `activations.ACTIVATIONS`.
        apply_softmax: turn the result into probabilities of the labels.

    Returns:
        float32 (n,) of one label, else (n, labels).
    """
    scores = activate(activation, values)
    if apply_softmax and scores.size:
        scores = softmax(scores)
    return scores[:, 0] if scores.shape[1] == 1 else scores


def ranked(scores: Floats, documents: Sequence[str] | None) -> list[RankedDocument]:
    """Sort documents by score, the best first; equal ones stay in order.

    Args:
        scores: float32 (n,).
        documents: their texts, where they are to be in the result.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    found: list[RankedDocument] = [{"corpus_id": place, "score": float(scores[place])} for place in order]
    if documents is not None:
        for entry in found:
            entry["text"] = documents[entry["corpus_id"]]
    return found
