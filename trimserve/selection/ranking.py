"""The order in which ids are kept, and how many of them a coverage or a budget takes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.errors import UsageError
from trimserve.profiles.profile import Profile

Mask = npt.NDArray[np.bool_]
Mass = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Order = npt.NDArray[np.int64]
_CURVE_POINTS = 8


def ranked(profile: Profile, eligible: Mask, free: Mask, last: Ids | None = None) -> Order:
    """The free ids that the tokenizer has: eligible first, then by frequency, then the lower id.

    Among ids that occur equally often (dead ones never do), those in `last`, int32, come behind all others.
    """
    free = free.copy()
    free[profile.padding_ids] = False
    ids = np.flatnonzero(free)
    behind = np.zeros(profile.vocab_size, np.bool_)
    if last is not None:
        behind[last[last < profile.vocab_size]] = True
    return ids[np.lexsort((ids, behind[ids], -profile.mass[ids], ~eligible[ids]))]


def keeping_order(profile: Profile, forced: npt.NDArray[np.int32] | None = None) -> Order:
    """Every id that can stay, in the order in which they do: those that must, then the most frequent.

    Args:
        profile: the counts.
        forced: ids that must stay, int32; the profile's structural ones by default.
    """
    first = profile.structural if forced is None else forced
    free = np.ones(profile.vocab_size, np.bool_)
    free[first] = False
    return np.concatenate([first.astype(np.int64), ranked(profile, profile.counts > 0, free)])


def covering(mass: Mass, share: float, order: Order, taken: Order) -> int:
    """How many ids of an order it takes, besides those taken, to cover a share of the occurrences.

    Args:
        mass: (V,) occurrences, or shares of them. Whole counts never miss a share of 1 by a rounding error.
        share: 0..1; a larger one takes all.
        order: ids, the first to come first.
        taken: ids that are covered anyway.
    """
    reached = mass[taken].sum() + np.concatenate([[0], np.cumsum(mass[order])])
    return min(int(np.searchsorted(reached, share * mass.sum())), order.size)


def occurrences(profile: Profile) -> Mass:
    """What coverage counts, (V,): occurrences, or shares of them in a weighted merge."""
    return profile.counts if profile.shares is None else profile.shares


def affordable(profile: Profile, max_bytes: int, multiple_of: int, taken: int, free: int) -> int:
    """How many free ids fit beside the taken ones, at a K that needs no rounding up.

    Raises:
        UsageError: the bytes of a row are not known, or the taken ids alone exceed the budget.
    """
    if profile.row_bytes == 0:
        raise UsageError(
            "max_bytes needs to know the bytes of a row, but the profiled folder held no weights: profile "
            "with a folder that has model.safetensors, or use top_k."
        )
    rows = max_bytes // profile.row_bytes
    if rows >= taken + free:
        return free
    size = rows - rows % multiple_of
    while size in profile.linear_widths:
        size -= multiple_of
    if size < taken:
        least = round_up(taken, multiple_of, profile.linear_widths) * profile.row_bytes
        raise UsageError(
            f"max_bytes {max_bytes:,} cannot hold the {taken:,} ids that must stay: allow {least:,} bytes."
        )
    return size - taken


def round_up(size: int, multiple_of: int, widths: Sequence[int]) -> int:
    """The next multiple that is not the width of a linear layer.

    An exporter that looks for the head by its width would take such a layer for it.

    Example:
        >>> round_up(700, 128, [768])
        896
    """
    rounded = -(-max(size, 1) // multiple_of) * multiple_of
    while rounded in widths:
        rounded += multiple_of
    return rounded


def coverage_curve(profile: Profile) -> list[tuple[int, float]]:
    """Coverage on the profile at doubling K: (K, coverage) up to the K that covers all of it."""
    order = keeping_order(profile)
    forced = profile.structural.size
    last = forced + int(np.count_nonzero(profile.counts[order[forced:]]))
    size = 1 << max(7, forced.bit_length())
    sizes: list[int] = []
    while size < last and len(sizes) < _CURVE_POINTS:
        sizes.append(size)
        size *= 2
    return [(size, profile.coverage(order[:size])) for size in [*sizes, last]]
