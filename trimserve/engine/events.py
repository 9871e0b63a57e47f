"""What an engine says of a request: pieces, then one last event."""

from dataclasses import dataclass
from typing import Literal

from trimserve.decoding.logprobs import TokenLogprob
from trimserve.generation.output import Generation

Reason = Literal["eos", "stop", "length", "cancelled", "timeout"]


@dataclass(frozen=True, slots=True)
class Piece:
    """More of a sequence.

    Attributes:
        ids: checked token ids, at least one.
        text: what became certain with them; may be empty, where a character or a stop string is open.
        logprobs: one entry a token id, where they were asked for.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these not fed again, because keys and values of the same tokens were there.
        completion_tokens: token ids produced, the one that ended it included.
        cold_tokens: of these without a compact row.
        drafted: tokens drafted.
        rejected: drafts that the full model's token replaced.
        queue_seconds: from `submit` to the first step of the prompt.
        first_token_seconds: from there to the first token; 0 where there is none.
        decode_seconds: from the first token to the last.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    cold_tokens: int = 0
    drafted: int = 0
    rejected: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a sequence.

    Attributes:
        text: what is left of the text, after that of all pieces.
        generation: the whole sequence, as `Generator.generate` gives it. Where it was cancelled or ran out of
            time, as far as it came (its `stopped` is "length" then).
        reason: what ended it.
        usage: what it took.
        strict: whether its tokens are, by the proof made when the engine was opened, those it has alone.
    """

    text: str
    generation: Generation
    reason: Reason
    usage: Usage
    strict: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that could not be finished.

    Attributes:
        error: a `TrimserveError`, or what the engine did not foresee.
    """

    error: Exception


Event = Piece | Finished | Failed
