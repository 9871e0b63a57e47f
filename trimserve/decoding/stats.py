"""What a generator counts while it works."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trimserve.concurrency import Lock
from trimserve.decoding.request import Request
from trimserve.vocab.map import VocabMap


@dataclass(slots=True)
class Timing:
    """Seconds spent in the parts of generation.

    Attributes:
        model: in the decoder's graph, body and compact head.
        prompts: of these in prompts, which the head reads one position of.
        cold_head: in checks.
        sampler: in choosing tokens.
    """

    model: float = 0.0
    prompts: float = 0.0
    cold_head: float = 0.0
    sampler: float = 0.0

    def take(self) -> "Timing":
        """The seconds so far, which begin anew."""
        taken = replace(self)
        self.model = self.prompts = self.cold_head = self.sampler = 0.0
        return taken

    def add(self, other: "Timing") -> None:
        """Add another's seconds."""
        self.model += other.model
        self.prompts += other.prompts
        self.cold_head += other.cold_head
        self.sampler += other.sampler


@dataclass(slots=True)
class ColdReads:
    """What exact mode's checks read of the cold files.

    Attributes:
        steps: steps checked.
        certified: steps settled by the sketch, with the few rows that it named, if any.
        rows: cold rows read by themselves.
        bytes: bytes of all checks: the sketch, rows, and the whole cold head where it was needed. Rows read
            for slots are not counted.
        full_bytes: of the whole cold head.
        row_bytes: of one of its rows.
    """

    steps: int = 0
    certified: int = 0
    rows: int = 0
    bytes: int = 0
    full_bytes: int = 0
    row_bytes: int = 0

    def add(self, other: "ColdReads") -> None:
        """Add what another has counted."""
        self.steps += other.steps
        self.certified += other.certified
        self.rows += other.rows
        self.bytes += other.bytes

    def take(self) -> "ColdReads":
        """What was counted, which begins anew."""
        taken = replace(self)
        self.steps = self.certified = self.rows = self.bytes = 0
        return taken

    def nothing_yet(self) -> "ColdReads":
        """Of the same rows, for one call to count."""
        return ColdReads(full_bytes=self.full_bytes, row_bytes=self.row_bytes)


@dataclass(slots=True)
class GeneratorStats:
    """What a generator has done since it was loaded: the live coverage, which shows drift.

    A call counts by itself and is added when it ends, also where its stream was abandoned. Calls may end in
    any thread.

    Attributes:
        prompt_tokens: tokens fed from prompts.
        tokens: tokens generated.
        cold_tokens: tokens of prompts and outputs that have no compact row (in a folder without cold rows
            they were split into kept pieces).
        drafted: tokens drafted.
        rejected: drafts that the full model's token replaced.
        guessed: tokens from a request's own text that were fed before they were drafted.
        guesses_stood: of these, the ones that were drafted then: each saved a step.
        cold_reads: what exact mode's checks read of the cold files.
        timing: seconds by what was timed.
        other: seconds in none of these parts.
        head_share: measures which share of a step is the compact head.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    cold_tokens: int = 0
    drafted: int = 0
    rejected: int = 0
    guessed: int = 0
    guesses_stood: int = 0
    cold_reads: ColdReads = field(default_factory=ColdReads)
    timing: Timing = field(default_factory=Timing)
    other: float = 0.0
    head_share: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @property
    def accepted(self) -> int:
        """Tokens generated that were drafted, and not put in the place of a draft."""
        return self.tokens - self.rejected

    @property
    def seconds(self) -> dict[str, float]:
        """Time by part: body, compact_head, cold_head, sampler, other.

        Body and compact head are one graph, whose time is split as that of a step with and without the
        head: measured when this is read for the first time, for about a tenth of a second.
        """
        steps = self.timing.model - self.timing.prompts
        head = steps * self.head_share() if steps > 0 else 0.0
        return {
            "body": self.timing.model - head,
            "compact_head": head,
            "cold_head": self.timing.cold_head,
            "sampler": self.timing.sampler,
            "other": self.other,
        }

    def count(
        self,
        requests: Sequence[Request],
        head_vocab: VocabMap,
        timings: Sequence[Timing],
        seconds: float,
        reads: ColdReads | None = None,
    ) -> None:
        """Add a finished batch that took so many seconds in all; cold tokens of prompts are counted apart."""
        prompt_tokens = sum(request.prompt_tokens for request in requests)
        tokens = sum(len(request.output) for request in requests)
        outputs = [np.array(request.output, np.int32) for request in requests]
        cold_tokens = sum(int((~head_vocab.is_kept(output)).sum()) for output in outputs)
        drafted = sum(request.drafted for request in requests)
        rejected = sum(request.rejected for request in requests)
        guessed = sum(request.guessed for request in requests)
        guesses_stood = sum(request.guesses_stood for request in requests)
        spent = sum(timing.model + timing.cold_head + timing.sampler for timing in timings)
        # Parts that overlapped count twice: nothing is left for the rest then.
        other = max(0.0, seconds - spent)
        with self._lock:
            # Only plain sums, so that nothing of another count can come between reading and writing one.
            self.prompt_tokens += prompt_tokens
            self.tokens += tokens
            self.cold_tokens += cold_tokens
            self.drafted += drafted
            self.rejected += rejected
            self.guessed += guessed
            self.guesses_stood += guesses_stood
            self.other += other
            for timing in timings:
                self.timing.add(timing)
            if reads is not None:
                self.cold_reads.add(reads)

    def count_cold(self, tokens: int) -> None:
        """Add cold tokens of prompts."""
        with self._lock:
            self.cold_tokens += tokens
