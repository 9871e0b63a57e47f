"""How a sketch rounds rows and hidden states: to integers with one scale a group, or to 4 bits in blocks.

Rows come in groups of `GROUP_ROWS`, whose norms and residuals are bounded together, in float64 and rounded
up; `sketch.py` says what follows from them. Two ways to round (`--sketch`):

- int8: a group shares a scale, and hidden states become integers, too ("digits"), so that products are
  exact sums of integers. Stored plus 128, as unsigned bytes.
- int4: each block of 32 numbers of a row has a scale of its own, as MatMulNBits wants it, which rounds the
  hidden states itself. Groups of rows, and hidden states, are first divided by a power of two, which makes
  their largest entry 1 to 2: numbers of a usual size are all that the kernel ever sees.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Doubles
from trimserve.exact.bounds import block_magnitude, norms, product_error, round_up, rounding_distance
from trimserve.files.quantized import BlockScheme, dequantize

GROUP_ROWS = 64
LEVELS = 127
ZERO = 128
# The second digit costs as much as another step. It is worth that where outliers in the hidden states make
# the first one's rounding matter more than that of the rows, whose residual is about 0.007 of their norm.
_SECOND_DIGIT_ABOVE = 0.02
BLOCKS = BlockScheme(bits=4, block_size=32, accuracy_level=4)
# Beside numbers of size 1 what is smaller counts as zero, or a product of two scales could underflow.
_SMALLEST = 2.0**-40


@dataclass(frozen=True, slots=True)
class SketchedRows:
    """Some groups of rows as integers, and what bounds the rest.

    Attributes:
        integers: int8: uint8 (n, H), each plus 128; int4: uint8 (n, blocks, 16). n is a multiple of
            `GROUP_ROWS`.
        block_scales: int4: float32 (n, blocks); int8: (n, 0).
        scales: float64 (groups,), a factor of the whole group.
        residuals: bounds of ``||w - s q||`` in a group (groups,).
        norms: bounds of ``||s q||`` in a group (groups,).
        roundings: float64 (groups,): what the rounding of the sketch's own product is proportional to; 0 for
            integers.
    """

    integers: npt.NDArray[np.uint8]
    block_scales: npt.NDArray[np.float32]
    scales: Doubles
    residuals: Doubles
    norms: Doubles
    roundings: Doubles


@dataclass(frozen=True, slots=True)
class Digits:
    """Hidden states as the sketch multiplies them: ``h = sum of scales * values + rest``.

    Attributes:
        values: (M, H): uint8, each plus 128, or float32 for int4; the N first digits, then the second ones.
        scales: float64 (M,).
        steps: the hidden state that a digit belongs to (M,).
        rest: bounds of the rests' norms (N,).
        norms: bounds of the hidden states' norms (N,).
        rounding: float64 (N,): how far a product may be from the real one, as a multiple of the groups'
            `SketchedRows.roundings`; 0 for integers.
    """

    values: npt.NDArray[Any]
    scales: Doubles
    steps: npt.NDArray[np.intp]
    rest: Doubles
    norms: Doubles
    rounding: Doubles


def to_digits(hidden: Doubles) -> Digits:
    """Round hidden states (N, H) to one digit, or two where one leaves too much."""
    sizes = norms(hidden)
    first, scales, rest = _digit(hidden)
    rests = norms(rest)
    again = np.flatnonzero(rests > _SECOND_DIGIT_ABOVE * sizes)
    second, second_scales, rest = _digit(rest[again])
    rests[again] = norms(rest)
    # What float64 itself rounds away in h - t a.
    rests = rests + 1e-12 * sizes
    return Digits(
        np.concatenate([first, second]),
        np.concatenate([scales, second_scales]),
        np.concatenate([np.arange(len(hidden)), again]),
        rests,
        sizes,
        np.zeros(len(hidden)),
    )


def _digit(values: Doubles) -> tuple[npt.NDArray[np.uint8], Doubles, Doubles]:
    scales = _scales(np.abs(values).max(axis=1, initial=0) / LEVELS)
    integers = np.clip(np.nan_to_num(np.rint(values / scales[:, None])), -LEVELS, LEVELS)
    return (integers + ZERO).astype(np.uint8), scales, values - scales[:, None] * integers


def to_blocks(hidden: Doubles) -> Digits:
    """Hidden states (N, H) for the kernel of 4-bit blocks, which rounds them to 8 bits, a block at a time."""
    sizes = norms(hidden)
    scales = _powers(np.abs(hidden).max(axis=1, initial=0))
    scaled = np.nan_to_num(_padded(hidden) / scales[:, None], posinf=0, neginf=0)
    values = np.where(np.abs(scaled) < _SMALLEST, 0, scaled).astype(np.float32)
    exact = values.astype(np.float64)
    distances = norms(scaled - exact) + rounding_distance(exact, BLOCKS)
    slope, constant = product_error(exact.shape[1], norms(exact) + distances, 2.0**20)
    return Digits(
        values,
        scales,
        np.arange(len(hidden)),
        scales * distances,
        sizes,
        round_up(scales * (slope + constant)),
    )


def sketch_rows(rows: npt.NDArray[np.float32]) -> SketchedRows:
    """Round rows (n, H) to integers of 8 bits, a group at a time; n is a multiple of `GROUP_ROWS`.

    A row that is not finite has an infinite residual: nothing is ever proven of its group.
    """
    groups = rows.reshape(-1, GROUP_ROWS, rows.shape[1]).astype(np.float64)
    largest = np.abs(groups).max(axis=(1, 2))
    scales = _scales(largest / LEVELS)
    integers = np.clip(np.nan_to_num(np.rint(groups / scales[:, None, None])), -LEVELS, LEVELS)
    residuals, sizes = _bounds(groups, integers * scales[:, None, None], largest)
    return SketchedRows(
        (integers + ZERO).astype(np.uint8).reshape(rows.shape),
        np.zeros((len(rows), 0), np.float32),
        scales,
        residuals,
        sizes,
        np.zeros(len(groups)),
    )


def sketch_blocks(rows: npt.NDArray[np.float32]) -> SketchedRows:
    """Round rows (n, H) to 4 bits in blocks of 32; n is a multiple of `GROUP_ROWS`.

    The entry of a block that is farthest from 0 becomes -8, so the scale may be negative. A row that is not
    finite has an infinite residual.
    """
    groups = _padded(rows).reshape(len(rows) // GROUP_ROWS, GROUP_ROWS, -1).astype(np.float64)
    largest = np.abs(groups).max(axis=(1, 2))
    scales = _powers(largest)
    scaled = np.nan_to_num(groups / scales[:, None, None], posinf=0, neginf=0)
    blocks = scaled.reshape(len(rows), -1, BLOCKS.block_size)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    steps = (np.where(high > -low, high, low) / -8).astype(np.float32)
    steps[np.abs(steps) < _SMALLEST] = 0
    quotients = np.divide(blocks, steps[..., None], out=np.zeros_like(blocks), where=steps[..., None] != 0)
    integers = np.clip(np.rint(quotients) + 8, 0, 15).astype(np.uint8)
    packed = integers[..., ::2] | integers[..., 1::2] << np.uint8(4)
    sketched = (integers - 8.0) * steps[..., None].astype(np.float64)
    residuals, sizes = _bounds(scaled, sketched.reshape(scaled.shape), largest)
    magnitudes = block_magnitude(steps, BLOCKS).reshape(-1, GROUP_ROWS).max(axis=1)
    return SketchedRows(
        packed, steps, scales, scales * residuals, scales * sizes, round_up(scales * (magnitudes + 1))
    )


def unpacked(integers: npt.NDArray[np.uint8], block_scales: npt.NDArray[np.float32]) -> Doubles:
    """What 4-bit blocks stand for, as in `SketchedRows`: float64 (n, H), padded to whole blocks."""
    width = block_scales.shape[1] * BLOCKS.block_size
    return dequantize(integers, block_scales, width, BLOCKS).astype(np.float64)


def block_spread(rows: npt.NDArray[np.float32]) -> Doubles:
    """What the residual of each row (n, H) in 4 bits is about proportional to, (n,)."""
    blocks = _padded(rows).reshape(len(rows), -1, BLOCKS.block_size)
    return norms(np.abs(blocks).max(axis=-1).astype(np.float64))


def _bounds(groups: Doubles, sketched: Doubles, largest: Doubles) -> tuple[Doubles, Doubles]:
    """Bounds of residuals and norms, the largest of each group: (groups, rows, H) -> (groups,) each."""
    with np.errstate(invalid="ignore"):
        residuals = norms(groups - sketched).max(axis=1)
    sizes = norms(sketched).max(axis=1)
    # What float64 itself rounds away in w - s q.
    residuals = np.where(np.isfinite(largest), residuals + 1e-12 * sizes, np.inf)
    return residuals, round_up(sizes)


def _scales(values: Doubles) -> Doubles:
    scales: Doubles = np.where((values > 0) & np.isfinite(values), values, 1.0)
    return scales


def _powers(largest: Doubles) -> Doubles:
    """The power of two in (x/2, x]; 1 for 0 and what is not finite."""
    _, exponents = np.frexp(_scales(largest))
    powers: Doubles = np.ldexp(1.0, exponents - 1)
    return powers


def _padded(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows with zeros up to whole blocks."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % BLOCKS.block_size)))
