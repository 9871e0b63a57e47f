"""The rounding bound of a vocab logit: what two correct kernels may differ by."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.tensorfile import map_tensor, to_float32
from trimserve_export.checkpoint import StoredVocab

# Unit roundoff of a graph's dtype: half the distance from 1 to the next larger number.
_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
# Roundings after the product of hidden state and head row: bias, scale and soft cap.
_ROUNDINGS_AFTER_PRODUCT = 8
_BLOCK_BYTES = 16 << 20


class RoundingBound:
    """How far two roundings of the same vocab logit can lie apart.

    |fl(h.w) - h.w| <= gamma_n |h|.|w| <= gamma_n ||h|| ||w|| with gamma_n = n u / (1 - n u), in whatever
    order the n products are added (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
    equation 3.5); two results differ by at most twice that.
    """

    def __init__(self, stored: StoredVocab, dtype: str) -> None:
        """Bound the logits of a head.

        Args:
            stored: the vocab tensors of the checkpoint; a tied head is the embedding.
            dtype: fp32, fp16 or bf16, in which the graph computes.
        """
        self._stored = stored
        self._roundoff = _ROUNDOFF[dtype]

    def of(self, hidden: npt.NDArray[Any]) -> float:
        """Bound for the logits of hidden states (..., H)."""
        operations = hidden.shape[-1] + _ROUNDINGS_AFTER_PRODUCT
        gamma = operations * self._roundoff / (1 - operations * self._roundoff)
        norms = np.linalg.norm(hidden.astype(np.float64), axis=-1)
        bound: float = 2 * gamma * float(norms.max()) * self._largest_row
        return bound

    @cached_property
    def _largest_row(self) -> float:
        """Largest Euclidean norm of a head row, read in blocks."""
        roles = self._stored.roles
        spec, _ = self._stored.cut[roles.get("head", roles["embedding"])]
        rows = map_tensor(spec)
        step = max(1, _BLOCK_BYTES * len(rows) // spec.nbytes)
        starts = range(0, len(rows), step)
        blocks = (to_float32(rows[start : start + step], spec.dtype) for start in starts)
        return max(float(np.linalg.norm(block, axis=1).max()) for block in blocks)
