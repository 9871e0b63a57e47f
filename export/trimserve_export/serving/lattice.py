"""Blocks whose numbers are whole multiples of one scale: quantised before, they lose nothing now.

What a GGUF file stores as Q4_0 or Q8_0 is such a block of 32, its scale a float16. Rounding to nearest takes
the scale from the largest number, which gives back Q4_0's scale mostly and Q8_0's never.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int16]
_ENOUGH: Final = 0.5  # share of blocks that the likely multiples settle, where the others are tried as well
_BLOCK: Final = 32
# Rows by which it is told whether a matrix was quantised before.
_SAMPLE_ROWS: Final = 256
_FIRST: Final = 4  # numbers of a block that are looked at before all are


def on_lattice(blocks: Floats, bits: int) -> tuple[npt.NDArray[np.bool_], Floats, Ints]:
    """Find the scale of blocks that have one: every number is ``scale * q`` to the bit.

    Args:
        blocks: float32 (n, size).
        bits: q is from -2 ** (bits - 1) to below 2 ** (bits - 1), the scale a float16.

    Returns:
        Which blocks have a scale (n,), their scales (n,), and q (n, size); meaningless for the others.
    """
    count, size = blocks.shape
    found, scales = np.zeros(count, np.bool_), np.zeros(count, np.float32)
    integers = np.zeros((count, size), np.int16)
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    left = np.flatnonzero(np.isfinite(peaks) & (peaks != 0))
    likely, others = _multiples(bits)
    for number, multiple in enumerate((*likely, *others)):
        if number == len(likely) and found.sum() < _ENOUGH * count:
            break
        scale = peaks[left] / np.float32(multiple)
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16).astype(np.float32) == scale
        chosen, scale = left[half], scale[half]
        for columns in (slice(_FIRST), slice(None)):
            exact = _exact(blocks[chosen, columns], scale, 1 << (bits - 1))
            chosen, scale = chosen[exact], scale[exact]
        found[chosen], scales[chosen] = True, scale
        integers[chosen] = np.rint(blocks[chosen] / scale[:, None])
        left = left[~found[left]]
        if not left.size:
            break
    # The same numbers with a scale above 0, as quantisers have it, where the lowest integer is not needed.
    turned = found & (scales < 0) & (integers.min(axis=1) > -(1 << (bits - 1)))
    scales[turned] *= -1
    integers[turned] *= -1
    return found, scales, integers


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


def _exact(numbers: Floats, scale: Floats, most: int) -> npt.NDArray[np.bool_]:
    """Which rows are whole multiples of their scale, from -most to below most."""
    whole: Any = np.rint(numbers / scale[:, None])
    exact: npt.NDArray[np.bool_] = (whole * scale[:, None] == numbers).all(axis=1)
    exact &= whole.max(axis=1) < most
    return exact


def _multiples(bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the largest number of a block can be a multiple of: what quantisers make it, and all else."""
    most = 1 << (bits - 1)
    likely = (-most, most - 1, 1 - most)
    others = [sign * size for size in range(most - 2, 0, -1) for sign in (1, -1)]
    return likely, tuple(others)
