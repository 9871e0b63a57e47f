"""Compare two profiles of one model: what a new month of traffic brings."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.arguments import checked
from trimserve.errors import UsageError
from trimserve.profiles.estimates import Shares
from trimserve.profiles.merging import check_same_model
from trimserve.profiles.profile import Profile

_RESAMPLINGS = 8


@dataclass(frozen=True, slots=True)
class Move:
    """How far one token's share of the occurrences moved.

    Attributes:
        token_id: the id.
        before: its share in the first profile, 0..1.
        after: its share in the second.
    """

    token_id: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Difference:
    """What tells two profiles apart; shares are of token occurrences, 0..1.

    Attributes:
        tokens: occurrences in each of the two.
        new_ids: number of ids that the second alone has.
        new_mass: their share of the second.
        gone_ids: number of ids that the first alone has.
        gone_mass: their share of the first.
        shifted_mass: share of the occurrences that would have to become other ids to make one profile of the
            other (total variation distance).
        js_distance: Jensen-Shannon distance, 0 (the same shares) to 1 (no id in common).
        js_by_chance: what that distance comes to on average where the same occurrences are dealt to two
            profiles of these sizes at random; documents are not dealt as wholes, so it is a lower limit.
        moved: the ids whose shares moved most, the farthest first.
    """

    tokens: tuple[int, int]
    new_ids: int
    new_mass: float
    gone_ids: int
    gone_mass: float
    shifted_mass: float
    js_distance: float
    js_by_chance: float
    moved: tuple[Move, ...]


@checked
def diff(before: Profile, after: Profile, *, top: int = 20) -> Difference:
    """Compare two profiles of one model.

    Args:
        before: the profile that a vocab was selected from, or an earlier month's.
        after: what it is compared with.
        top: how many tokens to name in `moved`.

    Raises:
        MismatchError: the profiles are of different tokenizers or models.
        UsageError: one of them holds no token.
    """
    check_same_model(before, after)
    if not (before.tokens and after.tokens):
        raise UsageError("a profile without a token has no shares to compare: profile a text first.")
    first, second = before.mass, after.mass
    new, gone = (first == 0) & (second > 0), (second == 0) & (first > 0)
    distance = np.abs(second - first)
    farthest = np.argsort(-distance, kind="stable")[: min(top, int(np.count_nonzero(distance)))]
    return Difference(
        tokens=(before.tokens, after.tokens),
        new_ids=int(new.sum()),
        new_mass=float(second[new].sum()),
        gone_ids=int(gone.sum()),
        gone_mass=float(first[gone].sum()),
        shifted_mass=float(distance.sum() / 2),
        js_distance=js_distance(first, second),
        js_by_chance=_js_by_chance(before, after),
        moved=tuple(Move(int(id_), float(first[id_]), float(second[id_])) for id_ in farthest),
    )


def js_distance(first: Shares, second: Shares) -> float:
    """The Jensen-Shannon distance of two distributions, to base 2: 0 to 1, a metric.

    Args:
        first: float64 (n,), summing to 1.
        second: float64 (n,), summing to 1.

    Source: J. Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37 (1991),
    145-151, https://doi.org/10.1109/18.61115; its square root is a metric: D. Endres and J. Schindelin,
    same journal 49 (2003), 1858-1860, https://doi.org/10.1109/TIT.2003.813506.
    """
    middle = (first + second) / 2
    divergence = (_divergence(first, middle) + _divergence(second, middle)) / 2
    return float(np.sqrt(min(max(divergence, 0.0), 1.0)))


def _divergence(shares: Shares, middle: Shares) -> float:
    """Kullback-Leibler divergence in bits; `middle` is positive wherever `shares` is."""
    held = shares > 0
    return float((shares[held] * np.log2(shares[held] / middle[held])).sum())


def _js_by_chance(before: Profile, after: Profile) -> float:
    """Mean distance of random re-divisions of all occurrences, always with the same random numbers."""
    pooled = before.counts + after.counts
    pooled = pooled[pooled > 0]
    random = np.random.default_rng(0)
    share = before.tokens / (before.tokens + after.tokens)
    return float(np.mean([_redivided(random.binomial(pooled, share), pooled) for _ in range(_RESAMPLINGS)]))


def _redivided(first: npt.NDArray[np.int64], pooled: npt.NDArray[np.int64]) -> float:
    second = pooled - first
    return js_distance(first / max(first.sum(), 1), second / max(second.sum(), 1))
