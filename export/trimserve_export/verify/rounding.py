"""The rounding bound of a vocab logit: what two correct kernels may differ by."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.files.tensors import map_tensor, to_float32
from trimserve_export.checkpoint.stored import StoredVocab
from trimserve_export.graphs.head import Head, find_head

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


class GraphBound(RoundingBound):
    """The rounding bound of a head that is a constant of a graph, quantised or not."""

    def __init__(self, graph: Path, dtype: str) -> None:
        """Bound the logits of a served graph.

        Args:
            graph: the full model's graph.
            dtype: see `RoundingBound`.
        """
        super().__init__(StoredVocab({}, {}, tied=False), dtype)
        self._graph = graph

    @cached_property
    def _largest_row(self) -> float:
        head = find_head(ir.load(self._graph).graph)
        return (
            _largest_float(head)
            if head.scales is None and not head.is_quantized
            else _largest_quantized(head)
        )


def _largest_float(head: Head) -> float:
    if head.weight.const_value is None:
        return 0.0
    weight = head.weight.const_value.numpy()
    rows = weight if head.by_row else weight.T
    step = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    starts = range(0, len(rows), step)
    blocks = (rows[start : start + step].astype(np.float32) for start in starts)
    return max(float(np.linalg.norm(block, axis=1).max()) for block in blocks)


def _largest_quantized(head: Head) -> float:
    """No weight is larger than the largest scale times the range of its integers."""
    value = head.product.inputs[2] if head.is_quantized else head.scales
    scales = None if value is None else value.const_value
    if scales is None:
        return 0.0
    default = 4 if head.is_quantized else 8
    bits = head.product.attributes["bits"].as_int() if "bits" in head.product.attributes else default
    largest = float(np.abs(scales.numpy().astype(np.float32)).max()) * (1 << bits)
    return largest * math.sqrt(head.width)
