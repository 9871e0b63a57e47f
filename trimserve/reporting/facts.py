"""The numbers of a report, gathered once for every format: counts, never text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arguments import Count, checked
from trimserve.arrays import Ids
from trimserve.corpus.files import CorpusSource
from trimserve.model.prize import WeightBytes
from trimserve.profiles.difference import js_distance
from trimserve.profiles.estimates import Shares, knee
from trimserve.profiles.forecast import CorpusCurve, cold_share, corpus_curve, seen_again
from trimserve.profiles.profile import Profile
from trimserve.reporting.recommendation import Recommendation, recommend
from trimserve.reporting.tokens import DroppedToken, KindShare, heaviest_dropped, kinds_of
from trimserve.selection.ranking import covering, keeping_order, occurrences
from trimserve.text.names import TokenNames
from trimserve.vocab.map import Reason, VocabMap

_CURVE_POINTS = 64
_NO_MORE = 1e-5  # a hundredth of a token of 1,000
_LEAST_K = 128  # K is a multiple of it


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a report is made from; only the profiles and the vocab must be there.

    Attributes:
        profiles: by name, of one model.
        merged: their sum.
        vocab: the choice that the report is about.
        names: names of the tokens.
        weights: bytes of the model's weights.
        held_out: counts of text that was not profiled.
        dead_ids: int32, ids that no text leads to.
        verification: what `trimserve verify` stored in a trimmed folder's manifest.
        min_docs: a token is named only if this many documents hold it.
    """

    profiles: Mapping[str, Profile]
    merged: Profile
    vocab: VocabMap
    names: TokenNames | None = None
    weights: WeightBytes | None = None
    held_out: Profile | None = None
    dead_ids: Ids | None = None
    verification: dict[str, Any] | None = None
    min_docs: int = 1


@dataclass(frozen=True, slots=True)
class CorpusFacts:
    """What was profiled."""

    texts: int
    characters: int
    tokens: int
    distinct: int
    beyond_rows: int
    sources: tuple[CorpusSource, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """Share of future tokens whose id the profile never saw, 0..1; see the properties of `Profile`."""

    estimate: float
    likely_bound: float
    guaranteed_bound: float
    documents: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """What keeping K ids gives.

    Attributes:
        kept: K.
        coverage: share of the profiled tokens that is kept, 0..1.
        expected: the share expected in text to come; see `forecast.seen_again`.
        held_out: the share in the held-out text, if there is one.
        weight_bytes: bytes of all weights, if they are at hand.
        decode_ratio: weight bytes read a token by the full model over those at K, if it has a head.
    """

    kept: int
    coverage: float
    expected: float
    held_out: float | None = None
    weight_bytes: int | None = None
    decode_ratio: float | None = None

    @property
    def cold_per_thousand(self) -> float:
        """Cold tokens expected in 1,000 of text to come."""
        return 1000 * (1 - self.expected)


@dataclass(frozen=True, slots=True)
class Completions:
    """Completions beside prompts: how large sets of their own would be at the choice's coverage.

    Attributes:
        tokens: occurrences in completions.
        coverage: share of them that is kept, 0..1.
        input_ids: ids that it takes to cover prompts and completions as well as the vocab does.
        output_ids: ids that it takes to cover the completions alone as well.
        head_rows: rows of the head where the vocab has output ids, else None.
        head_coverage: share of the completions that those cover, 0..1.
    """

    tokens: int
    coverage: float
    input_ids: int
    output_ids: int
    head_rows: int | None = None
    head_coverage: float | None = None


@dataclass(frozen=True, slots=True)
class Domains:
    """Profiles against each other.

    Attributes:
        names: of the profiles.
        tokens: occurrences in each.
        coverage: one row a profile: what its own K most frequent ids cover of each profile, 0..1.
        chosen: what the vocab covers of each.
        js_distance: Jensen-Shannon distance of each pair, 0..1.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    coverage: tuple[tuple[float, ...], ...]
    chosen: tuple[float, ...]
    js_distance: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All numbers of a report; None where what they need was not at hand."""

    model: str
    vocab_size: int
    corpus: CorpusFacts
    missing: Missing
    choice: Point
    options: dict[str, Any]
    reasons: dict[str, int]
    knee: Point
    curve: tuple[Point, ...]
    corpus_curve: CorpusCurve
    full_weight_bytes: int | None
    held_out_tokens: int | None
    dead_ids: int | None
    dropped_by_documents: bool
    kinds: tuple[KindShare, ...] | None
    dropped: tuple[DroppedToken, ...]
    completions: Completions | None
    domains: Domains | None
    verification: dict[str, Any] | None

    @property
    def enough(self) -> int:
        """The K of the curve beyond which no more is expected to be covered of text to come."""
        most = self.curve[-1].expected
        return next(point.kept for point in self.curve if point.expected >= most - _NO_MORE)

    @property
    def further(self) -> str:
        """What is foretold: a further document, or further text where documents were not counted."""
        return "a further document" if self.corpus_curve.unit == "documents" else "further text"

    @property
    def recommended(self) -> Recommendation:
        """The K to take, and why."""
        return recommend(self.curve, self.enough, self.vocab_size, self.further)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command line."""
        return asdict(self) | {"recommended": asdict(self.recommended)}


@checked
def gather(inputs: Inputs, *, top: Count = 30) -> Report:
    """Compute the numbers of a report.

    Args:
        inputs: what it is made from.
        top: how many dropped tokens to name.
    """
    merged, vocab = inputs.merged, inputs.vocab
    must_stay = vocab.kept_ids[(vocab.reason != Reason.PROFILE) & (vocab.reason != Reason.FILL)]
    order = keeping_order(merged, must_stay)
    points = _points(inputs, order, must_stay)
    return Report(
        model=merged.tokenizer_name,
        vocab_size=merged.vocab_size,
        corpus=CorpusFacts(
            merged.texts,
            merged.characters,
            merged.tokens,
            merged.distinct,
            merged.beyond_rows,
            merged.sources,
        ),
        missing=Missing(
            merged.missing_mass,
            merged.missing_mass_likely,
            merged.missing_mass_bound,
            merged.document_missing_mass,
        ),
        choice=_choice(inputs, must_stay),
        options=vocab.rule.get("options", {}),
        reasons=vocab.rule.get("reasons", {}),
        knee=_knee(points),
        curve=points,
        corpus_curve=corpus_curve(merged),
        full_weight_bytes=inputs.weights.total if inputs.weights else None,
        held_out_tokens=inputs.held_out.tokens if inputs.held_out else None,
        dead_ids=None if inputs.dead_ids is None else int(inputs.dead_ids.size),
        dropped_by_documents=inputs.min_docs > 1,
        kinds=kinds_of(inputs.names, merged, vocab) if inputs.names else None,
        dropped=heaviest_dropped(inputs.names, merged, vocab, top, inputs.min_docs),
        completions=_completions(merged, vocab, order, must_stay),
        domains=_domains(inputs.profiles, vocab) if len(inputs.profiles) > 1 else None,
        verification=inputs.verification,
    )


def _points(inputs: Inputs, order: npt.NDArray[np.int64], must_stay: Ids) -> tuple[Point, ...]:
    """The curve, from the least K that `select` keeps to every id."""
    merged = inputs.merged
    covered = _cumulative(merged, order)
    expected = np.minimum(np.cumsum(seen_again(merged, must_stay)[order]), 1.0)
    held_out = None if inputs.held_out is None else _cumulative(inputs.held_out, order)
    first = max(int(must_stay.size), min(_LEAST_K, order.size))
    sizes = _sizes(covered, first)
    return tuple(
        _point(
            inputs,
            size,
            covered[size - 1],
            expected[size - 1],
            None if held_out is None else held_out[size - 1],
        )
        for size in sizes.tolist()
    )


def _sizes(covered: Shares, first: int) -> npt.NDArray[np.int64]:
    """The K of the curve, in equal steps of ln K and of the nines of coverage, up to where it is whole."""
    steps = np.geomspace(first, covered.size, _CURVE_POINTS).round()
    nines = 1 - 10.0 ** -np.arange(1, 5, 0.125)
    reached = np.searchsorted(covered, [*nines, covered[-1]]) + 1
    return np.unique(np.clip(np.concatenate([steps, reached]), first, covered.size).astype(np.int64))


def _cumulative(profile: Profile, order: npt.NDArray[np.int64]) -> Shares:
    """The share of a profile's occurrences that each beginning of an order covers, float64 (n,)."""
    counted = occurrences(profile)  # whole counts, so that covering all of them is 1
    covered = np.asarray(np.cumsum(counted[order]), np.float64) / max(float(counted.sum()), 1e-300)
    return np.minimum(covered, 1.0)


def _point(
    inputs: Inputs,
    kept: int,
    covered: float,
    expected: float,
    held_out: float | None,
    head_rows: int | None = None,
) -> Point:
    weights = inputs.weights
    return Point(
        kept=kept,
        coverage=float(covered),
        expected=float(expected),
        held_out=None if held_out is None else float(held_out),
        weight_bytes=weights.at(kept, head_rows) if weights else None,
        decode_ratio=weights.decode_ratio(head_rows or kept) if weights else None,
    )


def _choice(inputs: Inputs, must_stay: Ids) -> Point:
    kept_ids = inputs.vocab.kept_ids
    held_out = inputs.held_out.coverage(kept_ids) if inputs.held_out else None
    expected = 1 - cold_share(inputs.merged, kept_ids, must_stay)
    covered, of_head = inputs.merged.coverage(kept_ids), inputs.vocab.output_ids
    head_rows = None if of_head is None else len(of_head)
    return _point(inputs, len(kept_ids), covered, expected, held_out, head_rows)


def _knee(points: Sequence[Point]) -> Point:
    """Where coverage against K bends most, up to the K beyond which nothing is gained."""
    gaining = [point for point in points if point.coverage < points[-1].coverage] or list(points[:1])
    sizes = np.array([point.kept for point in gaining], np.int64)
    return gaining[knee(sizes, np.array([point.coverage for point in gaining]))]


def _completions(
    merged: Profile, vocab: VocabMap, order: npt.NDArray[np.int64], must_stay: Ids
) -> Completions | None:
    spoken = merged.output_counts
    if spoken is None or not spoken.any():
        return None
    share = merged.coverage(vocab.kept_ids)
    forced, free = must_stay.astype(np.int64), order[must_stay.size :]
    by_output = free[np.argsort(-spoken[free], kind="stable")]
    return Completions(
        tokens=int(spoken.sum()),
        coverage=int(spoken[vocab.kept_ids].sum()) / int(spoken.sum()),
        input_ids=forced.size + covering(merged.counts, share, free, forced),
        output_ids=forced.size + covering(spoken, share, by_output, forced),
        head_rows=None if vocab.output_ids is None else len(vocab.output_ids),
        head_coverage=None
        if vocab.output_ids is None
        else int(spoken[vocab.output_ids].sum()) / int(spoken.sum()),
    )


def _domains(profiles: Mapping[str, Profile], vocab: VocabMap) -> Domains:
    parts = list(profiles.values())
    own = [keeping_order(part)[: len(vocab)] for part in parts]
    return Domains(
        names=tuple(profiles),
        tokens=tuple(part.tokens for part in parts),
        coverage=tuple(tuple(part.coverage(ids) for part in parts) for ids in own),
        chosen=tuple(part.coverage(vocab.kept_ids) for part in parts),
        js_distance=tuple(tuple(js_distance(one.mass, other.mass) for other in parts) for one in parts),
    )
