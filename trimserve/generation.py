"""The decoding loop: draft with the compact head, have the drafts checked, go on from what stands.

Compact mode is the same loop with blocks of one token and nobody to check them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trimserve.cold import ColdRows
from trimserve.decoder import AfterHead, Decoder, Floats, KVCache, Step, apply_after_head
from trimserve.errors import NoTokenError
from trimserve.sampling import Columns, History, SamplingParams, choose, join_columns
from trimserve.vocab import Ids, VocabMap

# Cold ids of one request that may be drafted; each costs one row of the head a step.
MAX_SLOTS = 64


@dataclass(slots=True)
class Timing:
    """Seconds spent in the parts of generation."""

    model: float = 0.0
    cold_head: float = 0.0
    sampler: float = 0.0


@dataclass(slots=True)
class Request:
    """One sequence being generated.

    Attributes:
        prompt: token ids.
        params: how tokens are chosen.
        max_tokens: at most so many are produced.
        stop_ids: token ids that end the sequence.
        output: checked token ids.
        finished: set by the loop at a stop id or the limit, or by the reader at a stop string.
    """

    prompt: Ids
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    finished: bool = False
    drafted: int = 0
    rejected: int = 0
    slots: "DraftSlots | None" = None

    def history(self, drafts: Sequence[int]) -> History:
        """Prompt and output, with drafts that were not checked yet."""
        return History(self.prompt, np.array([*self.output, *drafts], np.int32))

    def accept(self, tokens: Sequence[int]) -> list[int]:
        """Append checked tokens up to the first stop id or the limit; returns what was appended."""
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            self.finished = token in self.stop_ids or len(self.output) + len(taken) >= self.max_tokens
            if self.finished:
                break
        self.output += taken
        return taken


class DraftSlots:
    """The cold ids that one request may draft: those of its prompt and of its output.

    The least recently used id leaves when there are more than `MAX_SLOTS`.
    """

    def __init__(self, kept: Columns, cold: ColdRows, after_head: AfterHead, prompt_cold_ids: Ids) -> None:
        self._after_head = after_head
        self._kept = kept
        self._cold = cold
        self.ids: list[int] = []
        self.columns = kept
        latest_first = dict.fromkeys(prompt_cold_ids[::-1].tolist())
        self._hold(list(latest_first)[:MAX_SLOTS][::-1])

    def use(self, cold_id: int) -> None:
        """Note that a cold id was produced."""
        self._hold([*(held for held in self.ids if held != cold_id), cold_id][-MAX_SLOTS:])

    def _hold(self, ids: list[int]) -> None:
        if ids == self.ids or not len(self._cold):
            return
        self.ids = ids
        self.columns = join_columns(self._kept, ids)
        index = np.array(ids, np.int32)
        self._rows = self._cold.head(index).astype(np.float32)
        bias = self._cold.head_bias(index) if self._cold.has_head_bias else np.zeros(len(ids))
        self._bias = bias.astype(np.float32)

    def extend(self, logits: Floats, hidden: Floats) -> Floats:
        """Append the slots' logits to the kept ids': float32 (K,), (H,) -> (K + S,)."""
        if not self.ids:
            return logits
        product = self._rows @ hidden.astype(np.float32)
        return np.concatenate([logits, apply_after_head(product, self._bias, self._after_head)])


@dataclass(frozen=True, slots=True)
class Block:
    """Drafts of one request, one entry a step.

    Attributes:
        tokens: drafted token ids (n,).
        logits: compact logits the drafts were chosen from, float32 (n, K).
        hidden: the head's input at each step (n, H).
    """

    tokens: list[int]
    logits: Floats
    hidden: Floats


class Checker(Protocol):
    """Decides which drafts stand.

    Attributes:
        replaces: whether a draft that does not stand is replaced, so that any id may be drafted.
    """

    replaces: bool

    @property
    def block_size(self) -> int:
        """How many tokens to draft before the next check."""
        ...

    def check(self, requests: Sequence[Request], blocks: Sequence[Block]) -> list[list[int]]:
        """The full model's tokens, one list a request: the drafts that stand, then the first that differs."""
        ...


class GenerationLoop:
    """Generates for a batch of requests with one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        vocab: VocabMap,
        cold: ColdRows,
        checker: Checker | None,
        timing: Timing,
    ) -> None:
        self._decoder = decoder
        self._vocab = vocab
        self._cold = cold
        self._checker = checker
        self._kept = Columns(vocab.kept_ids, vocab.vocab_size)
        self._no_rows = np.zeros((1, decoder.hidden_size), decoder.dtype)
        self.timing = timing

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[int]]]:
        """Generate until all requests are finished, giving each one's checked tokens as they come."""
        live = [request for request in requests if request.max_tokens > 0]
        if not live:
            return
        for request in live:
            cold_ids = request.prompt[~self._vocab.is_kept(request.prompt)]
            request.slots = DraftSlots(self._kept, self._cold, self._decoder.after_head, cold_ids)
        cache, step = self._prefill(live)
        while True:
            blocks = self._draft(live, cache, step)
            checked = self._check(live, blocks)
            drop, keep = [], []
            for index, (request, block, tokens) in enumerate(zip(live, blocks, checked, strict=True)):
                taken = request.accept(tokens)
                self._note(request, block, taken)
                yield request, taken
                # Of the last token taken nothing is in the cache yet; of the drafts after it everything.
                drop.append(len(block.tokens) - len(taken))
                if not request.finished:
                    keep.append(index)
            if not keep:
                return
            live = [live[index] for index in keep]
            self._decoder.cut(cache, np.array(drop, np.int64))
            self._decoder.select(cache, keep)
            step = self._feed(cache, [request.output[-1] for request in live])

    def _prefill(self, requests: Sequence[Request]) -> tuple[KVCache, Step]:
        width = max(request.prompt.size for request in requests)
        ids = np.full((len(requests), width), int(self._vocab.kept_ids[0]), np.int32)
        mask = np.zeros((len(requests), width), np.int64)
        for row, request in enumerate(requests):  # aligned at the right, where generation goes on
            ids[row, width - request.prompt.size :] = request.prompt
            mask[row, width - request.prompt.size :] = 1
        cache = self._decoder.empty_cache(len(requests))
        return cache, self._step(cache, ids, mask=mask)

    def _feed(self, cache: KVCache, tokens: Sequence[int]) -> Step:
        return self._step(cache, np.array(tokens, np.int32)[:, None])

    def _step(self, cache: KVCache, ids: Ids, mask: npt.NDArray[np.int64] | None = None) -> Step:
        start = time.perf_counter()
        slotted = self._vocab.with_slots(ids)
        rows = self._cold.embedding(slotted.cold_ids) if slotted.cold_tokens else self._no_rows
        step = self._decoder.step(cache, slotted.ids, rows, mask=mask)
        self.timing.model += time.perf_counter() - start
        return step

    def _draft(self, requests: Sequence[Request], cache: KVCache, step: Step) -> list[Block]:
        size = self._checker.block_size if self._checker else 1
        size = min(size, max(request.max_tokens - len(request.output) for request in requests))
        drafts: list[list[int]] = [[] for _ in requests]
        steps = [step]
        for position in range(size):
            start = time.perf_counter()
            for row, (request, tokens) in enumerate(zip(requests, drafts, strict=True)):
                logits, hidden = steps[-1].logits[row, -1], steps[-1].hidden[row, -1]
                tokens.append(self._draft_token(request, logits, hidden, tokens))
            self.timing.sampler += time.perf_counter() - start
            ended = all(
                tokens[-1] in request.stop_ids for request, tokens in zip(requests, drafts, strict=True)
            )
            if ended or position == size - 1:
                break
            steps.append(self._feed(cache, [tokens[-1] for tokens in drafts]))
        logits = np.stack([s.logits[:, -1] for s in steps], axis=1)
        hidden = np.stack([s.hidden[:, -1] for s in steps], axis=1)
        return [Block(tokens, logits[row], hidden[row]) for row, tokens in enumerate(drafts)]

    def _draft_token(self, request: Request, logits: Floats, hidden: Floats, drafts: Sequence[int]) -> int:
        try:
            return _draft_token(request, logits, hidden, drafts)
        except NoTokenError:
            if self._checker is None or not self._checker.replaces:
                raise
            # Only cold ids are allowed here: the check will find the right one.
            return int(self._kept.ids[logits.argmax()])

    def _check(self, requests: Sequence[Request], blocks: Sequence[Block]) -> list[list[int]]:
        if self._checker is None:
            return [block.tokens for block in blocks]
        return self._checker.check(requests, blocks)

    def _note(self, request: Request, block: Block, taken: Sequence[int]) -> None:
        request.drafted += len(block.tokens)
        request.rejected += taken != block.tokens[: len(taken)]
        if request.slots is not None:
            for token in taken:
                if not self._vocab.is_kept(token):
                    request.slots.use(token)


def _draft_token(request: Request, logits: Floats, hidden: Floats, drafts: Sequence[int]) -> int:
    slots = request.slots
    if slots is None:  # set before the first draft
        raise RuntimeError("a request was drafted before its slots were made")
    extended = slots.extend(logits, hidden)
    if request.params.takes_maximum and not slots.ids:
        return int(slots.columns.ids[extended.argmax()])  # kept ids are sorted: argmax is the lowest on a tie
    return choose(extended, slots.columns, request.params, request.history(drafts))
