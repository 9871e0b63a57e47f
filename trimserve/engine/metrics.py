"""What an engine has done and does: one snapshot, with vLLM's words where it has one."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """A snapshot. Counts are since the engine was opened.

    Attributes:
        running: requests at work, prompts included.
        waiting: requests in the queue.
        waiting_tokens: their prompt tokens.
        kv_used_bytes: keys and values of what runs.
        kv_bytes: buffers that are held for them, and for prompts that may come again.
        kv_limit_bytes: most that may be held.
        prompt_tokens: fed or reused.
        cached_tokens: of these reused.
        generation_tokens: produced.
        cold_tokens: tokens of prompts and outputs without a compact row.
        drafted: tokens drafted.
        accepted: accepted drafts.
        checked_steps: steps that exact mode checked.
        certified_steps: of these proven by the sketch.
        cold_bytes: read of the cold files by checks.
        decode_steps: runs of the graph for decoding.
        decode_rows: sequences in all of these; divided by `decode_steps` the mean batch.
        finished: requests by reason; "error" for those that failed.
        rejected: requests that the queue had no room for.
        strict: whether a request's tokens are those it has alone.
        batching: how sequences run together, and where they do not, why.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_used_bytes: int = 0
    kv_bytes: int = 0
    kv_limit_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    cold_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    checked_steps: int = 0
    certified_steps: int = 0
    cold_bytes: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    finished: Mapping[str, int] | None = None
    rejected: int = 0
    strict: bool = True
    batching: str = ""
