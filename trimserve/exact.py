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

from trimserve.blocks import COLD_BLOCKS_NAME
from trimserve.decoder import Floats
from trimserve.folder import TrimmedFolder
from trimserve.request import Block, Request
from trimserve.rules import Verdict
from trimserve.sampling import Columns, choose, obey
from trimserve.session import open_session
from trimserve.stats import Timing
from trimserve.vocab import Ids, VocabMap

COLD_MAX_NAME = "cold_max.onnx"
COLD_HEAD_NAME = "cold_head.onnx"
# The longest block by default. On two cores the product with 144,512 x 256 fp32 rows took 11.6 ms for 16
# steps, 13.3 for 32 and 17.7 for 48: past 32 another step costs more than it shares.
MAX_BLOCK = 32
# How fast the limit of a block's size grows while drafts stand.
_GROWTH = 4


class ColdHead:
    """The cold rows as a matrix: hidden states -> logits of the cold ids.

    Two graphs over the same mapped bytes, tile after tile, so that nothing but a tile's activations is
    in memory. Opened without prepacking: a prepacked matrix would be a private copy. Quantised rows are
    stored prepacked, and are used in place if this option is on.
    """

    def __init__(self, folder: TrimmedFolder, *, threads: int | None = None) -> None:
        self.cold_ids: Ids = folder.vocab.cold_ids
        self._folder = folder
        self._threads = threads
        prepack = COLD_BLOCKS_NAME in folder.manifest.files
        self._maxima = open_session(folder.file(COLD_MAX_NAME), threads=threads, prepack=prepack)
        self._logits = open_session(folder.file(COLD_HEAD_NAME), threads=threads, prepack=prepack)

    def maxima(self, hidden: Floats) -> tuple[Floats, Ids]:
        """The largest cold logit of each hidden state and its token id (the lowest on a tie).

        Args:
            hidden: (N, H), in the graph's dtype.

        Returns:
            float32 (N,) and int32 (N,).
        """
        values, rows = self._maxima.run(["maximum", "row"], {"hidden_states": np.ascontiguousarray(hidden)})
        tile = values.argmax(axis=0)  # tiles are in id order: the first is the lowest id
        step = np.arange(values.shape[1])
        return values[tile, step].astype(np.float32, copy=False), self.cold_ids[rows[tile, step]]

    def logits(self, hidden: Floats) -> Floats:
        """Logits of all cold ids: (N, H) -> float32 (N, V - K)."""
        (logits,) = self._logits.run(["logits"], {"hidden_states": np.ascontiguousarray(hidden)})
        return np.asarray(logits, np.float32).T


class Certificate(Protocol):
    """Settles steps without reading every cold row; what it cannot settle it leaves to the cold head."""

    def challengers(self, hidden: Floats, floor: Floats) -> tuple[Floats, Ids]:
        """As `ColdHead.maxima`, or -inf (and any id) where every cold logit is proven to be below a floor.

        Args:
            hidden: (N, H), in the graph's dtype.
            floor: float32 (N,), the largest kept logit of each step.
        """
        ...

    def tokens(self, request: Request, block: Block) -> Sequence[int | None]:
        """The full model's token at each step of a block whose earlier drafts stand; None if not proven."""
        ...


class BlockSize:
    """How many tokens to draft before a check, from measured costs and the share of drafts that stand.

    A block of B steps costs ``B * step + check(B)``, or the larger of the two where the check overlaps with
    the next drafts. If each draft stands with probability p, it gives ``(1 - p^B) / (1 - p)`` tokens: those
    up to and with the first that differs. Of the powers of two up to the maximum, the size with the lowest
    cost a token is taken. Costs are averages over the requests so far, so they follow the machine; the
    tokens do not depend on them.
    """

    def __init__(self, maximum: int = MAX_BLOCK, *, overlap: bool = False) -> None:
        self._overlap = overlap
        self._sizes = [1 << power for power in range(maximum.bit_length()) if 1 << power <= maximum]
        self._limit = 1
        self._stood = 4.0
        self._drafted = 4.2
        self._step_seconds = 0.0
        self._check_seconds: dict[int, float] = {}

    def start(self) -> None:
        """Begin a request: one step until its first token, then blocks grow. What was learned stays."""
        self._limit = 1

    @property
    def size(self) -> int:
        """The block size to draft next."""
        if self._limit == 1:
            return 1
        return min((size for size in self._sizes if size <= self._limit), key=self._cost)

    def _cost(self, size: int) -> float:
        stand = min(self._stood / self._drafted, 0.9999)
        tokens = (1 - stand**size) / (1 - stand)
        draft, check = size * self._step_seconds, self._check_cost(size)
        return (max(draft, check) if self._overlap else draft + check) / tokens

    def _check_cost(self, size: int) -> float:
        if size in self._check_seconds or not self._check_seconds:
            return self._check_seconds.get(size, 0.0)
        # Not measured yet: as the nearest smaller size, since the rows are read once in either case.
        known = [measured for measured in self._check_seconds if measured < size]
        return self._check_seconds[max(known) if known else min(self._check_seconds)]

    def note(self, size: int, stood: int, drafted: int, step_seconds: float, check_seconds: float) -> None:
        """Learn from a block: its size, drafts that stood of those judged, and what it cost."""
        decay = 0.98**drafted
        self._stood = decay * self._stood + stood
        self._drafted = decay * self._drafted + drafted
        grown, shrunk = min(_GROWTH * self._limit, self._sizes[-1]), max(self._limit // 2, 1)
        self._limit = grown if stood == drafted else shrunk
        if step_seconds > 0:
            self._step_seconds = _average(self._step_seconds, step_seconds)
        self._check_seconds[size] = _average(self._check_seconds.get(size, 0.0), check_seconds)


def _average(old: float, new: float) -> float:
    return new if old == 0 else 0.8 * old + 0.2 * new


class ExactChecker:
    """The `Checker` of exact mode."""

    replaces = True

    def __init__(
        self,
        head: ColdHead,
        vocab: VocabMap,
        block: BlockSize | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        """Check against a cold head; `block` may have learned from other requests."""
        self._head = head
        self._certificate = certificate
        self._kept, self._cold, self._full = (
            Columns(ids, vocab.vocab_size)
            for ids in (vocab.kept_ids, head.cold_ids, np.arange(vocab.vocab_size, dtype=np.int32))
        )
        self._block = block or BlockSize()
        self._block.start()
        self.timing = Timing()

    @property
    def block_size(self) -> int:
        """How many tokens to draft before the next check."""
        return self._block.size

    def check(self, requests: Sequence[Request], blocks: Sequence[Block]) -> list[list[int]]:
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

    def _check_greedy(self, requests: Sequence[Request], blocks: Sequence[Block]) -> list[list[int]]:
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
        if self._certificate is None:
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

    def _replay(self, request: Request, block: Block) -> list[int]:
        start = time.perf_counter()
        proven: Sequence[int | None] = [None] * len(block.tokens)
        if self._certificate is not None:
            proven = self._certificate.tokens(request, block)
        open_steps = [step for step, token in enumerate(proven) if token is None]
        cold_logits: dict[int, Floats] = {}
        if open_steps:
            cold_logits = dict(zip(open_steps, self._head.logits(block.hidden[open_steps]), strict=True))
        self.timing.cold_head += time.perf_counter() - start
        start = time.perf_counter()
        tokens: list[int] = []
        full = np.empty(self._full.vocab_size, np.float32)
        for step, draft in enumerate(block.tokens):
            token = proven[step]
            if token is None:
                full[self._kept.ids] = block.logits[step]
                full[self._head.cold_ids] = cold_logits[step]
                token = choose(full, self._full, request.params, request.history(tokens))
            tokens.append(token)
            if token != draft:
                break
        self.timing.sampler += time.perf_counter() - start
        return tokens

    def _learn(self, blocks: Sequence[Block], checked: Sequence[list[int]], check_seconds: float) -> None:
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
