"""Four bits for a block of a body's weights, chosen by error: a scale, and a zero point or a minimum.

A block of 32 weights w becomes integers q of 0 to 15. Two forms:

- a zero point z, an integer: w is about s (q - z). MatMulNBits multiplies it as fast as without one.
- a minimum, which stands here by what the middle integer means: w is about s (q - 8) + m, m a float. The
  graph adds m times the sum of the block's inputs, which costs a small product beside the large one. Weights
  that were rounded like this once (GGUF's Q4_1 and Q4_K, made floats again) lie on such a lattice, and come
  out as they went in; for others it gains little. So a matrix takes minima only where they leave a fraction
  of the error.

Blocks that a lattice without offsets made (GGUF's Q4_0, see `lattice.py`) keep its integers and scale, with
the zero point 8. Those that a lattice with offsets made (Q4_1) keep integers, scale and minimum, where all of
a matrix's sample does; their middles are float32: float16 holds the minimum, but not what 8 means. All others
are searched: the range of a block is narrowed step by step, integers rounded, scale (and minimum) fitted to
them by least squares, and the smallest error wins. Errors are squared, and weighted by the second moments of
the product's inputs where they are known: what a weight's error does to the output grows with its input. All
of it is elementwise, or sums over an outer axis, which numpy adds in order: every processor finds the same
integers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError
from trimserve_export.serving.lattice import on_lattice, on_offset_lattice

BLOCK = 32
_LEVELS = 15
MIDDLE = np.float32(8)
# Largest numbers of rows: scales are about a tenth, and float16 has its full precision from 2^-14 on.
_USUAL = (2.0**-7, 2.0**10)
# How far a block's range is narrowed at most: beyond, what is clipped costs more than finer steps gain.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# Blocks that are searched together: their floats stay in a core's cache.
_BLOCKS_AT_ONCE = 4096
# Rows by which the form of a matrix is chosen, and the share of the error that minima must leave at most.
_SAMPLE_ROWS = 64
_MINIMA_BELOW = 0.25
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SearchedBlocks:
    """A matrix in 4-bit blocks.

    Attributes:
        integers: uint8 (n, blocks, 16), the first of two in the low half.
        scales: float16 or float32 (n, blocks).
        zero_points: uint8 (n, ceil(blocks / 2)), packed alike; None where the blocks have minima.
        middles: of blocks with minima, what the integer 8 means: float16, or float32 where all are exact
            (n, blocks); or None.
    """

    integers: Bytes
    scales: npt.NDArray[np.floating]
    zero_points: Bytes | None
    middles: npt.NDArray[np.floating] | None


@dataclass(frozen=True, slots=True)
class _Fit:
    """Blocks as columns: integers (32, n); scale, offset (zero point or middle) and error of each (n,)."""

    integers: Floats
    scales: Floats
    offsets: Floats
    errors: Floats

    def better_of(self, other: "_Fit") -> "_Fit":
        """Of each block the fit with the smaller error, this one's on a tie."""
        worse = other.errors < self.errors
        return _Fit(
            np.where(worse, other.integers, self.integers),
            np.where(worse, other.scales, self.scales),
            np.where(worse, other.offsets, self.offsets),
            np.where(worse, other.errors, self.errors),
        )


def search_blocks(
    rows: npt.NDArray[np.floating], moments: Floats | None, *, minima: bool = True, half: bool = False
) -> SearchedBlocks:
    """Round a matrix to 4 bits.

    Args:
        rows: a row an output, float (n, H).
        moments: second moments of the product's inputs (H,), in any unit; None weights all alike.
        minima: whether blocks may have minima.
        half: store the scales in float16 if they are of a size for it.
    """
    count, width = rows.shape
    weights = _weights(moments, width)
    sample = rows[:: max(1, len(rows) // _SAMPLE_ROWS)]
    with_minima = minima and width % BLOCK == 0 and _prefers_minima(sample, weights)
    kind: np.dtype[Any] = np.dtype(
        np.float16 if rows.dtype == np.float16 or (half and _is_usual(sample)) else np.float32
    )
    exact = with_minima and sample.dtype == np.float32 and bool(on_offset_lattice(_blocks(sample))[0].all())
    blocks = -(-width // BLOCK)
    integers = np.empty((count, blocks, BLOCK // 2), np.uint8)
    scales = np.empty((count, blocks), kind)
    offsets = np.empty((count, blocks), np.float32)
    for part in _slices(count, blocks):
        fit = _fit(rows[part], weights, kind, minima=with_minima, exact=exact)
        shape = (part.stop - part.start, blocks)
        values = fit.integers.T.reshape(*shape, BLOCK).astype(np.uint8)
        integers[part] = values[..., ::2] | (values[..., 1::2] << np.uint8(4))
        scales[part], offsets[part] = fit.scales.reshape(shape), fit.offsets.reshape(shape)
    if with_minima:
        return SearchedBlocks(integers, scales, None, offsets if exact else offsets.astype(np.float16))
    return SearchedBlocks(integers, scales, _packed(offsets.astype(np.uint8)), None)


def _weights(moments: Floats | None, width: int) -> Floats:
    """What squared errors are weighted with (blocks, 32): of size 1 on average, 0 for padding."""
    if moments is not None and moments.shape != (width,):
        raise MismatchError(
            f"the calibration has {moments.shape} moments for an input of {width} numbers: it was "
            "made for another model. Export the folder again."
        )
    padded = np.zeros(-(-width // BLOCK) * BLOCK, np.float32)
    if moments is None or not np.isfinite(moments).all() or moments.max() <= 0:
        padded[:width] = 1
    else:
        # An input that the sample hardly moved may move in other texts.
        least = np.float32(moments.mean() * 1e-2)
        padded[:width] = np.maximum(moments, least) / moments.mean()
    return padded.reshape(-1, BLOCK)


def _slices(count: int, blocks: int) -> Iterator[slice]:
    step = max(1, _BLOCKS_AT_ONCE // blocks)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _is_usual(rows: npt.NDArray[np.floating]) -> bool:
    """Whether scales have the size of float16's normal numbers, with room on both sides."""
    largest = np.abs(rows).max(axis=1)
    return bool(np.median(largest) >= _USUAL[0] and largest.max() <= _USUAL[1])


def _prefers_minima(rows: npt.NDArray[np.floating], weights: Floats) -> bool:
    kind = np.dtype(np.float32)
    fits = [_fit(rows, weights, kind, minima=form).errors.astype(np.float64) for form in (True, False)]
    return float(fits[0].sum()) < _MINIMA_BELOW * float(fits[1].sum())


def _blocks(rows: npt.NDArray[np.floating]) -> Floats:
    """Rows of whole blocks, a block a row (n, 32)."""
    return np.ascontiguousarray(rows, np.float32).reshape(-1, BLOCK)


def _fit(
    rows: npt.NDArray[np.floating],
    weights: Floats,
    kind: np.dtype[Any],
    *,
    minima: bool,
    exact: bool = False,
) -> _Fit:
    """The best fit found for each block of some rows, row after row."""
    missing = weights.size - rows.shape[1]
    padded = np.pad(np.asarray(rows, np.float32), ((0, 0), (0, missing)))
    columns = np.ascontiguousarray(padded.reshape(-1, BLOCK).T)
    weighted = np.ascontiguousarray(np.tile(weights, (len(rows), 1)).T)
    known = None
    if exact or (not minima and rows.dtype == np.float32):
        known = _on_offset_lattice(columns) if exact else _on_lattice(columns)
    if known is not None and not known.errors.any():
        return known
    candidates = (_with_minima if minima else _with_zero_points)(columns, weighted, kind)
    best = next(candidates) if known is None else known
    for other in candidates:
        best = best.better_of(other)
    return best


def _on_lattice(columns: Floats) -> _Fit:
    """The fit of blocks that were whole multiples of a scale; the error of the others is infinite."""
    found, scales, integers = on_lattice(np.ascontiguousarray(columns.T), bits=4, halves=True)
    errors = np.where(found | ~columns.any(axis=0), np.float32(0), np.float32(np.inf))
    whole = np.where(found, integers.T, 0).astype(np.float32) + MIDDLE
    return _Fit(whole, np.where(found, scales, 1), np.full_like(scales, MIDDLE), errors)


def _on_offset_lattice(columns: Floats) -> _Fit:
    """The fit of blocks that a scale and a minimum made; the error of the others is infinite."""
    found, scales, middles, integers = on_offset_lattice(np.ascontiguousarray(columns.T))
    errors = np.where(found, np.float32(0), np.float32(np.inf))
    return _Fit(integers.T.astype(np.float32), scales, middles, errors)


def _with_zero_points(columns: Floats, weighted: Floats, kind: np.dtype[Any]) -> Iterator[_Fit]:
    low, high = np.minimum(columns.min(axis=0), 0), np.maximum(columns.max(axis=0), 0)
    full = _nonzero((high - low) / np.float32(_LEVELS))
    for share in _RANGES:
        scales = full * np.float32(share)
        middle = np.clip(-low / full, 0, _LEVELS)
        for zeros in (np.floor(middle), np.ceil(middle)):
            integers = np.clip(np.rint(columns / scales + zeros), 0, _LEVELS)
            shifted = integers - zeros
            power = (weighted * shifted * shifted).sum(axis=0)
            fitted = (weighted * shifted * columns).sum(axis=0) / np.where(power > 0, power, 1)
            chosen = _stored(np.where(fitted > 0, fitted, scales), kind)
            errors = (weighted * (shifted * chosen - columns) ** 2).sum(axis=0)
            yield _Fit(integers, chosen, zeros, errors)


def _with_minima(columns: Floats, weighted: Floats, kind: np.dtype[Any]) -> Iterator[_Fit]:
    low, high = columns.min(axis=0), columns.max(axis=0)
    total = _nonzero(weighted.sum(axis=0))
    mean = (weighted * columns).sum(axis=0) / total
    for share in _RANGES:
        scales = _stored(_nonzero((high - low) * np.float32(share / _LEVELS)), kind)
        middles = low + (high - low) * np.float32((1 - share) / 2) + scales * MIDDLE
        fit = _at(columns, weighted, scales, middles)
        yield fit
        middle = (weighted * fit.integers).sum(axis=0) / total
        shifted = fit.integers - middle
        power = (weighted * shifted * shifted).sum(axis=0)
        fitted = (weighted * shifted * (columns - mean)).sum(axis=0) / np.where(power > 0, power, 1)
        scales = _stored(np.where(fitted > 0, fitted, scales), kind)
        yield _at(columns, weighted, scales, mean - scales * (middle - MIDDLE))


def _at(columns: Floats, weighted: Floats, scales: Floats, wanted: Floats) -> _Fit:
    middles = wanted.astype(np.float16).astype(np.float32)
    integers = np.clip(np.rint((columns - middles) / scales + MIDDLE), 0, _LEVELS)
    errors = (weighted * ((integers - MIDDLE) * scales + middles - columns) ** 2).sum(axis=0)
    return _Fit(integers, scales, middles, errors)


def _nonzero(values: Floats) -> Floats:
    """A block of equal numbers, or of zeros, takes any scale."""
    return np.where(values > np.finfo(np.float32).tiny, values, np.float32(1))


def _stored(scales: Floats, kind: np.dtype[Any]) -> Floats:
    """Scales as they are stored; one that float16 has no number for leaves a block of zeros."""
    return _nonzero(scales.astype(kind).astype(np.float32))


def _packed(zero_points: Bytes) -> Bytes:
    """Two zero points a byte, a row from a whole byte on."""
    padded = np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2)))
    packed: Bytes = padded[:, ::2] | (padded[:, 1::2] << np.uint8(4))
    return packed
