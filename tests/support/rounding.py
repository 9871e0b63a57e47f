"""How far two right computations of a number may lie apart, and the comparison that uses it.

Processors add the products of a matrix in different orders (AVX2, AVX-512 VNNI, ARM) and round each sum.
So a computed number is compared within a bound of its own product instead of one tolerance for all. The
bounds are from Nicholas J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, SIAM 2002,
chapter 3.

`pytest.approx` as it is, with its relative 1e-6, is for shares and counts in double precision, of which that
is 2^33 roundings and less than one token. Chance has bounds of its own where a test draws.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

# Unit roundoff: half the distance from 1 to the next larger number.
FLOAT64, FLOAT32, FLOAT16 = 2.0**-53, 2.0**-24, 2.0**-11
Numbers = npt.ArrayLike


def gamma(operations: int, roundoff: float = FLOAT32) -> float:
    """n u / (1 - n u): the largest relative error that n roundings add up to (Higham, lemma 3.1)."""
    assert operations * roundoff < 1, f"{operations} roundings of {roundoff} leave no digit"
    return operations * roundoff / (1 - operations * roundoff)


def product_bound(
    left: npt.NDArray[Any], right: npt.NDArray[Any], *, after: int = 0, roundoff: float = FLOAT32
) -> npt.NDArray[np.float64]:
    """How far two computations of the product left (..., n) @ right (n, m) may lie apart, number by number.

    |fl(a.b) - a.b| <= gamma_n |a|.|b| in whatever order the n products are added (Higham, equation 3.5); two
    results lie at most twice that apart.

    Args:
        left: what both computations multiply.
        right: likewise.
        after: roundings that follow the sum, of a scale or a bias that is part of the sum |a|.|b|.
        roundoff: unit roundoff of the sums.
    """
    sizes = np.abs(left.astype(np.float64)) @ np.abs(right.astype(np.float64))
    return 2 * gamma(left.shape[-1] + after, roundoff) * sizes


def chain_bound(
    left: npt.NDArray[Any], *matrices: npt.NDArray[Any], after: int = 0
) -> npt.NDArray[np.float64]:
    """How far two computations of left @ A @ B @ ... may lie apart, number by number.

    The sum of all n_i roundings bounds the relative error of each term: gamma_(n1 + n2 + ...) |left| |A| |B|
    (Higham, section 3.5, "matrix multiplication", and lemma 3.3).
    """
    sizes, operations = np.abs(left.astype(np.float64)), after
    for matrix in matrices:
        operations += matrix.shape[0]
        sizes = sizes @ np.abs(matrix.astype(np.float64))
    return 2 * gamma(operations) * sizes


def model_bound(
    model: Any,
    outputs: Callable[[Any], Any],
    *,
    roundoff: float = FLOAT32,
    roundings: int | None = None,
    draws: int = 6,
) -> float:
    """How far two computations of a torch model's numbers may lie apart, as the model amplifies errors.

    A computed product is the exact product of weights that are each changed by gamma_n at most (Higham,
    equation 3.4: the backward error). So every weight is changed by gamma_n with random signs, n being the
    longest sum of the model, and the largest change of any output over some draws is taken: four times, for
    two computations and for the sums that have no weights (attention, norms).

    Args:
        model: a torch module; its weights are as before afterwards.
        outputs: model -> the numbers that are compared, a tensor or an array.
        roundoff: unit roundoff of the arithmetic that is judged.
        roundings: n, where sums are longer in a wider type and only their results are rounded to this one.
        draws: how often weights are changed.
    """
    return 4 * change_of_outputs(
        model,
        outputs,
        lambda weight, longest: gamma(roundings or longest, roundoff) * weight.abs(),
        draws=draws,
    )


def change_of_outputs(
    model: Any,
    outputs: Callable[[Any], Any],
    sizes: Callable[[Any, int], Any],
    *,
    draws: int = 6,
) -> float:
    """The largest change of a torch model's outputs when its weights change at random.

    Args:
        model: a torch module; its weights are as before afterwards.
        outputs: model -> a tensor or an array.
        sizes: a weight and the length of the model's longest sum -> how much each number of it changes.
        draws: how often, each time with other signs.
    """
    import torch

    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    longest = max(weight.shape[-1] for weight in weights if weight.ndim)
    saved = [weight.detach().clone() for weight in weights]
    signs = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = np.asarray(outputs(model), np.float64)
        largest = 0.0
        for _ in range(draws):
            for weight, original in zip(weights, saved, strict=True):
                sign = torch.randint(0, 2, weight.shape, generator=signs) * 2 - 1
                weight.copy_(original + sign * sizes(original, longest))
            change = np.abs(np.asarray(outputs(model), np.float64) - before)
            largest = max(largest, float(change[np.isfinite(change)].max(initial=0)))
        for weight, original in zip(weights, saved, strict=True):
            weight.copy_(original)
    return largest


def assert_within(found: Numbers, expected: Numbers, bound: Numbers, *, rows: int | None) -> None:
    """Two arrays are equal within a bound, and the bound is small enough to see a wrong row.

    Every row of `expected` is put in the place of its neighbour as well: if that lay within the bound, the
    comparison could not fail for a shifted row, and it fails for that reason.

    Args:
        found: computed numbers.
        expected: what they should be; infinities are compared as they are.
        bound: how far each may be off; a number, or an array that fits.
        rows: the axis on which rows lie (of token ids, texts, positions); None where there is one alone.
    """
    found, expected = _array(found), _array(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    beyond = _excess(found, expected, bound)
    if not (beyond <= 0).all():
        place = tuple(int(i) for i in np.unravel_index(np.nanargmax(beyond), beyond.shape))
        allowed = np.broadcast_to(np.asarray(bound), found.shape)[place]
        raise AssertionError(
            f"{int((~(beyond <= 0)).sum())} of {found.size} numbers lie beyond their bound; "
            f"worst at {place}: {found[place]} for {expected[place]}, allowed {allowed}"
        )
    if rows is not None and expected.shape[rows] > 1:
        wrong = _excess(np.roll(expected, 1, axis=rows), expected, bound) > 0
        seen = np.moveaxis(wrong, rows, 0).reshape(expected.shape[rows], -1).any(axis=1)
        assert seen.all(), (
            f"the bound is too wide: rows {np.flatnonzero(~seen).tolist()} could be their neighbours"
        )


def _array(numbers: Any) -> npt.NDArray[Any]:
    return np.asarray(numbers.detach() if hasattr(numbers, "detach") else numbers)


def _excess(found: npt.NDArray[Any], expected: npt.NDArray[Any], bound: Numbers) -> npt.NDArray[np.float64]:
    """How far each number lies beyond its bound; NaN where one of two is none, -inf where both are equal."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    equal = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        beyond = np.abs(found - expected) - np.asarray(bound, np.float64)
    return np.where(equal, -np.inf, beyond)
