"""Rows that the source stores as integers in blocks, found again in a graph by the floats they stand for.

An exporter gets floats, and puts matrices together, turns them and renames them. A row stays a row in all of
that. So each row of the source's matrices is known by a hash of its floats; what is found is compared number
by number, and a matrix of a graph all of whose rows are found takes their integers, scales and offsets as
they are (`carrier`), which no rounding finds again in every case.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trimserve.files.packed_rows import Bytes, Floats, PackedRows, joined

_SLICE_BYTES = 4 << 20
_LARGEST_BLOCK = 128
_WHOLE_BITS = 8
Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


class PackedMatrix(Protocol):
    """A matrix in blocks, wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H)."""

    def unpack(self, rows: Places) -> PackedRows:
        """Some rows."""


@dataclass(frozen=True)  # no slots: hashes are made when they are needed
class StoredRows:
    """The rows of a checkpoint's matrices.

    Attributes:
        matrices: all that are stored in blocks.
    """

    matrices: tuple[PackedMatrix, ...]

    def find(self, rows: npt.NDArray[np.floating]) -> PackedRows | None:
        """What rows of floats were made of.

        Args:
            rows: float (n, H), n above 0.

        An offset belongs to the middle integer, where float32 holds that exactly: rounded activations then
        meet small integers of both signs, and what rounding them costs is smaller.

        Returns:
            The same rows in blocks; None where any of them is none of these matrices', to the bit.
        """
        if rows.dtype != np.float32 or not self.matrices:
            return None
        hashes, numbers, places = self._index
        wanted = np.concatenate([_hashes(part) for part in _slices(rows)])
        at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        if (hashes[at] != wanted).any():
            return None
        parts, order = [], []
        for number in np.unique(numbers[at]):
            chosen = np.flatnonzero(numbers[at] == number)
            matrix = self.matrices[number]
            if matrix.shape[1] != rows.shape[1]:
                return None
            parts.append(_centred(matrix.unpack(places[at[chosen]])))
            order.append(chosen)
        found = joined(parts, order)
        return found if _equal(found, rows) else None

    @cached_property
    def _index(self) -> tuple[Hashes, npt.NDArray[np.int32], Places]:
        """Hashes in order, and of each the matrix and the row that it belongs to."""
        made, numbers, places = [], [], []
        for number, matrix in enumerate(self.matrices):
            count, width = matrix.shape
            step = max(1, _SLICE_BYTES // (4 * width))
            for start in range(0, count, step):
                rows = np.arange(start, min(start + step, count))
                made.append(_hashes(matrix.unpack(rows).floats()))
                numbers.append(np.full(len(rows), number, np.int32))
                places.append(rows)
        hashes = np.concatenate(made)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], np.concatenate(numbers)[order], np.concatenate(places)[order]


def _slices(rows: npt.NDArray[np.floating]) -> Iterator[Floats]:
    step = max(1, _SLICE_BYTES // (4 * rows.shape[1]))
    return (np.ascontiguousarray(rows[start : start + step]) for start in range(0, len(rows), step))


def _hashes(rows: Floats) -> Hashes:
    """A sum of each row's bits, times numbers drawn once: equal rows have equal ones."""
    factors = np.random.default_rng(0).integers(0, 1 << 63, rows.shape[1], np.uint64) * np.uint64(2)
    bits = np.ascontiguousarray(rows).view(np.uint32).astype(np.uint64)
    found: Hashes = (bits * (factors + np.uint64(1))).sum(axis=1, dtype=np.uint64)
    return found


def _equal(found: PackedRows, rows: npt.NDArray[np.floating]) -> bool:
    step = max(1, _SLICE_BYTES // (4 * rows.shape[1]))
    return all(
        np.array_equal(_part(found, slice(start, start + step)).floats(), rows[start : start + step])
        for start in range(0, len(rows), step)
    )


def _part(rows: PackedRows, part: slice) -> PackedRows:
    offsets = None if rows.offsets is None else rows.offsets[part]
    return PackedRows(rows.bits, rows.integers[part], rows.scales[part], rows.zero_points[part], offsets)


@dataclass(frozen=True, slots=True)
class Carried:
    """Rows as MatMulNBits takes them: ``scale * (q - zero point)``, and an offset to be added.

    Attributes:
        bits: 4 or 8.
        block_size: a power of two.
        integers: uint8 (n, blocks, bytes of a block), of 4 bits the first of two in the low half.
        scales: float32 (n, blocks).
        zero_points: uint8 (n, bytes), packed alike; None where all are the middle integer.
        offsets: float32 (n, blocks), or None.
    """

    bits: int
    block_size: int
    integers: Bytes
    scales: Floats
    zero_points: Bytes | None
    offsets: Floats | None


def carrier(rows: PackedRows, least_bits: int) -> Carried:
    """Bring rows into the form of MatMulNBits; each number stays the same to the bit.

    Args:
        rows: with blocks of 16 or more.
        least_bits: 4, or 8 for integers of 8 bits whatever the rows have.
    """
    rows = rows.in_blocks_of(_part_of(rows.block_size))
    bits = 4 if rows.bits <= 4 and least_bits == 4 else _WHOLE_BITS
    count, blocks = rows.scales.shape
    zeros = rows.zero_points
    apart = rows.integers.reshape(count, blocks, -1).astype(np.int16)
    middle = 1 << (bits - 1)
    moved = apart + (middle - zeros[..., None].astype(np.int16))
    fits = (moved.min(axis=2) >= 0) & (moved.max(axis=2) < 1 << bits)
    integers = np.where(fits[..., None], moved, apart).astype(np.uint8)
    stored = None if fits.all() else np.where(fits, middle, zeros).astype(np.uint8)
    if bits != _WHOLE_BITS:
        integers = integers[..., ::2] | (integers[..., 1::2] << np.uint8(4))
        stored = None if stored is None else _in_halves(stored)
    return Carried(bits, rows.block_size, integers, rows.scales, stored, rows.offsets)


def _centred(rows: PackedRows) -> PackedRows:
    """The same rows with their offsets at the middle integer, where that is exact."""
    if rows.offsets is None:
        return rows
    middle = 1 << (rows.bits - 1)
    steps = rows.scales * (middle - rows.zero_points.astype(np.float64))
    wanted = rows.offsets + steps
    moved = wanted.astype(np.float32)
    # float64 holds the sum, unless one term ends far below the other's last bit.
    exact = (moved == wanted) & (wanted - steps == rows.offsets) & (wanted - rows.offsets == steps)
    zeros = np.where(exact, np.uint8(middle), rows.zero_points)
    offsets = np.where(exact, moved, rows.offsets)
    return PackedRows(rows.bits, rows.integers, rows.scales, zeros, offsets)


def _part_of(size: int) -> int:
    """The largest power of two that parts a block evenly, 128 at most."""
    return min(size & -size, _LARGEST_BLOCK)


def _in_halves(zero_points: Bytes) -> Bytes:
    padded = np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2)))
    packed: Bytes = padded[:, ::2] | (padded[:, 1::2] << np.uint8(4))
    return packed


def stored_rows(matrices: Iterable[PackedMatrix]) -> StoredRows | None:
    """The rows of some matrices; None where there are none."""
    chosen = tuple(matrices)
    return StoredRows(chosen) if chosen else None
