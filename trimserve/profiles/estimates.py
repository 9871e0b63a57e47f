"""How much of a text to come is still unseen: estimates from counts alone, each with its source."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]
CONFIDENCE = 0.95
# Quantile of the normal distribution that a share CONFIDENCE lies below.
_Z = 1.6448536269514722


def guaranteed_bound(estimate: float, draws: float) -> float:
    """Upper bound of the missing mass at `CONFIDENCE`, whatever the distribution of independent draws.

    Args:
        estimate: the Good-Turing estimate N1 / N.
        draws: N, the number of draws.

    Source: with probability 1 - delta/2 each,
    M0 <= E M0 + sqrt(ln(2/delta) / N) (D. Berend and A. Kontorovich, On the concentration of the missing
    mass, Electron. Commun. Probab. 18 (2013), no. 3, https://doi.org/10.1214/ECP.v18-2359) and
    E N1/N <= N1/N + sqrt(2 ln(2/delta) / N) (C. McDiarmid, On the method of bounded differences, 1989: one
    draw moves N1 by 2 at most); and E M0 <= E N1/N.
    """
    slack = (1 + math.sqrt(2)) * math.sqrt(math.log(2 / (1 - CONFIDENCE)) / max(draws, 1.0))
    return min(1.0, estimate + slack)


def likely_bound(once: Shares, twice: Shares, draws: float) -> float:
    """Upper bound of the missing mass at `CONFIDENCE` in the limit of many draws: far tighter, no guarantee.

    Args:
        once: mass of each id that occurs once (1 / N each without weights).
        twice: mass of each id that occurs twice.
        draws: N, the number of draws.

    Source: the variance N1/N^2 + 2 N2/N^2 - N1^2/N^3 of W. W. Esty, A normal limit law for a nonparametric
    estimator of the coverage of a random sample, Ann. Statist. 11 (1983), 905-912,
    https://doi.org/10.1214/aos/1176346256; with weights, each id enters by its own mass.
    """
    estimate = float(once.sum())
    variance = (once**2).sum() + 2 * ((twice / 2) ** 2).sum() - estimate**2 / max(draws, 1.0)
    return min(1.0, estimate + _Z * math.sqrt(max(float(variance), 0.0)))


def expected_unseen(
    mass: Shares, holders: npt.NDArray[np.int64], units: int, sizes: Sequence[int]
) -> list[float]:
    """Expected share of a further unit's tokens whose id none of n random others holds, for each n.

    One of the `units` (documents, or tokens) is held back at random, and n of the others are profiled. An id
    that d units hold stays unseen with probability C(D - d, n) / C(D - 1, n), so the expectation over all
    ways to choose is a sum over the ids, with no sampling. At n = D - 1 it is the leave-one-out share:
    the mass of the ids that one unit alone holds, which for tokens is Good and Turing's N1 / N.

    Args:
        mass: float64 (n,), share of the tokens that each id makes up; ids that always stay left out.
        holders: int64 (n,), d, how many units hold each id.
        units: D, how many units there are.
        sizes: the n to compute it for, each from 0 to D - 1.

    Returns:
        A share from 0 to 1 for each n.
    """
    held, place = np.unique(holders[holders > 0], return_inverse=True)
    by_holders = np.bincount(place, mass[holders > 0], held.size)
    ways = [_log_unseen(held, units, size) for size in sizes]
    return [float(by_holders @ np.exp(row)) for row in ways]


def _log_unseen(held: npt.NDArray[np.int64], units: int, size: int) -> Shares:
    """Ln C(D - d, n) - ln C(D - 1, n) for each d; minus infinity where n units cannot miss all d."""
    possible = held <= units - size
    terms = [
        math.lgamma(units - d + 1)
        - math.lgamma(units)
        - math.lgamma(units - d - size + 1)
        + math.lgamma(units - size)
        for d in held[possible].tolist()
    ]
    ways = np.full(held.size, -np.inf)
    ways[possible] = terms
    return ways


def knee(sizes: npt.NDArray[np.int64], gains: Shares) -> int:
    """The place where a concave curve bends most: farthest above the straight line between its ends.

    Args:
        sizes: increasing, (n,), n at least 1.
        gains: the curve's values, (n,).

    Returns:
        An index into `sizes`.

    Source: V. Satopaa, J. Albrecht, D. Irwin and B. Raghavan, Finding a "kneedle" in a haystack, ICDCS
    Workshops 2011, 166-171, https://doi.org/10.1109/ICDCSW.2011.20.
    """
    across = (sizes - sizes[0]) / max(int(sizes[-1] - sizes[0]), 1)
    up = (gains - gains[0]) / max(float(gains[-1] - gains[0]), 1e-300)
    return int(np.argmax(up - across))
