"""How a server behaves: what `trimserve serve` and `create_app` accept."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from trimserve.arguments import Count, Threads, kind_of, read_value
from trimserve.errors import UsageError
from trimserve.other_words import meant
from trimserve.runtime.session import MemoryUse

Seconds = Annotated[float, Meta(ge=0, le=1e6)]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        folders: name -> trimmed folder; clients choose among the names by the field `model`.
        device: where the models run.
        threads: CPU threads of one operator; by default the CPUs that the process may use.
        memory: see `loading.load`.
        keys: API keys, any of which opens every route but /health and /ready; none leaves all open.
        max_queue: requests of a model that may wait before the next one is answered with 429.
        max_queue_tokens: tokens of their prompts, likewise.
        max_tokens: of an answer, where neither the request nor the folder says it.
        max_inputs: texts of one request for embeddings, or documents to rank.
        max_body: bytes of a request; a longer one is answered with 413.
        shutdown_timeout: seconds that requests have to finish after SIGTERM.
        record_profile: file that counts of served token ids are added to; None records nothing.
        record_min_docs: requests that must hold an id before it is recorded.
        reload: open a folder again when it has been replaced.
    """

    folders: dict[str, Path]
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Threads | None = None
    memory: MemoryUse = "fast"
    keys: tuple[str, ...] = field(default=(), repr=False)
    max_queue: Count = 256
    max_queue_tokens: Count = 262_144
    max_tokens: Count = 1024
    max_inputs: Count = 2048
    max_body: Count = 16 << 20
    shutdown_timeout: Seconds = 30.0
    record_profile: Path | None = None
    record_min_docs: Count = 2
    reload: bool = True


def make_settings(**values: Any) -> ServerSettings:  # noqa: ANN401 - checked here
    """Settings, each checked against its annotation.

    Raises:
        UsageError: an unknown one, a wrong type or out of range.
    """
    kinds = get_type_hints(ServerSettings, include_extras=True)
    for name, value in values.items():
        if name not in kinds:
            raise UsageError(meant(name, kinds, "make_settings"))
        read_value(name, value, kind_of(kinds[name]))
    return ServerSettings(**values)
