"""Sparse vectors of a SPLADE model: one weight for each token id, of which most are 0."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids, Mask
from trimserve.files.tensors import to_float32
from trimserve.folder.sentence import SpladePooling
from trimserve.runtime.cold_rows import ColdRows
from trimserve.vocab.map import VocabMap

# Rows of the head multiplied at a time, so that a quarter of a million of them never lie in memory.
_TILE_ROWS = 8192


@dataclass(frozen=True, slots=True)
class SparseVector:
    """One text's weights that are not 0.

    Attributes:
        ids: int32 (n,), token ids of the original vocab, increasing.
        weights: float32 (n,).
    """

    ids: Ids
    weights: Floats


def splade(
    module: SpladePooling, logits: Floats, mask: Mask, hidden: Floats | None, vocab: VocabMap, cold: ColdRows
) -> Floats:
    """Pool logits over the vocab to one weight a token id, the ids that were not kept among them.

    Args:
        module: how.
        logits: float32 (B, T, K), of the kept ids, padded on the right.
        mask: int64 (B, T), 1 for a token; at least one in each row.
        hidden: float32 (B, T, H), the head's input; None where every id is kept.
        vocab: the kept ids.
        cold: rows of the head for the others.

    Returns:
        float32 (B, V).

    Source: Formal et al. 2021, https://arxiv.org/abs/2107.05720.
    """
    starts = np.concatenate([[0], mask.sum(axis=1).cumsum()[:-1]])
    tokens = mask == 1
    weights = np.zeros((len(mask), vocab.vocab_size), np.float32)
    weights[:, vocab.kept_ids] = _pooled(module, logits[tokens], starts)
    if hidden is None or not len(cold):
        return weights
    inputs = cold.head_input(hidden[tokens])
    for start in range(0, len(cold), _TILE_ROWS):
        ids = cold.cold_ids[start : start + _TILE_ROWS]
        part = inputs @ _rows(cold.head(ids)).T
        if cold.has_head_bias:
            part += _rows(cold.head_bias(ids))
        weights[:, ids] = _pooled(module, part, starts)
    return weights


def keep_largest(weights: Floats, most: int | None) -> Floats:
    """Set all but the `most` largest weights of each row to 0; None keeps them all."""
    if most is None or most >= weights.shape[1]:
        return weights
    places = np.argpartition(-np.abs(weights), most - 1, axis=1)[:, :most]
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, places, np.take_along_axis(weights, places, axis=1), axis=1)
    return kept


def sparse_vectors(weights: Floats) -> list[SparseVector]:
    """The weights that are not 0 of each row of (n, V)."""
    found = (np.flatnonzero(row).astype(np.int32) for row in weights)
    return [SparseVector(ids, row[ids]) for ids, row in zip(found, weights, strict=True)]


def _pooled(module: SpladePooling, logits: Floats, starts: npt.NDArray[np.int64]) -> Floats:
    """Pool (tokens, C) over the runs of tokens that begin at `starts`."""
    values = np.log1p(np.maximum(logits, 0))
    if module.activation == "log1p_relu":
        values = np.log1p(values)
    reduce = np.maximum if module.strategy == "max" else np.add
    pooled: Floats = reduce.reduceat(values, starts, axis=0)
    return pooled


def _rows(rows: npt.NDArray[np.generic]) -> Floats:
    # bfloat16 comes as its bits.
    return to_float32(rows, "BF16" if rows.dtype == np.uint16 else "F32")
