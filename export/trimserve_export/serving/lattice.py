"""Blocks whose numbers are whole multiples of one scale: quantised before, they lose nothing now.

What a GGUF file stores as Q4_0, Q5_0 or Q8_0 is such a block of 32, its scale a float16; Q3_K and Q6_K have
blocks of 16 and a product of a float16 and an integer. Rounding to nearest takes the scale from the largest
number, which gives back Q4_0's scale mostly and the others' never.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int16]
_BLOCK: Final = 32
# Rows by which it is told whether a matrix was quantised before.
_SAMPLE_ROWS: Final = 256
_MANTISSA: Final = 24  # bits of a float32
_FIRST: Final = 4  # numbers of a block that are looked at before all are


def on_lattice(
    blocks: Floats, bits: int, *, halves: bool = False
) -> tuple[npt.NDArray[np.bool_], Floats, Ints]:
    """Find the scale of blocks that have one: every number is ``scale * q`` to the bit.

    It is the greatest common divisor of the numbers' bits, so that whatever scale made them, they are its
    multiples, and the smallest ones possible.

    Args:
        blocks: float32 (n, size).
        bits: q is from -2 ** (bits - 1) to below 2 ** (bits - 1).
        halves: find scales alone that float16 holds.

    Returns:
        Which blocks have a scale (n,), their scales (n,), and q (n, size); meaningless for the others.
    """
    count, size = blocks.shape
    found, scales = np.zeros(count, np.bool_), np.zeros(count, np.float32)
    integers = np.zeros((count, size), np.int16)
    chosen = np.arange(count)
    for columns in (slice(_FIRST), slice(None)):
        usable, exponents, whole = _whole(blocks[chosen, columns], bits)
        chosen, exponents, whole = chosen[usable], exponents[usable], whole[usable]
        divisors = np.gcd.reduce(whole, axis=1)
        whole //= np.maximum(divisors, 1)[:, None]
        fits = np.abs(whole).max(axis=1, initial=0) <= 1 << (bits - 1)
        chosen, exponents, whole, divisors = chosen[fits], exponents[fits], whole[fits], divisors[fits]
    with np.errstate(over="ignore"):
        exact = np.ldexp(divisors.astype(np.float64), exponents)
        made = exact.astype(np.float32)
        kept = (made.astype(np.float16) == made) if halves else np.ones(len(made), np.bool_)
    # The same numbers with a scale below 0, where the lowest integer alone has room for the largest.
    turned = whole.max(axis=1, initial=0) == 1 << (bits - 1)
    whole[turned] *= -1
    kept &= (whole.max(axis=1, initial=0) < 1 << (bits - 1)) & (made == exact) & (made > 0)
    made[turned] *= -1
    found[chosen[kept]], scales[chosen[kept]], integers[chosen[kept]] = True, made[kept], whole[kept]
    return found, scales, integers


def _whole(
    blocks: Floats, bits: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Blocks as integers times a power of two: which may be multiples of a scale, the power, integers."""
    usable: npt.NDArray[np.bool_] = np.isfinite(blocks).all(axis=1) & (blocks != 0).any(axis=1)
    mantissas, exponents = np.frexp(np.where(usable[:, None], blocks, np.float32(1)))
    zeros = mantissas == 0
    lowest = np.where(zeros, np.iinfo(np.int32).max, exponents).min(axis=1)
    apart = np.where(zeros, 0, exponents - lowest[:, None])
    usable &= apart.max(axis=1) <= bits  # whole multiples lie no further apart
    whole = np.ldexp(mantissas.astype(np.float64), _MANTISSA + np.minimum(apart, bits)).astype(np.int64)
    return usable, lowest.astype(np.int64) - _MANTISSA, whole


def on_offset_lattice(blocks: Floats) -> tuple[npt.NDArray[np.bool_], Floats, Floats, Ints]:
    """Find scale and middle of blocks: every number is ``scale * (q - 8) + middle`` to the bit.

    So are those of GGUF's Q4_1, ``d q + m``: with d and m in float16, all of it is exact in float32.

    Args:
        blocks: float32 (n, size).

    Returns:
        Which blocks have both (n,), their scales, which are float16's, their middles (n,), and q (n, size),
        from 0 to 15; meaningless for the others.
    """
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    found = low == high
    scales, middles = np.ones_like(low), low.copy()
    integers = np.full(blocks.shape, 8, np.int16)
    left = np.flatnonzero(~found & np.isfinite(high - low))
    for steps in range(15, 0, -1):
        with np.errstate(over="ignore"):
            scale = ((high[left] - low[left]) / np.float32(steps)).astype(np.float16).astype(np.float32)
        usable = (scale > 0) & np.isfinite(scale)
        left, scale = left[usable], scale[usable]
        middle = low[left] + np.float32(8) * scale
        whole = np.rint((blocks[left] - low[left, None]) / scale[:, None])
        made = (whole - np.float32(8)) * scale[:, None] + middle[:, None]
        exact = (made == blocks[left]).all(axis=1) & (whole.max(axis=1, initial=0) <= 15)
        chosen = left[exact]
        found[chosen], scales[chosen], middles[chosen] = True, scale[exact], middle[exact]
        integers[chosen] = whole[exact]
        left = left[~exact]
        if not left.size:
            break
    return found, scales, middles, integers


def has_levels(rows: npt.NDArray[Any], most: int) -> bool:
    """Whether no block of 32 numbers has more than `most` different ones, in rows spread over a matrix.

    Args:
        rows: a row an output, float (n, H).
        most: e.g. 16, of numbers that had 4 bits.
    """
    sample = np.asarray(rows[:: max(1, len(rows) // _SAMPLE_ROWS)], np.float32)
    width = sample.shape[1] // _BLOCK * _BLOCK
    ordered = np.sort(sample[:, :width].reshape(-1, _BLOCK), axis=1)
    levels = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return bool(levels.max(initial=0) <= most)
