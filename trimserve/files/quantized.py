"""Block-wise quantised rows: how a quantised head lies in a file, and back to floats.

A row of H numbers is cut into blocks of `block_size`; a block is stored as one scale s and an unsigned
integer q a number, which stands for ``s * (q - z)`` with z = 2 ** (bits - 1), or a zero point of the
block's own. It is the layout of MatMulNBits
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md): two 4-bit integers share a
byte, the first one in its low half, and the last block of a row is padded. Rows do not depend on each
other, so cold rows quantised alone are the rows that the full head would have.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError
from trimserve.files.checked_json import convert_json
from trimserve.files.held import HeldFile
from trimserve.files.tensors import STORAGE_DTYPES, TensorSpec

_BITS = (4, 8)
_LARGEST_BLOCK = 1 << 16
_SMALLEST = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class BlockScheme:
    """How weights are quantised.

    Attributes:
        bits: 4 or 8.
        block_size: numbers that share a scale; a power of two, 16 or more. 32 is what other
            tools' 4-bit files have, too; larger blocks save scales and lose accuracy.
        accuracy_level: MatMulNBits' attribute: 4 rounds the activations to 8 bits, a block at a time,
            which is several times as fast on CPUs with dot products of bytes; 1 keeps them in float.
        zero_points: each block has a zero point of its own, packed as the integers are, a row from a whole
            byte on.
        scales: how they were chosen: ``"largest"``, so that a block's largest number fits, or ``"error"``,
            so that its squared error is small.
    """

    bits: int
    block_size: int = 32
    accuracy_level: int = 4
    zero_points: bool = False
    scales: Literal["largest", "error"] = "largest"

    def __post_init__(self) -> None:
        size = self.block_size
        if self.bits not in _BITS or not 16 <= size <= _LARGEST_BLOCK or size & (size - 1):
            raise MismatchError(
                f"quantisation to {self.bits} bits in blocks of {size} is not known: expected 4 or 8 bits "
                "and a power of two from 16. Export the folder again."
            )

    def blocks(self, width: int) -> int:
        """Blocks of a row of `width` numbers."""
        return -(-width // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's integers."""
        return self.block_size * self.bits // 8

    def zero_point_bytes(self, width: int) -> int:
        """Bytes of the zero points of a row of `width` numbers."""
        return -(-self.blocks(width) * self.bits // 8)


@dataclass(frozen=True, slots=True)
class _Apart:
    """The schemes of a manifest's entry that has two, before they are checked."""

    rows: dict[str, Any]
    body: dict[str, Any]
    keeps: bool = False
    table: bool = False


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's weights are quantised: the entry `quantization` of a manifest.

    Attributes:
        rows: the vocab's rows: those of the head, kept and cold.
        body: all other products.
        by_exporter: an exporter that has a quantiser of its own used it, and knows one scheme for all.
        keeps: the source was quantised to 4 bits before, most of it: its matrices that have more levels in a
            block (Q6_K among Q4_K) get 8 bits, so that they keep them.
        table: a model without a vocab head looks its embedding up in blocks as `rows` says. Folders of
            earlier versions have a table of floats.
    """

    rows: BlockScheme
    body: BlockScheme
    by_exporter: bool = False
    keeps: bool = False
    table: bool = False

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | None, origin: str = "the manifest's quantization"
    ) -> Self | None:
        """Read a manifest's entry; None for weights that are not quantised.

        Folders of earlier versions, those made of a graph, and those that an exporter quantised have one
        scheme for all products.

        Args:
            values: the entry.
            origin: what holds it, as the subject of a message.

        Raises:
            MismatchError: a scheme that is not known.
        """
        if values is None:
            return None
        advice = "export the folder again."
        if "rows" not in values:
            one = convert_json(values, BlockScheme, origin, advice=advice)
            return cls(one, one, by_exporter=True)
        schemes = convert_json(values, _Apart, origin, advice=advice)
        rows, body = (
            convert_json(entry, BlockScheme, origin, advice=advice) for entry in (schemes.rows, schemes.body)
        )
        return cls(rows, body, keeps=schemes.keeps, table=schemes.table)

    def to_dict(self) -> dict[str, Any]:
        """The manifest's entry."""
        rows = asdict(self.rows)
        said = {name: True for name in ("keeps", "table") if getattr(self, name)}
        return rows if self.by_exporter else {"rows": rows, "body": asdict(self.body), **said}


@dataclass(frozen=True, slots=True)
class BlockSpecs:
    """Where quantised rows lie in a file.

    Attributes:
        integers: uint8 (n, blocks, block bytes).
        scales: (n, blocks), in the graph's dtype.
        zero_points: uint8 (n, bytes), if the scheme has them.
    """

    integers: TensorSpec
    scales: TensorSpec
    zero_points: TensorSpec | None = None

    @property
    def end(self) -> int:
        """Offset of the first byte after them."""
        last = self.zero_points or self.scales
        return last.offset + last.nbytes


def block_specs(path: Path | HeldFile, rows: int, width: int, scheme: BlockScheme, dtype: str) -> BlockSpecs:
    """The layout of a file of quantised rows: all integers, then all scales, then all zero points.

    Args:
        path: the file; of an opened one the rows are mapped through what was opened.
        rows: n.
        width: H.
        scheme: see `BlockScheme`.
        dtype: of the scales, in safetensors' words.
    """
    file, path = (path, path.path) if isinstance(path, HeldFile) else (None, path)
    shape = (rows, scheme.blocks(width))
    integers = TensorSpec(
        "integers", "U8", (*shape, scheme.block_bytes), path, 0, rows * shape[1] * scheme.block_bytes, file
    )
    nbytes = rows * shape[1] * STORAGE_DTYPES[dtype].itemsize
    scales = TensorSpec("scales", dtype, shape, path, integers.nbytes, nbytes, file)
    if not scheme.zero_points:
        return BlockSpecs(integers, scales)
    size = scheme.zero_point_bytes(width)
    zeros = TensorSpec("zero_points", "U8", (rows, size), path, integers.nbytes + nbytes, rows * size, file)
    return BlockSpecs(integers, scales, zeros)


def dequantize(
    integers: npt.NDArray[np.uint8],
    scales: npt.NDArray[Any],
    width: int,
    scheme: BlockScheme,
    zero_points: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.float32]:
    """The rows that quantised rows stand for.

    Args:
        integers: uint8 (n, blocks, block bytes).
        scales: float (n, blocks).
        width: H; what a row's last block has beyond it is padding.
        scheme: see `BlockScheme`.
        zero_points: uint8 (n, bytes), if the scheme has them.

    Returns:
        float32 (n, H).
    """
    values = _unpack(integers, scheme).astype(np.float32)
    if zero_points is None:
        values -= np.float32(1 << (scheme.bits - 1))
    else:
        values -= _unpack(zero_points, scheme)[:, : scales.shape[1], None]
    rows = values * scales.astype(np.float32)[..., None]
    return np.ascontiguousarray(rows.reshape(len(rows), -1)[:, :width])


def _unpack(packed: npt.NDArray[np.uint8], scheme: BlockScheme) -> npt.NDArray[np.uint8]:
    """Integers along the last axis, one a byte."""
    if scheme.bits == 8:
        return packed
    halves = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1)


def round_activations(hidden: npt.NDArray[Any], scheme: BlockScheme) -> npt.NDArray[np.float32]:
    """What MatMulNBits multiplies its matrix with: each block of the input rounded to 8 bits.

    Args:
        hidden: float (..., H).
        scheme: only at accuracy level 4 is anything rounded.

    Returns:
        float32 (..., H).
    """
    values = np.asarray(hidden, np.float32)
    if scheme.accuracy_level != 4:
        return values
    width = values.shape[-1]
    if missing := -width % scheme.block_size:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    blocks = values.reshape(*values.shape[:-1], -1, scheme.block_size)
    # A block of zeros has no scale of its own: any will do.
    scales = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127), _SMALLEST)
    rounded: npt.NDArray[np.float32] = (np.rint(blocks / scales) * scales).reshape(values.shape)
    return rounded[..., :width]
