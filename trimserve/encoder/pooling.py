"""One vector a text from the vectors of its tokens, as sentence-transformers pools them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Mask
from trimserve.errors import UnsupportedModelError

# What a sum of no tokens is divided by.
_LEAST = np.float32(1e-9)


def pool(hidden: npt.NDArray[Any], mask: Mask, modes: Sequence[str], dropped: int = 0) -> Floats:
    """Pool token vectors in float32.

    Args:
        hidden: float (B, T, H), padded on the right.
        mask: int64 (B, T), 1 for a token; at least one in each row.
        modes: of ``"cls"`` (the first token), ``"max"``, ``"mean"``, ``"mean_sqrt_len_tokens"`` (divided by
            the root of the number of tokens), ``"weightedmean"`` (token i counts i times) and
            ``"lasttoken"``; the results of several stand one behind the other.
        dropped: tokens at the start that do not count, those of a prompt. A text that has no others gives
            zeros, minus infinity for ``"max"`` and its first token for ``"cls"``.

    Returns:
        float32 (B, modes x H).

    Raises:
        UnsupportedModelError: unknown mode.

    Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html (Pooling).
    """
    values = hidden.astype(np.float32, copy=False)
    counted = mask * (np.arange(mask.shape[1]) >= dropped) if dropped else mask
    return np.concatenate([_pool(values, counted, mode) for mode in modes], axis=1)


def _pool(values: Floats, mask: Mask, mode: str) -> Floats:
    if mode == "cls":
        return _tokens(values, mask.argmax(axis=1))
    if mode == "max":
        largest: Floats = np.where(mask[:, :, None] == 1, values, -np.inf).max(axis=1)
        return largest
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        return _tokens(values, last) * mask.any(axis=1, keepdims=True)
    if mode == "weightedmean":
        return _weighted(values, mask * np.arange(1, mask.shape[1] + 1), 1.0)
    if mode in ("mean", "mean_sqrt_len_tokens"):
        return _weighted(values, mask, 1.0 if mode == "mean" else 0.5)
    raise UnsupportedModelError(
        f"unknown pooling {mode!r}: this version has cls, max, mean, mean_sqrt_len_tokens, weightedmean and "
        "lasttoken."
    )


def _tokens(values: Floats, places: npt.NDArray[np.intp]) -> Floats:
    chosen: Floats = values[np.arange(len(values)), places]
    return chosen


def _weighted(values: Floats, weights: Mask, power: float) -> Floats:
    """The weighted sum over tokens, divided by the weights' sum to a power."""
    sums: Floats = np.einsum("bth,bt->bh", values, weights.astype(np.float32))
    total = weights.sum(axis=1, keepdims=True, dtype=np.float32)
    means: Floats = sums / np.maximum(total, _LEAST) ** np.float32(power)
    return means


def normalize_rows(vectors: Floats) -> Floats:
    """Scale each row to length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # The floor of torch.nn.functional.normalize.
    scaled: Floats = vectors / np.maximum(norms, np.float32(1e-12))
    return scaled
