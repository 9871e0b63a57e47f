"""The number formats of GGUF tensors: how many bytes a block takes, and back to float32.

A row is cut into blocks of 32 or 256 numbers, a block is stored as packed integers with their scales, and a
number is ``scale * q`` or ``scale * q + minimum`` (`PackedRows`). Formats by their description:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. The order of the float32 operations is that of
ggml's own dequantisation, so results are equal to it bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from trimserve.errors import UnsupportedModelError
from trimserve.files.packed_rows import PackedRows

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_SUPER: Final = 256  # numbers in a block of a K format


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A number format.

    Attributes:
        name: ggml's name.
        numbers: numbers of a block.
        nbytes: bytes of a block.
    """

    name: str
    numbers: int
    nbytes: int


# fmt: off
GGML_TYPES: Final[dict[int, GgmlType]] = {
    code: GgmlType(name, numbers, nbytes)
    for code, name, numbers, nbytes in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
        (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
    )
}
# fmt: on


def dequantize_blocks(blocks: Bytes, kind: GgmlType) -> Floats:
    """The numbers that blocks stand for.

    Args:
        blocks: uint8 (n, kind.nbytes).
        kind: one of `DEQUANTIZED`.

    Returns:
        float32 (n, kind.numbers).

    Raises:
        UnsupportedModelError: a format that is not read.
    """
    check_readable(kind)
    if not len(blocks):
        return np.empty((0, kind.numbers), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a file may hold infinite scales
        if kind.name in _FLOATS:
            return _FLOATS[kind.name](np.ascontiguousarray(blocks))
        return unpack_blocks(blocks, kind).floats()


def unpack_blocks(blocks: Bytes, kind: GgmlType) -> PackedRows:
    """The integers, scales and offsets of blocks, a stored block a row.

    Args:
        blocks: uint8 (n, kind.nbytes), n above 0.
        kind: one of `PACKED`.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _UNPACKERS[kind.name](np.ascontiguousarray(blocks))


def check_readable(kind: GgmlType, tensor: str = "a tensor") -> None:
    """Refuse a number format that is not dequantised.

    Raises:
        UnsupportedModelError: the message names the tensor, the format, and those that are read.
    """
    if kind.name not in DEQUANTIZED:
        raise UnsupportedModelError(
            f"{tensor} is stored as {kind.name}, which trimserve does not read (it reads "
            f"{', '.join(DEQUANTIZED)}): take another quantisation of this model."
        )


def _halves(blocks: Bytes, first: int) -> Floats:
    """The float16 at byte `first` of each block, as float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, group: int) -> Bytes:
    """4-bit integers: the low halves of `group` bytes, then their high halves, group after group."""
    grouped = packed.reshape(len(packed), -1, 1, group)
    return ((grouped >> _shifts(0, 4)) & np.uint8(15)).reshape(len(packed), -1)


def _pairs(packed: Bytes) -> Bytes:
    """2-bit integers: of 32 bytes first all lowest pairs of bits, then the next ones."""
    grouped = packed.reshape(len(packed), -1, 1, 32)
    return ((grouped >> _shifts(0, 2, 4, 6)) & np.uint8(3)).reshape(len(packed), -1)


def _shifts(*bits: int) -> Bytes:
    return np.array(bits, np.uint8).reshape(1, 1, -1, 1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """The bits of 4 bytes, one a number, at the place of the fifth bit."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _bit_planes(packed: Bytes) -> Bytes:
    """The lowest bits of 32 bytes, then the next ones: (n, 256) of 0 and 1."""
    planes = (packed[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & np.uint8(1)
    return planes.reshape(len(packed), -1)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return _halves(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rows(bits: int, integers: Bytes, scales: Floats, zero: int, offsets: Floats | None = None) -> PackedRows:
    return PackedRows(bits, integers, scales, np.full(scales.shape, zero, np.uint8), offsets)


def _negative(minima: Floats) -> Floats:
    """What is added where ggml subtracts; of what is no number the bits stay, as they do in a difference."""
    return np.where(np.isnan(minima), minima, -minima)


def _q4_0(blocks: Bytes) -> PackedRows:
    return _rows(4, _nibbles(blocks[:, 2:], 16), _halves(blocks, 0), 8)


def _q4_1(blocks: Bytes) -> PackedRows:
    return _rows(4, _nibbles(blocks[:, 4:], 16), _halves(blocks, 0), 0, _halves(blocks, 2))


def _q5_0(blocks: Bytes) -> PackedRows:
    return _rows(5, _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), _halves(blocks, 0), 16)


def _q5_1(blocks: Bytes) -> PackedRows:
    integers = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _rows(5, integers, _halves(blocks, 0), 0, _halves(blocks, 2))


def _q8_0(blocks: Bytes) -> PackedRows:
    return _rows(8, blocks[:, 2:] ^ np.uint8(128), _halves(blocks, 0), 128)


def _q2_k(blocks: Bytes) -> PackedRows:
    factors = blocks[:, :16]
    scales = _halves(blocks, 80) * (factors & np.uint8(15)).astype(np.float32)
    minima = _halves(blocks, 82) * (factors >> np.uint8(4)).astype(np.float32)
    return _rows(2, _pairs(blocks[:, 16:80]), scales, 0, _negative(minima))


def _q3_k(blocks: Bytes) -> PackedRows:
    integers = _pairs(blocks[:, 32:96]) | (_bit_planes(blocks[:, :32]) << np.uint8(2))
    packed = blocks[:, 96:108]
    fours = np.concatenate([packed[:, :8] & np.uint8(15), packed[:, :8] >> np.uint8(4)], axis=1)
    twos = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None]) & np.uint8(3)
    factors = (fours | (twos.reshape(-1, 16) << np.uint8(4))).astype(np.float32) - np.float32(32)
    return _rows(3, integers, _halves(blocks, 108) * factors, 4)


def _six_bits(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight factors of scales and eight of minima, of 6 bits each, out of 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    low, top = np.uint8(63), np.uint8(6)
    high_factors = (third & np.uint8(15)) | ((first >> top) << np.uint8(4))
    high_minima = (third >> np.uint8(4)) | ((second >> top) << np.uint8(4))
    factors = np.concatenate([first & low, high_factors], axis=1).astype(np.float32)
    minima = np.concatenate([second & low, high_minima], axis=1).astype(np.float32)
    return factors, minima


def _with_minima(bits: int, blocks: Bytes, integers: Bytes) -> PackedRows:
    """Q4_K and Q5_K: eight groups of 32 with a scale and a minimum each."""
    factors, minima = _six_bits(blocks[:, 4:16])
    return _rows(bits, integers, _halves(blocks, 0) * factors, 0, _negative(_halves(blocks, 2) * minima))


def _q4_k(blocks: Bytes) -> PackedRows:
    return _with_minima(4, blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Bytes) -> PackedRows:
    high = _bit_planes(blocks[:, 16:48]) << np.uint8(4)
    return _with_minima(5, blocks, _nibbles(blocks[:, 48:], 32) | high)


def _q6_k(blocks: Bytes) -> PackedRows:
    integers = _nibbles(blocks[:, :128], 64) | (_pairs(blocks[:, 128:192]) << np.uint8(4))
    factors = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _rows(6, integers, _halves(blocks, 208) * factors, 32)


_FLOATS: Final[dict[str, Callable[[Bytes], Floats]]] = {"F32": _f32, "F16": _f16, "BF16": _bf16}
_UNPACKERS: Final[dict[str, Callable[[Bytes], PackedRows]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
PACKED: Final = tuple(_UNPACKERS)
DEQUANTIZED: Final = (*_FLOATS, *PACKED)
