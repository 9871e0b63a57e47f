"""Training texts against a vocab: which of them have ids outside it, and a vocab that covers them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trimserve.arguments import Count, checked
from trimserve.arrays import Ids
from trimserve.selection.ranking import round_up
from trimserve.vocab.map import Reason, VocabMap


@dataclass(frozen=True, slots=True)
class Outside:
    """A text with token ids that are not kept.

    Attributes:
        index: its place among the texts, from 0.
        ids: int32, the distinct ids that are not kept, increasing.
    """

    index: int
    ids: Ids


@checked
def find_outside(sequences: Iterable[Sequence[int]], vocab: VocabMap) -> list[Outside]:
    """Find the texts with ids outside the vocab.

    Args:
        sequences: the token ids of each text, e.g. ``dataset["input_ids"]``.
        vocab: the kept ids.

    Raises:
        UnknownIdError: an id is outside 0..V-1.
    """
    found = []
    for index, sequence in enumerate(sequences):
        ids = np.asarray(sequence, np.int64)
        cold = ids[~vocab.is_kept(ids)]
        if cold.size:
            found.append(Outside(index, np.unique(cold).astype(np.int32)))
    return found


@checked
def grow(
    vocab: VocabMap, ids: Iterable[int], *, multiple_of: Count = 1, widths: Sequence[int] = ()
) -> VocabMap:
    """Return a vocab with further ids in it, for the reason `explicit`.

    Args:
        vocab: the vocab; not changed.
        ids: token ids to join it.
        multiple_of: K is rounded up to a multiple of this with the lowest ids that are not kept: tokenizers
            number frequent tokens first.
        widths: of the model's linear layers, which K must not equal (see `round_up`).

    Raises:
        UnknownIdError: an id is outside 0..V-1.
    """
    joined = np.unique(np.fromiter(ids, np.int64))
    joined = joined[~vocab.is_kept(joined)]
    size = min(round_up(len(vocab) + joined.size, multiple_of, widths), vocab.vocab_size)
    free = np.setdiff1d(vocab.cold_ids, joined)[: size - len(vocab) - joined.size]
    reasons = np.full(vocab.vocab_size, -1, np.int64)
    reasons[vocab.kept_ids] = vocab.reason
    reasons[joined] = Reason.EXPLICIT
    reasons[free] = Reason.FILL
    kept = np.flatnonzero(reasons >= 0).astype(np.int32)
    return VocabMap(
        kept,
        reasons[kept].astype(np.uint8),
        vocab.vocab_size,
        vocab.tokenizer_sha256,
        vocab.rule | {"grown": int(joined.size)},
        # As every explicit id, also in a head with fewer rows.
        None if vocab.output_ids is None else np.union1d(vocab.output_ids, joined).astype(np.int32),
    )
