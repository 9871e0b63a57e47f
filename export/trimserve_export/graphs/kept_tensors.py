"""Tensors of which the kept entries alone exist: cut when they are written, from a mapped file, in blocks."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.arrays import Ids

Bytes = npt.NDArray[np.uint8]
_BLOCK_BYTES = 8 << 20
# As many rows of any number of 2-bit or 4-bit entries end on a whole byte.
_WHOLE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a tensor's vocab axis is, with the tensor seen as (outer, V, inner).

    A flat tensor, ``V * n`` entries in a row, has outer 1 and inner n.

    Attributes:
        axis: the axis in the tensor's own shape.
        outer: entries before the vocab axis.
        inner: entries of one token.
    """

    axis: int
    outer: int
    inner: int

    def shape(self, before: tuple[int, ...], rows: int, kept: int) -> tuple[int, ...]:
        """The shape with `kept` instead of `rows` tokens."""
        size = before[self.axis] // rows * kept
        return (*before[: self.axis], size, *before[self.axis + 1 :])


def stored_bytes(tensor: ir.TensorProtocol) -> Bytes:
    """A tensor's bytes as ONNX stores them, mapped and not read where they lie in a file."""
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes:
        return np.memmap(tensor.path, np.uint8, "r", offset=tensor.offset or 0, shape=(tensor.nbytes,))
    return np.frombuffer(tensor.tobytes(), np.uint8)


class KeptEntries(ir.LazyTensor):
    """Some tokens' entries of a tensor, in any dtype, 2-bit and 4-bit ones included.

    Args:
        source: the whole tensor.
        cut: where its vocab axis is.
        rows: V.
        ids: the tokens to keep, strictly increasing.

    Attributes:
        whole: the whole tensor.
    """

    def __init__(self, source: ir.TensorProtocol, cut: Cut, rows: int, ids: Ids) -> None:
        shape = ir.Shape(cut.shape(tuple(source.shape.numpy()), rows, len(ids)))
        super().__init__(self._in_memory, source.dtype, shape, name=source.name)
        self.whole = source
        self._cut = cut
        self._rows = rows
        self._ids = ids.astype(np.int64)

    def tobytes(self) -> bytes:
        """The kept entries as ONNX stores them."""
        return self._filled().tobytes()

    def tofile(self, file: IO[bytes]) -> None:
        """Write the kept entries, a block at a time."""
        for chunk in self.chunks():
            file.write(np.ascontiguousarray(chunk).data)

    def chunks(self) -> Iterator[Bytes]:
        """The kept entries as bytes, in order, a block at a time."""
        data = stored_bytes(self.whole)
        bits = self.dtype.bitwidth
        if self._cut.inner * bits % 8 == 0:
            table = data.reshape(self._cut.outer, self._rows, self._cut.inner * bits // 8)
            yield from self._whole_bytes(table)
        else:
            yield from self._parts_of_bytes(data, bits)
        release(data)

    def _filled(self) -> Bytes:
        data, position = np.empty(self.nbytes, np.uint8), 0
        for chunk in self.chunks():
            data[position : position + len(chunk)] = chunk
            position += len(chunk)
        return data

    def _in_memory(self) -> ir.TensorProtocol:
        data = self._filled()
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(data, self.dtype, shape=self.shape)
        return ir.Tensor(data.view(self.dtype.numpy()).reshape(self.shape.numpy()), dtype=self.dtype)

    def _whole_bytes(self, table: Bytes) -> Iterator[Bytes]:
        outer, _, width = table.shape
        if outer == 1:
            step = max(1, _BLOCK_BYTES // max(width, 1))
            for start in range(0, len(self._ids), step):
                yield table[0, self._ids[start : start + step]].reshape(-1)
            return
        step = max(1, _BLOCK_BYTES // (self._rows * width))
        for start in range(0, outer, step):
            yield np.take(table[start : start + step], self._ids, axis=1).reshape(-1)

    def _parts_of_bytes(self, data: Bytes, bits: int) -> Iterator[Bytes]:
        """A token's entries begin or end within a byte: take them apart and pack them again."""
        outer, inner = self._cut.outer, self._cut.inner
        entries = (self._ids[:, None] * inner + np.arange(inner)).reshape(-1)
        if outer == 1:
            step = max(1, _BLOCK_BYTES // 8 // inner) * inner * _WHOLE_BYTES
            for start in range(0, len(entries), step):
                yield _pack(_entries(data, entries[start : start + step], bits), bits)
            return
        step = max(1, _BLOCK_BYTES // 8 // len(entries)) * _WHOLE_BYTES
        for start in range(0, outer, step):
            lines = np.arange(start, min(start + step, outer))[:, None] * (self._rows * inner)
            yield _pack(_entries(data, (lines + entries).reshape(-1), bits), bits)


def _entries(data: Bytes, positions: npt.NDArray[np.int64], bits: int) -> Bytes:
    """Entries of `bits` bits, the first one in a byte's lowest bits, one a byte."""
    shift = (positions * bits % 8).astype(np.uint8)
    values: Bytes = (data[positions * bits // 8] >> shift) & np.uint8((1 << bits) - 1)
    return values


def _pack(entries: Bytes, bits: int) -> Bytes:
    count = 8 // bits
    padded = np.pad(entries, (0, -len(entries) % count)).reshape(-1, count)
    packed: Bytes = np.bitwise_or.reduce(padded << (np.arange(count, dtype=np.uint8) * bits), axis=1)
    return packed.astype(np.uint8)


def release(mapped: Bytes) -> None:
    """Take a map's pages out of this process again (see `trimserve.runtime.cold_rows`)."""
    if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.base.madvise(mmap.MADV_DONTNEED)
