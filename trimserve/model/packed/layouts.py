"""Where AWQ, GPTQ and compressed-tensors put the integers, scales and zero points of a linear layer.

All pack integers into the bits of int32, the first one lowest, and mean ``scale * (q - zero point)``.

- AWQ ("gemm"): ``qweight`` (inputs, outputs / 8), ``qzeros`` (groups, outputs / 8), ``scales`` (groups,
  outputs); of eight outputs the even ones come first. https://github.com/casper-hansen/AutoAWQ
- GPTQ: ``qweight`` (inputs * bits / 32, outputs), ``qzeros`` (groups, outputs * bits / 32), ``scales``
  (groups, outputs); version 1 stores zero points less 1. https://github.com/ModelCloud/GPTQModel
- compressed-tensors ("pack-quantized"): ``weight_packed`` (outputs, inputs * bits / 32), ``weight_scale``
  (outputs, groups), ``weight_zero_point`` (outputs * bits / 32, groups) unless symmetric.
  https://github.com/vllm-project/compressed-tensors
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from trimserve.files.packed_rows import Bytes, Floats, PackedRows
from trimserve.files.tensors import TensorSpec, map_tensor, to_float32

Layout = Literal["awq", "gptq", "compressed-tensors"]
Rows = slice | npt.NDArray[Any]
# Which place of an int32 has the output j of eight.
_AWQ_PLACES: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7])
WORD: Final = 32


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer's matrix in blocks of integers.

    Attributes:
        layout: whose.
        bits: 2, 4 or 8.
        shape: (outputs, inputs).
        integers: of int32.
        scales: of F16, BF16 or F32.
        zeros: of int32; None where all zero points are the middle integer.
        less_one: zero points are stored less 1.
    """

    layout: Layout
    bits: int
    shape: tuple[int, int]
    integers: TensorSpec
    scales: TensorSpec
    zeros: TensorSpec | None
    less_one: bool = False

    @property
    def groups(self) -> int:
        """Blocks of a row."""
        return self.scales.shape[1 if self.layout == "compressed-tensors" else 0]

    def unpack(self, rows: Rows) -> PackedRows:
        """Rows (n, inputs) as integers, scales and zero points; n is above 0."""
        chosen = np.arange(self.shape[0])[rows]
        return PackedRows(self.bits, self._integers(chosen), self._scales(chosen), self.zero_points(chosen))

    def _integers(self, rows: npt.NDArray[np.int64]) -> Bytes:
        stored = _words(self.integers)
        if self.layout == "awq":
            return np.ascontiguousarray(self._of_columns(stored, rows).T)
        if self.layout == "gptq":
            return np.ascontiguousarray(self._apart(stored[:, rows].T))
        return np.ascontiguousarray(self._apart(stored[rows])[:, : self.shape[1]])

    def _scales(self, rows: npt.NDArray[np.int64]) -> Floats:
        stored = map_tensor(self.scales)
        found = stored[rows] if self.layout == "compressed-tensors" else stored[:, rows].T
        return np.ascontiguousarray(to_float32(np.asarray(found), self.scales.dtype))

    def zero_points(self, rows: npt.NDArray[np.int64] | None = None) -> Bytes:
        """The zero points of some rows, or of all, uint8 (n, blocks)."""
        rows = np.arange(self.shape[0]) if rows is None else rows
        if self.zeros is None:
            return np.full((len(rows), self.groups), 1 << (self.bits - 1), np.uint8)
        stored = _words(self.zeros)
        if self.layout == "compressed-tensors":
            stored = stored.T
        found = self._of_columns(stored, rows).T + np.uint8(self.less_one)
        return np.ascontiguousarray(found)

    def _of_columns(self, words: npt.NDArray[np.uint32], columns: npt.NDArray[np.int64]) -> Bytes:
        """Some columns of a matrix whose columns share words (n, columns)."""
        per = WORD // self.bits
        places = columns % per
        if self.layout == "awq":
            places = _AWQ_PLACES[places]
        shifts = (places * self.bits).astype(np.uint32)
        return ((words[:, columns // per] >> shifts) & np.uint32((1 << self.bits) - 1)).astype(np.uint8)

    def _apart(self, words: npt.NDArray[np.uint32]) -> Bytes:
        """The integers of words, along the last axis."""
        shifts = np.arange(0, WORD, self.bits, dtype=np.uint32)
        found = (words[..., None] >> shifts) & np.uint32((1 << self.bits) - 1)
        return found.astype(np.uint8).reshape(*words.shape[:-1], -1)


def _words(spec: TensorSpec) -> npt.NDArray[np.uint32]:
    found: npt.NDArray[np.uint32] = map_tensor(spec).view(np.uint32)
    return found
