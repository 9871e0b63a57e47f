"""Probabilities under the full vocab: log-probabilities of a text, and the mass that cold ids have.

The head's two parts are reduced apart, log(sum(exp(kept)) + sum(exp(cold))), a few positions at a time, so
that no array of all positions by V is ever made.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids
from trimserve.decoding.request import Draft, Request
from trimserve.decoding.stats import ColdReads, Timing
from trimserve.runtime.cold_head import ColdHead
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder, Step
from trimserve.runtime.kv_cache import KVCache
from trimserve.vocab.map import VocabMap

# Positions whose logits exist at the same time: 16 x 262,144 float32 are 17 MB.
_POSITIONS = 16
LogProbs = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of a text's tokens.

    Attributes:
        ids: int32 (T,), the text's token ids.
        log_probs: float64 (T - 1,), natural logarithm; entry t is that of ids[t + 1] after ids[: t + 1].
    """

    ids: Ids
    log_probs: LogProbs

    @property
    def total(self) -> float:
        """Log-probability of all tokens after the first."""
        return float(self.log_probs.sum())


class Scorer:
    """Scores token ids with a trimmed decoder; `head` is None where every id is kept."""

    def __init__(self, decoder: Decoder, vocab: VocabMap, cold: ColdRows, head: ColdHead | None) -> None:
        self._decoder = decoder
        self._vocab = vocab
        self._cold = cold
        self._head = head

    def score(self, ids: Ids, source: Ids | None = None) -> Score:
        """Log-probabilities of one sequence, int32 (T,); `source` is what an encoder reads before it."""
        cache = self._decoder.start([source])
        unchanged = self._decoder.unchanged
        if unchanged is not None and ids.size > unchanged:
            # The keys of all tokens depend on the length of the whole text: it is fed at once.
            step = self._feed(cache, ids)
            return Score(ids, self._log_probs(step.logits[0, :-1], step.hidden[0, :-1], ids[1:]))
        parts: list[LogProbs] = [np.zeros(0)]
        for start in range(0, max(ids.size - 1, 0), _POSITIONS):
            fed = ids[start : min(start + _POSITIONS, ids.size - 1)]
            step = self._feed(cache, fed)
            targets = ids[start + 1 : start + 1 + fed.size]
            parts.append(self._log_probs(step.logits[0], step.hidden[0], targets))
        return Score(ids, np.concatenate(parts))

    def _feed(self, cache: KVCache, ids: Ids) -> Step:
        slotted = self._vocab.with_slots(ids[None])
        return self._decoder.step(cache, slotted.ids, self._cold.embeddings(slotted.cold_ids), keep=0)

    def _log_probs(self, kept_logits: Floats, hidden: Floats, targets: Ids) -> LogProbs:
        head = self._vocab.head
        is_kept = head.is_kept(targets)
        total = log_sum_exp(kept_logits)
        chosen = np.empty(targets.size)
        chosen[is_kept] = kept_logits[is_kept, head.to_compact(targets[is_kept])]
        if self._head is not None:
            cold_logits = self._head.logits(hidden)
            total = np.logaddexp(total, log_sum_exp(cold_logits))
            columns = np.searchsorted(self._head.cold_ids, targets[~is_kept])
            chosen[~is_kept] = cold_logits[~is_kept, columns]
        return chosen - total


def log_sum_exp(logits: Floats) -> LogProbs:
    """log(sum(exp(logits))) over the last axis, without overflow: float32 (N, n) -> float64 (N,)."""
    peak = logits.max(axis=-1, keepdims=True)
    total: LogProbs = np.log(np.exp(logits - peak).sum(axis=-1, dtype=np.float64)) + peak[..., 0]
    return total


class MassMeter:
    """A `Checker` for compact mode that changes nothing and measures what compact mode leaves out.

    Attributes:
        masses: for each step so far the share of the full model's probability (temperature 1, no filter)
            on ids that compact mode cannot produce.
    """

    draft_length = _POSITIONS
    replaces = False

    def __init__(self, head: ColdHead) -> None:
        self._head = head
        self.masses: list[float] = []
        self.timing = Timing()
        self.reads = ColdReads()  # exact mode alone counts them

    @property
    def mean_mass(self) -> float:
        """Mean of `masses`, 0 before the first step."""
        return float(np.mean(self.masses)) if self.masses else 0.0

    def check(self, requests: Sequence[Request], blocks: Sequence[Draft]) -> list[list[int]]:
        """Accept every draft, and note the cold mass of each step."""
        for request, block in zip(requests, blocks, strict=True):
            start = time.perf_counter()
            cold_logits = self._head.logits(block.hidden).copy()
            self.timing.cold_head += time.perf_counter() - start
            slots = request.slots.ids if request.slots is not None else []
            reachable = np.searchsorted(self._head.cold_ids, np.array(slots, np.int32))
            slot_logits = cold_logits[:, reachable]
            cold_logits[:, reachable] = -np.inf
            cold = log_sum_exp(cold_logits)
            kept = log_sum_exp(np.concatenate([block.logits, slot_logits], axis=1))
            self.masses += np.exp(cold - np.logaddexp(kept, cold)).tolist()
        return [block.tokens for block in blocks]
