"""One vector a text from the hidden states of its tokens, as sentence-transformers pools them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Mask
from trimserve.errors import UnsupportedModelError


def pool(hidden: npt.NDArray[Any], mask: Mask, mode: str) -> Floats:
    """Pool hidden states in float32.

    Args:
        hidden: float (B, T, H), padded on the right.
        mask: int64 (B, T), 1 for a token; at least one in each row.
        mode: ``"mean"``, ``"cls"`` (the first token), ``"max"`` or ``"last"``.

    Returns:
        float32 (B, H).

    Raises:
        UnsupportedModelError: unknown mode.

    Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html (Pooling).
    """
    values = hidden.astype(np.float32, copy=False)
    if mode == "mean":
        sums: Floats = np.einsum("bth,bt->bh", values, mask.astype(np.float32))
        means: Floats = sums / mask.sum(axis=1, keepdims=True, dtype=np.float32)
        return means
    if mode == "cls":
        first: Floats = values[:, 0]
        return first
    if mode == "max":
        largest: Floats = np.where(mask[:, :, None] == 1, values, -np.inf).max(axis=1)
        return largest
    if mode == "last":
        last: Floats = values[np.arange(len(values)), mask.sum(axis=1) - 1]
        return last
    raise UnsupportedModelError(f"unknown pooling {mode!r}: this version has mean, cls, max and last.")


def normalize_rows(vectors: Floats) -> Floats:
    """Scale each row to length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # The floor of torch.nn.functional.normalize.
    scaled: Floats = vectors / np.maximum(norms, np.float32(1e-12))
    return scaled
