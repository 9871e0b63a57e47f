"""Exact mode: decide which drafts the full model would have produced (DESIGN.md section 6).

The hidden states of a block of drafts are multiplied with the cold rows in one product, so that those rows
are read once a block and not once a token. For plain greedy decoding the largest cold logit of each step
is enough; otherwise the same sampler is run again on the logits of the full vocab. Its random numbers
belong to (seed, step, token id), so the result is what the full model would have produced,
whatever was drafted: drafts decide the cost, never the tokens.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.decoding.columns import Columns
from trimserve.decoding.request import Draft, Request
from trimserve.decoding.sampling import choose, obey
from trimserve.decoding.stats import ColdReads, Timing
from trimserve.decoding.token_rules import Verdict
from trimserve.exact.draft_length import DraftLength
from trimserve.runtime.cold_head import ColdHead
from trimserve.vocab.map import VocabMap

# Steps whose logits over the full vocab exist at the same time: 16 x 262,144 float32 are 17 MB.
_STEPS_AT_ONCE = 16


class Certificate(Protocol):
    """Settles steps without reading every cold row; what it cannot settle it leaves to the cold head."""

    def challengers(self, hidden: Floats, floor: Floats) -> tuple[Floats, Ids]:
        """As `ColdHead.maxima`, or -inf (and any id) where every cold logit is proven to be below a floor.

        Args:
            hidden: (N, H), in the graph's dtype.
            floor: float32 (N,), the largest kept logit of each step.
        """
        ...

    def tokens(self, request: Request, block: Draft) -> Sequence[int | None]:
        """The full model's token at each step of a block whose earlier drafts stand; None if not proven."""
        ...


class ExactChecker:
    """The `Checker` of exact mode, for one call."""

    replaces = True

    def __init__(
        self,
        head: ColdHead,
        head_vocab: VocabMap,
        block: DraftLength | None = None,
        certificate: Certificate | None = None,
        reads: ColdReads | None = None,
    ) -> None:
        """Check against a cold head.

        Args:
            head: the cold head.
            head_vocab: the ids that the compact head keeps.
            block: chooses block sizes.
            certificate: settles what it can without the cold head.
            reads: counts what is read, with the certificate.
        """
        self._head = head
        self._certificate = certificate
        self.reads = reads or ColdReads()
        self._kept, self._cold, self._full = (
            Columns(ids, head_vocab.vocab_size)
            for ids in (head_vocab.kept_ids, head.cold_ids, np.arange(head_vocab.vocab_size, dtype=np.int32))
        )
        self._block = block or DraftLength()
        self.timing = Timing()

    @property
    def draft_length(self) -> int:
        """How many tokens to draft before the next check."""
        return self._block.size

    def check(self, requests: Sequence[Request], blocks: Sequence[Draft]) -> list[list[int]]:
        """The full model's tokens for each request, up to the first that differs from its draft."""
        start = time.perf_counter()
        plain = [row for row, request in enumerate(requests) if request.params.takes_allowed_maximum]
        checked: list[list[int]] = [[] for _ in requests]
        if plain:
            greedy = self._check_greedy([requests[row] for row in plain], [blocks[row] for row in plain])
            for row, tokens in zip(plain, greedy, strict=True):
                checked[row] = tokens
        for row, (request, block) in enumerate(zip(requests, blocks, strict=True)):
            if row not in plain:
                checked[row] = self._replay(request, block)
        self._learn(blocks, checked, time.perf_counter() - start)
        return checked

    def _check_greedy(self, requests: Sequence[Request], blocks: Sequence[Draft]) -> list[list[int]]:
        hidden = np.concatenate([block.hidden for block in blocks])
        logits = np.concatenate([block.logits for block in blocks])
        ends = np.cumsum([len(block.tokens) for block in blocks])
        verdicts = [
            request.verdict(block.tokens[:step]) if request.params.rules else None
            for request, block in zip(requests, blocks, strict=True)
            for step in range(len(block.tokens))
        ]
        for row, verdict in zip(logits, verdicts, strict=True):
            if verdict is not None:
                obey(row, self._kept, verdict)
        columns = logits.argmax(axis=1)
        kept_logits, kept_ids = logits[np.arange(len(columns)), columns], self._kept.ids[columns]
        start = time.perf_counter()
        self.reads.steps += len(hidden)
        if self._certificate is None:
            self.reads.bytes += self.reads.full_bytes
            cold_logits, cold_ids = self._head.maxima(hidden)
        else:
            cold_logits, cold_ids = self._certificate.challengers(hidden, kept_logits)
        self.timing.cold_head += time.perf_counter() - start
        for step, verdict in enumerate(verdicts):
            if verdict is not None and (
                verdict.forced.size or (cold_logits[step] > -np.inf and cold_ids[step] in verdict.banned)
            ):
                cold_logits[step], cold_ids[step] = self._allowed_maximum(hidden[step : step + 1], verdict)
        # The largest logit; on a tie the lowest id, as argmax over the full vocab gives it.
        cold_wins = (cold_logits > kept_logits) | ((cold_logits == kept_logits) & (cold_ids < kept_ids))
        winners = np.where(cold_wins, cold_ids, kept_ids)
        return [
            _agreeing(block.tokens, full.tolist())
            for block, full in zip(blocks, np.split(winners, ends[:-1]), strict=True)
        ]

    def _allowed_maximum(self, hidden: Floats, verdict: Verdict) -> tuple[float, int]:
        """The largest cold logit that the rules allow, of one state (1, H). Rare: it needs all of them."""
        if verdict.forced.size:
            logits = np.empty(self._cold.ids.size, np.float32)
        else:
            logits = self._head.logits(hidden)[0].copy()
        obey(logits, self._cold, verdict)
        best = logits.argmax()
        return float(logits[best]), int(self._cold.ids[best])

    def _replay(self, request: Request, block: Draft) -> list[int]:
        start = time.perf_counter()
        self.reads.steps += len(block.tokens)
        proven: Sequence[int | None] = [None] * len(block.tokens)
        if self._certificate is not None:
            proven = self._certificate.tokens(request, block)
        open_steps = [step for step, token in enumerate(proven) if token is None]
        self.timing.cold_head += time.perf_counter() - start
        start, checked_before = time.perf_counter(), self.timing.cold_head
        cold_logits: dict[int, Floats] = {}
        tokens: list[int] = []
        full = np.empty(self._full.vocab_size, np.float32)
        for step, draft in enumerate(block.tokens):
            token = proven[step]
            if token is None:
                if step not in cold_logits:
                    now, open_steps = open_steps[:_STEPS_AT_ONCE], open_steps[_STEPS_AT_ONCE:]
                    cold_logits = dict(zip(now, self._cold_logits(block.hidden[now]), strict=True))
                full[self._kept.ids] = block.logits[step]
                full[self._head.cold_ids] = cold_logits[step]
                token = choose(full, self._full, request.params, request.history(tokens))
            tokens.append(token)
            if token != draft:
                break
        self.timing.sampler += time.perf_counter() - start - (self.timing.cold_head - checked_before)
        return tokens

    def _cold_logits(self, hidden: Floats) -> Floats:
        start = time.perf_counter()
        self.reads.bytes += self.reads.full_bytes
        logits = self._head.logits(hidden)
        self.timing.cold_head += time.perf_counter() - start
        return logits

    def _learn(self, blocks: Sequence[Draft], checked: Sequence[list[int]], check_seconds: float) -> None:
        size = max(len(block.tokens) for block in blocks)
        stood = sum(
            tokens[-1] == block.tokens[len(tokens) - 1] for block, tokens in zip(blocks, checked, strict=True)
        )
        judged = sum(len(tokens) for tokens in checked)
        note = self._block.note
        note(size, judged - (len(blocks) - stood), judged, blocks[0].step_seconds, check_seconds)


def _agreeing(drafts: Sequence[int], tokens: list[int]) -> list[int]:
    """The full model's tokens up to and with the first that is not the draft."""
    for position, (draft, token) in enumerate(zip(drafts, tokens, strict=True)):
        if draft != token:
            return tokens[: position + 1]
    return tokens
