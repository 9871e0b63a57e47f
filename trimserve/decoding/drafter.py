"""Drafts blocks of tokens with the compact head: one step of the decoder a token, or fewer (`TextDrafts`)."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats
from trimserve.decoding.columns import Columns
from trimserve.decoding.feeder import Feeder
from trimserve.decoding.request import Draft, Request, all_ended
from trimserve.decoding.text_drafts import TextDrafts
from trimserve.errors import NoTokenError
from trimserve.runtime.decoder import Step
from trimserve.runtime.kv_cache import KVCache
from trimserve.runtime.row_costs import RowCosts

# Logits (B, K) and hidden states (B, H) behind one position.
_Row = tuple[Floats, npt.NDArray[Any]]


class Drafter:
    """Drafts for a batch of requests that share a cache.

    Between two calls a request's cache holds all of its tokens but the last one.
    """

    def __init__(
        self,
        feeder: Feeder,
        kept: Columns,
        *,
        takes_any_id: bool,
        row_costs: Callable[[], RowCosts] | None = None,
    ) -> None:
        """Draft with a decoder.

        Args:
            feeder: the decoder, which also counts its seconds.
            kept: the compact head's columns.
            takes_any_id: draft some id where no kept one is allowed, because a check replaces it.
            row_costs: what steps of several tokens cost; None never to feed any.
        """
        self._feeder = feeder
        self._kept = kept
        self._takes_any_id = takes_any_id
        self._row_costs = row_costs
        self._text: tuple[Request, TextDrafts] | None = None

    def draft(
        self,
        requests: Sequence[Request],
        cache: KVCache,
        step: Step | None,
        size: int,
        flying: Sequence[Draft] = (),
        *,
        one_step: bool = False,
    ) -> list[Draft]:
        """Draft a block for each request.

        Args:
            requests: those of the cache.
            cache: what was fed.
            step: what the decoder gave behind the last token; None where that one is yet to be fed.
            size: tokens to draft, at most.
            flying: blocks drafted before it that are being checked.
            one_step: stop where another step of the decoder is needed.
        """
        before = [block.tokens for block in flying] or [[] for _ in requests]
        drafts: list[list[int]] = [[] for _ in requests]
        rows: list[_Row] = []
        ready: deque[_Row] = deque() if step is None else deque([(step.logits[:, -1], step.hidden[:, -1])])
        given = len(ready)
        text = self._text_of(requests)
        guesses: list[int] = []
        model_seconds = self._feeder.timing.model
        while len(rows) < size:
            if not ready:
                if rows and one_step:
                    break
                past = [[*known, *tokens] for known, tokens in zip(before, drafts, strict=True)]
                guesses, fed = text.guess(past[0], size - len(rows) - 1) if text else ([], 0)
                ready = self._feed(requests, cache, past, guesses[:fed])
            logits, hidden = row = ready.popleft()
            rows.append(row)
            self._choose(requests, drafts, before, logits, hidden)
            if all_ended(requests, drafts):
                break
            if text and guesses:
                stands = guesses.pop(0) == drafts[0][-1]
                text.note(stood=stands, was_fed=bool(ready))
                if not stands:
                    _take_back(cache, ready)
                    guesses = []
        # The last draft is not fed: of guesses that were, what follows it has to go, and itself.
        _take_back(cache, ready)
        model_seconds = self._feeder.timing.model - model_seconds
        step_seconds = model_seconds / max(len(rows) - given, 1)
        logits, hidden = _joined([row[0] for row in rows]), _joined([row[1] for row in rows])
        return [Draft(tokens, logits[row], hidden[row], step_seconds) for row, tokens in enumerate(drafts)]

    def _text_of(self, requests: Sequence[Request]) -> TextDrafts | None:
        """Where guesses come from: a batch has none, its requests would stand at different places."""
        if self._row_costs is None or len(requests) > 1 or requests[0].source is not None:
            return None
        if self._text is None or self._text[0] is not requests[0]:
            self._text = requests[0], TextDrafts(requests[0], self._row_costs)
        return self._text[1]

    def _feed(
        self, requests: Sequence[Request], cache: KVCache, past: Sequence[list[int]], guesses: Sequence[int]
    ) -> deque[_Row]:
        last = [
            tokens[-1] if tokens else request.output[-1]
            for request, tokens in zip(requests, past, strict=True)
        ]
        step = (
            self._feeder.feed_several(cache, [*last, *guesses]) if guesses else self._feeder.feed(cache, last)
        )
        count = len(guesses) + 1
        return deque((step.logits[:, place], step.hidden[:, place]) for place in range(-count, 0))

    def _choose(
        self,
        requests: Sequence[Request],
        drafts: Sequence[list[int]],
        before: Sequence[Sequence[int]],
        logits: Floats,
        hidden: npt.NDArray[Any],
    ) -> None:
        """Append each request's next draft."""
        start = time.perf_counter()
        for row, (request, tokens) in enumerate(zip(requests, drafts, strict=True)):
            past = [*before[row], *tokens]
            try:
                token = request.draft(logits[row], hidden[row], past)
            except NoTokenError:
                if not self._takes_any_id:
                    raise
                # Only cold ids are allowed here: the check will find the right one.
                token = int(self._kept.ids[logits[row].argmax()])
            tokens.append(token)
        self._feeder.timing.sampler += time.perf_counter() - start


def _take_back(cache: KVCache, ready: deque[_Row]) -> None:
    """Take guesses that were fed out of the cache, with what was computed behind them."""
    if ready:
        cache.cut(np.array([len(ready)], np.int64))
        ready.clear()


def _joined(rows: Sequence[Floats]) -> Floats:
    """Put rows (B, n) side by side, (B, T, n); a single one, as compact mode has, is not copied."""
    return rows[0][:, None] if len(rows) == 1 else np.stack(rows, axis=1)
