"""Log-probabilities of produced tokens, and of the likeliest ids beside them, under the full vocab."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.decoding.loop import Checker
from trimserve.decoding.request import Draft, Request
from trimserve.decoding.scoring import log_sum_exp
from trimserve.decoding.stats import ColdReads, Timing
from trimserve.runtime.cold_head import ColdHead


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities of one step under the full vocab.

    Attributes:
        id: the token id that was produced.
        logprob: of that id, natural logarithm, temperature 1, before penalties and filters.
        top: the likeliest ids with theirs, the best first (of equal ones the lowest id); as many as were
            asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class LogprobMeter:
    """Tells what the full model thinks of tokens, from what they were drafted with."""

    def __init__(self, head: ColdHead | None, kept_ids: Ids) -> None:
        """Measure with a model.

        Args:
            head: the cold head; None where every id is kept.
            kept_ids: of the compact head, int32 (K,).
        """
        self._head = head
        self._kept_ids = kept_ids

    def measure(self, block: Draft, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
        """Log-probabilities of tokens at the first steps of a block, with those of the likeliest ids."""
        count = len(tokens)
        if self._head is None or not count:
            none = np.zeros(0, np.int32)
            return token_logprobs(block.logits[:count], None, self._kept_ids, none, tokens, top)
        cold = self._head.logits(block.hidden[:count])
        return token_logprobs(block.logits[:count], cold, self._kept_ids, self._head.cold_ids, tokens, top)


class MeteredChecker:
    """A `Checker` that leaves the decision to another one, and notes what the model thinks of the tokens.

    Attributes:
        found: one entry for each token of the last check, whether its request took it or not.
    """

    def __init__(self, checker: Checker | None, meter: LogprobMeter, top: int) -> None:
        """Measure for one request.

        Args:
            checker: decides which drafts stand; None where all do.
            meter: measures.
            top: how many of the likeliest ids to give.
        """
        self._checker = checker
        self._meter = meter
        self._top = top
        self.replaces = checker.replaces if checker else False
        self.timing = checker.timing if checker else Timing()
        self.reads = checker.reads if checker else ColdReads()
        self.found: list[TokenLogprob] = []

    @property
    def draft_length(self) -> int:
        """As of the checker that decides; one token where all drafts stand."""
        return self._checker.draft_length if self._checker else 1

    def check(self, requests: Sequence[Request], blocks: Sequence[Draft]) -> list[list[int]]:
        """See `Checker`; for one request at a time."""
        # A check may write what its rules ban into the logits.
        (block,) = (replace(block, logits=block.logits.copy()) for block in blocks)
        checked = self._checker.check(requests, blocks) if self._checker else [block.tokens]
        self.found = self._meter.measure(block, checked[0], self._top)
        return checked


def token_logprobs(
    kept: Floats, cold: Floats | None, kept_ids: Ids, cold_ids: Ids, tokens: Sequence[int], top: int
) -> list[TokenLogprob]:
    """What the full model thought of tokens.

    Args:
        kept: logits of the kept ids, float32 (n, K).
        cold: of the cold ids, float32 (n, V - K); None where there is none.
        kept_ids: int32 (K,).
        cold_ids: int32 (V - K,).
        tokens: n token ids.
        top: how many of the likeliest ids to give; 0 for none.
    """
    logits = kept if cold is None else np.concatenate([kept, cold], axis=1)
    ids = kept_ids if cold is None else np.concatenate([kept_ids, cold_ids])
    order = np.argsort(ids)
    columns = order[np.searchsorted(ids, np.asarray(tokens, np.int32), sorter=order)]
    totals = log_sum_exp(logits)
    found = []
    for row, (token, total) in enumerate(zip(tokens, totals, strict=True)):
        chosen = float(logits[row, columns[row]] - total)
        found.append(TokenLogprob(int(token), chosen, _likeliest(logits[row], ids, total, top)))
    return found


def _likeliest(logits: Floats, ids: Ids, total: float, top: int) -> tuple[tuple[int, float], ...]:
    if top <= 0:
        return ()
    count = min(top, ids.size)
    # All that equal the last one, so that ties go by id and not by their place.
    least = np.partition(logits, ids.size - count)[ids.size - count]
    places = np.flatnonzero(logits >= least)
    best = places[np.lexsort((ids[places], -logits[places]))][:count]
    return tuple((int(ids[place]), float(logits[place] - total)) for place in best)
