"""One request on its way through the engine: from the queue to its last event."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trimserve.decoding.logprobs import TokenLogprob
from trimserve.decoding.request import Request
from trimserve.engine.events import Failed, Finished, Piece, Reason, Usage
from trimserve.engine.handle import Handle
from trimserve.generation.output import OutputReader
from trimserve.generation.plan import GenerationPlan
from trimserve.vocab.map import VocabMap


@dataclass(slots=True, eq=False)
class Task:
    """A submitted request.

    Attributes:
        handle: its client's.
        plan: what was asked for.
        request: its tokens.
        reader: makes text of them.
        top_logprobs: see `GenerationRequest`.
        deadline: on the clock of `time.monotonic`, or None.
        cached_tokens: prompt tokens that were not fed again.
    """

    handle: Handle
    plan: GenerationPlan
    request: Request
    reader: OutputReader
    top_logprobs: int | None = None
    deadline: float | None = None
    cached_tokens: int = 0
    submitted: float = field(default_factory=time.monotonic)
    _started: float | None = None
    _first: float | None = None
    _last: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return self.request.prompt_tokens

    def start(self) -> None:
        """Note that it left the queue."""
        self._started = time.monotonic()

    def due(self, now: float) -> Reason | None:
        """Why it has to end now, whatever it was doing; None if it goes on."""
        if self.handle.cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and now >= self.deadline else None

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Tell the client of checked tokens that its request took.

        Args:
            tokens: the last ones of its output.
            logprobs: of these and maybe more.
        """
        self._last = time.monotonic()
        self._first = self._first or self._last
        before = len(self.request.output) - len(tokens)
        text = self.reader.push(self.request, tokens)
        stay = tuple(self.request.output[before:])
        if stay:
            self.handle.put(Piece(stay, text, tuple(logprobs[: len(stay)])))

    def finish(self, head_vocab: VocabMap, *, strict: bool, reason: Reason | None = None) -> Finished:
        """Give the client the last event.

        Args:
            head_vocab: tells which of the tokens are cold.
            strict: see `Finished`.
            reason: what ended it; what its request says by default.
        """
        text = self.reader.finish()
        generation = self.reader.result(self.request)
        usage = self._usage(head_vocab)
        event = Finished(text, generation, reason or generation.stopped, usage, strict)
        self.handle.put(event)
        return event

    def fail(self, error: Exception) -> None:
        """Give the client an error as the last event."""
        self.handle.put(Failed(error))

    def _usage(self, head_vocab: VocabMap) -> Usage:
        output = np.array(self.request.output, np.int32)
        started = self._started or time.monotonic()
        return Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=output.size,
            cold_tokens=int((~head_vocab.is_kept(output)).sum()),
            drafted=self.request.drafted,
            rejected=self.request.rejected,
            queue_seconds=started - self.submitted,
            first_token_seconds=self._first - started if self._first else 0.0,
            decode_seconds=self._last - self._first if self._first and self._last else 0.0,
        )
