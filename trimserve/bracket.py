"""Sampling between bounds: which token is drawn whatever the cold logits are within theirs.

The sampler takes the largest of score + noise over the ids that its filters leave (`sampling.choose`). Known
are the kept ids' logits, exactly, and upper bounds of all others:

- *Filters.* If top-k, top-p or min-p provably excludes every cold id, and the kept ids that stay are those
  that stay in the full vocab, the token is the one that kept ids alone give. Top-k and min-p look at the
  largest cold score alone; top-p needs the cold ids' mass, too: between 0 and the sum over their bounds.
- *No filter.* The noise of a cold id is known (it belongs to seed, step and id): only an id whose bound plus
  noise reaches the largest kept sum can win. There are few, and their rows are read.

Penalties, biases and bans change single ids: on kept ids they are applied, on cold ids they are applied to
both bounds, which they keep in order because each is a rounded monotone operation.
"""

from dataclasses import dataclass

import numpy as np

from trimserve.bounds import Doubles
from trimserve.decoder import Floats
from trimserve.sampling import SamplingParams, filter_scores
from trimserve.vocab import Ids

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


def filters_exclude_cold(scores: Floats, params: SamplingParams, cold_scores: Doubles, rows: Doubles) -> bool:
    """Whether the filters leave kept ids alone, and the same ones as in the full vocab.

    Args:
        scores: float32 (K,), the kept ids', after the temperature.
        params: with filters.
        cold_scores: upper bounds (n,) of the scores of all cold ids.
        rows: how many ids a bound is of (n,).
    """
    ceiling = float(cold_scores.max(initial=-np.inf))
    peak = float(scores.max(initial=-np.inf))
    if not ceiling < peak:
        return False
    excluded = False
    if params.top_k > 0:
        if params.top_k > scores.size:
            return False
        kth = np.partition(scores, scores.size - params.top_k)[scores.size - params.top_k]
        if not ceiling < kth:
            return False
        excluded = True
        scores = filter_scores(scores, SamplingParams(top_k=params.top_k))
    if params.top_p < 1:
        mass = 0.0 if excluded else float((rows * np.exp(cold_scores - peak)).sum()) * (1 + _MARGIN)
        if not _nucleus_is_settled(scores, params.top_p, mass, -np.inf if excluded else ceiling):
            return False
        excluded = True
    return excluded or ceiling < float(scores.max() + np.log(np.float32(params.min_p)))


def _nucleus_is_settled(scores: Floats, top_p: float, mass: float, ceiling: float) -> bool:
    """Whether top-p ends at the same kept id for every cold mass up to `mass`, with no cold id before it."""
    peak = float(scores.max())
    weights = np.sort(np.exp(scores.astype(np.float64) - peak))[::-1]
    reached = np.cumsum(weights)
    total = float(reached[-1])
    least, most = top_p * total * (1 - _MARGIN), top_p * (total + mass) * (1 + _MARGIN)
    last = int(np.searchsorted(reached, least))
    if last == weights.size or not reached[last] > most:
        return False
    return bool(weights[last] > np.exp(ceiling - peak) * (1 + _MARGIN))
