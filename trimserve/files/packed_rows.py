"""Rows that a checkpoint stores as integers in blocks, in one form whatever the file's own format is.

A number is ``scale * (q - zero point)``, or ``scale * (q - zero point) + offset``, computed in float32 in
this order: GGUF's formats, GPTQ, AWQ and compressed-tensors' integers are all of this form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows in blocks of equal size.

    Attributes:
        bits: integers are from 0 to below 2 ** bits; 2 to 8.
        integers: uint8 (n, H), one a byte.
        scales: float32 (n, blocks).
        zero_points: uint8 (n, blocks).
        offsets: float32 (n, blocks), what is added to a block's numbers; None where nothing is.
    """

    bits: int
    integers: Bytes
    scales: Floats
    zero_points: Bytes
    offsets: Floats | None = None

    @property
    def block_size(self) -> int:
        """Numbers that share a scale."""
        inputs, blocks = int(self.integers.shape[1]), int(self.scales.shape[1])
        return inputs // blocks

    def floats(self) -> Floats:
        """The numbers, float32 (n, H)."""
        count, blocks = self.scales.shape
        apart = self.integers.reshape(count, blocks, -1).astype(np.float32)
        apart -= self.zero_points[..., None]
        apart *= self.scales[..., None]
        if self.offsets is not None:
            apart += self.offsets[..., None]
        return apart.reshape(count, -1)

    def in_rows(self, count: int) -> Self:
        """The same numbers, in order, as `count` rows of whole blocks."""
        return type(self)(
            self.bits,
            self.integers.reshape(count, -1),
            self.scales.reshape(count, -1),
            self.zero_points.reshape(count, -1),
            None if self.offsets is None else self.offsets.reshape(count, -1),
        )

    def in_blocks_of(self, size: int) -> Self:
        """The same rows in smaller blocks, each with its scale, zero point and offset."""
        times = self.block_size // size
        if times == 1:
            return self
        return type(self)(
            self.bits,
            self.integers,
            np.repeat(self.scales, times, axis=1),
            np.repeat(self.zero_points, times, axis=1),
            None if self.offsets is None else np.repeat(self.offsets, times, axis=1),
        )

    def with_offsets(self) -> Floats:
        """The offsets, zeros where there are none."""
        return np.zeros_like(self.scales) if self.offsets is None else self.offsets


def joined(parts: Sequence[PackedRows], places: Sequence[npt.NDArray[np.int64]]) -> PackedRows:
    """One matrix of rows of several, with blocks that part theirs evenly and the most of their bits.

    Args:
        parts: at least one; their rows have one width.
        places: where the rows of each stand in the result.
    """
    size = math.gcd(*(part.block_size for part in parts))
    parts = [part.in_blocks_of(size) for part in parts]
    order = np.argsort(np.concatenate(places))
    arrays = [
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("integers", "scales", "zero_points")
    ]
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = np.concatenate([part.with_offsets() for part in parts])[order]
    return PackedRows(max(part.bits for part in parts), arrays[0], arrays[1], arrays[2], offsets)
