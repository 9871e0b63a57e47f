"""The decoding loop: draft with the compact head, have the drafts checked, go on from what stands.

Compact mode is the same loop with blocks of one token and nobody to check them. With a device for the
decoder the check runs on the CPU in another thread while the device drafts on (`overlap`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from trimserve.decoding.columns import Columns
from trimserve.decoding.drafter import Drafter
from trimserve.decoding.feeder import Feeder
from trimserve.decoding.request import Draft, Request, all_ended, note_block
from trimserve.decoding.slots import DraftSlots
from trimserve.decoding.stats import ColdReads, Timing
from trimserve.runtime.cold_rows import ColdRows
from trimserve.runtime.decoder import Decoder, Step
from trimserve.runtime.kv_cache import KVCache
from trimserve.runtime.row_costs import RowCosts
from trimserve.vocab.map import VocabMap


class Checker(Protocol):
    """Decides which drafts stand.

    Attributes:
        replaces: whether a draft that does not stand is replaced, so that any id may be drafted.
        timing: seconds spent in checks.
        reads: what checks read of the cold files.
    """

    replaces: bool
    timing: Timing
    reads: ColdReads

    @property
    def draft_length(self) -> int:
        """How many tokens to draft before the next check."""
        ...

    def check(self, requests: Sequence[Request], blocks: Sequence[Draft]) -> list[list[int]]:
        """The full model's tokens, one list a request: the drafts that stand, then the first that differs."""
        ...


class GenerationLoop:
    """Generates for a batch of requests with one decoder.

    Attributes:
        timing: seconds spent in the model and in drafting; a checker keeps its own.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocab: VocabMap,
        cold: ColdRows,
        checker: Checker | None,
        *,
        overlap: bool = False,
        row_costs: Callable[[], RowCosts] | None = None,
    ) -> None:
        """Generate with a decoder.

        Args:
            decoder: the graph.
            vocab: which ids it keeps.
            cold: rows of the others.
            checker: who decides which drafts stand; None where all do.
            overlap: draft on while a block is checked.
            row_costs: what steps of several tokens cost, for drafts from the text; None for none of these.
        """
        self._decoder = decoder
        self._head_vocab = vocab.head
        self._cold = cold
        self._checker = checker
        self._kept = Columns(vocab.head.kept_ids, vocab.vocab_size)
        self._feeder = Feeder(decoder, vocab, cold, in_pairs=row_costs is not None)
        replaces = checker is not None and checker.replaces
        self._drafter = Drafter(self._feeder, self._kept, takes_any_id=replaces, row_costs=row_costs)
        self._overlap = overlap and checker is not None
        self.timing = self._feeder.timing

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[int]]]:
        """Generate until all requests are finished, giving each one's checked tokens as they come.

        Who takes them may end the request they belong to (`Request.end`) before asking for more.
        """
        live = [request for request in requests if request.max_tokens > 0]
        if not live:
            return
        for request in live:
            cold_ids = request.given[~self._head_vocab.is_kept(request.given)]
            request.slots = DraftSlots(self._kept, self._cold, self._decoder.after_head, cold_ids)
        cache, step = self._feeder.prefill(live)
        blocks = self._draft(live, cache, step)
        while True:
            checked, ahead = self._check(live, blocks, cache)
            drop, keep = [], []
            for index, (request, block, tokens) in enumerate(zip(live, blocks, checked, strict=True)):
                taken = request.accept(tokens)
                note_block(request, block, taken, self._kept)
                yield request, taken
                # Of the last token taken nothing is in the cache yet; of the drafts after it everything.
                drop.append(len(block.tokens) - len(taken))
                if not request.finished:
                    keep.append(index)
            if not keep:
                return
            if ahead and len(keep) == len(live) and _all_stood(blocks, checked):
                blocks = ahead
                continue
            fed_ahead = len(ahead[0].tokens) if ahead else 0
            live = [live[index] for index in keep]
            for request in live:
                request.drafted += fed_ahead
            cache.cut(np.array(drop, np.int64) + fed_ahead)
            cache.select(keep)
            blocks = self._draft(live, cache, None)

    def _draft(
        self, requests: Sequence[Request], cache: KVCache, step: Step | None, flying: Sequence[Draft] = ()
    ) -> list[Draft]:
        """Draft a block behind `flying`, blocks that are being checked; see `Drafter.draft`."""
        size = min(_tokens_left(requests) - (len(flying[0].tokens) if flying else 0), self._most_drafts)
        if self._checker is None:
            return self._drafter.draft(requests, cache, step, size, flying, one_step=True)
        return self._drafter.draft(requests, cache, step, min(size, self._checker.draft_length), flying)

    @property
    def _most_drafts(self) -> int:
        """Drafts of a block that can be taken back: the last is not fed; with overlap there are two."""
        reach = self._decoder.reach
        if reach is None:
            return sys.maxsize
        return max(1, (reach + 1) // 2 if self._overlap else reach + 1)

    def _check(
        self, requests: Sequence[Request], blocks: Sequence[Draft], cache: KVCache
    ) -> tuple[list[list[int]], list[Draft]]:
        """Have blocks checked; with overlap, draft the next ones meanwhile, as if these stood."""
        if self._checker is None:
            return [block.tokens for block in blocks], []
        drafted = [block.tokens for block in blocks]
        if not self._overlap or all_ended(requests, drafted) or _tokens_left(requests) <= len(drafted[0]):
            return self._checker.check(requests, blocks), []
        with ThreadPoolExecutor(1) as checking:
            checked = checking.submit(self._checker.check, requests, blocks)
            ahead = self._draft(requests, cache, None, blocks)
            return checked.result(), ahead


def _tokens_left(requests: Sequence[Request]) -> int:
    """Tokens that it makes sense to draft: what one of them may still produce, and all have room for."""
    wanted = max(request.max_tokens - len(request.output) for request in requests)
    room = [request.room - len(request.output) for request in requests if request.room is not None]
    return min([wanted, *room])


def _all_stood(blocks: Sequence[Draft], checked: Sequence[Sequence[int]]) -> bool:
    return all(block.tokens == tokens for block, tokens in zip(blocks, checked, strict=True))


class InStep:
    """A `Checker` that lets every sequence of a batch advance by the same number of tokens.

    What a sequence is ahead of the slowest is not taken: it is drafted again in the next block, and comes
    out the same, since a token depends on (seed, step) and the tokens before it.
    """

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self.replaces = checker.replaces
        self.timing = checker.timing
        self.reads = checker.reads

    @property
    def draft_length(self) -> int:
        """How many tokens to draft before the next check."""
        return self._checker.draft_length

    def check(self, requests: Sequence[Request], blocks: Sequence[Draft]) -> list[list[int]]:
        """The full model's tokens for each request; those that go on get equally many."""
        checked = self._checker.check(requests, blocks)
        going_on = [
            len(tokens)
            for request, tokens in zip(requests, checked, strict=True)
            if not request.ends_with(tokens)
        ]
        shortest = min(going_on, default=0)
        return [
            tokens if request.ends_with(tokens) else tokens[:shortest]
            for request, tokens in zip(requests, checked, strict=True)
        ]
