"""Which K to take: one rule over the curve, and the reason in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimserve.reporting.facts import Point

# Cold tokens of 1,000 that cost next to nothing: a few rows are read beside a text of some pages.
_FEW_COLD = 1.0
_MULTIPLE = 128  # what `select` rounds K up to


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A K, and why.

    Attributes:
        kept: K, a multiple of 128 where the vocab has so many ids.
        coverage: the share of the profiled tokens that at least is kept, 0..1.
        cold_per_thousand: cold tokens expected in 1,000 of text to come, at most.
        enough_text: whether the rule was met; else the profiled text is too little for any K to meet it.
        reason: a sentence without its end.
    """

    kept: int
    coverage: float
    cold_per_thousand: float
    enough_text: bool
    reason: str


def recommend(curve: Sequence["Point"], enough: int, vocab_size: int, further: str) -> Recommendation:
    """The least K of a curve that leaves few tokens cold, or beyond which no more are expected to be covered.

    Args:
        curve: points of growing K, at least one.
        enough: the K beyond which no more is expected to be covered.
        vocab_size: V.
        further: what is foretold, for the reason.
    """
    few = [point for point in curve if point.cold_per_thousand <= _FEW_COLD]
    point = few[0] if few else next(point for point in curve if point.kept >= enough)
    if few:
        reason = f"the least K that should leave at most {_FEW_COLD:g} cold token of 1,000 in {further}"
    else:
        reason = (
            f"beyond it no more should be covered; {point.cold_per_thousand:.3g} of 1,000 tokens of "
            f"{further} should be cold at any K, as too little text was profiled: more text helps more than "
            "more ids"
        )
    rounded = min(-(-point.kept // _MULTIPLE) * _MULTIPLE, vocab_size)
    return Recommendation(rounded, point.coverage, point.cold_per_thousand, bool(few), reason)
