"""What a profile lets expect of text to come: cold tokens, and whether the corpus is large enough."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.profiles.estimates import Shares, expected_unseen
from trimserve.profiles.profile import Profile

_CURVE_POINTS = 24


@dataclass(frozen=True, slots=True)
class CorpusCurve:
    """How much of a further text is unseen after a corpus of each size.

    Attributes:
        unit: what is held back and drawn: "documents", or "tokens" where documents were not counted.
        sizes: numbers of units, increasing.
        unseen: expected share of a further unit's tokens whose id none of that many others holds, 0..1;
            structural ids never count as unseen.
    """

    unit: str
    sizes: tuple[int, ...]
    unseen: tuple[float, ...]

    @property
    def last_doubling(self) -> float:
        """By how much the second half of the corpus lowered the unseen share, 0..1."""
        half = float(np.interp(np.log(self.sizes[-1] / 2), np.log(self.sizes), self.unseen))
        return half - self.unseen[-1]


def corpus_curve(profile: Profile) -> CorpusCurve:
    """Compute the expected unseen share against corpus size, exactly; see `estimates.expected_unseen`.

    In a merge, documents are drawn from all profiles alike; if it is weighted, tokens count by their weight.
    """
    unit, holders, units = _units(profile)
    free = np.ones(profile.vocab_size, np.bool_)
    free[profile.structural] = False
    largest = max(units - 1, 1)
    sizes = np.unique(np.geomspace(1, largest, _CURVE_POINTS).round().astype(np.int64)).tolist()
    unseen = expected_unseen(profile.mass[free], holders[free], units, sizes)
    return CorpusCurve(unit, tuple(sizes), tuple(unseen))


def seen_again(profile: Profile, must_stay: Ids) -> Shares:
    """The mass, float64 (V,), that an id is expected to keep in text to come.

    Nothing for an id that one document alone holds (or that occurs once, where documents were not
    counted): had that document come later, the id would not have been kept. All of it for any other id,
    and for those in `must_stay`, int32, which stay without being seen.
    """
    _, holders, _ = _units(profile)
    mass = np.where(holders > 1, profile.mass, 0.0)
    mass[must_stay] = profile.mass[must_stay]
    return mass


def cold_share(profile: Profile, kept_ids: npt.ArrayLike, must_stay: Ids) -> float:
    """Expected share of cold tokens in a further document, 0..1; see `seen_again`.

    Args:
        profile: what the vocab was selected from.
        kept_ids: distinct token ids.
        must_stay: those that are kept for another reason than their frequency, int32.
    """
    kept = np.asarray(kept_ids, np.int64)
    return max(0.0, 1 - float(seen_again(profile, must_stay)[kept].sum()))


def _units(profile: Profile) -> tuple[str, npt.NDArray[np.int64], int]:
    """What is drawn at random, how many units hold each id (V,), and how many there are."""
    if profile.document_counts is not None and profile.texts > 1:
        return "documents", profile.document_counts, profile.texts
    return "tokens", profile.counts, profile.tokens
