"""One sequence being generated: its prompt, its checked output, and what may be drafted for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.decoding.columns import Columns, History
from trimserve.decoding.sampling import SamplingParams, choose
from trimserve.decoding.slots import DraftSlots
from trimserve.decoding.token_rules import TokenRules, Verdict


@dataclass(slots=True)
class Request:
    """One sequence being generated.

    Attributes:
        prompt: token ids that the output continues; for an encoder-decoder what its decoder starts with.
        params: how tokens are chosen.
        max_tokens: at most so many are produced.
        stop_ids: token ids that end the sequence.
        output: checked token ids.
        finished: by `accept` at a stop id or the limit, or by its reader (`end`) at a stop string.
        drafted: tokens drafted for it.
        rejected: drafts that a check replaced.
        guessed: tokens from its own text that were fed before they were drafted (see `TextDrafts`).
        guesses_stood: of these, the ones that were drafted then.
        slots: the cold ids that may be drafted.
        room: tokens that can follow the prompt before the model's positions end; None for no end.
        source: for an encoder-decoder the text that its encoder reads, as token ids.
    """

    prompt: Ids
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    output: list[int] = field(default_factory=list)
    finished: bool = False
    drafted: int = 0
    rejected: int = 0
    guessed: int = 0
    guesses_stood: int = 0
    slots: "DraftSlots | None" = None
    source: Ids | None = None
    room: int | None = None

    @property
    def given(self) -> Ids:
        """Token ids that came with the request: source, prompt, and those that its rules force."""
        forced = self.params.rules.forced_bos_token_id if self.params.rules else ()
        parts = [np.array(forced, np.int32), self.prompt]
        return np.concatenate([*([] if self.source is None else [self.source]), *parts])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the text that was given."""
        return (self.prompt if self.source is None else self.source).size

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """Whether a stop id or the limit is among tokens that would come next."""
        return len(self.output) + len(tokens) >= self.max_tokens or not self.stop_ids.isdisjoint(tokens)

    def history(self, drafts: Sequence[int]) -> History:
        """Prompt and output, with drafts that were not checked yet."""
        return History(self.prompt, np.array([*self.output, *drafts], np.int32), self.source)

    def verdict(self, drafts: Sequence[int]) -> Verdict:
        """What the model's rules say of the step after some drafts."""
        history = self.history(drafts)
        return (self.params.rules or TokenRules()).at(history.prompt, history.output, history.source)

    def draft(self, logits: Floats, hidden: Floats, drafts: Sequence[int]) -> int:
        """Choose the next draft among kept ids and slots, after drafts that were not checked yet.

        Args:
            logits: compact logits, float32 (K,).
            hidden: the head's input (H,).
            drafts: token ids drafted since `output`.

        Raises:
            NoTokenError: no kept id and no slot is allowed here.
        """
        slots = self.slots
        if slots is None:
            raise RuntimeError("a request was drafted before its slots were made")
        if self.params.takes_maximum:
            return slots.best(logits, hidden)
        extended = slots.extend(logits, hidden)
        return choose(extended, slots.columns, self.params, self.history(drafts))

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

    def end(self, taken_back: int) -> None:
        """End the request at its reader's word; the last of the output, so many tokens, are taken back."""
        self.finished = True
        del self.output[len(self.output) - taken_back :]


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafts of one request, one entry a step.

    Attributes:
        tokens: drafted token ids (n,).
        logits: compact logits the drafts were chosen from, float32 (n, K).
        hidden: the head's input at each step (n, H).
        step_seconds: mean time of a step of the decoder; 0 where none was measured.
    """

    tokens: list[int]
    logits: Floats
    hidden: Floats
    step_seconds: float = 0.0


def note_block(request: Request, block: Draft, taken: Sequence[int], kept: Columns) -> None:
    """Count a block of drafts and what was taken of it; cold ids among that may be drafted next."""
    request.drafted += len(block.tokens)
    request.rejected += list(taken) != block.tokens[: len(taken)]
    if request.slots is not None:
        for token in taken:
            if not kept.has(token):
                request.slots.use(token)


def all_ended(requests: Sequence[Request], drafts: Sequence[Sequence[int]]) -> bool:
    """Whether the last draft of every request is one of its stop ids."""
    return all(tokens[-1] in request.stop_ids for request, tokens in zip(requests, drafts, strict=True))
