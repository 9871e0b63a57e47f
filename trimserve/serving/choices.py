"""What chats and completions share: the way from a checked request to its answer, whole or as a stream."""

import contextlib
import functools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from trimserve.arrays import Ids
from trimserve.engine.events import Finished, Piece, Usage
from trimserve.engine.settings import GenerationRequest
from trimserve.errors import TrimserveError
from trimserve.serving.answers import Answer, Answers, collect
from trimserve.serving.fields import Sampling
from trimserve.serving.http import DONE, EventStream, event, json_response, unless_gone
from trimserve.serving.metrics import Metrics
from trimserve.serving.models import ServedModel
from trimserve.serving.problems import ApiError, as_api_error


class Choices(ABC):
    """The answer to one request: its choices, in the shape of one route.

    Attributes:
        object: of the whole answer.
        chunk_object: of an event of a stream.
        id_prefix: of the answer's id.
    """

    object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(
        self,
        served: ServedModel,
        fields: Sampling,
        prompts: Sequence[Ids],
        requests: Sequence[GenerationRequest],
    ) -> None:
        self.served = served
        self.fields = fields
        self.prompts = prompts
        self.requests = requests
        self._id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A finished choice."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice; None for none."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """A choice's part of an event; None where there is nothing to say."""

    @abstractmethod
    def ending(self, index: int, end: Finished) -> dict[str, Any]:
        """The last one, with its text's rest and the reason."""

    def prompt_of(self, index: int) -> Ids:
        """The prompt of a choice, token ids."""
        return self.prompts[index // self.fields.n]

    async def respond(
        self, request: Request, metrics: Metrics, closing: contextlib.AsyncExitStack
    ) -> Response:
        """Answer a request.

        Args:
            request: whose client may go.
            metrics: what was done is counted there.
            closing: what is given back at the end; a stream takes it over.
        """
        count = functools.partial(metrics.count_generation, self.served.name)
        answers = await closing.enter_async_context(Answers(self.served.engine, self.requests, count))
        headers = self._headers()
        if self.fields.stream:
            return EventStream(self._events(answers), headers, closing.pop_all())
        found = await unless_gone(request, collect(answers, len(self.requests)))
        return json_response(self._whole(found), headers=headers)

    def _headers(self) -> dict[str, str]:
        """What holds for the answer: the mode, and whether it is the same under any load."""
        strict = self.served.engine.metrics().strict
        plan = self.served.generator("generation").plan(self.requests[0].options)  # type: ignore[arg-type]
        return {"x-trimserve-mode": plan.mode, "x-trimserve-strict": str(strict).lower()}

    def _frame(self, object_: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_,
            "created": self._created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
        }

    def _whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [{"index": index, **self.choice(index, answer)} for index, answer in enumerate(answers)]
        usage = self._usage([answer.end.usage for answer in answers])
        return self._frame(self.object, choices) | {"usage": usage} | self._of_prompt()

    def _of_prompt(self) -> dict[str, Any]:
        """What `return_token_ids` adds to the answer itself."""
        return {}

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, whatever `n` is."""
        prompts = sum(usage.prompt_tokens for usage in usages[:: self.fields.n])
        cached = sum(usage.cached_tokens for usage in usages[:: self.fields.n])
        completion = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": completion,
            "total_tokens": prompts + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def _events(self, answers: Answers) -> AsyncIterator[bytes]:
        try:
            async for part in self._chunks(answers):
                yield event(part)
        except TrimserveError as error:  # the status has been sent: the stream says it
            yield event(as_api_error(error).body)
        except Exception as error:
            yield event(ApiError(500, f"the server failed: {type(error).__name__}.").body)
            raise
        yield DONE

    async def _chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        usages: dict[int, Usage] = {}
        for index in range(len(self.requests)):
            if (first := self.opening(index)) is not None:
                yield self._chunk(index, first)
        async for index, found in answers.events():
            if isinstance(found, Finished):
                usages[index] = found.usage
                yield self._chunk(index, self.ending(index, found))
            elif (made := self.chunk(index, found)) is not None:
                yield self._chunk(index, made)
        if self._includes_usage:
            usage = self._usage([usages[index] for index in sorted(usages)])
            yield self._frame(self.chunk_object, []) | {"usage": usage}

    def _chunk(self, index: int, made: dict[str, Any]) -> dict[str, Any]:
        found = self._frame(self.chunk_object, [{"index": index, **made}])
        return found | {"usage": None} if self._includes_usage else found

    @property
    def _includes_usage(self) -> bool:
        return self.fields.stream_options is not None and self.fields.stream_options.include_usage


def finish_reason(end: Finished) -> str:
    """OpenAI's word for what ended an answer."""
    return "length" if end.reason in ("length", "timeout") else "stop"
