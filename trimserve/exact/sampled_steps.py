"""Sampling between bounds: which token is drawn whatever the cold logits are within theirs.

The sampler takes the largest of score + noise over the ids that its filters leave (`sampling.choose`). Known
are the kept ids' logits, exactly, and upper bounds of all others:

- *Filters.* Which kept ids top-k, top-p and min-p leave depends on the cold ids; `allowed_kept` finds those
  that may be left, those that are left for sure, and a score below which no cold id is left. The likeliest
  drawn of the first (largest score + noise) must be one of the second.
- *Noise.* The noise of a cold id is known (it belongs to seed, step and id), so only an id whose bound plus
  noise reaches that largest sum can win. There are few, and their rows are read.

Penalties, biases and bans change single ids: on kept ids they are applied, on cold ids they are applied to
both bounds, which they keep in order because each is a rounded monotone operation.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Doubles, Floats, Ids
from trimserve.decoding.sampling import SamplingParams

# float64 sums of at most 2^20 weights, in any order, differ by far less.
_MARGIN = 1e-9


@dataclass(frozen=True, slots=True)
class Rivals:
    """Cold ids that may win a step, and between what their scores lie.

    Attributes:
        ids: int32 (n,); an id may be repeated.
        lower: float64 (n,).
        upper: float64 (n,).
    """

    ids: Ids
    lower: Doubles
    upper: Doubles

    def plus(self, other: "Rivals") -> "Rivals":
        """Both together."""
        join = np.concatenate
        return Rivals(
            join([self.ids, other.ids]), join([self.lower, other.lower]), join([self.upper, other.upper])
        )

    def without(self, ids: Ids) -> "Rivals":
        """Those that are not among some ids."""
        stay = ~np.isin(self.ids, ids)
        return Rivals(self.ids[stay], self.lower[stay], self.upper[stay])

    def winner(self, floor: float) -> tuple[int, float] | None:
        """Whether one of them is certainly above a floor and above the others, or none reaches it.

        Returns:
            The id that wins and its lower bound; -1 and -inf if all are below the floor; None if neither is
            certain.
        """
        level = max(floor, float(self.lower.max(initial=-np.inf)))
        # What is not a number is not known to be below.
        alive = ~(self.upper < level)
        if not alive.any():
            return -1, -np.inf
        ids = np.unique(self.ids[alive])
        lowest = float(self.lower[alive].min())
        return (int(ids[0]), lowest) if len(ids) == 1 and lowest > floor else None


def scores_between(logits: Doubles, temperature: float, side: int) -> Doubles:
    """Bound what float32 logits give divided by the temperature: from above (side 1) or below (side -1)."""
    scores: Doubles = logits / np.float64(np.float32(temperature))
    error = np.abs(scores) * 2.0**-22 + 2.0**-126
    bounds: Doubles = scores + side * np.where(np.isfinite(scores), error, 0.0)
    return bounds


def has_filters(params: SamplingParams, vocab_size: int) -> bool:
    """Whether anything but the noise decides which ids may be drawn."""
    return 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the filters leave.

    Attributes:
        may: bool (K,), kept ids that may be left: all others are excluded for sure.
        sure: bool (K,), kept ids that are left for sure.
        cut: a cold id whose score is below it is excluded for sure.
        floor: an id whose score reaches it is left for sure: what is certain of a kept id is certain of what
            is above it.
    """

    may: npt.NDArray[np.bool_]
    sure: npt.NDArray[np.bool_]
    cut: float
    floor: float


def allowed_kept(
    scores: Floats, params: SamplingParams, cold_scores: Doubles, rows: Doubles, alike: Doubles | None = None
) -> Allowed:
    """Apply the filters to kept ids, whatever the cold ids' scores are below their bounds.

    Cold ids only push kept ids out of top-k and raise the floor of min-p, which is relative to the largest
    score. For top-p they add to the mass that the nucleus has to reach a share of: up to the sum over
    their bounds, so more kept ids may be left, and fewer by the mass of the cold ids that stand before them.

    Args:
        scores: float32 (K,), the kept ids', after the temperature.
        params: the filters.
        cold_scores: upper bounds (n,) of the scores of all cold ids.
        rows: how many ids a bound is of (n,).
        alike: how many ids at that very bound would have at least their mass (n,); as many by default.
    """
    may = scores > -np.inf
    sure, cut = may, -np.inf
    peak = float(scores.max())
    cold = _ColdAbove(cold_scores, rows, rows if alike is None else alike, peak)
    if params.top_k > 0:
        if params.top_k < scores.size:
            cut = float(np.partition(scores, scores.size - params.top_k)[scores.size - params.top_k])
            may = may & (scores >= cut)
        larger = scores.size - np.searchsorted(np.sort(scores), scores, side="right")
        sure = may & (larger + cold.rows(scores) < params.top_k)
    if params.top_p < 1:
        may, sure, nucleus = _nucleus(scores, params.top_p, may, sure, cold)
        cut = max(cut, nucleus)
    if params.min_p > 0:
        least = float(scores.max() + np.log(np.float32(params.min_p)))
        most = max(least, cold.largest + float(np.log(np.float32(params.min_p))))
        may = may & (scores >= least)
        sure = sure & may & (scores > most + _MARGIN * abs(most) + 2.0**-20 * (abs(cold.largest) + 1))
        cut = max(cut, least)
    return Allowed(may, sure, cut, float(scores[sure].min(initial=np.inf)))


class _ColdAbove:
    """How many cold ids, and how much of their mass, may lie at or above a score."""

    def __init__(self, scores: Doubles, rows: Doubles, alike: Doubles, peak: float) -> None:
        order = np.argsort(-scores)
        self.largest = float(scores.max(initial=-np.inf))
        self._falling = -scores[order]
        self._rows = np.concatenate([[0.0], np.cumsum(rows[order])])
        with np.errstate(over="ignore"):
            mass = alike[order] * np.exp(scores[order] - peak)
        self._mass = np.concatenate([[0.0], np.cumsum(mass)]) * (1 + _MARGIN)

    @property
    def total_mass(self) -> float:
        """Of all cold ids, relative to the largest kept weight."""
        return float(self._mass[-1])

    def rows(self, scores: Floats) -> Doubles:
        """Cold ids that may be at or above scores (K,)."""
        found: Doubles = self._rows[np.searchsorted(self._falling, -scores, side="right")]
        return found

    def mass(self, scores: Floats) -> Doubles:
        """The mass of these."""
        found: Doubles = self._mass[np.searchsorted(self._falling, -scores, side="right")]
        return found


def _nucleus(
    scores: Floats,
    top_p: float,
    may: npt.NDArray[np.bool_],
    sure: npt.NDArray[np.bool_],
    cold: _ColdAbove,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], float]:
    """Top-p among ids that may be there or are there for sure; also the score below which no cold id is."""
    weights = np.exp(scores.astype(np.float64) - float(scores.max()))
    # Weights that are equal here may differ by a rounding beside another largest score: for what is sure,
    # they stand before each other, and a cold id must be well below.
    before_may, total_may = _before(weights, may, ties=True)
    before_sure, total_sure = _before(weights, sure, ties=False)
    most = top_p * (total_may + cold.total_mass) * (1 + _MARGIN)
    least = top_p * total_sure * (1 - _MARGIN)
    # An id is left if the weights above its own do not reach the target.
    left = may & (before_sure < most)
    certain = sure & (before_may + cold.mass(scores) < least)
    full = sure & (before_sure + weights >= most)
    last = float(scores[full].max(initial=-np.inf))
    return left, certain, last - _MARGIN * (1 + abs(last) + abs(float(scores.max())))


def _before(weights: Doubles, present: npt.NDArray[np.bool_], *, ties: bool) -> tuple[Doubles, float]:
    """The sum of all present weights larger than each weight (or equal, less itself); the sum of all."""
    falling = np.sort(weights[present])[::-1]
    sums = np.concatenate([[0.0], np.cumsum(falling)])
    before: Doubles = sums[np.searchsorted(-falling, -weights, side="right" if ties else "left")]
    return (before - weights if ties else before), float(sums[-1])
