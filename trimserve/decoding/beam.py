"""Beam search as transformers 4.57 defines it, over kept and cold logits together.

A beam lives by its place among all continuations of all beams, and by probabilities, which need the sum over
the whole vocab. So nothing can be drafted: in exact mode every step multiplies the hidden states of all beams
of the batch with the cold rows (`ColdHead.logits`), reading those rows once a step, and the log-probabilities
are those of the full model. In compact mode they are renormalised over the kept ids and the request's slots.
The steps are those of `GenerationMixin._beam_search` in transformers/generation/utils.py: after each, the
best 2 x num_beams continuations (more with several end tokens) are split into finished and running ones.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.feeder import Feeder
from trimserve.decoding.request import Request
from trimserve.decoding.sampling import edit_logits, filter_scores, gumbel_noise
from trimserve.decoding.slots import DraftSlots
from trimserve.errors import NoTokenError, UsageError
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder, Step
from trimserve.vocab.map import VocabMap

EarlyStopping = bool | Literal["never"]
_OUT = np.float32(-1e9)  # the score of what cannot be chosen, as in transformers
# Beams whose logits over the whole vocab exist at a time: 32 x 262,144 float32 are 34 MB.
_MAX_ROWS = 32
_BLOCK = 512  # entries that `largest` reduces at a time


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How beams are kept.

    Attributes:
        num_beams: sequences that are followed at a time.
        length_penalty: a finished sequence's log-probability is divided by its length to this power.
        renormalize_logits: make the scores log-probabilities again after rules and penalties.
        do_sample: draw continuations (without replacement) instead of taking the best.
        early_stopping: True ends as soon as `num_beams` are finished; False as soon as the best running one
            could not get among them at its present length; "never" at the length best for it.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    renormalize_logits: bool = False
    do_sample: bool = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UsageError(f"num_beams should be 1 or more, found {self.num_beams}.")
        if not np.isfinite(self.length_penalty):
            raise UsageError(f"length_penalty should be a number, found {self.length_penalty}.")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(
                f"early_stopping should be true, false or 'never', found {self.early_stopping!r}."
            )


@dataclass(frozen=True, slots=True)
class Beam:
    """One sequence.

    Attributes:
        tokens: token ids generated.
        score: log-probability; of a finished sequence divided by the length penalty.
        row: of the beam that it continues, among the request's running ones.
    """

    tokens: tuple[int, ...]
    score: np.float32
    row: int = 0


@dataclass(slots=True)
class BeamState:
    """The beams of one request.

    Attributes:
        request: its output is set when the search is over.
        running: `num_beams` sequences that go on, best first; at the start all but one are out.
        finished: the best finished sequences, at most `num_beams`, best first.
        done: whether the search is over.
    """

    request: Request
    params: BeamParams
    running: list[Beam] = field(default_factory=list)
    finished: list[Beam] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.running = [Beam((), np.float32(0) if row == 0 else _OUT) for row in range(self.params.num_beams)]

    def advance(self, logits: Sequence[Floats], columns: Columns) -> None:
        """Take a step.

        Args:
            logits: of each running beam, float32 (n,).
            columns: the ids that they belong to.
        """
        best = self._continuations(logits, columns)
        length = len(best[0].tokens)
        ended = [self._ends(beam) for beam in best]
        going_on = [
            Beam(beam.tokens, beam.score + _OUT if end else beam.score, beam.row)
            for beam, end in zip(best, ended, strict=True)
        ]
        count = self.params.num_beams
        self.running = sorted(going_on, key=lambda beam: -beam.score)[:count]
        penalty = np.float32(length**self.params.length_penalty)
        new = [
            Beam(beam.tokens, beam.score / penalty)
            for beam, end in zip(best[:count], ended[:count], strict=True)
            if end
        ]
        self.finished = sorted([*self.finished, *new], key=lambda beam: -beam.score)[:count]
        self.done = all(ended) or self._is_settled(length)
        if self.done:
            self.request.output = list(self.finished[0].tokens)
            self.request.finished = True

    def _continuations(self, logits: Sequence[Floats], columns: Columns) -> list[Beam]:
        """The best continuations of all running beams; on a tie the earlier beam comes first, or lower id."""
        keep = max(2, 1 + len(self.request.stop_ids)) * self.params.num_beams
        found: list[tuple[float, int, int, np.float32]] = []
        for row, (beam, beam_logits) in enumerate(zip(self.running, logits, strict=True)):
            scores = self._log_probs(beam, beam_logits, columns)
            order = scores
            if self.params.do_sample:
                order = self._perturbed(scores, row, len(beam.tokens), columns)
            top = largest(order, keep)
            total = scores[top] + beam.score
            ranks = (-(order[top] + beam.score)).tolist()
            found += zip(ranks, [row] * len(ranks), columns.ids[top].tolist(), total, strict=True)
        chosen = sorted(found, key=lambda entry: entry[:3])[:keep]
        if chosen[0][3] == -np.inf:
            raise NoTokenError("no token is allowed: every beam's logits are -inf. Allow at least one id.")
        return [Beam((*self.running[row].tokens, token), score, row) for _, row, token, score in chosen]

    def _log_probs(self, beam: Beam, logits: Floats, columns: Columns) -> Floats:
        shifted = _log_softmax(logits)
        params = self.request.params
        if params.edits_logits:
            history = History(self.request.prompt, np.array(beam.tokens, np.int32), self.request.source)
            shifted = edit_logits(shifted, columns, params, history)
        if self.params.do_sample:
            # So that what ends a sequence is never all that can be drawn.
            keep = max(2, 1 + len(self.request.stop_ids))
            shifted = filter_scores(shifted / np.float32(params.temperature), params, keep)
        return _log_softmax(shifted) if self.params.renormalize_logits else shifted

    def _perturbed(self, scores: Floats, row: int, step: int, columns: Columns) -> Floats:
        """Scores with noise: the largest are draws from softmax(scores), without replacement."""
        ids = columns.ids.astype(np.int64) + row * columns.vocab_size
        noisy: Floats = scores + gumbel_noise(self.request.params.seed, step, ids).astype(np.float32)
        return noisy

    def _ends(self, beam: Beam) -> bool:
        return beam.tokens[-1] in self.request.stop_ids or len(beam.tokens) >= self.request.max_tokens

    def _is_settled(self, length: int) -> bool:
        """Whether no running beam is taken to be able to get among the finished ones any more."""
        params = self.params
        full = len(self.finished) == params.num_beams
        if not full or params.early_stopping is True:
            return full
        longest = params.early_stopping == "never" and params.length_penalty > 0
        assumed = self.request.max_tokens if longest else length
        best = self.running[0].score / np.float32(assumed**params.length_penalty)
        return bool(best <= self.finished[-1].score)


class BeamSearch:
    """Searches for a batch of requests with one decoder.

    Attributes:
        timing: seconds spent in the model, the cold head and the beams.
    """

    def __init__(
        self, decoder: Decoder, vocab: VocabMap, cold: ColdRows, head: ColdHead | None, params: BeamParams
    ) -> None:
        """Prepare a search.

        Args:
            decoder: the graph.
            vocab: the kept ids.
            cold: rows of the cold ids, for slots.
            head: for exact mode; None for compact mode, or where every id is kept.
            params: how beams are kept.
        """
        self._feeder = Feeder(decoder, vocab, cold)
        self._after_head = decoder.after_head
        self._head_vocab = vocab.head
        self._cold = cold
        self._head = head
        self._params = params
        self._kept = Columns(vocab.head.kept_ids, vocab.vocab_size)
        cold_ids = [] if head is None else [head.cold_ids]
        self._columns = Columns(np.concatenate([self._kept.ids, *cold_ids]), vocab.vocab_size)
        self.timing = self._feeder.timing

    def run(self, requests: Sequence[Request]) -> None:
        """Search until each request has its output."""
        states = [BeamState(request, self._params) for request in requests if request.max_tokens > 0]
        if not states:
            return
        for request in requests:
            cold_ids = request.given[~self._head_vocab.is_kept(request.given)]
            request.slots = DraftSlots(self._kept, self._cold, self._after_head, cold_ids)
        count = self._params.num_beams
        cache, step = self._feeder.prefill([state.request for state in states])
        rows = [row for row in range(len(states)) for _ in range(count)]
        cache.select(rows)
        step = Step(step.logits[rows], step.hidden[rows])
        while True:
            self._advance(states, step)
            going_on = [(place, state) for place, state in enumerate(states) if not state.done]
            if not going_on:
                return
            states = [state for _, state in going_on]
            cache.select([place * count + beam.row for place, state in going_on for beam in state.running])
            step = self._feeder.feed(cache, [beam.tokens[-1] for state in states for beam in state.running])

    def _advance(self, states: Sequence[BeamState], step: Step) -> None:
        """Take a step with all requests, as many at a time as share one product with the cold rows."""
        count = self._params.num_beams
        together = max(1, _MAX_ROWS // count)
        for first in range(0, len(states), together):
            group = states[first : first + together]
            rows = slice(first * count, (first + len(group)) * count)
            logits = self._all_logits(group, step.logits[rows, -1], step.hidden[rows, -1])
            start = time.perf_counter()
            for place, state in enumerate(group):
                state.advance(logits[place * count : (place + 1) * count], self._columns_of(state))
            self.timing.sampler += time.perf_counter() - start

    def _all_logits(self, states: Sequence[BeamState], kept: Floats, hidden: Floats) -> list[Floats]:
        """Logits of every id that the mode can produce, a row a beam."""
        if self._head is not None:
            start = time.perf_counter()
            cold = self._head.logits(hidden)
            self.timing.cold_head += time.perf_counter() - start
            return list(np.concatenate([kept, cold], axis=1))
        slots = [state.request.slots for state in states for _ in range(self._params.num_beams)]
        return [
            kept[row] if held is None else held.extend(kept[row], hidden[row])
            for row, held in enumerate(slots)
        ]

    def _columns_of(self, state: BeamState) -> Columns:
        slots = state.request.slots
        return self._columns if self._head is not None or slots is None else slots.columns


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max()
    shifted -= np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return shifted


def largest(scores: Floats, count: int) -> npt.NDArray[np.int64]:
    """Places of the `count` largest of float32 (n,), in no order; all of them if there are fewer.

    They lie in the `count` blocks with the largest maxima: for a vocab that takes a fifth of the time
    that sorting it into two parts does.
    """
    whole = scores.size // _BLOCK * _BLOCK
    places = np.arange(scores.size)
    if whole // _BLOCK > count:
        maxima = scores[:whole].reshape(-1, _BLOCK).max(axis=1)
        blocks = np.argpartition(-maxima, count - 1)[:count]
        inside = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        places = np.concatenate([inside, np.arange(whole, scores.size)])
    if places.size <= count:
        return places
    top: npt.NDArray[np.int64] = places[np.argpartition(-scores[places], count - 1)[:count]]
    return top
