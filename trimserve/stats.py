"""What a generator counts while it works."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from trimserve.request import Request
from trimserve.vocab import VocabMap


@dataclass(slots=True)
class Timing:
    """Seconds spent in the parts of generation."""

    PARTS: ClassVar[tuple[str, ...]] = ("model", "cold_head", "sampler")

    model: float = 0.0
    cold_head: float = 0.0
    sampler: float = 0.0


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


@dataclass(slots=True)
class GeneratorStats:
    """What a generator has done since it was loaded: the live coverage, which shows drift.

    Attributes:
        prompt_tokens: tokens fed from prompts.
        tokens: tokens generated.
        cold_tokens: tokens of prompts and outputs that have no compact row (in a folder without cold rows
            they were split into kept pieces).
        drafted: tokens drafted.
        rejected: drafts that the full model's token replaced.
        seconds: time by part: model (body and compact head), cold_head, sampler, other.
        cold_reads: what exact mode's checks read of the cold files.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    cold_tokens: int = 0
    drafted: int = 0
    rejected: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"model": 0.0, "cold_head": 0.0, "sampler": 0.0, "other": 0.0}
    )
    cold_reads: ColdReads = field(default_factory=ColdReads)

    def count(
        self, requests: Sequence[Request], vocab: VocabMap, timings: Sequence[Timing], seconds: float
    ) -> None:
        """Add a finished batch that took so many seconds in all; cold tokens of prompts are counted apart."""
        for request in requests:
            output = np.array(request.output, np.int32)
            self.prompt_tokens += request.prompt_tokens
            self.tokens += len(request.output)
            self.cold_tokens += int((~vocab.is_kept(output)).sum())
            self.drafted += request.drafted
            self.rejected += request.rejected
        parts = {name: sum(getattr(timing, name) for timing in timings) for name in Timing.PARTS}
        # Parts that overlapped count twice: nothing is left for the rest then.
        parts["other"] = max(0.0, seconds - sum(parts.values()))
        for name, spent in parts.items():
            self.seconds[name] += spent
