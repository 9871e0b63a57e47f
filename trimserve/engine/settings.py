"""What an engine is told when it is opened, and what a client asks of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from trimserve.arrays import Ids
from trimserve.errors import UsageError

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of an engine.

    Attributes:
        max_queued_requests: requests that wait, at most; those at work do not count.
        max_queued_tokens: prompt tokens of those that wait, at most; a lone request may have more.
        kv_memory: bytes of keys and values, at most.
        max_rows: sequences that are generated at the same time, at most.
        chunk: prompt tokens fed between two steps of the others, at most; 2 or more.
        strict: batch only where a request's tokens are the same, bit for bit of the logits, as alone; without
            it batches are made wherever the graph takes them, and the answers say that they were.
    """

    max_queued_requests: int = 512
    max_queued_tokens: int = 1 << 20
    kv_memory: int = _GIB
    max_rows: int = 32
    chunk: int = 256
    strict: bool = True

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            found = getattr(self, name)
            if found < least:
                raise UsageError(f"{name} should be {least:,} or more, found {found:,}.")


_LEAST: Final[Mapping[str, int]] = {
    "max_queued_requests": 1,
    "max_queued_tokens": 1,
    "kv_memory": 1,
    "max_rows": 1,
    "chunk": 2,
}


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        prompt: token ids, int32 (T,); empty for what the model starts from by itself. For an encoder-decoder
            the source text.
        options: see `trimserve.generation.GenerationOptions`.
        top_logprobs: give each token's log-probability under the full vocab (see `TokenLogprob`) and those of
            so many likeliest ids; None for neither. Needs the cold head; not with beams.
        timeout: seconds after `submit` at which the request ends with what it has; None for no end.
    """

    prompt: Ids
    options: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int | None = None
    timeout: float | None = None
