"""The certificate of exact mode: prove that no cold id changes a step, and read only rows that could.

The sketch bounds every cold logit from above (`sketch.py`). Where the bounds of a step stay below the largest
kept logit, the kept argmax is the full model's. Elsewhere the rows of the groups whose bounds reach it are
read from the cold rows and their logits bounded from both sides: mostly that leaves one id, or none. What
is still open - too many groups, or two logits closer than rounding - is left to the cold head.
A certified token is never another than the one that the cold head's product would have given.

Sampled steps are settled by `bracket.py`. Certified are temperature, top-k, top-p, min-p, the three
penalties, logit and sequence bias and the model's own bans; a `logits_processor` and the rarer filters see
logits of the full vocab, and a forced token needs no logits: these are replayed.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Doubles, Floats, Ids
from trimserve.concurrency import Lock
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.request import Draft, Request
from trimserve.decoding.sampling import (
    LARGEST_NOISE,
    SamplingParams,
    edit_logits,
    edited_ids,
    gumbel_noise,
    noise_may_reach,
)
from trimserve.decoding.stats import ColdReads
from trimserve.exact.sampled_steps import Rivals, allowed_kept, has_filters, scores_between
from trimserve.exact.sketch import Sketch, SketchedProduct
from trimserve.exact.sketch_rows import GROUP_ROWS
from trimserve.runtime.cold_head import ColdHead
from trimserve.vocab.map import VocabMap

# Groups of a step whose rows are read: first those with the largest bounds, then what is still open.
_FIRST_GROUPS = 4
_MOST_GROUPS = 64
_MOST_ROWS = _MOST_GROUPS * GROUP_ROWS


class Worth:
    """Whether it pays to ask the sketch: it does not where most of what is asked stays open.

    Every eighth block is tried, so that it is noticed when that changes. All requests of a model learn it
    together: what it says changes what a block costs, not its tokens.
    """

    _PAYS_ABOVE = 0.6

    def __init__(self) -> None:
        self._share = 1.0
        self._skipped = 0
        self._lock = Lock()

    def asks(self) -> bool:
        """Whether to ask for the next block."""
        with self._lock:
            self._skipped = 0 if self._share > self._PAYS_ABOVE or self._skipped >= 7 else self._skipped + 1
            return self._skipped == 0

    def note(self, share: float) -> None:
        """Learn which share of a block was worth asking for."""
        with self._lock:
            self._share += 0.1 * (share - self._share)


@dataclass(frozen=True, slots=True)
class _Step:
    """One step to settle: its row of a product, and cold ids whose logits are changed, with their bounds."""

    product: SketchedProduct
    row: int
    edited: Rivals
    banned: Ids


class ColdCertificate:
    """A `Certificate` by a sketch of the cold rows.

    All of it but `reads` may be shared: `counting` gives each call one that counts by itself.
    """

    def __init__(
        self, sketch: Sketch, head: ColdHead, head_vocab: VocabMap, reads: ColdReads | None = None
    ) -> None:
        self._sketch = sketch
        self._head = head
        self._head_vocab = head_vocab
        self._kept = Columns(head_vocab.kept_ids, head_vocab.vocab_size)
        self._reads = reads or ColdReads()
        self._greedy, self._sampled = Worth(), Worth()
        # A place of each cold row; where an id is repeated, the last.
        self._place_of = np.empty(head.cold_ids.size, np.intp)
        self._place_of[np.searchsorted(head.cold_ids, sketch.ids)] = np.arange(sketch.ids.size)

    def counting(self, reads: ColdReads) -> Self:
        """The same certificate, which counts what it reads there."""
        mine = copy.copy(self)
        mine._reads = reads
        return mine

    def challengers(self, hidden: Floats, floor: Floats) -> tuple[Floats, Ids]:
        """See `exact.Certificate`."""
        count = len(hidden)
        values, ids = np.full(count, -np.inf, np.float32), np.full(count, self._head.cold_ids[0])
        if not self._greedy.asks():
            return self._maxima(hidden)
        product = self._product(hidden)
        settled = np.isfinite(floor) & (product.upper.max(axis=1) < floor)
        for row in np.flatnonzero(~settled & np.isfinite(floor)):
            step = _Step(product, int(row), _none(), np.zeros(0, np.int32))
            found = self._rivals(step, float(floor[row]))
            winner = None if found is None else found.winner(float(floor[row]))
            if winner is not None:
                settled[row] = True
                ids[row] = max(winner[0], 0)
                values[row] = -np.inf if winner[0] < 0 else np.nextafter(floor[row], np.float32(np.inf))
        open_steps = np.flatnonzero(~settled)
        # One open step costs as much as all of them: the cold rows are read once.
        self._greedy.note(float(not open_steps.size))
        self._reads.certified += int(settled.sum())
        if open_steps.size:
            values[open_steps], ids[open_steps] = self._maxima(hidden[open_steps])
        return values, ids

    def tokens(self, request: Request, block: Draft) -> Sequence[int | None]:
        """See `exact.Certificate`."""
        nothing: list[int | None] = [None] * len(block.tokens)
        if request.params.needs_all_logits or not self._sampled.asks():
            return nothing
        # Only the nucleus is about masses.
        product = self._product(block.hidden, request.params.temperature if request.params.top_p < 1 else 0.0)
        found = nothing
        settled = judged = 0
        for step, draft in enumerate(block.tokens):
            judged += 1
            found[step] = self._token(product, step, request, block.logits[step], block.tokens[:step])
            settled += found[step] is not None
            if found[step] not in (None, draft):
                break  # drafts after one that falls are not looked at
        # Each open step costs a pass over all logits in the sampler, the first one the cold product, too.
        self._sampled.note((settled / judged + (settled == judged)) / 2)
        self._reads.certified += settled
        return found

    def _token(
        self, product: SketchedProduct, row: int, request: Request, logits: Floats, past: Sequence[int]
    ) -> int | None:
        """The token of a step after drafts that stand, or None."""
        params, history = request.params, request.history(past)
        verdict = request.verdict(past)
        if verdict.forced.size:
            return None
        step = _Step(product, row, self._edited(product, row, params, history), verdict.banned)
        kept = edit_logits(logits, self._kept, params, history)
        if params.temperature == 0:
            found = self._rivals(step, float(kept.max()))
            return self._decide(found, kept.astype(np.float64))
        return self._drawn(step, kept / np.float32(params.temperature), params, history.output.size)

    def _drawn(self, step: _Step, scores: Floats, params: SamplingParams, number: int) -> int | None:
        """The token of a sampled step, from the kept ids' scores; `number` is that of the step."""
        groups = self._scores(step.product.upper[step.row], params)
        edited = self._scores(step.edited.upper, params)
        if not np.isfinite(float(groups.max()) + float(scores.max())) or np.isnan(edited).any():
            return None
        sums = scores + gumbel_noise(params.seed, number, self._kept.ids)
        filtered = has_filters(params, self._kept.vocab_size)
        cut = floor = -np.inf
        if filtered:
            single = np.ones(edited.size)
            counts = np.concatenate([np.full(groups.size, float(GROUP_ROWS)), single])
            alike = np.concatenate([step.product.alike[step.row], single])
            allowed = allowed_kept(scores, params, np.concatenate([groups, edited]), counts, alike)
            sums[~allowed.may] = -np.inf
            if not allowed.sure[sums.argmax()]:
                return None
            cut, floor = allowed.cut, allowed.floor
        found = self._noisy_rivals(step, groups, params, number, float(sums.max()), cut)
        token = self._decide(found, sums)
        if found is None or token is None or self._head_vocab.is_kept(token):
            return token
        noise = gumbel_noise(params.seed, number, np.array([token], np.int32))
        score = float((found.lower[found.ids == token] - noise).min()) - 1e-9
        # A cold id may have won that the filters exclude.
        return token if score >= floor else None

    def _scores(self, upper: Doubles, params: SamplingParams) -> Doubles:
        return scores_between(upper, params.temperature, 1)

    def _decide(self, rivals: Rivals | None, kept: Doubles) -> int | None:
        floor = float(kept.max())
        winner = None if rivals is None or not np.isfinite(floor) else rivals.winner(floor)
        if winner is None:
            return None
        return int(self._kept.ids[kept.argmax()]) if winner[0] < 0 else winner[0]

    def _rivals(self, step: _Step, floor: float) -> Rivals | None:
        """The cold ids whose bounds reach a floor; None if they are too many to read."""
        upper = step.product.upper[step.row]
        found = step.edited
        # What is not a number is not known to be below.
        groups = np.flatnonzero(~(upper < floor))
        groups = groups[np.argsort(-upper[groups], kind="stable")]
        first, rest = groups[:_FIRST_GROUPS], groups[_FIRST_GROUPS:]
        found = found.plus(self._read(step, _places(first)))
        level = max(floor, float(found.lower.max(initial=-np.inf)))
        rest = rest[~(upper[rest] < level)]
        if rest.size > _MOST_GROUPS:
            return None
        return found.plus(self._read(step, _places(rest)))

    def _noisy_rivals(
        self, step: _Step, groups: Doubles, params: SamplingParams, number: int, floor: float, cut: float
    ) -> Rivals | None:
        """The cold ids whose bounds reach a cut, and with noise a floor; None if they are too many to read.

        `groups` are upper bounds of the groups' scores.
        """
        may = ~(groups < cut) & ~(groups + LARGEST_NOISE < floor)
        places = _places(np.flatnonzero(may))
        if places.size:
            least = floor - float(groups.max())
            places = places[noise_may_reach(params.seed, number, self._sketch.ids[places], least - 1e-6)]
        noise = gumbel_noise(params.seed, number, self._sketch.ids[places])
        places = places[~(groups[places // GROUP_ROWS] + noise < floor)]
        if places.size > _MOST_ROWS:
            return None
        both = step.edited.plus(self._read(step, places))
        upper = self._scores(both.upper, params)
        noise = gumbel_noise(params.seed, number, both.ids)
        lower = scores_between(both.lower, params.temperature, -1)
        stays = ~(upper < cut)
        return Rivals(both.ids[stays], (lower + noise)[stays], (upper + noise)[stays])

    def _edited(self, product: SketchedProduct, row: int, params: SamplingParams, history: History) -> Rivals:
        """The cold ids whose logits are changed one by one, and their bounds after that."""
        ids = edited_ids(params, history)
        ids = ids[~self._head_vocab.is_kept(ids)]
        if not ids.size:
            return _none()
        places = self._place_of[np.searchsorted(self._head.cold_ids, ids)]
        lower, upper = self._score(product, row, places)
        columns = Columns(ids, self._kept.vocab_size)
        return Rivals(
            ids,
            edit_logits(_to_float(lower, -1), columns, params, history).astype(np.float64),
            edit_logits(_to_float(upper, 1), columns, params, history).astype(np.float64),
        )

    def _read(self, step: _Step, places: npt.NDArray[np.intp]) -> Rivals:
        """Bounds of some places' logits, without ids that are edited or banned."""
        if not places.size:
            return _none()
        lower, upper = self._score(step.product, step.row, places)
        rivals = Rivals(self._sketch.ids[places], lower, upper)
        apart = np.concatenate([step.edited.ids, step.banned])
        return rivals.without(apart) if apart.size else rivals

    def _score(
        self, product: SketchedProduct, row: int, places: npt.NDArray[np.intp]
    ) -> tuple[Doubles, Doubles]:
        self._reads.rows += places.size
        self._reads.bytes += places.size * self._reads.row_bytes
        return self._sketch.score(product, row, places)

    def _product(self, hidden: Floats, temperature: float = 0.0) -> SketchedProduct:
        self._reads.bytes += self._sketch.nbytes
        return self._sketch.product(hidden, temperature)

    def _maxima(self, hidden: Floats) -> tuple[Floats, Ids]:
        self._reads.bytes += self._reads.full_bytes
        return self._head.maxima(hidden)


def _places(groups: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Places of all rows of some groups."""
    places: npt.NDArray[np.intp] = (groups[:, None] * GROUP_ROWS + np.arange(GROUP_ROWS)).ravel()
    return places


def _none() -> Rivals:
    return Rivals(np.zeros(0, np.int32), np.zeros(0), np.zeros(0))


def _to_float(values: Doubles, side: int) -> Floats:
    """Round to float32, away from the number that is bounded."""
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(side * np.inf))
